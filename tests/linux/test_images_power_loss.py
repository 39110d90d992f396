"""Power lost at every barrier of a store's life: afterwards it opens, and every image is whole or gone.

The store is on ext4 on a disk that records its writes and flushes (`recorded_disk`).  Each state that the record
permits is mounted, as after the reboot, and looked at: what was acknowledged before is there, each file of each image
is what it was, and the store takes what it has lost once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.images import ImageStore

from ..images_support import BASE, TOP, in_private_mounts, member, picture, tar, write_layout
from .recorded_disk import cuts, recorded

pytestmark = pytest.mark.root

SIZE = 96 << 20  # bytes of the disk
CUTS = 40
# Each image's layers, by what makes their files; `shared` is the lowest of two.
FILES = {
    "shared": {f"lib/f{number}": hashlib.sha256(b"%d" % number).digest() * 300 for number in range(150)},
    "app": {f"app/{number}": os.urandom(30_000) for number in range(100)},
    "other": {f"other/{number}": os.urandom(200) for number in range(400)},
}


def layer(name: str) -> bytes:
    return tar(*(member(path, data=data) for path, data in FILES[name].items()))


def test_an_image_is_whole_or_gone_wherever_the_power_fails(tmp_path: Path) -> None:
    for name, layers in {"one": ["shared", "app"], "two": ["shared", "other"], "three": ["app"]}.items():
        extra = [BASE, TOP] if name == "three" else []
        write_layout(tmp_path / name, picture(*map(layer, layers), *extra))
    (tmp_path / "files.json").write_text(
        json.dumps({path: hashlib.sha256(data).hexdigest() for files in FILES.values() for path, data in files.items()})
    )
    done = in_private_mounts(
        "import sys; from pathlib import Path; "
        "from tests.linux.test_images_power_loss import lose_power; lose_power(Path(sys.argv[1]))",
        tmp_path,
        seconds=240,
    )
    looked, found = map(int, done.stdout.split())
    assert looked >= 20  # so many barriers there are, or the record has missed them
    assert found > looked // 2  # images were really seen after cuts


def lose_power(directory: Path) -> None:
    """In a mount namespace of its own: the store's life on the recorded disk, then each cut of it."""
    work = directory / "work"
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work], check=True)
    backing, record, mountpoint, disk = work / "backing", work / "record", work / "fuse", work / "disk"
    for made in (mountpoint, disk):
        made.mkdir()
    with backing.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", backing], check=True)
    shutil.copy(backing, work / "start")
    with recorded(mountpoint, backing, record) as file:
        with mounted(file, disk):
            live(ImageStore(disk / "store"), directory, mountpoint)
    looked = found = 0
    for cut in cuts(record, work / "start", work / "cut", CUTS, seed=5):
        with mounted(cut.image, disk):
            found += look(disk / "store", directory, cut.notes)
        looked += 1
    print(looked, found)


@contextlib.contextmanager
def mounted(image: Path, target: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop,nodiscard", image, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def live(store: ImageStore, layouts: Path, mountpoint: Path) -> None:
    """What is recorded.  A note is made before an image may go, and after it has been promised."""
    with contextlib.closing(store):
        for name in ("one", "two"):
            store.load(f"oci:{layouts}/{name}")
            (mountpoint / f"+{name}").exists()
        (mountpoint / "-one").exists()
        store.remove("localhost/one:latest")
        (mountpoint / "=one").exists()
        store.load(f"oci:{layouts}/three")
        (mountpoint / "+three").exists()
        (mountpoint / "-one").exists()
        store.load(f"oci:{layouts}/one")
        (mountpoint / "+one").exists()


def look(root: Path, layouts: Path, notes: tuple[str, ...]) -> int:
    """What a cut has left; the number of images."""
    hashes = json.loads((layouts / "files.json").read_text())
    with contextlib.closing(ImageStore(root)) as store:
        there = {image.names[0].removeprefix("localhost/").removesuffix(":latest") for image in store.list()}
        state = {note[1:]: note[0] for note in notes}  # the last word about each
        assert {name for name, word in state.items() if word == "+"} <= there, (notes, there)
        assert not there & {name for name, word in state.items() if word == "="}, (notes, there)
        for image in store.list():
            overlay = store.view(image.id)
            for lower in overlay.lowers:
                check_files(Path(overlay.base) / lower, hashes)
        names = [path.name for path in (root / "tmp").iterdir()]
        assert names == []
        for name in {"one", "two", "three"} - there:
            store.load(f"oci:{layouts}/{name}")
    return len(there)


def check_files(tree: Path, hashes: dict[str, str]) -> None:
    for path in tree.rglob("*"):
        if path.is_file() and (known := hashes.get(os.fspath(path.relative_to(tree)))):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == known, path
    count = sum(path.is_file() for path in tree.rglob("*"))
    expected = {len(files) for files in FILES.values()} | {0, 1, 2}  # of BASE and TOP
    assert count in expected, (tree, count)
