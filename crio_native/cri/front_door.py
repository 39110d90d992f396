"""The CRI socket that the world connects to: gRPC and HTTP/1.1 on one path.

cAdvisor asks HTTP on the very socket where the kubelet speaks gRPC.  gRPC for Python takes no connection that somebody
else has accepted, so it listens on a socket of its own in a directory that only root can enter, and connections that
begin as HTTP/2 does are relayed to it, byte by byte, on the event loop: about 0.1 ms a call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat

from crio_native.cri import http
from crio_native.errors import AlreadyExists, Internal
from crio_native.streaming.reception import Reception

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 1024
STRANGERS_MAX = 128  # connections that have not said a word yet, or ask nothing of HTTP any more
DECIDE_SECONDS = 10.0  # for a client to say its first bytes
_PREFACE = b"PRI "  # of "PRI * HTTP/2.0"; no method of HTTP/1.1 begins so
_CHUNK = 256 << 10
_BACKLOG = 128


class FrontDoor:
    """path: the public socket.  behind: gRPC's own.  route: what HTTP asks."""

    def __init__(self, path: str, behind: str, route: http.Route) -> None:
        self._path, self._behind, self._route = path, behind, route
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        whose = "clients of the CRI socket"
        self._reception = Reception(whose, self._welcome, most=CONNECTIONS_MAX, strangers=STRANGERS_MAX)
        self._relays: set[Relay] = set()

    def claim(self) -> None:
        """Take the path; nobody is served yet.  Raises AlreadyExists when a live server has it."""
        claim_socket(self._path, "crio.api.listen")
        self._listener.bind(self._path)
        os.chmod(self._path, 0o660)

    def open(self) -> None:
        """Serve."""
        self._listener.listen(_BACKLOG)
        self._reception.open(self._listener)

    def close(self) -> None:
        """Take no new connection; those that there are go on until gRPC, or `hang_up`, ends them."""
        self._reception.close(self._listener)
        self._listener.close()
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass

    def hang_up(self) -> None:
        """End every connection."""
        self._reception.hang_up()
        for relay in list(self._relays):
            relay.close()

    async def _welcome(self, client: socket.socket) -> None:
        first = b""
        try:
            async with asyncio.timeout(DECIDE_SECONDS):
                first = await _first_bytes(client)
        except (OSError, TimeoutError):
            pass  # it has gone, or never says a word
        finally:
            if not first:
                client.close()
        if first == _PREFACE:
            self._relay(client)
        elif first:
            await http.serve(client, self._route, self._reception)

    def _relay(self, client: socket.socket) -> None:
        if len(self._relays) >= CONNECTIONS_MAX:
            log.warning("the CRI socket has %d connections; another one is refused", CONNECTIONS_MAX)
            client.close()
            return
        try:
            server = _connected(self._behind)
        except OSError as error:
            log.error("a connection cannot be relayed to %s: %s", self._behind, error.strerror)
            client.close()
            return
        self._relays.add(Relay(client, server, self._relays.discard))


def _connected(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        server.setblocking(False)
        server.connect(path)
    except OSError:
        server.close()
        raise
    return server


async def _first_bytes(client: socket.socket) -> bytes:
    """The first four, which stay to be read; fewer from a client that says no more."""
    while True:
        await _readable(client)
        seen = client.recv(len(_PREFACE), socket.MSG_PEEK)
        if len(seen) == len(_PREFACE) or not seen or not _PREFACE.startswith(seen):
            return seen
        await asyncio.sleep(0.01)  # the rest of the word is on its way, and what was only looked at stays readable


async def _readable(client: socket.socket) -> None:
    loop, said = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(client, said.set)
    try:
        await said.wait()
    finally:
        loop.remove_reader(client)


class Relay:
    """Two sockets, each given what the other says.  Callbacks rather than coroutines: every call passes here twice."""

    def __init__(self, client: socket.socket, server: socket.socket, done: object) -> None:
        self._loop = asyncio.get_running_loop()
        self._done = done
        self._open = 2
        self._ends = client, server
        self._pump(client, server)
        self._pump(server, client)

    def close(self) -> None:
        if self._open < 0:
            return
        self._open = -1
        for end in self._ends:
            self._loop.remove_reader(end)
            self._loop.remove_writer(end)
            end.close()
        self._done(self)  # type: ignore[operator]

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Forward what can be read; where the sink is full, read no more until it takes the rest."""

        def forward() -> None:
            try:
                data = source.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            if not data:
                self._ended(source, sink)
                return
            push(data)

        def push(data: bytes) -> None:
            try:
                sent = sink.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            if sent < len(data):
                self._loop.remove_reader(source)
                self._loop.add_writer(sink, retry, data[sent:])

        def retry(data: bytes) -> None:
            self._loop.remove_writer(sink)
            self._loop.add_reader(source, forward)
            push(data)

        self._loop.add_reader(source, forward)

    def _ended(self, source: socket.socket, sink: socket.socket) -> None:
        """One direction is over; the other may go on."""
        self._loop.remove_reader(source)
        self._open -= 1
        if self._open == 0:
            self.close()
            return
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()


def claim_socket(path: str, setting: str) -> None:
    """Make the socket's directory and clear a stale socket away.

    setting: what an operator changes to have it elsewhere.  Raises AlreadyExists when somebody serves it, or when the
    path is something else than a socket.
    """
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if len(os.fsencode(path)) > 107:  # sun_path
        raise Internal(f"the socket path {path} is longer than 107 bytes; set {setting} to a shorter one")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AlreadyExists(f"{path} exists and is no socket; remove it or change {setting}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            os.unlink(path)
            return
        except OSError:
            pass  # alive, if slow
    raise AlreadyExists(f"a server is already listening on {path}; stop it or change {setting}")
