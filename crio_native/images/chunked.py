"""zstd:chunked layers: fetch only the files that the store lacks.

Such a layer is an ordinary zstd archive in which each file begins a frame of its own; its annotations say where its
table of contents and its tar-split are.  From these the layer's archive is put together again, with contents from
layers that are here or from ranges of the blob, and judged by its digest in the image's config like any other.  What
cannot be had in this way is left to the ordinary one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from crio_native.errors import InvalidArgument, Unavailable
from crio_native.images import jsonstream
from crio_native.images.manifests import LAYERS, Descriptor
from crio_native.images.references import check_digest
from crio_native.images.unpacker import Limits

_PREFIX = "io.github.containers.zstd-chunked."
TOC_AT, TOC_DIGEST = f"{_PREFIX}manifest-position", f"{_PREFIX}manifest-checksum"
SPLIT_AT = f"{_PREFIX}tarsplit-position"
MAX_TOC = 64 << 20  # bytes, uncompressed, of which its regular files are kept
MAX_SPLIT = 256 << 20  # bytes, uncompressed; read line by line, and never kept
MAX_TABLE = 64 << 20  # bytes of either, compressed, that are in memory at once
MAX_RATIO = Limits().ratio  # bytes for each compressed one, of a table that is larger than RATIO_FROM
RATIO_FROM = 1 << 20
MAX_ENTRIES = 1_000_000
MAX_ENTRY = 64 << 10  # characters; beyond them a line of a tar-split may only have the one segment
MAX_LINES = 3 * MAX_ENTRIES
MAX_LINE = 2 << 20  # bytes; a segment has at most 1 MiB, in base64
MAX_FILE = 16 << 20  # bytes, compressed, that are in memory at once
MAX_WINDOW = 8 << 20  # bytes; this is unpacked in the daemon
GAP = 64 << 10  # bytes between two files that are rather fetched than asked around
PIECE = 256 << 10
_FILE, _SEGMENT = 1, 2
_BASE64 = string.ascii_letters.encode() + b"0123456789+/="


class Ranges(Protocol):
    """A source that can give a part of a blob."""

    def knows_ranges(self, descriptor: Descriptor) -> bool: ...

    def part(self, descriptor: Descriptor, start: int, end: int) -> Iterator[bytes]: ...


@dataclass(slots=True)
class _File:
    """Where a file's bytes are in the blob, compressed."""

    digest: str
    size: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chunked:
    """A layer that can be had by its files.  here: opens the local copy of a file, by digest and size, or None."""

    descriptor: Descriptor
    blobs: Ranges
    files: Mapping[str, _File]
    lines: Iterable[bytes]
    here: Callable[[str, int], int | None]
    fetched: list[int] = field(default_factory=list)  # bytes of the blob, a number a request

    def contents(self) -> dict[str, str]:
        """The layer's files by digest, for pulls to come."""
        return {file.digest: name for name, file in self.files.items()}

    def archive(self) -> Iterator[bytes]:
        """The layer's uncompressed archive.  Raises InvalidArgument, Unavailable.

        The unpacker sees nothing compressed here, so its bound for what comes out of a blob is held here: a tar-split
        may name one large file of another layer without end.
        """
        size, most = 0, max(Limits().ratio_from, Limits().ratio * self.descriptor.size)
        for part in self._parts():
            size += len(part)
            if size > most:
                raise InvalidArgument("tar-split", size, f"more than {MAX_RATIO} bytes for each of the layer's own")
            yield part

    def _parts(self) -> Iterator[bytes]:
        missing = self._runs()
        for line in self.lines:
            kind, name, segment = _split_entry(line)
            if kind == _SEGMENT:
                yield segment
            elif kind == _FILE and name in self.files:
                yield from self._content(self.files[name], missing)

    def _content(self, file: _File, missing: _Runs) -> Iterator[bytes]:
        fd = None if file.digest in missing.wanted else self.here(file.digest, file.size)
        if fd is None:
            yield from _unzstd(missing.take(file), file.size)
            return
        with open(fd, "rb", buffering=0) as local:
            while piece := local.read(PIECE):
                yield piece

    def _runs(self) -> _Runs:
        """What is not here, in stretches of the blob that one request each brings."""
        wanted: set[str] = set()
        runs: list[tuple[int, int]] = []
        for file in sorted(self.files.values(), key=lambda file: file.start):
            fd = self.here(file.digest, file.size)
            if fd is not None:
                os.close(fd)
                continue
            wanted.add(file.digest)
            if runs and file.start - runs[-1][1] <= GAP:
                runs[-1] = (runs[-1][0], file.end)
            else:
                runs.append((file.start, file.end))
        self.fetched.extend(end - start for start, end in runs)
        return _Runs(self.descriptor, self.blobs, runs, wanted)


