"""SPDY/3.1 frames in and out, without I/O: the dialect that Kubernetes' clients speak (draft-mbelshe-httpbis-spdy-00).

`Connection.receive` turns bytes into events, the other methods make bytes to send.  Payloads are never copied or
collected: a part of a DATA frame becomes an event as soon as it is there.  As in the implementation that those clients
use there is no flow control by windows: who cannot take more stops to read the connection.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

VERSION = 3
CONTROL_MAX = 64 * 1024  # bytes of a control frame
HEADERS_MAX = 64 * 1024  # bytes of its header block, unpacked
HEADER_COUNT_MAX = 128
STREAMS_MAX = 1024  # open at once
DATA_MAX = 0xFFFFFF  # the length field of a frame has 24 bits

REFUSED_STREAM = 3
CANCEL = 5

FIN = 1
_CONTROL = 1 << 31
_SYN_STREAM, _SYN_REPLY, _RST_STREAM, _PING, _GOAWAY, _HEADERS = 1, 2, 3, 6, 7, 8
_HEAD = struct.Struct(">II")
_WORD = struct.Struct(">I")

# The words that both sides' compression starts from.  Each of the first has its length before it.
_WORDS = [
    *"options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status".split(" "),
    *("200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin"),
]
_PHRASES = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,"
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(_WORD.pack(len(word)) + word.encode() for word in _WORDS) + _PHRASES.encode()


class ProtocolError(Exception):
    """The peer's bytes are not SPDY/3.1, or pass a bound; the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer opened a stream.  headers: names in lower case; of several values the first."""

    stream: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Replied:
    stream: int


