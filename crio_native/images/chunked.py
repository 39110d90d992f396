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
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from crio_native.errors import InvalidArgument, Unavailable
from crio_native.images.manifests import LAYERS, Descriptor
from crio_native.images.references import check_digest

_PREFIX = "io.github.containers.zstd-chunked."
TOC_AT, TOC_DIGEST = f"{_PREFIX}manifest-position", f"{_PREFIX}manifest-checksum"
SPLIT_AT = f"{_PREFIX}tarsplit-position"
MAX_TABLE = 64 << 20  # bytes, uncompressed
MAX_ENTRIES = 1_000_000
MAX_FILE = 16 << 20  # bytes, compressed, that are in memory at once
MAX_WINDOW = 8 << 20  # bytes; this is unpacked in the daemon
GAP = 64 << 10  # bytes between two files that are rather fetched than asked around
PIECE = 256 << 10
_FILE, _SEGMENT = 1, 2


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
        """The layer's uncompressed archive.  Raises InvalidArgument, Unavailable."""
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
            yield from _unzstd(missing.take(file), file)
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
    toc = _table(descriptor, ranges, notes[TOC_AT], check_digest(notes[TOC_DIGEST], TOC_DIGEST))
    try:
        document = json.loads(toc)
        entries, split = document["entries"], document["tarSplitDigest"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidArgument("zstd:chunked table", toc[:60], "not an object with entries and tarSplitDigest") from None
    files = _files(entries, descriptor)
    lines = _table(descriptor, ranges, notes[SPLIT_AT], check_digest(split, "tarSplitDigest"))
    return None if files is None else Chunked(descriptor, ranges, files, io.BytesIO(lines), here)


def _table(descriptor: Descriptor, blobs: Ranges, position: str, digest: str) -> bytes:
    """A table of the layer, checked and uncompressed."""
    numbers = [int(part) if part.isdigit() and len(part) < 20 else -1 for part in position.split(":")[:3]]
    if len(numbers) < 3 or min(numbers) < 0 or max(numbers[1:]) > MAX_TABLE or sum(numbers[:2]) > descriptor.size:
        raise InvalidArgument("zstd:chunked position", position, "not OFFSET:LENGTH:UNCOMPRESSED within the layer")
    start, length, size = numbers
    raw = b"".join(blobs.part(descriptor, start, start + length))
    algorithm, _, expected = digest.partition(":")
    if hashlib.new(algorithm, raw).hexdigest() != expected:
        raise Unavailable(f"{descriptor.digest} has another table of contents than its annotations say")
    return b"".join(_unzstd(raw, _File("", size, 0, 0)))


def _files(entries: Any, descriptor: Descriptor) -> dict[str, _File] | None:
    """The regular files by name, as the tar-split has it; None where one has holes, or is too large to be a part."""
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        raise InvalidArgument("zstd:chunked table", type(entries).__name__, "not a list of entries")
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


def _split_entry(line: bytes) -> tuple[int, str, bytes]:
    """(kind, name, segment) of a tar-split's line."""
    try:
        entry = json.loads(line)
        raw = base64.b64decode(entry["name_raw"]) if entry.get("name_raw") else None
        name = raw.decode(errors="surrogateescape") if raw else str(entry.get("name", ""))
        kind = int(entry["type"])
        return kind, name, base64.b64decode(entry["payload"] or "") if kind == _SEGMENT else b""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise InvalidArgument("tar-split", line[:60], "malformed") from None


def _unzstd(raw: bytes, file: _File) -> Iterator[bytes]:
    """The bytes of a file; never more than were announced."""
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(raw, read_across_frames=True)
    left = file.size
    try:
        while left and (piece := reader.read(min(PIECE, left))):
            left -= len(piece)
            yield piece
    except zstandard.ZstdError as error:
        raise InvalidArgument("zstd:chunked layer", str(error), "damaged") from None
    if left:
        raise InvalidArgument("zstd:chunked layer", file.size, f"a part is {left} bytes shorter than announced")