class _Runs:
    """The stretches, read in order."""

    def __init__(self, descriptor: Descriptor, blobs: Ranges, runs: list[tuple[int, int]], wanted: set[str]) -> None:
        self._descriptor, self._blobs, self._runs, self.wanted = descriptor, blobs, runs, wanted
        self._position, self._rest = 0, b""
        self._pieces: Iterator[bytes] = iter(())

    def take(self, file: _File) -> bytes:
        """The compressed bytes of a file; files come in the order of the blob."""
        if not self._position <= file.start:
            raise InvalidArgument("zstd:chunked table", file.start, "its files are not in the order of the archive")
        while self._runs and self._runs[0][0] <= file.start:
            start, end = self._runs.pop(0)
            self._position, self._rest, self._pieces = start, b"", self._blobs.part(self._descriptor, start, end)
        self._read(file.start - self._position)
        return self._read(file.end - file.start)

    def _read(self, count: int) -> bytes:
        parts = [self._rest]
        have = len(self._rest)
        while have < count:
            piece = next(self._pieces, b"")
            if not piece:
                raise Unavailable(f"{self._descriptor.digest} ends in the middle of a file")
            parts.append(piece)
            have += len(piece)
        whole = b"".join(parts)
        self._rest = whole[count:]
        self._position += count
        return whole[:count]


def opened(descriptor: Descriptor, blobs: object, here: Callable[[str, int], int | None]) -> Chunked | None:
    """A layer that can be had by its files; None for one that cannot.  Raises InvalidArgument, Unavailable."""
    notes = descriptor.annotations
    has_tables = {TOC_AT, TOC_DIGEST, SPLIT_AT} <= notes.keys() and descriptor.media_type in LAYERS
    if not has_tables or not hasattr(blobs, "part"):
        return None
    ranges: Ranges = blobs  # type: ignore[assignment]  # as it has parts
    if not ranges.knows_ranges(descriptor):
        return None
    toc = _table(descriptor, ranges, notes[TOC_AT], check_digest(notes[TOC_DIGEST], TOC_DIGEST), MAX_TOC)
    files, split = _read(toc, descriptor)
    if files is None:
        return None
    lines = _table(descriptor, ranges, notes[SPLIT_AT], check_digest(split, "tarSplitDigest"), MAX_SPLIT)
    return Chunked(descriptor, ranges, files, _lines(lines), here)


def _table(descriptor: Descriptor, blobs: Ranges, position: str, digest: str, most: int) -> Iterator[bytes]:
    """A table of the layer, checked; uncompressed, of at most so many bytes, as it is read."""
    numbers = [int(part) if part.isdigit() and len(part) < 20 else -1 for part in position.split(":")[:3]]
    if len(numbers) < 3 or min(numbers) < 0 or sum(numbers[:2]) > descriptor.size:
        raise InvalidArgument("zstd:chunked position", position, "not OFFSET:LENGTH:UNCOMPRESSED within the layer")
    start, length, size = numbers
    if length > MAX_TABLE or size > min(most, max(RATIO_FROM, length * MAX_RATIO)):
        raise InvalidArgument("zstd:chunked position", position, "a larger table than any layer needs")
    raw = b"".join(blobs.part(descriptor, start, start + length))
    algorithm, _, expected = digest.partition(":")
    if hashlib.new(algorithm, raw).hexdigest() != expected:
        raise Unavailable(f"{descriptor.digest} has another table of contents than its annotations say")
    return _unzstd(raw, size, MAX_ENTRY)


