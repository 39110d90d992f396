"""The archive's bytes: read from a descriptor, uncompressed, hashed and bounded as they pass.

What the bytes mean is `tar`'s business.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator

from crio_native.images.unpacker import Limits, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

READ = 256 << 10  # compressed bytes in memory at once
PIECE = 1 << 20  # uncompressed bytes in memory at once
ZSTD_WINDOW = 128 << 20  # bytes; what `zstd --long` makes
XZ_MEMORY = 128 << 20  # bytes; `xz -9` needs 65 MiB


Pieces = Iterator[bytes]


def decompressor(compression: str) -> Callable[[Pieces], Pieces]:
    """What turns compressed pieces into uncompressed ones of bounded size.  Imports what it needs, and must be called
    while there still is a file system to import from.  Raises KeyError for an unknown compression."""
    return {"none": _plain, "gzip": _gzip, "zstd": _zstd, "bzip2": _bzip2, "xz": _xz}[compression]()


def _plain() -> Callable[[Pieces], Pieces]:
    return lambda pieces: pieces


def _gzip() -> Callable[[Pieces], Pieces]:
    """RFC 1952: one member or several, one after the other.  isal's takes half of zlib's time."""
    from isal import isal_zlib

    damaged: Any = isal_zlib.error

    def gunzip(pieces: Pieces) -> Pieces:
        member = None
        for piece in pieces:
            while piece:
                member = member or isal_zlib.decompressobj(wbits=31)
                try:
                    out = member.decompress(piece, PIECE)
                except damaged as error:
                    raise Refused(f"the gzip data is damaged ({error})") from None
                if out:
                    yield out
                piece = member.unused_data if member.eof else member.unconsumed_tail
                if member.eof:
                    member = None
        if member:
            raise Refused("the gzip data ends in the middle")

    return gunzip


def _zstd() -> Callable[[Pieces], Pieces]:
    """RFC 8878: frames, also skippable ones, with windows of up to ZSTD_WINDOW."""
    import zstandard

    def unzstd(pieces: Pieces) -> Pieces:
        decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        source: Any = _Reader(pieces)
        reader = decoder.stream_reader(source, read_size=READ, read_across_frames=True)
        while True:
            try:
                out = reader.read(PIECE)
            except zstandard.ZstdError as error:
                raise Refused(
                    f"the zstd data is damaged, or its window is above {ZSTD_WINDOW} bytes ({error})"
                ) from None
            if not out:
                return
            yield out

    return unzstd


class _Reader:
    """Pieces as a file that is read in other steps."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._rest = pieces, b""

    def read(self, size: int) -> bytes:
        self._rest = self._rest or next(self._pieces, b"")
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def _bzip2() -> Callable[[Pieces], Pieces]:
    import bz2

    return lambda pieces: _in_streams(pieces, bz2.BZ2Decompressor, (OSError, ValueError), "bzip2")


def _xz() -> Callable[[Pieces], Pieces]:
    import lzma

    def make() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    return lambda pieces: _in_streams(pieces, make, (lzma.LZMAError,), "xz")


def _in_streams(
    pieces: Pieces, make: Callable[[], Any], errors: tuple[type[Exception], ...], name: str
) -> Iterator[bytes]:
    """bzip2 and xz: one stream or several, one after the other, with zeros between them."""
    decoder = None
    for piece in pieces:
        while decoder or (piece := piece.lstrip(b"\0")):
            decoder = decoder or make()
            try:
                out = decoder.decompress(piece, PIECE)
            except errors as error:
                raise Refused(f"the {name} data is damaged ({error})") from None
            piece = b""
            if out:
                yield out
            if decoder.eof:
                piece, decoder = decoder.unused_data, None
            elif decoder.needs_input:
                break
    if decoder:
        raise Refused(f"the {name} data ends in the middle")


class Stream:
    """The uncompressed bytes in order.  position: how many were handed out; `digest()` is of all that was read."""

    def __init__(self, fd: int, decompress: Callable[[Pieces], Pieces], limits: Limits) -> None:
        self._fd, self._limits = fd, limits
        self._compressed = self.size = self.position = 0
        self._hash = hashlib.sha256()
        self._pieces = decompress(self._read_compressed())
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
