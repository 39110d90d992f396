"""The store's own check and repair: damage is found, and costs the images that have it and no other."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crio_native.images import Image, ImageStore, upkeep

from ..images_support import BASE, DIR, TOP, load, made_directory, member, tar
from ..images_support import store as store

pytestmark = pytest.mark.root

# Everything that the count has to know: links, whiteouts, opaque directories, devices, what is replaced.
RICH = tar(
    *[member("./", DIR), member("d", DIR), member("d/.wh..wh..opq"), member("d/file", data=b"1" * 9000)],
    *[member("twin", b"1", linkname="d/file"), member("link", b"2", linkname="twin"), member("etc/.wh.motd")],
    *[member("pipe", b"6"), member("gone/x", data=b"1"), member("gone", data=b"2"), member("empty")],
)


def tree_of(store: ImageStore, image: Image, layer: int) -> Path:
    overlay = store.view(image.id)
    return Path(overlay.base) / overlay.lowers[layer]


def test_what_was_unpacked_is_whole(store: ImageStore, tmp_path: Path) -> None:
    load(store, tmp_path, "one", BASE, TOP, RICH)
    assert upkeep.check(store) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: os.truncate(tree / "d/file", 0),
        lambda tree: (tree / "empty").unlink(),
        lambda tree: (tree / "more").write_text("1"),
        lambda tree: shutil.rmtree(tree / "d"),
        shutil.rmtree,
    ],
    ids=["cut", "lost", "more", "directory", "all"],
)
def test_damage_costs_its_own_images_and_no_other(
    store: ImageStore, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    hurt, sound = load(store, tmp_path, "one", BASE, RICH), load(store, tmp_path, "two", BASE, TOP)
    damage(tree_of(store, hurt, 0))
    (found,) = upkeep.check(store)
    assert (found.layer, found.images) == (hurt.layers[1], (hurt.id,)) and hurt.layers[1] in str(found)
    assert upkeep.repair(store) == ([found], [])
    assert [image.id for image in store.list()] == [sound.id]
    assert upkeep.check(store) == []
    assert load(store, made_directory(tmp_path / "again"), "one", BASE, RICH).id == hurt.id
    assert upkeep.check(store) == []


def test_an_image_in_use_stays_and_is_told(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", RICH)
    (tree_of(store, image, 0) / "empty").unlink()
    _, left = upkeep.repair(store, in_use={image.id: "container c1"})
    assert len(left) == 1 and "container c1" in left[0]
    assert store.get(image.id)


def test_the_command_finds_and_mends(tmp_path: Path) -> None:
    (tmp_path / "crio.conf").write_text(
        f'[crio]\nroot = "{tmp_path}/root"\nrunroot = "{tmp_path}/run"\nlog_dir = "{tmp_path}/log"\n'
        f'version_file = "{tmp_path}/v"\nclean_shutdown_file = "{tmp_path}/c"\n'
    )
    for name in ("root", "none"):
        (tmp_path / name).mkdir()
    with contextlib.closing(ImageStore(tmp_path / "root/images")) as store:
        image = load(store, tmp_path, "one", RICH)
        tree = tree_of(store, image, 0)
        busy = run(tmp_path, "--images")
        assert busy.returncode == 1 and "in use by another process" in busy.stderr
    assert "every layer has its files" in run(tmp_path, "--images").stdout
    (tree / "empty").unlink()
    found = run(tmp_path, "--images")
    assert found.returncode == 1 and f"layer {image.layers[0]}" in found.stdout
    assert "damaged" in run(tmp_path, "--repair").stdout
    assert "every layer has its files" in run(tmp_path, "--repair").stdout
    with contextlib.closing(ImageStore(tmp_path / "root/images")) as store:
        assert store.list() == []


def run(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("crio-native"))
    line = [program, "--config", f"{directory}/crio.conf", "--config-dir", f"{directory}/none", "check", *flags]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)
