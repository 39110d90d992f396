"""HTTP/2, the server's side of one connection, without I/O (RFC 9113): bytes in, requests out, answers in, bytes out.

What a gRPC server needs and no more: a request is told when it is whole, its body bounded; an answer is headers, data
as fast as the client's windows permit, and trailers.  Names and values of headers are `hpack`'s work; what they mean is
`rpc`'s.  Nothing is pushed, and priorities are not heeded.

Everything that a client makes us keep is bounded: streams, the size of a body and of headers, the frames that headers
come in (CVE-2024-27316).  Streams that are opened and reset cost their client as much as us (CVE-2023-44487): `rpc`
counts the work that still runs, not the streams that are open.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS_MAX = 64 << 10  # bytes of a request's headers, packed and unpacked
STREAMS_MAX = 1024
_CONTINUATIONS_MAX = 32
_FRAME_MAX = 16384  # bytes of a payload: what both sides accept unless they say otherwise
_WINDOW = 65535  # bytes: what every window begins with
_WINDOW_MAX = 2**31 - 1
_CREDIT_AFTER = 1 << 20  # bytes of bodies that were read before the client is told that it may send as many more
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY, _ACK = 0x1, 0x4, 0x8, 0x20, 0x1

# It tells the log of every integer that it decodes.
logging.getLogger("hpack").setLevel(logging.WARNING)


class Kind(IntEnum):
    """Of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class ErrorCode(IntEnum):
    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Setting(IntEnum):
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ConnectionFailed(Exception):
    """The client broke the protocol; nothing more can be said on this connection but why."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Request:
    """body: None for one beyond its bound, of which nothing was kept."""

    stream: int
    headers: dict[bytes, bytes]
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Reset:
    """The client does not want the answer any more."""

    stream: int


Event = Request | Reset


@dataclass(slots=True)
class _Stream:
    """window: bytes that its client takes now.  unsent: the rest of the answer; trailers: what ends it, when known."""

    window: int
    headers: dict[bytes, bytes]
    body: list[bytes] = field(default_factory=list)
    size: int = 0
    whole: bool = False
    unsent: deque[memoryview] = field(default_factory=deque)
    trailers: bytes = b""


class Connection:
    """One client.  After every call, `take` has what is to be sent."""

    def __init__(self, *, body_max: int) -> None:
        """body_max: bytes of a request's body."""
        self._body_max = body_max
        self._out: list[bytes | memoryview] = []
        self._in = b""
        self._greeted = False
        self._decoder = hpack.Decoder(max_header_list_size=HEADERS_MAX)
        self._block: tuple[int, int, list[bytes]] | None = None  # headers under way: stream, flags, what came
        self._streams: dict[int, _Stream] = {}
        self._last = 0  # the highest stream that the client has opened
        self._closing = False
        self._window, self._initial, self._frame_max = _WINDOW, _WINDOW, _FRAME_MAX
        self._read = 0
        # A body has a bound of its own, so its stream needs no second one.
        ours = (
            (Setting.MAX_CONCURRENT_STREAMS, STREAMS_MAX),
            (Setting.INITIAL_WINDOW_SIZE, _WINDOW_MAX),
            (Setting.MAX_HEADER_LIST_SIZE, HEADERS_MAX),
        )
        self._send(Kind.SETTINGS, 0, 0, b"".join(k.to_bytes(2, "big") + v.to_bytes(4, "big") for k, v in ours))
        self._send(Kind.WINDOW_UPDATE, 0, 0, (_WINDOW_MAX - _WINDOW).to_bytes(4, "big"))

    def take(self) -> bytes:
        """The bytes for the client, once."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def receive(self, data: bytes) -> list[Event]:
        """What the client's next bytes come to.  Raises ConnectionFailed; then `go_away` with its code and hang up."""
        buffer = self._in + data if self._in else data
        at = 0
        if not self._greeted:
            if not PREFACE.startswith(buffer[: len(PREFACE)]):
                raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, "the client does not speak HTTP/2")
            if len(buffer) < len(PREFACE):
                self._in = buffer
                return []
            at, self._greeted = len(PREFACE), True
        events: list[Event] = []
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            if size > _FRAME_MAX:
                raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR, f"a frame has {size} bytes")
            end = at + 9 + size
            if len(buffer) < end:
                break
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big") & 0x7FFFFFFF
            event = self._frame(buffer[at + 3], buffer[at + 4], stream, buffer[at + 9 : end])
            if event is not None:
                events.append(event)
            at = end
        self._in = buffer[at:]
        return events

    def headers(self, stream: int, block: bytes) -> None:
        """Begin an answer.  block: packed by `packed`."""
        if stream in self._streams:
            self._send(Kind.HEADERS, _END_HEADERS, stream, block)

    def data(self, stream: int, payload: bytes) -> None:
        """Go on with an answer; what the client's windows do not take waits in `unsent`."""
        found = self._streams.get(stream)
        if found is not None:
            found.unsent.append(memoryview(payload))
            self._push(stream, found)

    def finish(self, stream: int, block: bytes) -> None:
        """End an answer with trailers; alone, they are the whole answer."""
        found = self._streams.get(stream)
        if found is not None:
            found.trailers = block
            self._push(stream, found)

    def reset(self, stream: int, code: ErrorCode) -> None:
        """End a stream without an answer."""
        if self._streams.pop(stream, None) is not None:
            self._send(Kind.RST_STREAM, 0, stream, code.to_bytes(4, "big"))

    def unsent(self, stream: int) -> bool:
        """Whether some of an answer's data waits for the client's windows."""
        found = self._streams.get(stream)
        return found is not None and bool(found.unsent)

    def go_away(self, code: ErrorCode = ErrorCode.NO_ERROR, text: str = "") -> None:
        """Take no more streams; those that there are go on."""
        self._closing = True
        said = text.encode()[:256]
        self._send(Kind.GOAWAY, 0, 0, self._last.to_bytes(4, "big") + code.to_bytes(4, "big") + said)

    def _send(self, kind: int, flags: int, stream: int, payload: bytes | memoryview) -> None:
        head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
        self._out += (head, payload)

    def _push(self, stream: int, found: _Stream) -> None:
        """Send what the windows permit, and the trailers after the last of it."""
        unsent = found.unsent
        while unsent:
            size = min(len(unsent[0]), found.window, self._window, self._frame_max)
            if size <= 0 < len(unsent[0]):
                return
            self._send(Kind.DATA, 0, stream, unsent[0][:size])
            found.window -= size
            self._window -= size
            unsent[0] = unsent[0][size:]
            if not unsent[0]:
                unsent.popleft()
        if found.trailers:
            self._send(Kind.HEADERS, _END_HEADERS | _END_STREAM, stream, found.trailers)
            del self._streams[stream]
            if not found.whole:  # an answer that needs no more of the request
                self._send(Kind.RST_STREAM, 0, stream, ErrorCode.NO_ERROR.to_bytes(4, "big"))

    def _push_all(self) -> None:
        for stream, found in list(self._streams.items()):
            if self._window <= 0:
                return
            if found.unsent:
                self._push(stream, found)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> Event | None:
        if self._block is not None and kind != Kind.CONTINUATION:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, "headers are interrupted by another frame")
        match kind:
            case Kind.DATA:
                return self._data(flags, stream, payload)
            case Kind.HEADERS:
                return self._headers(flags, stream, payload)
            case Kind.CONTINUATION:
                return self._continuation(flags, stream, payload)
            case Kind.RST_STREAM:
                self._known(stream, payload, 4)
                return Reset(stream) if self._streams.pop(stream, None) is not None else None
            case Kind.SETTINGS:
                self._settings(flags, stream, payload)
            case Kind.PING:
                _check_size(payload, 8)
                if not flags & _ACK:
                    self._send(Kind.PING, _ACK, 0, payload)
            case Kind.WINDOW_UPDATE:
                return self._window_update(stream, payload)
            case Kind.PRIORITY:
                _check_size(payload, 5)
            case Kind.PUSH_PROMISE:
                raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, "a client pushes nothing")
        return None  # GOAWAY: the client opens no more streams by itself; and unknown frames are to be ignored

    def _known(self, stream: int, payload: bytes, size: int) -> None:
        _check_size(payload, size)
        if not 0 < stream <= self._last:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, f"stream {stream} was not opened")

    def _data(self, flags: int, stream: int, payload: bytes) -> Event | None:
        if not 0 < stream <= self._last:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, f"data for stream {stream}, which was not opened")
        self._credit(len(payload))
        found = self._streams.get(stream)
        if found is None:
            return None  # it was on its way when the stream was closed
        if found.whole:
            raise ConnectionFailed(ErrorCode.STREAM_CLOSED, f"data after the end of stream {stream}")
        if flags & _PADDED:
            payload = _unpadded(payload)
        found.size += len(payload)
        if found.size > self._body_max:
            found.body.clear()
            found.size = self._body_max + 1
        elif payload:
            found.body.append(payload)
        return self._whole(stream, found) if flags & _END_STREAM else None

    def _whole(self, stream: int, found: _Stream) -> Request:
        found.whole = True
        body = None if found.size > self._body_max else b"".join(found.body)
        found.body.clear()
        return Request(stream, found.headers, body)

    def _credit(self, size: int) -> None:
        self._read += size
        if self._read >= _CREDIT_AFTER:
            self._send(Kind.WINDOW_UPDATE, 0, 0, self._read.to_bytes(4, "big"))
            self._read = 0

    def _headers(self, flags: int, stream: int, payload: bytes) -> Event | None:
        if flags & _PADDED:
            payload = _unpadded(payload)
        if flags & _PRIORITY:
            if len(payload) < 5:
                raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR, "headers are shorter than their priority")
            payload = payload[5:]
        if flags & _END_HEADERS:
            return self._opened(flags, stream, payload)
        self._block = stream, flags, [payload]
        return None

    def _continuation(self, flags: int, stream: int, payload: bytes) -> Event | None:
        if self._block is None or self._block[0] != stream:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, "a continuation of no headers")
        _, first_flags, parts = self._block
        parts.append(payload)
        if len(parts) > _CONTINUATIONS_MAX or sum(map(len, parts)) > HEADERS_MAX:
            raise ConnectionFailed(ErrorCode.ENHANCE_YOUR_CALM, f"headers of more than {HEADERS_MAX} bytes")
        if not flags & _END_HEADERS:
            return None
        self._block = None
        return self._opened(first_flags, stream, b"".join(parts))

    def _opened(self, flags: int, stream: int, block: bytes) -> Event | None:
        # Also of a stream that is refused: the decoder's table is the connection's.
        try:
            decoded = self._decoder.decode(block, raw=True)
        except (hpack.HPACKError, UnicodeDecodeError) as error:
            raise ConnectionFailed(ErrorCode.COMPRESSION_ERROR, f"headers cannot be unpacked: {error}") from None
        if found := self._streams.get(stream):  # the trailers of a request, in which gRPC has nothing to say
            if found.whole or not flags & _END_STREAM:
                raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, f"stream {stream} has headers twice")
            return self._whole(stream, found)
        if stream % 2 == 0:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {stream}")
        if stream <= self._last:
            return None  # trailers that were on their way when the stream was closed
        self._last = stream
        opened = self._streams[stream] = _Stream(self._initial, dict(decoded))
        if self._closing or len(self._streams) > STREAMS_MAX:
            self.reset(stream, ErrorCode.REFUSED_STREAM)
            return None
        return self._whole(stream, opened) if flags & _END_STREAM else None

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        if stream or len(payload) % 6 or (flags & _ACK and payload):
            raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR, "settings are cut off")
        if flags & _ACK:
            return
        for at in range(0, len(payload), 6):
            name, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if name == Setting.INITIAL_WINDOW_SIZE:
                if value > _WINDOW_MAX:
                    raise ConnectionFailed(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                for found in self._streams.values():
                    found.window += value - self._initial  # may go below zero: RFC 9113, 6.9.2
                self._initial = value
            elif name == Setting.MAX_FRAME_SIZE:
                if not _FRAME_MAX <= value < 1 << 24:
                    raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
                self._frame_max = value
        self._send(Kind.SETTINGS, _ACK, 0, b"")
        self._push_all()

    def _window_update(self, stream: int, payload: bytes) -> Event | None:
        _check_size(payload, 4)
        more = int.from_bytes(payload, "big") & _WINDOW_MAX
        if stream == 0:
            self._window += more
            if not more or self._window > _WINDOW_MAX:
                raise ConnectionFailed(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is out of bounds")
            self._push_all()
            return None
        self._known(stream, payload, 4)
        found = self._streams.get(stream)
        if found is None:
            return None
        found.window += more
        if not more or found.window > _WINDOW_MAX:
            self.reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
            return Reset(stream)
        self._push(stream, found)
        return None


def packed(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers for `headers` and `finish`, packed such that they fit every connection: no table remembers them."""
    never = [hpack.NeverIndexedHeaderTuple(name, value) for name, value in fields]
    return bytes(_encoder.encode(never, huffman=False))


_encoder = hpack.Encoder()


def _check_size(payload: Sequence[int], size: int) -> None:
    if len(payload) != size:
        raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR, f"a frame has {len(payload)} bytes instead of {size}")


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR, "a frame is all padding")
    return payload[1 : len(payload) - payload[0]]
