"""Images that skopeo left in a containers/storage root, with either driver, are the same images in ours."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from crio_native.errors import CrioError, InvalidArgument, NotFound, Unavailable
from crio_native.images import ImageStore

from ..images_support import BASE, TOP, assert_nothing_left, layers_of, member, picture, sha256, tar, write_layout
from ..images_support import store as store
from .test_images_save import EVERYTHING

pytestmark = pytest.mark.root

LONG = tar(member("long/" + "x" * 200, data=os.urandom(300_000)), member("last", data=b"end"))


@pytest.fixture(scope="module", params=["overlay", "vfs"])
def storage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with two images; skopeo mounts in it, so it runs in a mount namespace of its own."""
    directory = tmp_path_factory.mktemp(f"storage-{request.param}")
    for name, layers in (("app", (BASE, EVERYTHING, TOP)), ("other", (BASE, LONG))):
        layout = write_layout(directory / f"layout-{name}", picture(*layers))
        target = f"containers-storage:[{request.param}@{directory}/root+{directory}/run]localhost/{name}:v1"
        command = ["unshare", "-m", "--propagation", "private", "skopeo", "--insecure-policy", "copy"]
        done = subprocess.run([*command, f"oci:{layout}:latest", target], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    return directory


def test_all_images_come_with_names_and_digests(store: ImageStore, storage: Path, tmp_path: Path) -> None:
    loaded = {image.names: image for image in store.load(f"containers-storage:{storage}/root")}
    assert set(loaded) == {("localhost/app:v1",), ("localhost/other:v1",)}
    (from_layout,) = store.load(f"oci:{storage}/layout-app")
    image = loaded["localhost/app:v1",]
    assert image.id == from_layout.id
    assert image.layers == (sha256(BASE), sha256(EVERYTHING), sha256(TOP))
    index = json.loads((storage / "layout-app/index.json").read_text())
    assert image.digests == (f"localhost/app@{index['manifests'][0]['digest']}",)


def test_one_image_comes_by_its_name(store: ImageStore, storage: Path, tmp_path: Path) -> None:
    (image,) = store.load(f"containers-storage:{storage}/root:localhost/app:v1")
    assert image.names == ("localhost/app:v1",)
    assert (layers_of(store, image, tmp_path / "c")[0] / "etc/issue").read_text() == "new"
    with pytest.raises(NotFound, match="the storage does not have it"):
        store.load(f"containers-storage:{storage}/root:localhost/none")


def test_a_bare_path_is_recognized(store: ImageStore, storage: Path) -> None:
    assert len(store.load(f"{storage}/root")) == 2


def copied(storage: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-a", storage / "root", tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def driver_of(root: Path) -> str:
    return "overlay" if (root / "overlay-images").exists() else "vfs"


def packed(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0)


@pytest.mark.parametrize(
    ("pattern", "data", "error", "words"),
    [
        ("*-images/images.json", b"{", InvalidArgument, "not JSON"),
        ("*-images/images.json", b"[5]", InvalidArgument, "not a list of objects"),
        ("*-images/images.json", b'[{"id":"../../etc","names":["localhost/app:v1"]}]', InvalidArgument, "64 hex"),
        ("*-images/images.json", b'[{"id":"%s","names":["localhost/app:v1"]}]' % (b"0" * 64), NotFound, "file"),
        ("*-layers/layers.json", b"[]", NotFound, "does not have it"),
        ("*-layers/*.tar-split.gz", None, NotFound, "tar-split.gz"),
        ("*-layers/*.tar-split.gz", packed(b"{}\n"), InvalidArgument, "tar-split: malformed"),
        ("*-layers/*.tar-split.gz", packed(b'{"type":2,"payload":"AAAA"}\n'), Unavailable, "gave 3 bytes"),
        (
            "*-layers/*.tar-split.gz",
            packed(b'{"type":1,"name":"../../../../../../../etc/passwd","size":5}\n'),
            NotFound,
            "etc/passwd",
        ),
        ("**/etc/issue", b"changed", Unavailable, "gave"),
    ],
)
def test_a_damaged_storage_is_refused(
    store: ImageStore,
    storage: Path,
    tmp_path: Path,
    pattern: str,
    data: bytes | None,
    error: type[CrioError],
    words: str,
) -> None:
    root = copied(storage, tmp_path)
    for path in [*root.glob(pattern)]:
        path.unlink()
        if data is not None:
            path.write_bytes(data)
    with pytest.raises(error, match=words):
        store.load(f"containers-storage:{root}:localhost/app:v1")
    assert_nothing_left(tmp_path / "store")
