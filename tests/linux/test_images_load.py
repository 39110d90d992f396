"""Loading OCI layouts and docker-archives from disk, honest and hostile ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from crio_native.errors import (
    CrioError,
    InvalidArgument,
    NotFound,
)
from crio_native.images import ImageStore

from ..images_support import (
    BASE,
    TOP,
    assert_nothing_left,
    layers_of,
    member,
    picture,
    sha256,
    tar,
    write_layout,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry
from ..images_support import store as store

pytestmark = pytest.mark.root


# Loading


def skopeo(source: str, target: str) -> None:
    subprocess.run(["skopeo", "copy", "-q", source, target], check=True)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive"])
def test_what_skopeo_wrote_is_loaded(store: ImageStore, tmp_path: Path, transport: str, bare: bool) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE, TOP), "registry.example/team/app:v1")
    path = tmp_path / "image"
    skopeo(f"oci:{layout}:registry.example/team/app:v1", f"{transport}:{path}:registry.example/team/app:v1")
    (image,) = store.load(str(path) if bare else f"{transport}:{path}")
    assert image.names == ("registry.example/team/app:v1",)
    assert image.layers == (sha256(BASE), sha256(TOP))
    assert bool(image.manifest_digest) == (transport != "docker-archive")
    assert_nothing_left(tmp_path / "store", layers=2)


def test_a_compressed_archive_is_loaded(store: ImageStore, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE))
    subprocess.run(["tar", "-C", layout, "-czf", tmp_path / "my-app.tar.gz", "."], check=True)
    (image,) = store.load(f"oci-archive:{tmp_path}/my-app.tar.gz")
    assert image.names == ("localhost/my-app:latest",)


def test_an_archive_with_gzip_layers_is_loaded(store: ImageStore, tmp_path: Path) -> None:
    import gzip

    image = picture(BASE)
    config = next(data for data in image.blobs.values() if b"rootfs" in data)
    manifest = [{"Config": "c.json", "RepoTags": ["app:1", "app:2"], "Layers": ["a/layer.tar"]}]
    archive = tar(
        member("a/layer.tar", tarfile.SYMTYPE, linkname="../b.tar"),
        member("b.tar", data=gzip.compress(BASE)),
        member("c.json", data=config),
        member("manifest.json", data=json.dumps(manifest).encode()),
    )
    (tmp_path / "x.tar").write_bytes(archive)
    (loaded,) = store.load(f"docker-archive:{tmp_path}/x.tar")
    assert loaded.names == ("docker.io/library/app:1", "docker.io/library/app:2")
    assert loaded.layers == (sha256(BASE),)
    with pytest.raises(NotFound, match="app:3"):
        store.load(f"docker-archive:{tmp_path}/x.tar:app:3")


def test_a_layout_of_several_images(store: ImageStore, tmp_path: Path) -> None:
    one, two = picture(BASE), picture(TOP)
    directory = write_layout(tmp_path / "layout", one, "one")
    write_layout(tmp_path / "other", two)
    shutil.copytree(tmp_path / "other/blobs", directory / "blobs", dirs_exist_ok=True)
    index = json.loads((directory / "index.json").read_text())
    index["manifests"].append(two.manifest | {"annotations": {"org.opencontainers.image.ref.name": "two"}})
    (directory / "index.json").write_text(json.dumps(index))
    assert [image.names for image in store.load(f"oci:{directory}:two")] == [("localhost/layout:two",)]
    assert len(store.load(f"oci:{directory}")) == 2
    with pytest.raises(NotFound, match="'three' not found: the layout has one, two"):
        store.load(f"oci:{directory}:three")


def test_an_image_without_layers(store: ImageStore, tmp_path: Path) -> None:
    (image,) = store.load(f"oci:{write_layout(tmp_path / 'layout', picture())}")
    assert list(layers_of(store, image, tmp_path / "c")[0].iterdir()) == []


def spoil_layout(directory: Path, name: str, data: bytes | None) -> None:
    path = directory / name
    path.unlink()
    if data is not None:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("oci-layout", None, InvalidArgument, "this is no OCI layout"),
        ("index.json", None, NotFound, "index.json"),
        ("index.json", b"{}", InvalidArgument, "index.json.schemaVersion"),
        ("index.json", b'{"schemaVersion":2}', InvalidArgument, "index.json.manifests"),
        ("index.json", b'{"schemaVersion":2,"manifests":[]}', NotFound, "no image with a name"),
        ("index.json", b"x" * (5 << 20), InvalidArgument, "larger than"),
        (
            "index.json",
            b'{"schemaVersion":2,"manifests":[{"mediaType":"x","size":1,"digest":"sha256:../../x"}]}',
            InvalidArgument,
            "digest",
        ),
    ],
)
def test_a_broken_layout_is_refused(
    store: ImageStore, tmp_path: Path, name: str, data: bytes | None, error: type[CrioError], words: str
) -> None:
    directory = write_layout(tmp_path / "layout", picture(BASE))
    spoil_layout(directory, name, data)
    with pytest.raises(error, match=words):
        store.load(f"oci:{directory}")
    assert_nothing_left(tmp_path / "store")


def test_a_layout_leads_nowhere_outside(store: ImageStore, tmp_path: Path) -> None:
    image = picture(BASE)
    directory = write_layout(tmp_path / "layout", image)
    (tmp_path / "outside").mkdir()
    shutil.move(directory / "blobs/sha256", tmp_path / "outside/sha256")
    os.symlink(tmp_path / "outside/sha256", directory / "blobs/sha256")
    with pytest.raises(NotFound, match="blobs/sha256"):
        store.load(f"oci:{directory}")


def test_a_layout_with_a_fifo_does_not_hang(store: ImageStore, tmp_path: Path) -> None:
    directory = write_layout(tmp_path / "layout", picture(BASE))
    spoil_layout(directory, "index.json", None)
    os.mkfifo(directory / "index.json")
    with pytest.raises(InvalidArgument, match="not a regular file"):
        store.load(f"oci:{directory}")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("oci:/no/such", NotFound, "file '/no/such' not found"),
        ("/no/such", NotFound, "file '/no/such' not found"),
        ("oci:relative", InvalidArgument, "source: not an absolute path"),
        ("busybox", InvalidArgument, "source: not an absolute path"),
        ("dir:/tmp", InvalidArgument, "no directory of the dir transport"),
        ("containers-storage:/tmp", InvalidArgument, "no root of a containers/storage"),
        ("docker-daemon:/tmp", InvalidArgument, "source: not an absolute path"),
        ("oci:/etc/passwd", InvalidArgument, "not a directory"),
        ("oci-archive:/tmp", InvalidArgument, "not a file"),
        ("docker-archive:/dev/null", InvalidArgument, "not a file"),
        ("oci-archive:/etc/passwd", InvalidArgument, "archive /etc/passwd"),
        ("/proc/sys", InvalidArgument, "no OCI layout, docker-archive, dir or containers-storage"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    store: ImageStore, tmp_path: Path, source: str, error: type[CrioError], words: str
) -> None:
    with pytest.raises(error, match=words):
        store.load(source)
    assert_nothing_left(tmp_path / "store")
