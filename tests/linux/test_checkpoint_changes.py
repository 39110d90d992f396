"""What a container changed in its root file system, as a checkpoint's archive has it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from crio_native.images import exporting, unpacking
from crio_native.pods import checkpoint

pytestmark = pytest.mark.root


def write(path: Path, size: int, *data: tuple[int, bytes]) -> None:
    with path.open("wb") as file:
        for at, text in data:
            file.seek(at)
            file.write(text)
        file.truncate(size)


@pytest.mark.parametrize("reader", ["ours", "tar"])
def test_a_file_of_holes_is_checkpointed_as_holes(tmp_path: Path, reader: str) -> None:
    """Else one that a container made in a moment would fill the disk while the container is frozen."""
    upper, back = tmp_path / "upper", tmp_path / "back"
    (upper / "d").mkdir(parents=True)
    back.mkdir()
    write(upper / "d/middle", 5 << 30, (1 << 20, b"first"), (4 << 30, b"last"))
    write(upper / "d/ends", 1 << 30, (0, b"first"), ((1 << 30) - 4, b"last"))
    write(upper / "only-a-hole", 1 << 30)
    write(upper / "plain", 100_000, *((at, b"x" * 1000) for at in range(0, 100_000, 1000)))
    write(upper / "empty", 0)
    os.link(upper / "d/middle", upper / "d/second")
    os.setxattr(upper / "d/middle", "user.kept", b"yes")
    archive = tmp_path / "changes.tar"
    assert checkpoint._write_changes(upper, archive) == []
    assert archive.stat().st_size < 1 << 20
    if reader == "ours":
        with archive.open("rb") as file:
            unpacking.unpack(back, iter(lambda: file.read(1 << 20), b""))
    else:
        subprocess.run(["tar", "-C", back, "--xattrs", "-xf", archive], check=True)
    for path in [path for path in upper.rglob("*") if path.is_file()]:
        copy = back / path.relative_to(upper)
        assert copy.stat().st_size == path.stat().st_size
        assert copy.stat().st_blocks <= path.stat().st_blocks + 16
        assert data_of(copy) == data_of(path)
    assert (back / "d/second").samefile(back / "d/middle")
    assert os.getxattr(back / "d/middle", "user.kept") == b"yes"


def data_of(path: Path) -> list[tuple[int, bytes]]:
    """What is not zero of each range, at which place."""
    found = []
    with path.open("rb") as file:
        end = 0
        with contextlib.suppress(OSError):
            while True:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                data = os.pread(file.fileno(), end - start, start)
                found.append((start + len(data) - len(data.lstrip(b"\0")), data.strip(b"\0")))
    return found


def test_of_too_many_holes_the_largest_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "MAX_FRAGMENTS", 4)
    (tmp_path / "upper").mkdir()
    (tmp_path / "back").mkdir()
    places = [0, 1 << 20, 3 << 20, 20 << 20, 21 << 20, 60 << 20]
    write(tmp_path / "upper/f", 61 << 20, *((at, b"here") for at in places))
    checkpoint._write_changes(tmp_path / "upper", tmp_path / "changes.tar")
    assert (tmp_path / "changes.tar").stat().st_size < 10 << 20
    with (tmp_path / "changes.tar").open("rb") as file:
        unpacking.unpack(tmp_path / "back", iter(lambda: file.read(1 << 20), b""))
    assert (tmp_path / "back/f").read_bytes() == (tmp_path / "upper/f").read_bytes()
