"""Where the data of a sparse file belong (GNU tar manual, "Storing Sparse Files"): the old format and PAX 1.0.

These two GNU tar writes; PAX 0.0 and 0.1, which it wrote before 2006, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from crio_native.images.unpacker import Refused
from crio_native.images.unpacker.stream import Stream

BLOCK = 512
MAX_FRAGMENTS = 1 << 16  # a map costs no data, so nothing else bounds it
MAX_DIGITS = 20

Fragments = list[tuple[int, int]]  # (offset, bytes), ascending


def of_header(header: bytes, stream: Stream, number: Callable[[bytes, str], int]) -> tuple[Fragments, int]:
    """(fragments, size of the file) of an entry of type S; the blocks that its header goes on in are read."""
    numbers = _fields(header[386:482], number)
    block, more = header, 482
    while block[more]:
        if len(numbers) > MAX_FRAGMENTS * 2:
            raise _too_many()
        block, more = stream.read(BLOCK), 504
        if len(block) < BLOCK:
            raise Refused("the archive is cut in a map of a sparse file")
        numbers += _fields(block[:504], number)
    return _pairs(numbers), number(header[483:495], "real size")


def of_data(extended: dict[bytes, bytes], stream: Stream) -> tuple[Fragments, int]:
    """The same of an entry with PAX headers, the beginning of whose data is the map."""
    if (extended.get(b"GNU.sparse.major"), extended.get(b"GNU.sparse.minor")) != (b"1", b"0"):
        raise Refused("its sparse format is none that is known: there are GNU's old one and PAX 1.0")
    lines = _lines(stream)
    count = next(lines)
    if count > MAX_FRAGMENTS:
        raise _too_many()
    numbers = [next(lines) for _ in range(count * 2)]
    return _pairs(numbers), _decimal(extended.get(b"GNU.sparse.realsize", b""))


def check(fragments: Fragments, stored: int, size: int) -> None:
    """Raises Refused unless the fragments are in order, have the entry's data and no more, and are within the file."""
    end = 0
    for offset, length in fragments:
        if length < 0 or offset < end:
            raise Refused(f"the map of a sparse file is not in order: {length} bytes at {offset} follow {end}")
        end = offset + length
    if end > size or sum(length for _, length in fragments) != stored:
        raise Refused(f"the map of a sparse file does not fit its {stored} bytes of data, or its size of {size}")


def _fields(data: bytes, number: Callable[[bytes, str], int]) -> list[int]:
    """Pairs of 12 bytes each; an empty one ends them."""
    found: list[int] = []
    for place in range(0, len(data), 24):
        if not data[place]:
            break
        found += (number(data[place : place + 12], "offset"), number(data[place + 12 : place + 24], "length"))
    return found


def _lines(stream: Stream) -> Iterator[int]:
    """Decimal numbers, a line each, in whole blocks."""
    rest = b""
    while True:
        line, newline, after = rest.partition(b"\n")
        if newline:
            rest = after
            yield _decimal(line)
            continue
        if len(rest) > MAX_DIGITS:
            raise Refused("the map of a sparse file has a line that is no number")
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise Refused("the archive is cut in a map of a sparse file")
        rest += block


def _pairs(numbers: list[int]) -> Fragments:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > MAX_DIGITS:
        raise Refused(f"the map of a sparse file has {text[:40]!r} for a number")
    return int(text)


def _too_many() -> Refused:
    return Refused(f"the map of a sparse file has more than {MAX_FRAGMENTS} fragments", kind="limit")
