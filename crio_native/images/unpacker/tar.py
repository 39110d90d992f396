"""The tar format: ustar, GNU long names and base-256 numbers, PAX extended headers (POSIX.1-2001 pax; GNU tar manual).

From a stream of bytes to entries, nothing more; what an entry does to a directory is `tree`'s.  Names stay bytes.  A
header that can be read in two ways is refused: a scanner may have read the other one.
"""

from __future__ import annotations

from collections.abc import Iterator

from crio_native.images.unpacker import Limits, Refused, sparse
from crio_native.images.unpacker.stream import Stream

BLOCK = 512
MAX_NAME = 4096  # PATH_MAX
MAX_EXTENDED = 1 << 20  # bytes of one PAX header or one GNU long name
MAX_SECONDS = 1 << 40

FILE, LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_KINDS = {
    FILE: FILE,
    b"\0": FILE,
    b"7": FILE,
    b"S": FILE,
    **{kind: kind for kind in (LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO)},
}


class Entry:
    """One member.  Times in ns since the epoch; xattrs by name; `major`, `minor` of devices.

    size: of the data that follow.  fragments: where they belong in a sparse file, whose size is `whole`; else None.
    """

    __slots__ = (
        *("fragments", "gid", "kind", "link", "major", "minor", "mode", "mtime", "name", "size", "uid", "whole"),
        "xattrs",
    )

    kind: bytes
    name: bytes
    link: bytes
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int
    major: int
    minor: int
    xattrs: dict[bytes, bytes]
    fragments: sparse.Fragments | None
    whole: int


def entries(stream: Stream, limits: Limits) -> Iterator[Entry]:
    """The members in order.  One's data are the next `entry.size` bytes of the stream; what is not read is skipped."""
    count = 0
    extended: dict[bytes, bytes] = {}
    while (header := stream.read(BLOCK)) and header.strip(b"\0"):
        if (count := count + 1) > limits.entries:
            raise Refused(f"it has more than {limits.entries} entries", kind="limit")
        _check_sum(header)
        kind = header[156:157]
        if kind in b"xgLK":
            data = _extension(stream, _number(header[124:136], "size"))
            if kind == b"x":
                extended |= _pax_records(data)
            elif kind != b"g":  # global headers carry comments (a commit's id) and, as in every peer, are not applied
                extended[b"path" if kind == b"L" else b"linkpath"] = data.partition(b"\0")[0]
            continue
        entry = _entry(header, kind, extended)
        end = stream.position + entry.size + -entry.size % BLOCK
        if kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in extended):
            end = _read_map(entry, header, extended, stream, limits, end)
        extended = {}
        yield entry
        stream.skip(end - stream.position)
    if extended:
        raise Refused("the archive is cut: it ends after an extended header")


def _entry(header: bytes, kind: bytes, extended: dict[bytes, bytes]) -> Entry:
    entry = Entry()
    entry.name = extended.get(b"GNU.sparse.name") or extended.get(b"path") or _name(header)
    entry.link = extended.get(b"linkpath") or _text(header[157:257])
    if len(entry.name) > MAX_NAME or b"\0" in entry.name:
        raise Refused(f"the name is longer than {MAX_NAME} bytes or has a NUL in it", entry.name)
    if len(entry.link) > MAX_NAME or b"\0" in entry.link:
        raise Refused(f"the link's target is longer than {MAX_NAME} bytes or has a NUL in it", entry.name)
    if kind not in _KINDS:
        raise Refused(f"the entry's type {kind!r} is not known", entry.name)
    entry.kind = _KINDS[kind]
    if entry.kind == FILE and entry.name.endswith(b"/"):
        entry.kind = DIRECTORY  # as tar wrote it before there was a type for directories
    try:
        entry.mode = _number(header[100:108], "mode") & 0o7777
        entry.uid = _bounded(extended, b"uid", header[108:116], (1 << 32) - 2)
        entry.gid = _bounded(extended, b"gid", header[116:124], (1 << 32) - 2)
        size = _bounded(extended, b"size", header[124:136], 1 << 62)
        entry.mtime = _time(extended[b"mtime"]) if extended.get(b"mtime") else _number(header[136:148], "mtime") * 10**9
        device = entry.kind in (CHAR, BLOCKDEV)
        entry.major = _number(header[329:337], "major") if device else 0
        entry.minor = _number(header[337:345], "minor") if device else 0
    except Refused as refused:
        refused.entry = entry.name
        raise
    if not (
        -MAX_SECONDS < entry.mtime // 10**9 < MAX_SECONDS and 0 <= entry.major < 4096 and 0 <= entry.minor < 1 << 20
    ):
        raise Refused("its time or device number is out of range", entry.name)
    entry.size = size if entry.kind == FILE else 0  # the other kinds have no data, whatever their header says
    entry.fragments, entry.whole = None, entry.size
    entry.xattrs = {key[13:]: value for key, value in extended.items() if key.startswith(b"SCHILY.xattr.")}
    return entry


