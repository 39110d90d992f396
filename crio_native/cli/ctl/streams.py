"""Interactive sessions: the client's side of the URLs that Exec, Attach and PortForward answer, over SPDY/3.1.

Every CRI runtime speaks that, and in it an input has an end, which WebSocket's v4 lacks.  One thread reads what the
runtime sends, another what people type: neither can hold the other up.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
import ssl
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

from crio_native.errors import CrioError, Unavailable
from crio_native.streaming import spdy

COMMAND, FORWARD = "v4.channel.k8s.io", "portforward.k8s.io"
CONNECT_SECONDS = 10.0
_CHUNK = 256 * 1024
_STATUS_MAX = 64 * 1024
_DONE = object()


class CommandFailed(CrioError):
    """The runtime's words for a session that did not end by the command's own exit."""


class Link:
    """A connection to a streaming URL, upgraded to SPDY.

    Raises Unavailable when the runtime cannot be reached there or does not agree.  Sending is safe for any thread.
    """

    def __init__(self, url: str, protocol: str) -> None:
        self._socket = _connect(url)
        try:
            self._early = _upgrade(self._socket, url, protocol)
        except BaseException:
            self._socket.close()
            raise
        self._spdy = spdy.Connection(client=True)
        self._lock = threading.Lock()

    def open(self, headers: dict[str, str]) -> int:
        with self._lock:
            stream, frame = self._spdy.open(headers)
            self._socket.sendall(frame)
        return stream

    def send(self, stream: int, data: bytes | memoryview) -> None:
        with self._lock:
            if self._spdy.may_send(stream):
                self._socket.sendall(self._spdy.data(stream, len(data)))
                self._socket.sendall(data)

    def end(self, stream: int) -> None:
        with self._lock:
            self._socket.sendall(self._spdy.end(stream))

    def reset(self, stream: int) -> None:
        with self._lock:
            self._socket.sendall(self._spdy.reset(stream))

    def events(self) -> Iterator[spdy.Event]:
        """What the runtime sends, to its end.  Raises Unavailable for what is not SPDY."""
        try:
            yield from self._take(memoryview(self._early))
            buffer = memoryview(bytearray(_CHUNK))
            while count := self._receive(buffer):
                yield from self._take(buffer[:count])
        except spdy.ProtocolError as error:
            raise Unavailable(f"the runtime does not speak SPDY/3.1: {error}") from None
        except OSError:
            return  # closed, by them or by us

    def _receive(self, buffer: memoryview) -> int:
        if not isinstance(self._socket, ssl.SSLSocket):
            return self._socket.recv_into(buffer)
        if not self._socket.pending():
            select.select([self._socket], [], [])
        with self._lock:  # a TLS connection must not be read and written at once
            return self._socket.recv_into(buffer)

    def _take(self, data: memoryview) -> Iterator[spdy.Event]:
        for event in self._spdy.receive(data):
            if isinstance(event, spdy.Answer):
                with self._lock:
                    self._socket.sendall(event.data)
            else:
                yield event

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads
        except OSError:
            pass
        self._socket.close()


def _connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        sock = socket.create_connection((host, port), CONNECT_SECONDS)
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise Unavailable(
            f"the streaming server at {host}:{port} has a certificate that is not trusted here "
            f"({error.verify_message}); name its authority's file in the variable SSL_CERT_FILE"
        ) from None
    except OSError as error:
        raise Unavailable(f"cannot reach the streaming server at {host}:{port}: {error.strerror or error}") from None
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _upgrade(sock: socket.socket, url: str, protocol: str) -> bytes:
    """What came behind the answer already."""
    parts = urlsplit(url)
    http = h11.Connection(h11.CLIENT)
    headers = [
        ("Host", parts.netloc),
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", protocol),
        ("Content-Length", "0"),
    ]
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    sock.sendall(http.send(h11.Request(method="POST", target=target, headers=headers)) or b"")
    sock.sendall(http.send(h11.EndOfMessage()) or b"")
    body = b""
    try:
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(sock.recv(65536))
            elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                return http.trailing_data[0]
            elif isinstance(event, h11.Data):
                body += event.data[:_STATUS_MAX]
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                text = " ".join(body.decode(errors="replace").split()) or "no reason given"
                raise Unavailable(f"the streaming server refused the session: {text}")
    except h11.RemoteProtocolError as error:
        raise Unavailable(f"the streaming server at {parts.netloc} does not speak HTTP: {error}") from None


@dataclass(frozen=True, slots=True)
class Streams:
    """What of our own standard streams takes part.  terminal: the command has a terminal, ours becomes raw."""

    stdin: bool
    terminal: bool


class Command:
    """An exec or attach session between a URL and our own standard streams."""

    def __init__(self, url: str, streams: Streams) -> None:
        self._link = Link(url, COMMAND)
        self._streams = streams
        names = ["error", *(["stdin"] if streams.stdin else []), "stdout"]
        names += ["resize"] if streams.terminal else ["stderr"]
        self._numbers = {name: self._link.open({"streamtype": name}) for name in names}
        self._status = b""
        self._events = self._link.events()
        self._first: spdy.Event | None = None
        self._sizes: queue.SimpleQueue[object] = queue.SimpleQueue()

    def await_start(self) -> None:
        """Until the runtime sends what belongs to the session, which our own does when its command runs."""
        for event in self._events:
            if isinstance(event, (spdy.Data, spdy.Ended)) and event.stream != self._numbers["error"]:
                self._first = event
                return
            if isinstance(event, spdy.Data):
                self._status += bytes(event.data)
                return

    def run(self) -> int:
        """Until the session ends; the command's exit code, 0 for an attachment.  Raises CommandFailed, Unavailable."""
        with self._raw_terminal():
            if self._streams.stdin:
                threading.Thread(target=self._send_input, daemon=True).start()
            try:
                if self._first is not None:
                    self._take(self._first)
                for event in self._events:
                    self._take(event)
            finally:
                self._link.close()
        return self._result()

    def _take(self, event: spdy.Event) -> None:
        if not isinstance(event, spdy.Data):
            return
        if event.stream == self._numbers["error"]:
            self._status += bytes(event.data[: _STATUS_MAX - len(self._status)])
            return
        to = sys.stderr if event.stream == self._numbers.get("stderr") else sys.stdout
        to.buffer.write(event.data)
        to.buffer.flush()

    def _send_input(self) -> None:
        try:
            while data := os.read(0, 65536):
                self._link.send(self._numbers["stdin"], data)
            self._link.end(self._numbers["stdin"])
        except OSError:
            pass  # the session has ended

    def _result(self) -> int:
        try:
            status = json.loads(self._status)
        except ValueError:
            text = self._status.decode(errors="replace").strip()
            raise Unavailable(text or "the session ended without the runtime saying how") from None
        if status.get("status") == "Success":
            return 0
        for cause in (status.get("details") or {}).get("causes") or []:
            if cause.get("reason") == "ExitCode":
                return int(cause["message"])
        raise CommandFailed(str(status.get("message") or status))

    @contextmanager
    def _raw_terminal(self) -> Iterator[None]:
        """With a terminal: keys go to the command as they are typed, and our window's size with them."""
        if not self._streams.terminal:
            yield
            return
        before = termios.tcgetattr(0) if self._streams.stdin and os.isatty(0) else None
        threading.Thread(target=self._send_sizes, daemon=True).start()
        previous = signal.signal(signal.SIGWINCH, lambda *_: self._sizes.put(None))
        self._sizes.put(None)
        try:
            if before is not None:
                tty.setraw(0)
            yield
        finally:
            signal.signal(signal.SIGWINCH, previous)
            self._sizes.put(_DONE)
            if before is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, before)

    def _send_sizes(self) -> None:
        """In a thread: a signal's handler must not wait for a connection."""
        while self._sizes.get() is not _DONE:
            try:
                size = os.get_terminal_size(1 if os.isatty(1) else 0)
                text = json.dumps({"Width": size.columns, "Height": size.lines})
                self._link.send(self._numbers["resize"], text.encode())
            except OSError:
                pass  # no terminal of ours, or the session has ended


