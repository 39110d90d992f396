"""The store: pull from a real registry, load from disk, mount what comes out, and what failures leave behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import (
    AlreadyExists,
    CrioError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionRefused,
    ResourceExhausted,
    StepFailed,
    Unavailable,
    Unimplemented,
)
from crio_native.images import Credentials, Image, ImageStore, Platform, Progress
from crio_native.images import registry as client
from crio_native.images.manifests import OCI_INDEX
from crio_native.images.unpacker import Limits

from ..images_support import (
    HostileRegistry,
    Picture,
    Registry,
    in_private_mounts,
    in_turn,
    member,
    picture,
    reply,
    sha256,
    tar,
    tree,
    write_layout,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry

pytestmark = pytest.mark.root

DIR = tarfile.DIRTYPE
BASE = tar(member("bin", DIR), member("bin/sh", data=b"shell", mode=0o755), member("etc/motd", data=b"old"))
TOP = tar(member("etc/.wh.motd"), member("etc/issue", data=b"new"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    made = ImageStore(tmp_path / "store")
    yield made
    made.close()


def assert_nothing_left(root: Path, layers: int = 0) -> None:
    """The store holds so many layers and no scraps."""
    assert list((root / "tmp").iterdir()) == []
    assert len(list((root / "layers").iterdir())) == layers + 1


def lower_of(store: ImageStore, image: Image, container: Path, layer: int = 0) -> Path:
    container.mkdir()
    overlay = store.prepare_root(image.id, container)
    return Path(overlay.base) / overlay.lowers[layer]


# Pulling


@pytest.mark.parametrize("compress", [True, False])
def test_an_image_comes_from_a_real_registry(
    store: ImageStore, registry: Registry, tmp_path: Path, compress: bool
) -> None:
    image = picture(BASE, TOP, compress=compress)
    name = registry.push("team/app", "v1", image)
    reports: list[Progress] = []
    pulled = store.pull(name, progress=reports.append)
    repository = name.removesuffix(":v1")
    assert pulled.names == (name,)
    assert pulled.digests == (f"{repository}@{image.manifest['digest']}",)
    assert pulled.manifest_digest == image.manifest["digest"]
    assert pulled.layers == (sha256(BASE), sha256(TOP))
    assert pulled.config["config"]["Cmd"] == ["/bin/true"]
    assert sha256(json.dumps(pulled.config).encode()) == pulled.id
    assert pulled.size > 2 * 4096
    done = [report for report in reports if report.stage == "done"]
    assert len(done) == 2 and all(report.current == report.total for report in done)
    assert (lower_of(store, pulled, tmp_path / "c") / "etc/issue").read_text() == "new"
    for ref in (name, pulled.id, pulled.id[7:], pulled.id[7:20], f"sha256:{pulled.id[7:20]}", *pulled.digests):
        assert store.get(ref) is pulled
    assert list(store.list()) == [pulled]
    assert_nothing_left(tmp_path / "store", layers=2)


def test_a_second_pull_unpacks_nothing(store: ImageStore, registry: Registry) -> None:
    first = store.pull(registry.push("team/app", "v1", picture(BASE, TOP)))
    name = registry.push("team/other", "v2", picture(BASE, TOP))
    reports: list[Progress] = []
    assert store.pull(name, progress=reports.append).id == first.id
    assert {report.stage for report in reports} == {"exists"}
    assert len(store.get(first.id).names) == 2


def test_a_pull_by_digest_gives_no_name(store: ImageStore, registry: Registry) -> None:
    image = picture(BASE)
    repository = registry.push("team/app", "v1", image).removesuffix(":v1")
    pulled = store.pull(f"{repository}:whatever@{image.manifest['digest']}")
    assert pulled.names == ()
    assert store.get(f"{repository}@{image.manifest['digest']}") is pulled
    with pytest.raises(NotFound):
        store.get(f"{repository}:v1")


def index_of(*entries: tuple[Picture, str, str]) -> dict[str, Any]:
    described = [
        image.manifest | {"platform": {"os": "linux", "architecture": architecture, "variant": variant}}
        for image, architecture, variant in entries
    ]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": described}


def test_the_right_image_of_an_index_is_pulled(store: ImageStore, registry: Registry) -> None:
    images = {name: picture(tar(member(name, data=b"x"))) for name in ("s390x", "arm64", "amd64", "riscv64")}
    for image in images.values():
        registry.push("team/multi", image.manifest["digest"], image)
    document = index_of(*[(image, name, "") for name, image in images.items()])
    name = registry.push("team/multi", "v1", Picture({}, {"digest": ""}), document=document)
    repository = name.removesuffix(":v1")
    pulled = store.pull(name, platform=Platform("s390x"))
    assert pulled.manifest_digest == images["s390x"].manifest["digest"]
    index = f"{repository}@{sha256(json.dumps(document).encode())}"
    assert set(pulled.digests) == {index, f"{repository}@{pulled.manifest_digest}"}
    assert store.get(index) is pulled
    ours = store.pull(name)
    assert ours.manifest_digest == images[Platform.host().architecture].manifest["digest"]
    assert store.get(pulled.id).names == ()
    with pytest.raises(NotFound, match=r"linux/mips.* has linux/amd64, linux/arm64"):
        store.pull(name, platform=Platform("mips"))


def test_a_moved_tag_leaves_the_old_image_without_a_name(store: ImageStore, registry: Registry) -> None:
    old = store.pull(registry.push("team/app", "latest", picture(BASE)))
    new = store.pull(registry.push("team/app", "latest", picture(TOP)))
    assert store.get(old.id).names == ()
    assert store.get(new.names[0]).id == new.id


def test_docker_images_come_too(store: ImageStore, registry: Registry, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE, TOP))
    target = f"docker://{registry.address}/team/docker:v2"
    command = ["skopeo", "copy", "-q", "--dest-tls-verify=false", "--format=v2s2", f"oci:{layout}:latest", target]
    subprocess.run([*command], check=True)
    assert store.pull(target.removeprefix("docker://")).layers == (sha256(BASE), sha256(TOP))


def test_what_comes_out_is_what_skopeo_and_gnu_tar_make(store: ImageStore, registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree("/usr/share/doc/bash", source / "doc", symlinks=True)
    os.chown(source / "doc", 10, 20)
    os.link(source / "doc/copyright", source / "twin")
    layer = subprocess.run(["tar", "-C", source, "-cf", "-", "."], check=True, capture_output=True).stdout
    name = registry.push("team/doc", "v1", picture(layer))
    pulled = store.pull(name)
    copy = tmp_path / "copy"
    subprocess.run(["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"dir:{copy}"], check=True)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    peer = tmp_path / "peer"
    peer.mkdir()
    blob = copy / manifest["layers"][0]["digest"].removeprefix("sha256:")
    subprocess.run(["tar", "-C", peer, "-xpzf", blob], check=True)
    assert tree(lower_of(store, pulled, tmp_path / "c")) == tree(peer)


def test_one_pull_serves_all_who_want_the_same(store: ImageStore, hostile: HostileRegistry) -> None:
    image = picture(BASE)
    name = hostile.serve("app", image)
    path = next(path for path in hostile.routes if image.manifest["digest"] not in path and "/blobs/" in path)
    serve, gate = hostile.routes[path], threading.Event()

    def wait(request: BaseHTTPRequestHandler) -> None:
        gate.wait(10)
        serve(request)

    hostile.routes[path] = wait
    results: list[Image] = []
    threads = [threading.Thread(target=lambda: results.append(store.pull(name))) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    gate.set()
    for thread in threads:
        thread.join()
    assert len({result.id for result in results}) == 1 and len(results) == 5
    assert hostile.count("/manifests/latest") == 1


def test_a_layer_is_unpacked_once_for_two_pulls_at_once(store: ImageStore, registry: Registry, tmp_path: Path) -> None:
    big = tar(member("big", data=os.urandom(4 << 20)))
    names = [registry.push(f"team/n{n}", "v1", picture(big, tar(member(f"n{n}")))) for n in range(4)]
    threads = [threading.Thread(target=store.pull, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list()) == 4
    assert_nothing_left(tmp_path / "store", layers=5)


# Failures of a pull, and that nothing is left


def blob_path(image: Picture, layer: bytes) -> str:
    import gzip

    return f"/v2/app/blobs/{sha256(gzip.compress(layer, 1, mtime=0))}"


def spoil_digest(server: HostileRegistry, image: Picture) -> None:
    path = blob_path(image, TOP)
    server.routes[path] = reply(200, image.blobs[path[-71:]][:-1] + b"!")


def spoil_length(server: HostileRegistry, image: Picture) -> None:
    server.routes[blob_path(image, TOP)] = reply(200, b"short")


def cut_short(server: HostileRegistry, image: Picture) -> None:
    path = blob_path(image, TOP)
    data = image.blobs[path[-71:]]

    def answer(request: BaseHTTPRequestHandler) -> None:
        reply(200, data[:50], {"Content-Length": str(len(data))})(request)
        request.close_connection = True

    server.routes[path] = answer


def never_end(server: HostileRegistry, image: Picture) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        reply(200, b"", {"Content-Length": "9" * 18})(request)
        while True:
            request.wfile.write(b"x" * 65536)

    server.routes[blob_path(image, TOP)] = answer


def lose_blob(server: HostileRegistry, image: Picture) -> None:
    del server.routes[blob_path(image, TOP)]


def lose_config(server: HostileRegistry, image: Picture) -> None:
    for digest, data in image.blobs.items():
        if b"rootfs" in data:
            server.routes[f"/v2/app/blobs/{digest}"] = reply(500)


def change_manifest(server: HostileRegistry, image: Picture) -> None:
    headers = {"Docker-Content-Digest": image.manifest["digest"]}
    server.routes["/v2/app/manifests/latest"] = reply(200, image.blobs[image.manifest["digest"]] + b" ", headers)


def forbid(server: HostileRegistry, image: Picture) -> None:
    server.routes["/v2/app/manifests/latest"] = reply(403)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoil_digest, Unavailable, "gave other content than sha256:"),
        (spoil_length, Unavailable, "announces 5 bytes"),
        (cut_short, Unavailable, "cut sha256:.* short at 50 of "),
        (never_end, Unavailable, "announces 999999999999999999 bytes"),
        (lose_blob, NotFound, "HTTP 404"),
        (lose_config, Unavailable, "HTTP 500"),
        (change_manifest, Unavailable, "gave other content"),
        (forbid, PermissionRefused, "HTTP 403"),
    ],
)
def test_a_registry_that_fails_is_named_and_nothing_is_left(
    store: ImageStore,
    hostile: HostileRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[HostileRegistry, Picture], None],
    error: type[CrioError],
    words: str,
) -> None:
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    monkeypatch.setattr(client, "RESUMES", 0)
    image = picture(BASE, TOP)
    name = hostile.serve("app", image)
    spoil(hostile, image)
    with pytest.raises(error, match=words) as caught:
        store.pull(name)
    assert hostile.address in str(caught.value)
    assert store.list() == []
    assert_nothing_left(tmp_path / "store")
    hostile.serve("app", image)
    assert store.pull(name).names == (name,)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (tar(member("../x", data=b"1")), "'..' in it"),
        (tar(member("l", tarfile.SYMTYPE, linkname="/etc"), member("l/x", data=b"1")), "an absolute symlink"),
        (tar(member("x", data=b"x" * 9000))[:5000], "the archive is cut"),
        (tar(member("x", tarfile.GNUTYPE_SPARSE)), "GNU sparse"),
    ],
)
def test_a_hostile_layer_is_named_and_nothing_is_left(
    store: ImageStore, registry: Registry, tmp_path: Path, layer: bytes, words: str
) -> None:
    name = registry.push("team/evil", "v1", picture(BASE, layer))
    with pytest.raises(InvalidArgument, match=r"^layer sha256:[0-9a-f]{64}: ") as caught:
        store.pull(name)
    assert words in str(caught.value)
    assert store.list() == []
    assert_nothing_left(tmp_path / "store")


def test_a_layer_with_a_device_is_kept_and_the_device_works_nowhere_on_the_way(
    store: ImageStore, registry: Registry, tmp_path: Path
) -> None:
    layer = tar(member("dev/zero", tarfile.CHRTYPE, devmajor=1, devminor=5, mode=0o666))
    pulled = store.pull(registry.push("team/device", "v1", picture(layer)))
    node = lower_of(store, pulled, tmp_path / "c") / "dev/zero"
    assert stat.S_ISCHR(node.stat().st_mode) and node.stat().st_rdev == os.makedev(1, 5)


def test_a_bomb_of_zeros_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", limits=Limits(ratio_from=1 << 20))
    with contextlib.closing(store):
        name = registry.push("team/bomb", "v1", picture(tar(member("zeros", data=b"\0" * (8 << 20)))))
        with pytest.raises(ResourceExhausted, match="decompression bomb"):
            store.pull(name)
        assert_nothing_left(tmp_path / "store")


def test_a_layer_that_is_not_what_the_config_says_is_refused(
    store: ImageStore, registry: Registry, tmp_path: Path
) -> None:
    image = picture(BASE, config={"rootfs": {"type": "layers", "diff_ids": [sha256(b"another")]}})
    with pytest.raises(InvalidArgument, match="its content is not what the image config says"):
        store.pull(registry.push("team/liar", "v1", image))
    assert_nothing_left(tmp_path / "store")


def test_an_artifact_is_no_image(store: ImageStore, hostile: HostileRegistry) -> None:
    image = picture(BASE)
    document = json.loads(image.blobs[image.manifest["digest"]])
    document["config"]["mediaType"] = "application/vnd.example.model"
    name = hostile.serve("app", image)
    hostile.routes["/v2/app/manifests/latest"] = reply(200, json.dumps(document).encode())
    with pytest.raises(Unimplemented, match=r"artifact of type 'application/vnd.example.model'"):
        store.pull(name)


def test_an_image_that_does_not_exist(store: ImageStore, registry: Registry) -> None:
    with pytest.raises(NotFound, match=rf"{registry.address}/no/such:v1.* HTTP 404 MANIFEST_UNKNOWN"):
        store.pull(f"{registry.address}/no/such:v1")


def test_one_failure_stops_the_other_layers(store: ImageStore, hostile: HostileRegistry, tmp_path: Path) -> None:
    """A layer that would take for ever does not hold up the error of another."""
    image = picture(BASE, TOP)
    name = hostile.serve("app", image)
    spoil_digest(hostile, image)
    path = blob_path(image, BASE)
    data = image.blobs[path[-71:]]

    def slow(request: BaseHTTPRequestHandler) -> None:
        reply(200, b"", {"Content-Length": str(len(data))})(request)
        for byte in data:
            request.wfile.write(bytes([byte]))
            time.sleep(0.2)

    hostile.routes[path] = slow
    before = time.monotonic()
    with pytest.raises(Unavailable, match="gave other content"):
        store.pull(name)
    assert time.monotonic() - before < 10
    assert_nothing_left(tmp_path / "store")


def test_a_pull_can_be_cancelled(store: ImageStore, hostile: HostileRegistry, tmp_path: Path) -> None:
    image = picture(BASE)
    name = hostile.serve("app", image)
    hostile.routes[blob_path(image, BASE)] = reply(503, headers={"Retry-After": "30"})
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    with pytest.raises(DeadlineExceeded, match=f"pull of {name} was cancelled"):
        store.pull(name, cancelled=cancelled)
    assert_nothing_left(tmp_path / "store")


def test_a_cancelled_pull_does_not_cancel_who_joined_it(store: ImageStore, hostile: HostileRegistry) -> None:
    image = picture(BASE)
    name = hostile.serve("app", image)
    path = blob_path(image, BASE)
    hostile.routes[path] = in_turn(reply(503, headers={"Retry-After": "30"}), hostile.routes[path])
    cancelled = threading.Event()
    errors: list[BaseException] = []

    def first() -> None:
        try:
            store.pull(name, cancelled=cancelled)
        except DeadlineExceeded as error:
            errors.append(error)

    results: list[Image] = []
    threads = [threading.Thread(target=first), threading.Thread(target=lambda: results.append(store.pull(name)))]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    cancelled.set()
    for thread in threads:
        thread.join()
    assert len(errors) == 1 and len(results) == 1


def test_credentials_are_not_shared_with_who_has_none(store: ImageStore, hostile: HostileRegistry) -> None:
    name = hostile.serve("app", picture(BASE))
    manifest = hostile.routes["/v2/app/manifests/latest"]

    def guarded(request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Authorization"):
            time.sleep(0.5)
            manifest(request)
        else:
            reply(401, headers={"WWW-Authenticate": 'Basic realm="x"'})(request)

    hostile.routes["/v2/app/manifests/latest"] = guarded
    thread = threading.Thread(target=lambda: store.pull(name, credentials=Credentials("me", "pw")))
    thread.start()
    time.sleep(0.1)
    with pytest.raises(PermissionRefused, match="no credentials"):
        store.pull(name)
    thread.join()
    assert len(store.list()) == 1


def test_the_end_of_the_daemon_ends_its_pulls(hostile: HostileRegistry, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    name = hostile.serve("app", picture(BASE))
    hostile.routes["/v2/app/manifests/latest"] = reply(503, headers={"Retry-After": "30"})
    threading.Timer(0.3, store.close).start()
    with pytest.raises(DeadlineExceeded):
        store.pull(name)


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
    assert list(lower_of(store, image, tmp_path / "c").iterdir()) == []


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
        ("index.json", b"{}", InvalidArgument, "index.json.manifests"),
        ("index.json", b'{"manifests":[]}', NotFound, "no image with a name"),
        ("index.json", b"x" * (5 << 20), InvalidArgument, "larger than"),
        (
            "index.json",
            b'{"manifests":[{"mediaType":"x","size":1,"digest":"sha256:../../x"}]}',
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
        ("dir:/tmp", InvalidArgument, "source: not an absolute path"),
        ("oci:/etc/passwd", InvalidArgument, "not a directory"),
        ("oci-archive:/tmp", InvalidArgument, "not a file"),
        ("docker-archive:/dev/null", InvalidArgument, "not a file"),
        ("oci-archive:/etc/passwd", InvalidArgument, "archive /etc/passwd"),
        ("/proc/sys", InvalidArgument, "no OCI layout or docker-archive"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    store: ImageStore, tmp_path: Path, source: str, error: type[CrioError], words: str
) -> None:
    with pytest.raises(error, match=words):
        store.load(source)
    assert_nothing_left(tmp_path / "store")


# Removing, pinning, usage


def load(store: ImageStore, tmp_path: Path, name: str, *layers: bytes) -> Image:
    (image,) = store.load(f"oci:{write_layout(tmp_path / name, picture(*layers))}")
    return image


def test_an_image_is_removed_with_the_layers_that_nobody_else_needs(store: ImageStore, tmp_path: Path) -> None:
    one, two = load(store, tmp_path, "one", BASE), load(store, tmp_path, "two", BASE, TOP)
    before = store.usage()
    store.remove("localhost/two:latest")
    assert_nothing_left(tmp_path / "store", layers=1)
    assert store.usage().bytes < before.bytes and store.usage().inodes < before.inodes
    with pytest.raises(NotFound, match=two.id):
        store.remove(two.id)
    with pytest.raises(FailedPrecondition, match=f"image {one.id} .* is in use by container c1"):
        store.remove(one.id[7:20], in_use={one.id: "container c1"})
    with pytest.raises(FailedPrecondition, match="in use"):
        store.remove(one.id, in_use=[one.id])
    store.remove(one.id)
    assert_nothing_left(tmp_path / "store")


def test_ids_are_found_by_their_beginning_only_if_it_is_long_and_theirs(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE)
    for ref in (image.id[7:18], f"{'0' * 12}", "localhost/one:other"):
        with pytest.raises(NotFound):
            store.get(ref)
    with pytest.raises(InvalidArgument):
        store.get("Not A Name")


def test_pinned_images_are_marked(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE)
    assert not image.pinned
    for patterns, pinned in (
        (["localhost/one:latest"], True),
        (["localhost/*"], True),
        (["*two*"], False),
        ([], False),
    ):
        store.pin(patterns)
        assert store.get(image.id).pinned == pinned


def test_usage_is_near_what_du_says(store: ImageStore, tmp_path: Path) -> None:
    data = [member(f"d{number}/f{number}", data=os.urandom(number * 1000)) for number in range(100)]
    load(store, tmp_path, "one", tar(*data))
    done = subprocess.run(["du", "-s", "-B1", tmp_path / "store/layers"], capture_output=True, text=True, check=True)
    assert abs(store.usage().bytes / int(done.stdout.split()[0]) - 1) < 0.1
    assert store.usage().mountpoint == str(tmp_path / "store")


# Root file systems


def mounted(store: ImageStore, image: Image, container: Path, look: str) -> str:
    """What a shell sees in the image's root file system, really mounted."""
    container.mkdir()
    overlay = store.prepare_root(image.id, container)
    (container / "root").mkdir()
    return in_private_mounts(
        """
        import os, subprocess, sys
        from crio_native.linux import syscalls
        base, lowers, upper, work, root, look = sys.argv[1:]
        os.chdir(base)
        options = f"lowerdir={lowers},upperdir={upper},workdir={work}"
        assert len(options) < 4096
        syscalls.mount("overlay", root, "overlay", 0, options)
        os.chdir(root)
        subprocess.run(["sh", "-c", look], check=True)
        """,
        *(overlay.base, ":".join(overlay.lowers), overlay.upper, overlay.work, container / "root", look),
    ).stdout


def test_the_kernel_reads_our_whiteouts(store: ImageStore, tmp_path: Path) -> None:
    lower = tar(
        *[member("./", DIR, mode=0o711, uid=5, gid=6), member("gone", data=b"1"), member("kept", data=b"1")],
        *[member("dir/hidden", data=b"1"), member("whole/x", data=b"1"), member("anew/old", data=b"1")],
    )
    upper = tar(
        *[member(".wh.gone"), member("dir/.wh..wh..opq"), member("dir/shown", data=b"2"), member(".wh.whole")],
        *[member(".wh.anew"), member("anew", DIR), member("anew/new", data=b"2")],
    )
    image = load(store, tmp_path, "one", lower, upper, tar(member("top", data=b"3")))
    seen = mounted(store, image, tmp_path / "c", "find . | sort; stat -c '%a %u %g' .; cat top")
    expected = [".", "./anew", "./anew/new", "./dir", "./dir/shown", "./kept", "./top", "711 5 6", "3"]
    assert seen.splitlines() == expected


def test_an_opaque_root_hides_all_below(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE, tar(member(".wh..wh..opq"), member("only", data=b"1")))
    assert mounted(store, image, tmp_path / "c", "find . | sort").split() == [".", "./only"]


def test_the_same_layer_may_come_twice(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", TOP, BASE, TOP)
    assert mounted(store, image, tmp_path / "c", "ls etc").split() == ["issue"]


@pytest.mark.slow
def test_127_layers_fit(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", layers_in_parallel=4)
    with contextlib.closing(store):
        image = load(store, tmp_path, "one", *[tar(member(f"f{n}")) for n in range(127)])
        assert len(mounted(store, image, tmp_path / "c", "ls").split()) == 127


def test_a_root_is_prepared_once_and_quickly(store: ImageStore, tmp_path: Path) -> None:
    image = load(store, tmp_path, "one", BASE)
    times = []
    for number in range(20):
        directory = tmp_path / f"c{number}"
        directory.mkdir()
        before = time.perf_counter()
        store.prepare_root(image.id, directory)
        times.append(time.perf_counter() - before)
    assert sorted(times)[10] < 0.001
    with pytest.raises(AlreadyExists, match="c0/upper exists"):
        store.prepare_root(image.id, tmp_path / "c0")
    with pytest.raises(NotFound):
        store.prepare_root("sha256:" + "0" * 64, tmp_path)
    shutil.rmtree(tmp_path / "c1/upper")
    with pytest.raises(AlreadyExists, match="c1/work exists"):
        store.prepare_root(image.id, tmp_path / "c1")
    assert not (tmp_path / "c1/upper").exists()


# Restarts


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with contextlib.closing(ImageStore(root)) as store:
        image = load(store, tmp_path, "one", BASE, TOP)
    with contextlib.closing(ImageStore(root)) as store:
        assert list(store.list()) == [image]
        assert (lower_of(store, image, tmp_path / "c", 1) / "bin/sh").read_bytes() == b"shell"
        with pytest.raises(FailedPrecondition, match="in use by another process"):
            ImageStore(root)
        store.remove(image.id)
    with contextlib.closing(ImageStore(root)) as store:
        assert store.list() == []


def test_what_a_crash_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "store"
    with contextlib.closing(ImageStore(root)) as store:
        kept, damaged = load(store, tmp_path, "one", BASE), load(store, tmp_path, "two", TOP)
        lost = Path(store.prepare_root(damaged.id, _made(tmp_path / "c")).lowers[0]).parent
    (root / "tmp/half/fs/x").mkdir(parents=True)
    (root / "layers/strange/fs").mkdir(parents=True)
    subprocess.run(["cp", "-a", root / "layers" / lost, root / "layers/copy"], check=True)
    shutil.rmtree(root / "layers" / lost)
    with caplog.at_level(logging.WARNING), contextlib.closing(ImageStore(root)) as store:
        assert [image.id for image in store.list()] == [kept.id]
        assert_nothing_left(root, layers=1)
        assert "has lost layer" in caplog.text and "layers/strange is not usable" in caplog.text
        assert load(store, _made(tmp_path / "again"), "two", TOP).id == damaged.id


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_a_damaged_database_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "store"
    with contextlib.closing(ImageStore(root)) as store:
        load(store, tmp_path, "one", BASE)
    (root / "images.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with contextlib.closing(ImageStore(root)) as store:
        assert store.list() == []
        assert "is damaged" in caplog.text
        assert len(list(root.glob("images.db.corrupt-*"))) == 1
        load(store, _made(tmp_path / "again"), "one", BASE)


def test_a_database_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "store"
    ImageStore(root).close()
    with contextlib.closing(sqlite3.connect(root / "images.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    for _ in range(2):  # the first refusal has let go of the lock
        with pytest.raises(FailedPrecondition, match="has version 99"):
            ImageStore(root)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StepFailed, match=r"open the image store.*/file/store with ENOTDIR"):
        ImageStore(tmp_path / "file/store")


def test_sigkill_in_the_middle_of_a_pull_leaves_nothing(hostile: HostileRegistry, tmp_path: Path) -> None:
    root = tmp_path / "store"
    image = picture(tar(member("first", data=b"1" * 100_000), member("second", data=os.urandom(3 << 20))))
    name = hostile.serve("app", image)
    path = max((path for path in hostile.routes if "/blobs/" in path), key=lambda path: len(image.blobs[path[-71:]]))
    data, silence = image.blobs[path[-71:]], threading.Event()

    def stall(request: BaseHTTPRequestHandler) -> None:
        reply(200, data[: 1 << 20], {"Content-Length": str(len(data))})(request)
        silence.wait(20)
        request.close_connection = True

    serve, hostile.routes[path] = hostile.routes[path], stall
    script = """
        import sys
        from pathlib import Path
        from crio_native.images import ImageStore
        ImageStore(Path(sys.argv[1])).pull(sys.argv[2])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), root, name])
    try:
        assert _soon(lambda: any(root.glob("tmp/*/fs/first")))
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        unpackers = [int(pid) for file in children for pid in file.read_text().split()]
        assert len(unpackers) == 1
        (inner,) = Path(f"/proc/{unpackers[0]}/task/{unpackers[0]}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        silence.set()
    assert _soon(lambda: all(_ended(pid) for pid in (*unpackers, int(inner))))
    hostile.routes[path] = serve
    with contextlib.closing(ImageStore(root)) as store:
        assert_nothing_left(root)
        assert store.list() == []
        assert store.pull(name).names == (name,)


def _soon(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _ended(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    for name, size in (("big", 8 << 20), ("small", 1000)):
        write_layout(tmp_path / name, picture(BASE, tar(member("data", data=os.urandom(size)))))
    root = _made(tmp_path / "disk")
    done = in_private_mounts(
        """
        import os, subprocess, sys
        from pathlib import Path
        from crio_native.errors import ResourceExhausted
        from crio_native.images import ImageStore
        from tests.linux.test_images_store import assert_nothing_left

        disk, layouts = Path(sys.argv[1]), Path(sys.argv[2])
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
        store = ImageStore(disk / "store")
        for source in (f"oci:{layouts}/big", f"oci-archive:{layouts}/big.tar"):
            try:
                store.load(source)
            except ResourceExhausted as error:
                print(error)
            assert store.list() == []
            assert_nothing_left(disk / "store")
        print(store.load(f"oci:{layouts}/small")[0].names[0])
        """,
        *(root, _archived(tmp_path)),
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("no space left on the device" in line for line in lines[:2])
    assert lines[2] == "localhost/small:latest"


def _archived(directory: Path) -> Path:
    subprocess.run(["tar", "-C", directory / "big", "-cf", directory / "big.tar", "."], check=True)
    return directory


def test_the_daemon_pays_for_pulling_only_when_it_pulls(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from crio_native.images import ImageStore
        ImageStore(Path(sys.argv[1]))
        heavy = ("urllib3", "ssl", "tarfile", "crio_native.images.unpacker.tree")
        print([name for name in heavy if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "store")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