def _read_map(
    entry: Entry, header: bytes, extended: dict[bytes, bytes], stream: Stream, limits: Limits, end: int
) -> int:
    """Make an entry a sparse file; what comes before its data is read.  Returns where its data end."""
    before = stream.position
    try:
        if entry.kind != FILE:
            raise Refused("it is a sparse file, and is none")
        if header[156:157] == b"S":
            entry.fragments, entry.whole = sparse.of_header(header, stream, _number)
            end += stream.position - before
        else:
            entry.fragments, entry.whole = sparse.of_data(extended, stream)
            entry.size -= stream.position - before
        sparse.check(entry.fragments, entry.size, entry.whole)
        if entry.whole > limits.bytes:
            raise Refused(f"a sparse file of {entry.whole} bytes; the most is {limits.bytes}", kind="limit")
    except Refused as refused:
        refused.entry = entry.name
        raise
    return end


def _check_sum(header: bytes) -> None:
    stated = _number(header[148:156], "checksum")
    rest = header[:148] + b" " * 8 + header[156:]
    if stated == sum(rest):
        return
    if stated != sum(byte - 256 if byte > 127 else byte for byte in rest):  # some old tars added signed chars
        raise Refused("a header's checksum is wrong: this is no tar archive, or it is damaged")


def _name(header: bytes) -> bytes:
    name, prefix = _text(header[:100]), b""
    if header[257:263] == b"ustar\0":  # GNU's own format has other things where ustar has the prefix
        prefix = _text(header[345:500])
    return prefix + b"/" + name if prefix else name


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes, what: str) -> int:
    if field[0] & 0x80:  # base 256, two's complement, the first bit is the mark
        value = int.from_bytes(field, "big")
        bits = len(field) * 8
        return value - (1 << bits) if field[0] & 0x40 else value - (1 << bits - 1)
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise Refused(f"a header's {what} is not a number: {field!r}")
    return int(digits, 8)


def _bounded(extended: dict[bytes, bytes], key: bytes, field: bytes, most: int) -> int:
    text, what = extended.get(key), key.decode()
    if not text:
        value = _number(field, what)
    elif len(text) <= 20 and text.isdigit():
        value = int(text)
    else:
        raise Refused(f"the extended header's {what} is not a number: {text[:40]!r}")
    if not 0 <= value <= most:
        raise Refused(f"the {what} {value} is not in 0..{most}")
    return value


def _time(text: bytes) -> int:
    """Decimal seconds, with a fraction or without, to ns."""
    seconds, _, fraction = text.removeprefix(b"-").partition(b".")
    if len(text) > 40 or not seconds.isdigit() or (fraction and not fraction.isdigit()):
        raise Refused(f"the extended header's mtime is not a number: {text[:40]!r}")
    value = int(seconds) * 10**9 + int(fraction[:9].ljust(9, b"0"))
    return -value if text.startswith(b"-") else value


def _extension(stream: Stream, size: int) -> bytes:
    if not 0 <= size <= MAX_EXTENDED:
        raise Refused(f"an extended header of {size} bytes; the most is {MAX_EXTENDED}", kind="limit")
    data = stream.read(size) if size else b""
    if len(data) != size:
        raise Refused("the archive is cut in an extended header")
    stream.skip(-size % BLOCK)
    return data


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n`; the last of a key counts."""
    records = {}
    position = 0
    while position < len(data):
        blank = data.find(b" ", position, position + 8)
        digits = data[position:blank] if blank > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        record = data[blank + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(data) or not record.endswith(b"\n") or not equals or not key:
            raise Refused(f"a record of an extended header is malformed: {data[position : position + 40]!r}")
        records[key] = value
        position = end
    return records
