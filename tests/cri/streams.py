"""Clients of the streaming server for tests: SPDY by crioctl's own connection, WebSocket by wsproto."""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection, events

from crio_native.cli.ctl.streams import COMMAND, FORWARD, Link
from crio_native.streaming import spdy

from .conftest import Client


def exec_url(cri: Client, container: str, *command: str, **flags: bool) -> str:
    """By default with stdout and stderr."""
    flags = {"stdout": True, "stderr": not flags.get("tty"), **flags}
    return str(cri.call("Exec", container_id=container, cmd=list(command), **flags).url)


def attach_url(cri: Client, container: str, **flags: bool) -> str:
    flags = {"stdout": True, "stderr": not flags.get("tty"), **flags}
    return str(cri.call("Attach", container_id=container, **flags).url)


class Spdy:
    """A remotecommand session over SPDY.  `output`: what came, by stream name; `ended`: the streams that did."""

    def __init__(self, url: str, *names: str, protocol: str = COMMAND) -> None:
        self.link = Link(url, protocol)
        self.numbers = {name: self.link.open({"streamtype": name}) for name in ("error", *names)}
        self.output: dict[str, bytearray] = defaultdict(bytearray)
        self.ended: set[str] = set()
        self.reset: set[str] = set()
        self._names = {number: name for name, number in self.numbers.items()}
        self._events = self.link.events()

    def send(self, name: str, data: bytes) -> None:
        self.link.send(self.numbers[name], data)

    def end(self, name: str = "stdin") -> None:
        self.link.end(self.numbers[name])

    def until(self, condition: Callable[[], Any]) -> None:
        """Read until the condition holds; the connection's end makes that an error."""
        while not condition():
            event = next(self._events, None)
            assert event is not None, f"the session ended: {dict(self.output)}"
            self._take(event)

    def rest(self) -> dict[str, Any]:
        """Read to the end of the connection; the status object."""
        for event in self._events:
            self._take(event)
        self.link.close()
        return json.loads(self.output["error"]) if self.output["error"].startswith(b"{") else {}

    def _take(self, event: spdy.Event) -> None:
        name = self._names.get(getattr(event, "stream", 0), "?")
        if isinstance(event, spdy.Data):
            self.output[name] += event.data
        elif isinstance(event, spdy.Ended):
            self.ended.add(name)
        elif isinstance(event, spdy.Reset):
            self.reset.add(name)


def exit_code(status: dict[str, Any]) -> int:
    if status["status"] == "Success":
        return 0
    assert status["reason"] == "NonZeroExitCode", status
    return int(status["details"]["causes"][0]["message"])


class WebSocket:
    """Messages by channel."""

    def __init__(self, url: str, *protocols: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), 10)
        self._connection = WSConnection(ConnectionType.CLIENT)
        request = events.Request(host=parts.netloc, target=parts.path, subprotocols=list(protocols))
        self.socket.sendall(self._connection.send(request))
        self.messages: list[bytes] = []
        self.refusal = 0
        self.protocol: str | None = None
        self.closed = False
        self._partial = b""
        self.until(lambda: self.protocol is not None or self.refusal)

    def send(self, channel: int, data: bytes) -> None:
        self.socket.sendall(self._connection.send(events.BytesMessage(data=bytes([channel]) + data)))

    def send_text(self, text: str) -> None:
        self.socket.sendall(self._connection.send(events.TextMessage(data=text)))

    def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            assert not self.closed, f"closed; got {self.messages}"
            data = self.socket.recv(65536)
            self._connection.receive_data(data or None)
            for event in self._connection.events():
                self._take(event)

    def rest(self) -> None:
        """Read to the end."""
        self.until(lambda: self.closed)
        self.socket.close()

    def _take(self, event: Any) -> None:
        if isinstance(event, events.AcceptConnection):
            self.protocol = event.subprotocol or ""
        elif isinstance(event, events.RejectConnection):
            self.refusal, self.closed = event.status_code, True
        elif isinstance(event, events.Message):
            self._partial += event.data.encode() if isinstance(event.data, str) else event.data
            if event.message_finished:
                self.messages.append(self._partial)
                self._partial = b""
        elif isinstance(event, events.Ping):
            self.socket.sendall(self._connection.send(event.response()))
        elif isinstance(event, events.CloseConnection):
            self.closed = True

    def channel(self, number: int) -> bytes:
        return b"".join(message[1:] for message in self.messages if message[:1] == bytes([number]))


class Forward:
    """A port-forward connection over SPDY, with one pair of streams for each `open`."""

    def __init__(self, cri: Client, pod: str) -> None:
        self.link = Link(cri.call("PortForward", pod_sandbox_id=pod).url, FORWARD)
        self.output: dict[int, bytearray] = defaultdict(bytearray)
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self._events = self.link.events()
        self._requests = 0

    def open(self, port: object, **headers: str) -> tuple[int, int]:
        """(data stream, error stream)."""
        self._requests += 1
        headers = {"port": str(port), "requestid": str(self._requests), **headers}
        error = self.link.open({**headers, "streamtype": "error"})
        return self.link.open({**headers, "streamtype": "data"}), error

    def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            event = next(self._events, None)
            assert event is not None, "the connection ended"
            stream = getattr(event, "stream", 0)
            if isinstance(event, spdy.Data):
                self.output[stream] += event.data
            elif isinstance(event, spdy.Ended):
                self.ended.add(stream)
            elif isinstance(event, spdy.Reset):
                self.reset.add(stream)


def http_get(url: str, headers: str = "Connection: close", method: str = "GET") -> bytes:
    """The answer to a plain request, to the connection's end."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), 10) as sock:
        sock.sendall(f"{method} {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{headers}\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer
