"""What is saved is what skopeo and ourselves read again: the same files, with all that matters of them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import AlreadyExists, CrioError, InvalidArgument, NotFound, Unimplemented
from crio_native.images import Image, ImageStore
from crio_native.images.work import Stop

from ..images_support import (
    BASE,
    TOP,
    layers_of,
    load,
    member,
    skopeo,
    tar,
    tree,
    write_layout,
)
from ..images_support import store as store
from .test_images_formats import artifact

pytestmark = pytest.mark.root

DIR = tarfile.DIRTYPE
EVERYTHING = tar(
    member("./", DIR, mode=0o711, uid=3, gid=4),
    member("d", DIR, mode=0o1777, uid=7, mtime=99),
    member("d/file", data=b"content", uid=1, gid=2, mode=0o4755, pax_headers={"mtime": "12.5"}),
    member("d/hard", tarfile.LNKTYPE, linkname="d/file"),
    member("d/soft", tarfile.SYMTYPE, linkname="/x"),
    member("d/" + "long" * 40, data=b"x", pax_headers={"SCHILY.xattr.user.key": "v\xe4lue"}),
    member("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
    member("fifo", tarfile.FIFOTYPE),
    member("gone/.wh.old"),
    member("hidden/.wh..wh..opq"),
    member("hidden/new", data=b"n"),
)
SAVED = ["oci", "oci-archive", "docker-archive", "dir"]


def directories(store: ImageStore, image: Image, container: Path) -> list[dict[str, Any]]:
    """What each layer holds, but for the times of whiteouts and of the layer's own directory: no archive has them."""
    found = [tree(layer) for layer in layers_of(store, image, container)]
    return [
        {name: (*row[:4], 0, *row[5:]) if name == "." or row[0] == "0o20000" else row for name, row in layer.items()}
        for layer in found
    ]


@pytest.mark.parametrize("transport", SAVED)
def test_what_is_saved_comes_back(store: ImageStore, tmp_path: Path, transport: str) -> None:
    image = load(store, tmp_path, "everything", BASE, EVERYTHING, TOP)
    before = directories(store, image, tmp_path / "before")
    target = f"{transport}:{tmp_path}/saved"
    assert store.save(image.id, target) is image
    (loaded,) = store.load(target)
    assert directories(store, loaded, tmp_path / "after") == before
    assert loaded.config["config"] == image.config["config"]
    if transport != "dir":
        assert loaded.names == ("localhost/everything:latest",)
    assert list((tmp_path / "store/tmp").iterdir()) == []


@pytest.mark.parametrize("transport", SAVED)
def test_skopeo_reads_what_is_saved(store: ImageStore, tmp_path: Path, transport: str) -> None:
    image = load(store, tmp_path, "everything", BASE, EVERYTHING)
    store.save("localhost/everything", f"{transport}:{tmp_path}/saved")
    seen = json.loads(skopeo("inspect", f"{transport}:{tmp_path}/saved"))
    assert len(seen["Layers"]) == 2
    assert seen["Architecture"] == image.config["architecture"]
    skopeo("copy", f"{transport}:{tmp_path}/saved", f"dir:{tmp_path}/copied")
    (copied,) = store.load(f"dir:{tmp_path}/copied")
    assert directories(store, copied, tmp_path / "b") == directories(store, image, tmp_path / "a")


def test_equal_images_make_equal_archives(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "everything", EVERYTHING)
    for name in ("one", "two"):
        store.save(image.id, f"docker-archive:{tmp_path}/{name}")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_root_that_hides_all_below_stays_so(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "opaque", BASE, tar(member(".wh..wh..opq"), member("x", data=b"1")))
    store.save(image.id, f"oci:{tmp_path}/saved")
    (loaded,) = store.load(f"oci:{tmp_path}/saved")
    assert len(layers_of(store, loaded, tmp_path / "c")) == 1


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("oci:relative", InvalidArgument, "target: not an absolute path"),
        ("/no/transport", InvalidArgument, "target: not an absolute path"),
        ("docker://x", InvalidArgument, "target: not an absolute path"),
        ("oci:/a:b", InvalidArgument, "without ':'"),
        ("oci:/tmp", AlreadyExists, "/tmp exists"),
        ("docker-archive:/etc/passwd", AlreadyExists, "/etc/passwd exists"),
    ],
)
def test_a_bad_target_is_refused(
    store: ImageStore, tmp_path: Path, target: str, error: type[CrioError], words: str
) -> None:
    image = load(store, tmp_path, "app", BASE)
    with pytest.raises(error, match=words):
        store.save(image.id, target)


def test_an_image_that_is_not_there_is_told(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        store.save("localhost/none", f"oci:{tmp_path}/x")


def test_an_artifact_is_not_saved(store: ImageStore, tmp_path: Path) -> None:
    made, _ = artifact(("a", b"1"))
    (image,) = store.load(f"oci:{write_layout(tmp_path / 'artifact', made)}")
    with pytest.raises(Unimplemented, match="is an artifact"):
        store.save(image.id, f"oci:{tmp_path}/x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("transport", SAVED)
def test_a_stop_leaves_nothing(
    store: ImageStore, tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = load(store, tmp_path, "app", EVERYTHING)
    checks = iter([None] * 5)
    monkeypatch.setattr(Stop, "check", lambda self: next(checks))
    with pytest.raises(StopIteration):
        store.save(image.id, f"{transport}:{tmp_path}/saved")
    assert not (tmp_path / "saved").exists()
    assert list((tmp_path / "store/tmp").iterdir()) == []