def _read(toc: Iterator[bytes], descriptor: Descriptor) -> tuple[dict[str, _File] | None, Any]:
    """The regular files (see `_files`) and the digest of the tar-split."""
    document = jsonstream.Document(toc, MAX_ENTRY, MAX_ENTRIES)
    files: dict[str, _File] | None = {}
    split: Any = None
    try:
        for name in document.members():
            if name == "entries":
                files = _files(document.elements(), descriptor)
                if files is None:
                    return None, ""
            else:
                value = document.value()
                split = value if name == "tarSplitDigest" else split
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("zstd:chunked table", ..., f"no object, or too large a one: {error}") from None
    return files, split


def _files(entries: Iterable[Any], descriptor: Descriptor) -> dict[str, _File] | None:
    """The regular files by name, as the tar-split has it; None where one has holes, or is too large to be a part."""
    files: dict[str, _File] = {}
    for entry in entries:
        try:
            kind, name = entry["type"], entry["name"]
            start, end, size = entry.get("offset", 0), entry.get("endOffset", 0), entry.get("size", 0)
            if kind not in ("reg", "chunk") or (kind == "reg" and not size):
                continue
            if (
                type(size) is not int
                or entry.get("chunkType")
                or not 0 <= start < end <= descriptor.size
                or not isinstance(name, str)
            ):
                return None
            if kind == "chunk":
                files[name].end = max(files[name].end, end)
            else:
                files[name] = _File(check_digest(entry["digest"], "zstd:chunked digest"), size, start, end)
        except (TypeError, KeyError, AttributeError):
            raise InvalidArgument("zstd:chunked table", entry, "a malformed entry") from None
    return None if any(file.end - file.start > MAX_FILE for file in files.values()) else files


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Of a tar-split."""
    rest, left = b"", MAX_LINES
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        left -= len(whole)
        if len(rest) > MAX_LINE or left < 0:
            raise InvalidArgument("tar-split", rest[:60], "it has more, or longer, lines than any layer needs")
        yield from whole
    if rest:
        yield rest


def _split_entry(line: bytes) -> tuple[int, str, bytes]:
    """(kind, name, segment) of a tar-split's line."""
    if len(line) > MAX_ENTRY and len(line.translate(None, _BASE64)) > MAX_ENTRY:
        raise InvalidArgument("tar-split", line[:60], "a line that is long for more than its segment")
    try:
        entry = json.loads(line)
        raw = base64.b64decode(entry["name_raw"]) if entry.get("name_raw") else None
        name = raw.decode(errors="surrogateescape") if raw else str(entry.get("name", ""))
        kind = int(entry["type"])
        return kind, name, base64.b64decode(entry["payload"] or "") if kind == _SEGMENT else b""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise InvalidArgument("tar-split", line[:60], "malformed") from None


def _unzstd(raw: bytes, size: int, most: int = PIECE) -> Iterator[bytes]:
    """So many bytes as were announced, and never more, in pieces of at most `most`."""
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(raw, read_across_frames=True)
    left = size
    try:
        while left and (piece := reader.read(min(most, left))):
            left -= len(piece)
            yield piece
    except zstandard.ZstdError as error:
        raise InvalidArgument("zstd:chunked layer", str(error), "damaged") from None
    if left:
        raise InvalidArgument("zstd:chunked layer", size, f"a part is {left} bytes shorter than announced")
