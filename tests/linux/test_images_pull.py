"""Pulling from a real registry, and from those that fail: what arrives, and what failures leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PermissionRefused,
    ResourceExhausted,
    Unavailable,
)
from crio_native.images import Credentials, Image, ImageStore, Platform, Progress, transport
from crio_native.images import registry as client
from crio_native.images.manifests import OCI_INDEX
from crio_native.images.unpacker import Limits

from ..images_support import (
    BASE,
    TOP,
    Answer,
    HostileRegistry,
    Picture,
    Registry,
    assert_nothing_left,
    blob_path,
    in_turn,
    layers_of,
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
from ..images_support import store as store

pytestmark = pytest.mark.root


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
    assert (layers_of(store, pulled, tmp_path / "c")[0] / "etc/issue").read_text() == "new"
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
    assert tree(layers_of(store, pulled, tmp_path / "c")[0]) == tree(peer)


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


def spoil_digest(server: HostileRegistry, image: Picture) -> None:
    path = blob_path(TOP)
    server.routes[path] = reply(200, image.blobs[path[-71:]][:-1] + b"!")


def spoil_length(server: HostileRegistry, image: Picture) -> None:
    server.routes[blob_path(TOP)] = reply(200, b"short")


def cut_short(server: HostileRegistry, image: Picture) -> None:
    path = blob_path(TOP)
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

    server.routes[blob_path(TOP)] = answer


def lose_blob(server: HostileRegistry, image: Picture) -> None:
    del server.routes[blob_path(TOP)]


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
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
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
        (tar(member("x", pax_headers={"GNU.sparse.map": "0,9"})), "its sparse format"),
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
    node = layers_of(store, pulled, tmp_path / "c")[0] / "dev/zero"
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


def test_an_image_that_does_not_exist(store: ImageStore, registry: Registry) -> None:
    with pytest.raises(NotFound, match=rf"{registry.address}/no/such:v1.* HTTP 404 MANIFEST_UNKNOWN"):
        store.pull(f"{registry.address}/no/such:v1")


def test_one_failure_stops_the_other_layers(store: ImageStore, hostile: HostileRegistry, tmp_path: Path) -> None:
    """A layer that would take for ever does not hold up the error of another."""
    image = picture(BASE, TOP)
    name = hostile.serve("app", image)
    spoil_digest(hostile, image)
    path = blob_path(BASE)
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
    hostile.routes[blob_path(BASE)] = reply(503, headers={"Retry-After": "30"})
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    with pytest.raises(DeadlineExceeded, match=f"pull of {name} was cancelled"):
        store.pull(name, cancelled=cancelled)
    assert_nothing_left(tmp_path / "store")


def test_a_cancelled_pull_does_not_cancel_who_joined_it(store: ImageStore, hostile: HostileRegistry) -> None:
    image = picture(BASE)
    name = hostile.serve("app", image)
    path = blob_path(BASE)
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


def test_connections_are_used_again(store: ImageStore, hostile: HostileRegistry) -> None:
    """One for each layer in flight, not one for each request."""
    image = picture(*(tar(member(f"file{number}", data=b"x" * 1000)) for number in range(12)))
    name = hostile.serve("app", image)
    ports: set[int] = set()

    def noting(answer: Answer) -> Answer:
        def answered(request: BaseHTTPRequestHandler) -> None:
            ports.add(request.client_address[1])
            answer(request)

        return answered

    hostile.routes = {path: noting(answer) for path, answer in hostile.routes.items()}
    store.pull(name)
    assert len(hostile.requests) >= 14 and len(ports) <= 4
