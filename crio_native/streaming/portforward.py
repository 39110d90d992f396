"""Connections into a pod: the portforward protocol over SPDY, and the older one of WebSocket channels.

The sockets come from the pod's network namespace already (`Dial`); connecting them and moving bytes is done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass

from crio_native.errors import CrioError, InvalidArgument, Unavailable
from crio_native.streaming.sessions import Session
from crio_native.streaming.wires import Buffer, read, write

log = logging.getLogger(__name__)

PROTOCOL = "portforward.k8s.io"
PAIR_SECONDS = 30.0  # between the two streams of a connection
CONNECT_SECONDS = 10.0
_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}

Dial = Callable[[], Sequence[socket.socket]]
"""Unconnected TCP sockets of the pod's network namespace, one a family; blocks; raises CrioError."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What a port-forward URL stands for.  numbers: the request's ports, which only WebSocket channels need."""

    numbers: Sequence[int]
    dial: Dial


async def connect(dial: Dial, port: int) -> socket.socket:
    """A connection to the port on the pod's loopback, by IPv4 or else IPv6.  Raises CrioError."""
    refusals = []
    sockets = await asyncio.to_thread(dial)
    connected: socket.socket | None = None
    try:
        for sock in sockets:
            sock.setblocking(False)
            address = _LOOPBACK[socket.AddressFamily(sock.family)]
            try:
                async with asyncio.timeout(CONNECT_SECONDS):  # wait_for may lose a cancellation, until Python 3.12
                    await asyncio.get_running_loop().sock_connect(sock, (address, port))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connected = sock
                return connected
            except TimeoutError:
                refusals.append(f"{address}: no answer within {CONNECT_SECONDS:g} s")
            except OSError as error:
                refusals.append(f"{address}: {os.strerror(error.errno or 0).lower()}")
    finally:
        for sock in sockets:
            if sock is not connected:
                sock.close()
    raise Unavailable(f"cannot connect to port {port} in the pod: {'; '.join(refusals)}")


def parse_port(text: str) -> int:
    """Raises InvalidArgument."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= 65535):
        raise InvalidArgument("port", text, "must be 1 to 65535")
    return int(text)


class Connection:
    """One connection into the pod, from the moment that it is asked for."""

    def __init__(self, ports: Ports, port: int) -> None:
        self._ports, self.port = ports, port
        self._socket: asyncio.Future[socket.socket | None] = asyncio.get_running_loop().create_future()
        self._writing = asyncio.Lock()
        self._client_ended = asyncio.Event()

    async def run(self, send: Callable[[memoryview], Awaitable[None]]) -> None:
        """Connect, and pass on what the pod sends, to its end.  Raises CrioError, OSError."""
        try:
            sock = await connect(self._ports.dial, self.port)
        except BaseException:
            self._socket.set_result(None)
            raise
        self._socket.set_result(sock)
        buffer = Buffer()
        while data := await read(sock.fileno(), buffer):
            await send(data)
            await asyncio.sleep(0)

    async def write(self, data: memoryview) -> None:
        """To the pod; waits until it is connected.  What the pod does not take any more is dropped."""
        async with self._writing:
            sock = await asyncio.shield(self._socket)
            if sock is not None:
                with contextlib.suppress(OSError):
                    await write(sock.fileno(), data)

    async def end(self) -> None:
        """The client sends no more; what the pod sends still reaches it."""
        sock = await asyncio.shield(self._socket)
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        self._client_ended.set()

    async def client_ended(self) -> None:
        await self._client_ended.wait()

    async def close(self) -> None:
        sock = self._socket.result() if self._socket.done() else None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # a `write` that waits for the pod fails now
            async with self._writing:
                sock.close()


class Forwarder:
    """The portforward protocol: for each connection a pair of streams, `error` and `data`, that name each other by
    the header `requestid` (or, from old clients, by following each other)."""

    def __init__(self, session: Session, ports: Ports) -> None:
        self._session = session
        self._ports = ports
        self._waiting: dict[str, dict[str, int]] = {}  # request id -> stream number by type
        self._connections: dict[int, Connection] = {}  # by data stream
        self._tasks: dict[int, asyncio.Future[None]] = {}  # by data stream

    async def run(self) -> None:
        """Until the client has gone; then its connections end.  Raises spdy.ProtocolError, OSError."""
        try:
            await self._session.run(self)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def opened(self, stream: int, headers: dict[str, str]) -> None:
        kind = headers.get("streamtype", "")
        pair = headers.get("requestid") or str(stream - 2 if kind == "data" else stream)
        streams = self._waiting.get(pair, {})
        if kind not in ("error", "data") or kind in streams:
            await self._session.reset(stream)
            return
        streams[kind] = stream
        if len(streams) == 1:
            self._waiting[pair] = streams
            asyncio.get_running_loop().call_later(PAIR_SECONDS, self._give_up, pair, streams)
            return
        del self._waiting[pair]
        data, error = streams["data"], streams["error"]
        try:
            connection = Connection(self._ports, parse_port(headers.get("port", "")))
        except InvalidArgument as refusal:
            await self._refuse(data, error, str(refusal))
            return
        self._connections[data] = connection
        self._begin(data, self._forward(connection, data, error))

    def _begin(self, stream: int, work: Coroutine[None, None, None]) -> None:
        self._tasks[stream] = task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._forget(stream))

    def _forget(self, stream: int) -> None:
        """Also of a task that was cancelled before it began."""
        self._tasks.pop(stream, None)
        self._connections.pop(stream, None)

    def _give_up(self, pair: str, streams: dict[str, int]) -> None:
        if self._waiting.get(pair) is streams:
            del self._waiting[pair]
            for stream in streams.values():
                self._begin(stream, self._reset_quietly(stream))

    async def _reset_quietly(self, *streams: int) -> None:
        with contextlib.suppress(OSError):
            for stream in streams:
                await self._session.reset(stream)

    async def _forward(self, connection: Connection, data: int, error: int) -> None:
        try:
            await connection.run(lambda part: self._session.send(data, part))
            await self._session.end(data)
            await self._session.end(error)  # clients wait for that before they end their side
            await connection.client_ended()
        except CrioError as failure:
            await self._refuse(data, error, str(failure))
        except OSError as failure:
            await self._refuse(
                data, error, f"the connection to port {connection.port} in the pod broke: {failure.strerror}"
            )
        finally:
            await connection.close()

    async def _refuse(self, data: int, error: int, text: str) -> None:
        log.info("port-forward: %s", text)
        with contextlib.suppress(OSError):
            await self._session.send(error, memoryview(text.encode()))
            await self._session.end(error)
            await self._session.reset(data)

    async def data(self, stream: int, data: memoryview) -> None:
        if stream in self._connections:
            await self._connections[stream].write(data)

    async def ended(self, stream: int) -> None:
        if stream in self._connections:
            await self._connections[stream].end()

    async def reset(self, stream: int) -> None:
        if stream in self._tasks:
            self._tasks[stream].cancel()
