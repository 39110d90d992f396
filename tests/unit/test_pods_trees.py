"""Trees as a hostile container leaves them: deep, linked, large."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crio_native.pods.trees import disk_usage, remove_tree


def deep(path: Path, levels: int, name: str = "d") -> None:
    fd = os.open(path, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def test_remove(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "a" / "up").symlink_to("../../outside")
    (tree / "a" / "b" / "file").write_text("x")
    os.mkfifo(tree / "fifo")
    remove_tree(tree)
    assert not tree.exists() and (outside / "precious").exists()
    remove_tree(tree)


@pytest.mark.parametrize("name", ["d", "deep-0"])
def test_remove_a_very_deep_tree(tmp_path: Path, name: str) -> None:
    """Deeper than Python recurses, than a path is long, and than descriptors may be open."""
    tree = tmp_path / "tree"
    tree.mkdir()
    deep(tree, 3000, name)
    (tree / "deep-1").mkdir()
    (tree / "deep-1" / "file").write_text("x")
    (tree / "deep-2").write_text("a file with a name that we use")
    before = len(os.listdir("/proc/self/fd"))
    remove_tree(tree)
    assert not tree.exists() and len(os.listdir("/proc/self/fd")) == before


def test_remove_refuses_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="link"):
        remove_tree(tmp_path / "link")
    assert (tmp_path / "real").exists()


def test_usage(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 100_000)
    os.link(tmp_path / "one", tmp_path / "two")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "three").write_bytes(b"x" * 50_000)
    (tmp_path / "away").symlink_to("/")
    used, inodes = disk_usage(tmp_path)
    assert 150_000 <= used < 300_000 and inodes == 4


def test_usage_is_bounded(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "x").touch()
    assert disk_usage(tmp_path, entries=60)[1] < 70
    assert disk_usage(tmp_path, seconds=0) == (0, 0)
    deep(tmp_path, 3000)
    disk_usage(tmp_path)
    remove_tree(tmp_path / "d")