@dataclass(frozen=True, slots=True)
class Data:
    """Part of what a stream carries, empty for a frame without content.

    A view of what `receive` was given, so good until the next event is asked for.
    """

    stream: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer sends no more on a stream; ours may go on."""

    stream: int


@dataclass(frozen=True, slots=True)
class Reset:
    stream: int
    status: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes that the protocol wants sent: the echo of a ping, the refusal of a stream."""

    data: bytes


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer opens no more streams."""


Event = Opened | Replied | Data | Ended | Reset | Answer | GoneAway


class Connection:
    """One side of a connection.  client: whether that is the side whose streams have odd numbers."""

    def __init__(self, *, client: bool) -> None:
        self._client = client
        self._next = 1 if client else 2
        self._last_of_peer = 0
        self._sending: set[int] = set()  # streams on which we have not ended
        self._receiving: set[int] = set()  # streams on which the peer has not
        self._unpack = zlib.decompressobj(zdict=DICTIONARY)
        self._pack = zlib.compressobj(zdict=DICTIONARY)
        self._partial = bytearray()  # the beginning of a frame's head, or of a control frame
        self._stream = 0  # of the DATA frame under way
        self._left = 0  # bytes of it that are still to come
        self._ends = False  # whether it ends its stream

    def receive(self, data: memoryview) -> Iterator[Event]:
        """The events in `data`; take them all before calling again.  Raises ProtocolError."""
        position, end = 0, len(data)
        while position < end:
            if self._left:
                part = data[position : position + self._left]
                position += len(part)
                self._left -= len(part)
                yield from self._payload(part)
                continue
            if not self._partial and end - position >= 8:
                first, second = _HEAD.unpack_from(data, position)
                if first < _CONTROL:
                    position += 8
                    yield from self._begin_data(first, second)
                    continue
            taken = min(self._missing(), end - position)
            self._partial += data[position : position + taken]
            position += taken
            if not self._missing():
                yield from self._frame()

    def _missing(self) -> int:
        """Bytes that `_partial` lacks: of a frame's head, or of a whole control frame."""
        have = len(self._partial)
        if have < 8:
            return 8 - have
        first, second = _HEAD.unpack_from(self._partial)
        if first < _CONTROL:
            return 0
        length = second & DATA_MAX
        if length > CONTROL_MAX:
            raise ProtocolError(f"a control frame of {length} bytes; at most {CONTROL_MAX} are taken")
        return 8 + int(length) - have

    def _frame(self) -> Iterator[Event]:
        first, second = _HEAD.unpack_from(self._partial)
        body = bytes(self._partial[8:])
        self._partial.clear()
        if first < _CONTROL:
            yield from self._begin_data(first, second)
        else:
            yield from self._control(first & ~_CONTROL, second >> 24, body)

    def _begin_data(self, stream: int, second: int) -> Iterator[Event]:
        self._stream, self._left, self._ends = stream, second & DATA_MAX, bool(second >> 24 & FIN)
        if not self._left:
            yield from self._payload(memoryview(b""))

    def _payload(self, part: memoryview) -> Iterator[Event]:
        """What comes for a stream that is closed was under way when it was: it is dropped."""
        if self._stream not in self._receiving:
            return
        if part or not self._ends:
            yield Data(self._stream, part)
        if self._ends and not self._left:
            self._receiving.discard(self._stream)
            yield Ended(self._stream)

    def _control(self, first: int, flags: int, body: bytes) -> Iterator[Event]:
        version, kind = first >> 16, first & 0xFFFF
        if version != VERSION:
            raise ProtocolError(f"a frame of SPDY version {version}; this is version {VERSION}")
        if kind == _SYN_STREAM:
            yield from self._opened(body, flags)
        elif kind == _SYN_REPLY:
            stream = self._number(body, "SYN_REPLY")
            self._headers(body[4:])
            yield Replied(stream)
            yield from self._maybe_ended(stream, flags)
        elif kind == _HEADERS:
            stream = self._number(body, "HEADERS")
            self._headers(body[4:])
            yield from self._maybe_ended(stream, flags)
        elif kind == _RST_STREAM:
            stream = self._number(body, "RST_STREAM")
            status = self._number(body[4:], "RST_STREAM")
            known = stream in self._sending or stream in self._receiving
            self._forget(stream)
            if known:
                yield Reset(stream, status)
        elif kind == _PING:
            number = self._number(body, "PING")
            if bool(number % 2) != self._client:  # the peer's own, not the echo of ours
                yield Answer(_control_frame(_PING, _WORD.pack(number)))
        elif kind == _GOAWAY:
            yield GoneAway()

    def _opened(self, body: bytes, flags: int) -> Iterator[Event]:
        if len(body) < 10:
            raise ProtocolError("a SYN_STREAM frame that is too short")
        stream = self._number(body, "SYN_STREAM")
        headers = self._headers(body[10:])  # always unpacked: the next block builds on it
        if stream % 2 == self._client or stream <= self._last_of_peer:
            raise ProtocolError(f"stream number {stream} does not follow {self._last_of_peer}")
        self._last_of_peer = stream
        if len(self._sending | self._receiving) >= STREAMS_MAX:
            yield Answer(_control_frame(_RST_STREAM, _HEAD.pack(stream, REFUSED_STREAM)))
            return
        self._sending.add(stream)
        self._receiving.add(stream)
        yield Opened(stream, headers)
        yield from self._maybe_ended(stream, flags)

    def _maybe_ended(self, stream: int, flags: int) -> Iterator[Event]:
        if flags & FIN and stream in self._receiving:
            self._receiving.discard(stream)
            yield Ended(stream)

    def _headers(self, block: bytes) -> dict[str, str]:
        try:
            plain = self._unpack.decompress(block, HEADERS_MAX + 1)
        except zlib.error as error:
            raise ProtocolError(f"a header block that cannot be unpacked: {error}") from None
        if len(plain) > HEADERS_MAX or self._unpack.unconsumed_tail:
            raise ProtocolError(f"a header block of more than {HEADERS_MAX} bytes")
        return _parse_headers(plain)

    @staticmethod
    def _number(body: bytes, frame: str) -> int:
        if len(body) < 4:
            raise ProtocolError(f"a {frame} frame that is too short")
        number: int = _WORD.unpack_from(body)[0] & ~_CONTROL
        return number

    def _forget(self, stream: int) -> None:
        self._sending.discard(stream)
        self._receiving.discard(stream)

    def open(self, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Open a stream; its number, and what to send."""
        stream, self._next = self._next, self._next + 2
        self._sending.add(stream)
        self._receiving.add(stream)
        return stream, _control_frame(_SYN_STREAM, _HEAD.pack(stream, 0) + b"\0\0" + self._block(headers))

    def reply(self, stream: int) -> bytes:
        """Accept a stream that the peer opened."""
        return _control_frame(_SYN_REPLY, _WORD.pack(stream) + self._block({}))

    def data(self, stream: int, length: int) -> bytes:
        """What to send before `length` (at most DATA_MAX) bytes of a stream."""
        return _HEAD.pack(stream, length)

    def end(self, stream: int) -> bytes:
        """What ends our side of a stream; b"" when it has ended."""
        if stream not in self._sending:
            return b""
        self._sending.discard(stream)
        return _HEAD.pack(stream, FIN << 24)

    def reset(self, stream: int, status: int = CANCEL) -> bytes:
        """What ends both sides of a stream at once; b"" when both have ended."""
        known = stream in self._sending or stream in self._receiving
        self._forget(stream)
        return _control_frame(_RST_STREAM, _HEAD.pack(stream, status)) if known else b""

    def may_send(self, stream: int) -> bool:
        return stream in self._sending

    def ping(self, number: int) -> bytes:
        return _control_frame(_PING, _WORD.pack(number))

    def _block(self, headers: Mapping[str, str]) -> bytes:
        plain = _WORD.pack(len(headers)) + b"".join(
            _WORD.pack(len(text)) + text
            for pair in headers.items()
            for text in (pair[0].lower().encode(), pair[1].encode())
        )
        return self._pack.compress(plain) + self._pack.flush(zlib.Z_SYNC_FLUSH)


def _control_frame(kind: int, body: bytes) -> bytes:
    return _HEAD.pack(_CONTROL | VERSION << 16 | kind, len(body)) + body


def _parse_headers(plain: bytes) -> dict[str, str]:
    position = 0

    def number() -> int:
        nonlocal position
        if position + 4 > len(plain):
            raise ProtocolError("a header block that ends too early")
        position += 4
        found: int = _WORD.unpack_from(plain, position - 4)[0]
        return found

    def text() -> str:
        nonlocal position
        length = number()
        if position + length > len(plain):
            raise ProtocolError("a header that is longer than its block")
        position += length
        return plain[position - length : position].decode("latin-1")

    count = number()
    if count > HEADER_COUNT_MAX:
        raise ProtocolError(f"{count} headers; at most {HEADER_COUNT_MAX} are taken")
    headers: dict[str, str] = {}
    for _ in range(count):
        name, value = text().lower(), text()
        if not name or name in headers:
            raise ProtocolError(f"the header name {name!r} is empty or comes twice")
        headers[name] = value.partition("\0")[0]
    return headers
