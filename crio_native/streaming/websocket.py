"""WebSocket (by wsproto): remotecommand and port-forward as numbered channels, and SPDY inside messages.

A message of the channel protocols begins with its channel's number: a byte, or a digit where the rest is base64.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from wsproto import ConnectionType, events
from wsproto.connection import Connection, ConnectionState
from wsproto.handshake import H11Handshake
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from crio_native.streaming.http import Refused, Request
from crio_native.streaming.portforward import PROTOCOL as PORTFORWARD
from crio_native.streaming.remotecommand import Sink
from crio_native.streaming.wires import Buffer, Wire

V5 = "v5.channel.k8s.io"
COMMAND_PROTOCOLS = (
    V5,
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "",
)
TUNNEL = f"SPDY/3.1+{PORTFORWARD}"
CHANNELS = ("stdin", "stdout", "stderr", "error", "resize")
CLOSE = 255  # v5: the channel whose messages name one that the client ends
_MESSAGE_MAX = 1 << 20  # bytes of a base64 message, which is taken as a whole


class Messages:
    """A WebSocket connection that has been accepted."""

    def __init__(self, wire: Wire, rest: bytes) -> None:
        self._wire = wire
        self._connection = Connection(ConnectionType.SERVER, trailing_data=rest)
        self._buffer = Buffer()

    @property
    def used(self) -> float:
        return self._wire.used

    @used.setter
    def used(self, when: float) -> None:
        self._wire.used = when

    async def parts(self) -> AsyncIterator[tuple[bytes, bool]]:
        """(part of a message, whether that ends it), until the client has gone.

        Raises ConnectionAbortedError for what is not WebSocket, OSError.
        """
        try:
            while self._connection.state is not ConnectionState.CLOSED:
                for event in self._connection.events():
                    if isinstance(event, events.Message):
                        data = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
                        yield data, event.message_finished
                    elif isinstance(event, events.Ping):
                        await self._wire.send(self._connection.send(event.response()))
                    elif isinstance(event, events.CloseConnection):
                        await self._answer_close(event)
                        return
                received = await self._wire.receive(self._buffer)
                self._connection.receive_data(bytes(received) or None)
        except RemoteProtocolError as error:
            raise ConnectionAbortedError(f"the client does not speak WebSocket: {error}") from None

    async def _answer_close(self, event: events.CloseConnection) -> None:
        if self._connection.state is ConnectionState.REMOTE_CLOSING:
            await self._wire.send(self._connection.send(event.response()))

    async def send(self, *parts: bytes | memoryview, text: bool = False) -> None:
        """One message.  Raises OSError when the client has gone."""
        data = b"".join(parts)
        message = events.TextMessage(data=data.decode()) if text else events.BytesMessage(data=data)
        try:
            await self._wire.send(self._connection.send(message))
        except LocalProtocolError:
            raise BrokenPipeError("the client has closed the WebSocket") from None

    async def close(self) -> None:
        if self._connection.state is ConnectionState.OPEN:
            await self._wire.send(self._connection.send(events.CloseConnection(code=1000)))


async def accept(wire: Wire, request: Request, known: Sequence[str]) -> tuple[Messages, str]:
    """Agree on a protocol and switch to it.  Raises Refused."""
    handshake = H11Handshake(ConnectionType.SERVER)
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers]
    try:
        handshake.initiate_upgrade_connection(headers, request.path)
    except RemoteProtocolError as error:
        raise Refused(400, f"not a WebSocket request: {error}") from None
    offered = request.values("sec-websocket-protocol")
    chosen = next((protocol for protocol in offered or [""] if protocol in known), None)
    if chosen is None:
        names = ", ".join(filter(None, known))
        raise Refused(403, f"none of the protocols {', '.join(offered) or '(none)'} is known here; known are: {names}")
    await wire.send(handshake.send(events.AcceptConnection(subprotocol=chosen or None)))
    return Messages(wire, request.rest), chosen


class Tunnel:
    """Bytes inside binary messages, as a `sessions.Carrier`."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._parts = messages.parts()

    @property
    def used(self) -> float:
        return self._messages.used

    @used.setter
    def used(self, when: float) -> None:
        self._messages.used = when

    async def receive(self, buffer: Buffer) -> memoryview:
        async for data, _ in self._parts:
            if data:
                return memoryview(data)
        return memoryview(b"")

    async def send(self, *parts: bytes | memoryview) -> None:
        if any(parts):
            await self._messages.send(*parts)


class Channels:
    """A `remotecommand.Transport` of numbered channels.

    names: of the channels, by number.  protocol: as agreed; what contains "base64" is sent as text.
    """

    def __init__(self, messages: Messages, protocol: str, names: Mapping[int, str]) -> None:
        self._messages = messages
        self._base64 = "base64" in protocol
        self._closes = protocol == V5
        self._names = names
        self._numbers = {name: number for number, name in names.items()}

    async def ready(self) -> None:
        """All channels exist at once."""

    async def begun(self) -> None:
        first = next((name for name in ("stdout", "stderr") if name in self._numbers), "error")
        await self.send(first, memoryview(b""))

    async def run(self, sink: Sink) -> None:
        channel: int | None = None  # of the message under way
        async for part, last in self._whole() if self._base64 else self._messages.parts():
            data = memoryview(part)
            if channel is None and data:
                channel, data = data[0], data[1:]
            if channel == CLOSE and self._closes:
                for number in data:
                    await self._end(sink, number)
            elif data and channel is not None and channel in self._names:
                self._messages.used = time.monotonic()
                await sink.data(self._names[channel], data)
            if last:
                channel = None

    async def _end(self, sink: Sink, number: int) -> None:
        if number in self._names:
            await sink.ended(self._names[number])

    async def _whole(self) -> AsyncIterator[tuple[bytes, bool]]:
        """Base64 messages, decoded, with the channel's digit as a byte."""
        message = b""
        async for part, last in self._messages.parts():
            message += part
            if len(message) > _MESSAGE_MAX:
                raise ConnectionAbortedError(f"a base64 message of more than {_MESSAGE_MAX} bytes")
            if last and message:
                try:
                    yield bytes([message[0] - ord("0") & 0xFF]) + base64.b64decode(message[1:], validate=True), True
                except binascii.Error as error:
                    raise ConnectionAbortedError(f"a message that is not base64: {error}") from None
                message = b""

    async def send(self, name: str, data: memoryview) -> None:
        self._messages.used = time.monotonic()
        number = self._numbers[name]
        if self._base64:
            await self._messages.send(b"%d" % number, base64.b64encode(data), text=True)
        else:
            await self._messages.send(bytes([number]), data)

    async def end(self) -> None:
        await self._messages.close()
