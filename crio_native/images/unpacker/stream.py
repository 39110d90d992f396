"""The archive's bytes: read from a descriptor, uncompressed, hashed and bounded as they pass.

What the bytes mean is `tar`'s business.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator

from crio_native.images.unpacker import Limits, Refused

READ = 256 << 10  # compressed bytes in memory at once
PIECE = 1 << 20  # uncompressed bytes in memory at once


def _plain(pieces: Iterator[bytes]) -> Iterator[bytes]:
    return pieces


def _gunzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """RFC 1952: one member or several, one after the other."""
    member = None
    for piece in pieces:
        while piece:
            member = member or zlib.decompressobj(wbits=31)
            try:
                out = member.decompress(piece, PIECE)
            except zlib.error as error:
                raise Refused(f"the gzip data is damaged ({error})") from None
            if out:
                yield out
            piece = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member:
        raise Refused("the gzip data ends in the middle")


_DECOMPRESSORS: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {"none": _plain, "gzip": _gunzip}


class Stream:
    """The uncompressed bytes in order.  position: how many were handed out; `digest()` is of all that was read."""

    def __init__(self, fd: int, compression: str, limits: Limits) -> None:
        self._fd, self._limits = fd, limits
        self._compressed = self.size = self.position = 0
        self._hash = hashlib.sha256()
        self._pieces = _DECOMPRESSORS[compression](self._read_compressed())
        self._rest = memoryview(b"")

    def _read_compressed(self) -> Iterator[bytes]:
        while piece := os.read(self._fd, READ):
            self._compressed += len(piece)
            yield piece

    def take(self, most: int) -> memoryview:
        """The next 1..most bytes; none at the end of the stream."""
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
            self._hash.update(self._rest)
            self.size += len(self._rest)
            self._check_size()
        piece, self._rest = self._rest[:most], self._rest[most:]
        self.position += len(piece)
        return piece

    def _check_size(self) -> None:
        limits = self._limits
        if self.size > limits.bytes:
            raise Refused(f"it is larger than {limits.bytes} bytes when unpacked", kind="limit")
        if self.size > limits.ratio_from and self.size > self._compressed * limits.ratio:
            raise Refused(
                f"{self._compressed} bytes unpack to more than {self.size}: over {limits.ratio} to 1, as a "
                "decompression bomb does",
                kind="limit",
            )

    def read(self, count: int) -> bytes:
        """Exactly count bytes, or none at all at the end of the stream."""
        piece = self.take(count)
        if len(piece) == count or not piece:
            return bytes(piece)
        parts = [piece, *self.pieces(count - len(piece))]
        return b"".join(parts)

    def pieces(self, count: int) -> Iterator[memoryview]:
        """Exactly count bytes in pieces."""
        while count:
            piece = self.take(count)
            if not piece:
                raise Refused(f"the archive is cut: {count} more bytes were announced")
            count -= len(piece)
            yield piece

    def skip(self, count: int) -> None:
        for _ in self.pieces(count):
            pass

    def drain(self) -> None:
        """Read to the end: the digest covers what follows the archive's last entry, too."""
        while self.take(PIECE):
            pass

    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()
