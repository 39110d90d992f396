"""Whatever a stranger sends: the parsers of images either understand it, as others do, or refuse it in our words."""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crio_native.errors import CrioError, InvalidArgument
from crio_native.images import layouts, manifests, references
from crio_native.images.model import Platform
from crio_native.images.unpacker import Limits, Refused, tar
from crio_native.images.unpacker.stream import Stream, decompressor

from ..images_support import member
from ..images_support import tar as make_tar

LIMITS = Limits(entries=100, bytes=1 << 20, depth=20, ratio=50, ratio_from=1 << 16)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(data: bytes, compression: str = "none") -> list[tuple[tar.Entry, bytes]]:
    """All entries of an archive, with their data."""
    fd = os.memfd_create("archive")
    try:
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        stream = Stream(fd, decompressor(compression), LIMITS)
        found = [(entry, b"".join(stream.pieces(entry.size))) for entry in tar.entries(stream, LIMITS)]
        stream.drain()
        return found
    finally:
        os.close(fd)


# Past the first look of each decompressor.
MAGIC = {"none": b"", "gzip": b"\x1f\x8b\x08\0", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh9", "xz": b"\xfd7zXZ\0"}


@QUICK
@given(st.binary(max_size=3000), st.sampled_from(sorted(MAGIC)))
def test_any_bytes_are_read_or_refused(data: bytes, compression: str) -> None:
    try:
        read(MAGIC[compression] + data, compression)
    except Refused as refused:
        assert refused.reason


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99"}
VALID = make_tar(
    member("directory/", tarfile.DIRTYPE),
    member("file" * 40, data=b"x" * 700, pax_headers={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}),
    member("link", tarfile.SYMTYPE, linkname="t" * 150),
    member("device", tarfile.CHRTYPE, devmajor=1, devminor=3),
    member("sparse", data=b"2\n0\n3\n9\n3\n".ljust(512, b"\0") + b"abcdef", pax_headers=SPARSE),
)


@QUICK
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_a_damaged_archive_is_read_or_refused(changes: list[tuple[int, int]], mend: bool) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
        start = position // 512 * 512
        if mend and data[start + 257 : start + 262] == b"ustar":  # so that the damage gets past the checksum
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    try:
        for entry, content in read(bytes(data)):
            assert len(entry.name) <= tar.MAX_NAME and len(content) == entry.size
            assert entry.fragments is None or sum(length for _, length in entry.fragments) == entry.size <= entry.whole
            assert 0 <= entry.uid < 1 << 32 and 0 <= entry.gid < 1 << 32 and 0 <= entry.mode <= 0o7777
    except Refused as refused:
        assert refused.reason


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=130)


@QUICK
@given(
    st.lists(
        st.tuples(
            st.lists(names, min_size=1, max_size=4).map("/".join),
            st.binary(max_size=1500),
            st.fixed_dictionaries(
                {
                    "mode": st.integers(0, 0o7777),
                    "uid": st.integers(0, 2**32 - 2),
                    "gid": st.integers(0, 2**32 - 2),
                    "mtime": st.integers(-(2**35), 2**35),
                }
            ),
        ),
        max_size=5,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
@example([("é" * 60, b"", {"mode": 0, "uid": 2**21, "gid": 2**31, "mtime": -1})], tarfile.PAX_FORMAT)
@example([("x" * 100, b"1", {"mode": 0, "uid": 2**21, "gid": 2**31, "mtime": -1})], tarfile.GNU_FORMAT)
def test_what_pythons_tarfile_writes_is_read_the_same(
    files: list[tuple[str, bytes, dict[str, Any]]], format: int
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as archive:
        for name, data, fields in files:
            info, _ = member(name, data=data, **fields)
            archive.addfile(info, io.BytesIO(data))
    expected = [(name.encode(), data, fields) for name, data, fields in files]
    found = [
        (entry.name, data, {"mode": entry.mode, "uid": entry.uid, "gid": entry.gid, "mtime": entry.mtime // 10**9})
        for entry, data in read(buffer.getvalue())
    ]
    assert found == expected


@QUICK
@given(st.one_of(st.text(max_size=80), st.text("abAB01:/@.-_[]", max_size=40), st.from_regex(references._REPOSITORY)))
def test_a_reference_is_complete_or_refused(text: str) -> None:
    try:
        reference = references.parse(text)
    except InvalidArgument:
        return
    assert references.parse(str(reference)) == reference
    assert reference.tag or reference.digest
    assert not {"..", "", "."} & set(reference.repository.split("/"))
    assert str(reference).isascii() and str(reference).isprintable() and " " not in str(reference)


documents = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.just("sha256:" + "0" * 64)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                "mediaType schemaVersion manifests layers config digest size platform annotations rootfs diff_ids Env "
                "os architecture variant Labels".split()
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=12,
)


@QUICK
@given(documents, st.sampled_from([*manifests.ACCEPTED, "", "text/plain"]))
def test_any_document_is_understood_or_refused(document: Any, media_type: str) -> None:
    raw = json.dumps(document).encode()
    with_type = json.dumps(document | {"mediaType": media_type} if isinstance(document, dict) else document).encode()
    for data in (raw, with_type):
        try:
            parsed = manifests.parse_manifest(data, media_type, "m")
            if isinstance(parsed, tuple):
                manifests.choose(parsed, Platform("amd64"), "m")
        except CrioError as error:
            assert str(error)
        try:
            manifests.parse_config(data, 1, "c")
        except InvalidArgument as error:
            assert error.field.startswith("c")


@QUICK
@given(st.text(max_size=60))
def test_any_source_is_split_or_refused(text: str) -> None:
    try:
        transport, path, _ = layouts.split_source(text)
    except InvalidArgument:
        return
    assert path.startswith("/") and transport in ("", *layouts.TRANSPORTS)


@pytest.mark.parametrize("blank", [b"", b"\0" * 512])
def test_an_empty_archive_has_no_entries(blank: bytes) -> None:
    assert read(blank) == []
