"""The frames of ttrpc: a header of ten bytes, then the message.  Bytes in, frames out; no I/O, and no protobuf.

Header: length of the message (u32), stream (u32), type (u8), flags (u8), all big-endian.  See containerd/ttrpc,
PROTOCOL.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

HEADER = struct.Struct(">IIBB")
MESSAGE_MAX = 4 << 20
"""Most bytes of one message, by the protocol; a larger one is read, dropped, and refused to whom it was for."""

REQUEST, RESPONSE, DATA = 1, 2, 3
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4


class ProtocolError(Exception):
    """The peer does not speak ttrpc: nothing that follows can be understood."""


@dataclass(frozen=True, slots=True)
class Frame:
    """oversize: the message's length where it was larger than MESSAGE_MAX; then its payload was dropped."""

    stream: int
    kind: int
    flags: int = 0
    payload: bytes = b""
    oversize: int = 0


def pack(frame: Frame) -> bytes:
    """Raises ValueError for a payload above MESSAGE_MAX."""
    if len(frame.payload) > MESSAGE_MAX:
        raise ValueError(f"a message of {len(frame.payload)} bytes is larger than ttrpc's {MESSAGE_MAX}")
    return HEADER.pack(len(frame.payload), frame.stream, frame.kind, frame.flags) + frame.payload


class FrameReader:
    """Puts a peer's bytes together to frames.  It never keeps more than one message and what was fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`.  Raises ProtocolError for a type that ttrpc does not have."""
        if self._skip:
            dropped = min(self._skip, len(data))
            self._skip -= dropped
            data = data[dropped:]
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            length, stream, kind, flags = HEADER.unpack_from(self._buffer)
            if kind not in (REQUEST, RESPONSE, DATA):
                raise ProtocolError(f"a frame of type {kind}, which ttrpc does not have")
            if length > MESSAGE_MAX:
                held = len(self._buffer) - HEADER.size
                self._skip = max(length - held, 0)
                del self._buffer[: HEADER.size + length]
                yield Frame(stream, kind, flags, b"", length)
                continue
            if len(self._buffer) < HEADER.size + length:
                return
            payload = bytes(self._buffer[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            yield Frame(stream, kind, flags, payload)

    @property
    def between(self) -> bool:
        """Whether no frame is half read: an end of the connection is then an orderly one."""
        return not self._buffer and not self._skip
