"""A SPDY connection on the event loop: events go to a handler, one after the other.

While the handler waits nothing more is read, so that a sink that is full holds the client back.
"""

from __future__ import annotations

import time
from typing import Protocol

from crio_native.streaming import spdy
from crio_native.streaming.wires import Buffer


class Carrier(Protocol):
    """What a session needs of the connection below: a `wires.Wire`, or a tunnel through WebSocket messages."""

    used: float

    async def receive(self, buffer: Buffer) -> memoryview: ...

    async def send(self, *parts: bytes | memoryview) -> None: ...


class Handler(Protocol):
    async def opened(self, stream: int, headers: dict[str, str]) -> None:
        """The client opened a stream, and has been told that we accept it."""

    async def data(self, stream: int, data: memoryview) -> None:
        """The view is good until this returns."""

    async def ended(self, stream: int) -> None: ...

    async def reset(self, stream: int) -> None: ...


class Session:
    """The server's side of a connection."""

    def __init__(self, carrier: Carrier, rest: bytes = b"") -> None:
        """rest: bytes that came with the request that opened the connection."""
        self._carrier = carrier
        self._spdy = spdy.Connection(client=False)
        self._rest = rest

    async def run(self, handler: Handler) -> None:
        """Until the client has gone.  Raises spdy.ProtocolError, OSError."""
        buffer = Buffer()
        await self._take(memoryview(self._rest), handler)
        while data := await self._carrier.receive(buffer):
            await self._take(data, handler)

    async def _take(self, data: memoryview, handler: Handler) -> None:
        for event in self._spdy.receive(data):
            match event:
                case spdy.Data(stream, part):
                    self._carrier.used = time.monotonic()
                    await handler.data(stream, part)
                case spdy.Opened(stream, headers):
                    await self._carrier.send(self._spdy.reply(stream))
                    await handler.opened(stream, dict(headers))
                case spdy.Ended(stream):
                    await handler.ended(stream)
                case spdy.Reset(stream, _):
                    await handler.reset(stream)
                case spdy.Answer(answer):
                    await self._carrier.send(answer)

    async def send(self, stream: int, data: memoryview) -> None:
        """Raises BrokenPipeError when the client has reset the stream, OSError when it has gone."""
        if not self._spdy.may_send(stream):
            raise BrokenPipeError("the client has closed the stream")
        self._carrier.used = time.monotonic()
        await self._carrier.send(self._spdy.data(stream, len(data)), data)

    async def end(self, stream: int) -> None:
        await self._carrier.send(self._spdy.end(stream))

    async def reset(self, stream: int) -> None:
        await self._carrier.send(self._spdy.reset(stream))
