"""Each published weakness of a tar extractor, tried on ours: what the archive does in it, and what must not happen.

`target` is unpacked into by the real, confined child; beside it lies a canary whose content, mode and time must stay.
"""

from __future__ import annotations

import io
import itertools
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.errors import CrioError, InvalidArgument, ResourceExhausted
from crio_native.images.unpacker import Limits
from crio_native.images.unpacking import unpack

from ..images_support import member, tar

pytestmark = pytest.mark.root

DIR, SYM, LNK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
LIMITS = Limits(entries=200, bytes=8 << 20, depth=60, ratio=1000, ratio_from=1 << 20)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    canary, outside, directory = tmp_path / "canary", tmp_path / "outside", tmp_path / "target"
    canary.write_text("untouched")
    os.chmod(canary, 0o640)
    outside.mkdir(mode=0o750)
    directory.mkdir()
    for path in (canary, outside):
        os.utime(path, (1000, 1000))
    yield directory
    assert {path.name for path in tmp_path.iterdir()} == {"canary", "outside", "target"}
    assert canary.read_text() == "untouched" and list(outside.iterdir()) == []
    for path, mode in ((canary, 0o640), (outside, 0o750)):
        info = path.stat()
        assert (info.st_mode & 0o7777, info.st_mtime, info.st_uid) == (mode, 1000, 0)


def refused(target: Path, *members: tuple[tarfile.TarInfo, bytes]) -> str:
    with pytest.raises(CrioError) as caught:
        unpack(target, [tar(*members)], limits=LIMITS)
    return str(caught.value)


@pytest.mark.parametrize("name", ["../canary", "a/../../canary", "./../outside/x"])
def test_cve_2007_4559_names_that_lead_out(target: Path, name: str) -> None:
    assert "'..'" in refused(target, member(name, data=b"changed"))


def test_cve_2007_4559_absolute_names_stay_inside(target: Path) -> None:
    unpack(target, [tar(member(f"{target.parent}/canary", data=b"changed"))])
    assert (target / str(target.parent).lstrip("/") / "canary").read_bytes() == b"changed"


@pytest.mark.parametrize("final", ["escape/canary", "escape/outside/x"])
def test_cve_2025_4517_a_path_too_long_to_be_resolved(target: Path, final: str) -> None:
    """A chain of directories and short links whose resolved name exceeds PATH_MAX, then `..` behind it."""
    members, path = [], ""
    for step in "abcdefghijklmnop":
        long = step * 247
        members += [member(f"{path}{long}", DIR), member(f"{path}{step}", SYM, linkname=long)]
        path += f"{step}/"
    members += [member(f"{path}{'l' * 254}", SYM, linkname="../" * 16)]
    members += [member("escape", SYM, linkname=f"{path}{'l' * 254}/../..")]
    assert refused(target, *members, member(final, data=b"changed"))


@pytest.mark.parametrize("link", ["../outside", "a/../../outside", "/", "a/b/../../../outside"])
def test_cve_2025_4330_writing_through_a_link_that_leads_out(target: Path, link: str) -> None:
    members = [member("a/b", DIR), member("out", SYM, linkname=link), member("out/x", data=b"changed")]
    assert refused(target, *members)


@pytest.mark.parametrize("link", ["../canary", "/etc/passwd"])
def test_cve_2025_4138_a_link_that_leads_out_is_only_a_link(target: Path, link: str) -> None:
    """Images have such links; an entry of the same name takes the link's place, never its target's."""
    before = Path("/etc/passwd").read_bytes()
    unpack(target, [tar(member("kept", SYM, linkname=link), member("x", SYM, linkname=link), member("x", data=b"new"))])
    assert os.readlink(target / "kept") == link and (target / "x").read_bytes() == b"new"
    assert not (target / "x").is_symlink() and Path("/etc/passwd").read_bytes() == before


def test_cve_2025_4435_what_is_refused_ends_all(target: Path) -> None:
    """No entry is skipped with the rest unpacked nevertheless."""
    refused(target, member("first"), member("../canary", data=b"changed"), member("later"))
    assert not (target / "later").exists()


@pytest.mark.parametrize("name", ["canary", "outside"])
def test_cve_2024_12718_modes_and_times_of_others(target: Path, name: str) -> None:
    """A directory that a link replaces before its time is set, and a link with a mode of its own."""
    unpack(
        target,
        [
            tar(
                *[member("d", DIR, mode=0o777, mtime=5), member("d", SYM, linkname=f"../{name}", mode=0o777, mtime=5)],
                *[member("e", SYM, linkname=f"../{name}", mode=0o777, uid=7), member("e", LNK, linkname="d")],
            )
        ],
    )


@pytest.mark.parametrize("size", [-1, -512, -(1 << 40)])
def test_cve_2025_8194_a_negative_size_goes_not_back(target: Path, size: int) -> None:
    header = bytearray(member("x")[0].tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size & ((1 << 96) - 1)).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match="size"):
        unpack(target, [bytes(header) * 3 + bytes(1024)], limits=LIMITS)
    assert time.monotonic() - began < 20


def test_cve_2025_13462_a_cut_name_does_not_make_a_directory(target: Path) -> None:
    """The old type and a name field that happens to end with a slash; the whole name is in the entry before."""
    name = "a" * 99 + "/file"
    info = member(name, data=b"data")[0]
    archive = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header = archive[-512:]
    header[156:157] = b"\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    archive[-512:] = header
    assert header[99:100] == b"/"
    unpack(target, [bytes(archive) + b"data".ljust(512, b"\0") + bytes(1024)], limits=LIMITS)
    assert (target / name).read_bytes() == b"data"


@pytest.mark.parametrize("link", ["../canary", "/etc/hostname"])
def test_cve_2026_11940_a_hard_link_to_a_link_that_leads_out(target: Path, link: str) -> None:
    unpack(
        target,
        [tar(member("s", SYM, linkname=link), member("h", LNK, linkname="s"), member("h", data=b"new", mode=0o777))],
    )
    assert (target / "h").read_bytes() == b"new" and (target / "s").is_symlink()
    through = [member("d", SYM, linkname=".."), member("h2", LNK, linkname="d/canary"), member("h2", data=b"changed")]
    assert refused(target, *through)


@pytest.mark.parametrize("version", ["0.0", "1.0"])
def test_cve_2025_58183_a_sparse_map_without_end(target: Path, version: str) -> None:
    """Maps are bounded, and those that are in headers are not read at all."""
    headers = {"GNU.sparse.major": version[0], "GNU.sparse.minor": version[2], "GNU.sparse.numblocks": "9" * 18}
    info = tarfile.TarInfo("sparse")
    info.size, info.pax_headers = 1 << 20, headers
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"99999999\n" + b"1\n" * (1 << 19)))
    with pytest.raises((InvalidArgument, ResourceExhausted), match="sparse"):
        unpack(target, [buffer.getvalue()], limits=LIMITS)


def test_cve_2025_58183_a_sparse_header_without_end(target: Path) -> None:
    """The old format: each block of the map says that another one follows."""
    header = bytearray(tarfile.TarInfo("sparse").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = b"S", 1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    block = b"".join(b"%011o\0%011o\0" % (number, 0) for number in range(21)) + b"\1" + bytes(7)
    with pytest.raises(ResourceExhausted, match="more than 65536 fragments"):
        unpack(target, itertools.chain([bytes(header)], itertools.repeat(block, 1 << 16)), limits=LIMITS)