class Forwarding:
    """One URL's port-forwards: connections that we accept become pairs of streams."""

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        self._link = Link(url, FORWARD)
        self._tell = tell
        self._lock = threading.Lock()
        self._requests = 0
        self._sockets: dict[int, socket.socket] = {}  # by data stream
        self._half: set[int] = set()  # data streams of which one side has ended
        self._errors: dict[int, int] = {}  # error stream -> port

    def serve(self, listeners: Sequence[tuple[socket.socket, int]]) -> None:
        """Accept on each listener for its port in the pod, until the runtime ends the connection (Unavailable)."""
        for listener, port in listeners:
            threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()
        try:
            for event in self._link.events():
                self._take(event)
        finally:
            self._link.close()
        raise Unavailable("the runtime has closed the connection")

    def _accept(self, listener: socket.socket, port: int) -> None:
        while True:
            try:
                sock, _ = listener.accept()
                self._begin(sock, port)
            except OSError:
                return  # our end

    def _begin(self, sock: socket.socket, port: int) -> None:
        with self._lock:
            self._requests += 1
            headers = {"port": str(port), "requestid": str(self._requests)}
            error = self._link.open({**headers, "streamtype": "error"})
            self._link.end(error)
            data = self._link.open({**headers, "streamtype": "data"})
            self._errors[error] = port
            self._sockets[data] = sock
        threading.Thread(target=self._send, args=(data, sock), daemon=True).start()

    def _send(self, stream: int, sock: socket.socket) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        try:
            while count := sock.recv_into(buffer):
                self._link.send(stream, buffer[:count])
            self._link.end(stream)
            self._side_ended(stream)
        except OSError:
            try:
                self._link.reset(stream)
            except OSError:
                pass  # the runtime has gone

    def _side_ended(self, stream: int) -> None:
        """After both sides the connection is closed."""
        with self._lock:
            if stream not in self._half:
                self._half.add(stream)
                return
            self._half.discard(stream)
            sock = self._sockets.pop(stream, None)
        if sock is not None:
            sock.close()

    def _take(self, event: Any) -> None:
        if isinstance(event, spdy.Data) and event.stream in self._errors:
            self._tell(f"port {self._errors[event.stream]}: {bytes(event.data).decode(errors='replace')}")
        elif isinstance(event, spdy.Ended):
            self._errors.pop(event.stream, None)
        sock = self._sockets.get(getattr(event, "stream", 0))
        if sock is None:
            return
        try:
            if isinstance(event, spdy.Data):
                sock.sendall(event.data)
            elif isinstance(event, spdy.Ended):
                sock.shutdown(socket.SHUT_WR)
                self._side_ended(event.stream)
            elif isinstance(event, spdy.Reset):
                sock.shutdown(socket.SHUT_RDWR)  # also ends the thread that reads it
                self._side_ended(event.stream)
        except OSError:
            self._link.reset(event.stream)
