"""Every format that an image may come in, made by skopeo or by hand, is the same image in the store."""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from crio_native.errors import CrioError, InvalidArgument, NotFound, PermissionRefused, Unavailable, Unimplemented
from crio_native.images import Image, ImageStore, Settings, schema1
from crio_native.images.manifests import FOREIGN, LAYERS, OCI_MANIFEST, of_another_machine
from crio_native.images.model import Platform

from ..images_support import (
    BASE,
    GZIP_LAYER,
    TOP,
    HostileRegistry,
    Picture,
    Registry,
    assert_nothing_left,
    layers_of,
    member,
    picture,
    reply,
    sha256,
    skopeo,
    tar,
    tree,
    write_layout,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry
from ..images_support import store as store

pytestmark = pytest.mark.root

SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"


def content(store: ImageStore, image: Image, container: Path) -> list[dict[str, Any]]:
    """What the image's directories hold, the top first."""
    return [tree(layer) for layer in layers_of(store, image, container)]


def two_layers() -> Picture:
    """With the history that schema 1 must have."""
    history = [{"created": "2024-01-01T00:00:00Z", "created_by": f"step {number}"} for number in (1, 2)]
    return picture(BASE, TOP, config={"history": history, "created": "2024-01-01T00:00:00Z"})


def changed(image: Picture, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The image's manifest with something changed."""
    document: dict[str, Any] = json.loads(image.blobs[image.manifest["digest"]])
    change(document)
    return document


# Compression


@pytest.mark.parametrize(
    ("media_type", "compress"),
    [
        (GZIP_LAYER, gzip.compress),
        (GZIP_LAYER.replace("gzip", "zstd"), zstandard.compress),
        (GZIP_LAYER.removesuffix("+gzip"), lambda data: data),
        (GZIP_LAYER, bz2.compress),
        (GZIP_LAYER, lzma.compress),
        (GZIP_LAYER, lambda data: data),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", zstandard.compress),
    ],
    ids=["gzip", "zstd", "uncompressed", "bzip2", "xz", "labelled wrongly", "docker zstd"],
)
def test_layers_of_every_compression(
    store: ImageStore, registry: Registry, tmp_path: Path, media_type: str, compress: Callable[[bytes], bytes]
) -> None:
    image = picture(BASE)

    def change(document: dict[str, Any]) -> None:
        document["layers"] = [image.put(media_type, compress(BASE))]

    document = changed(image, change)
    pulled = store.pull(registry.push("formats/compressed", "v1", image, document=document))
    plain = store.pull(registry.push("formats/plain", "v1", picture(BASE, compress=False)))
    assert content(store, pulled, tmp_path / "a") == content(store, plain, tmp_path / "b")
    assert pulled.layers == (sha256(BASE),)


# What skopeo writes


@pytest.mark.parametrize("format", ["oci", "v2s2", "v2s1"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_skopeo_pushes_and_we_pull(
    store: ImageStore, registry: Registry, tmp_path: Path, format: str, compression: str
) -> None:
    if compression == "zstd" and format != "oci":
        compression = "gzip"  # the other formats have no word for it
    layout = write_layout(tmp_path / "layout", two_layers())
    (loaded,) = store.load(f"oci:{layout}")
    name = f"{registry.address}/skopeo/{format}-{compression}:v1"
    flags = ["--dest-tls-verify=false", "--format", format, "--dest-compress-format", compression]
    skopeo("copy", *flags, f"oci:{layout}:latest", f"docker://{name}")
    pulled = store.pull(name)
    seen = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{name}"))
    assert f"{name.removesuffix(':v1')}@{seen['Digest']}" in pulled.digests
    assert pulled.config["architecture"] == seen["Architecture"]
    assert pulled.config["config"]["Env"] == seen["Env"]
    assert pulled.layers == loaded.layers
    assert content(store, pulled, tmp_path / "a") == content(store, loaded, tmp_path / "b")


@pytest.mark.parametrize("format", ["oci", "v2s2", "v2s1"])
def test_a_directory_of_skopeo_is_loaded(store: ImageStore, tmp_path: Path, format: str) -> None:
    layout = write_layout(tmp_path / "layout", two_layers())
    skopeo("copy", "--format", format, f"oci:{layout}:latest", f"dir:{tmp_path}/dir")
    (loaded,) = store.load(f"dir:{tmp_path}/dir")
    assert loaded.layers == (sha256(BASE), sha256(TOP))
    assert loaded.names == ()
    assert [image.id for image in store.load(f"{tmp_path}/dir")] == [loaded.id]
    assert_nothing_left(tmp_path / "store", layers=2)


def test_a_directory_with_an_index_is_loaded(store: ImageStore, registry: Registry, tmp_path: Path) -> None:
    image = picture(BASE)
    registry.push("formats/all", image.manifest["digest"], image)
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [image.manifest | {"platform": {"os": "linux", "architecture": store_architecture()}}],
    }
    name = registry.push("formats/all", "v1", Picture({}, {"digest": ""}), document=index)
    skopeo("copy", "--all", "--src-tls-verify=false", f"docker://{name}", f"dir:{tmp_path}/dir")
    (loaded,) = store.load(f"dir:{tmp_path}/dir")
    assert loaded.layers == (sha256(BASE),)


def store_architecture() -> str:
    return Platform.host().architecture


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("manifest.json", b"{", InvalidArgument, "manifest.json: not JSON"),
        ("manifest.json", b'{"schemaVersion":2}', InvalidArgument, "not one image or index"),
        (sha256(BASE)[7:], None, NotFound, "file"),
        (sha256(BASE)[7:], b"other", Unavailable, "gave 5 bytes"),
    ],
)
def test_a_damaged_directory_is_refused(
    store: ImageStore, tmp_path: Path, name: str, data: bytes | None, error: type[CrioError], words: str
) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE, compress=False))
    skopeo("copy", f"oci:{layout}:latest", f"dir:{tmp_path}/dir")
    if data is None:
        (tmp_path / "dir" / name).unlink()
    else:
        (tmp_path / "dir" / name).write_bytes(data)
    with pytest.raises(error, match=words):
        store.load(f"dir:{tmp_path}/dir")
    assert list(store.list()) == []
    assert_nothing_left(tmp_path / "store")


# Schema 1


def old_image(*layers: bytes, **changes: Any) -> tuple[Picture, dict[str, Any]]:
    """A schema 1 document by hand: an image's layers, and an entry that made none."""
    made = Picture()
    blobs = [made.put("", gzip.compress(layer))["digest"] for layer in layers]
    empty = made.put("", gzip.compress(bytes(1024)))["digest"]
    configs = [{"id": str(n), "container_config": {"Cmd": ["add", str(n)]}} for n in range(len(layers))]
    top = {"id": "top", "throwaway": True, "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/sh"]}}
    document = {
        "schemaVersion": 1,
        "name": "app",
        "tag": "latest",
        "architecture": "amd64",
        "fsLayers": [{"blobSum": digest} for digest in [empty, *reversed(blobs)]],
        "history": [{"v1Compatibility": json.dumps(config)} for config in [top, *reversed(configs)]],
    }
    return made, document | changes


def serve_old(hostile: HostileRegistry, made: Picture, raw: bytes, media_type: str = SCHEMA1) -> str:
    for digest, data in made.blobs.items():
        hostile.routes[f"/v2/app/blobs/{digest}"] = reply(200, data)
    hostile.routes["/v2/app/manifests/latest"] = reply(200, raw, {"Content-Type": media_type})
    return f"{hostile.address}/app:latest"


def test_schema_1_becomes_an_image(store: ImageStore, hostile: HostileRegistry, tmp_path: Path) -> None:
    made, document = old_image(BASE, TOP)
    pulled = store.pull(serve_old(hostile, made, json.dumps(document).encode()))
    assert pulled.layers == (sha256(BASE), sha256(TOP))
    assert pulled.config["config"]["Cmd"] == ["/bin/sh"]
    assert pulled.config["history"][0] == {"created_by": "add 0"}
    assert pulled.config["history"][-1] == {"empty_layer": True}
    assert not {"id", "throwaway"} & pulled.config.keys()
    assert_nothing_left(tmp_path / "store", layers=2)


def signed(raw: bytes, *tails: bytes) -> bytes:
    """With signatures in the form of libtrust; each repeats how the document ended."""
    end = len(raw) - 2
    entries = []
    for tail in tails or (raw[end:],):
        header = json.dumps({"formatLength": end, "formatTail": unpadded(tail)}).encode()
        entries.append({"header": {"alg": "ES256"}, "signature": "x", "protected": unpadded(header)})
    return raw[:end] + b',\n"signatures":' + json.dumps(entries).encode() + raw[end:]


def unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def test_a_signed_document_has_the_digest_of_what_was_signed(store: ImageStore, hostile: HostileRegistry) -> None:
    made, document = old_image(BASE)
    raw = json.dumps(document, indent=3).encode()
    assert schema1.unsigned(signed(raw)) == raw
    serve_old(hostile, made, signed(raw), SCHEMA1.replace("json", "prettyjws"))
    hostile.routes[f"/v2/app/manifests/{sha256(raw)}"] = hostile.routes["/v2/app/manifests/latest"]
    pulled = store.pull(f"{hostile.address}/app@{sha256(raw)}")
    assert pulled.manifest_digest == sha256(raw)


@pytest.mark.parametrize(
    "signatures",
    [[{}], [5], "x", [{"protected": "!"}], [{"protected": unpadded(b'{"formatLength": 1000000, "formatTail": ""}')}]],
)
def test_malformed_signatures_are_refused(signatures: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"schema 1 manifest\.signatures: malformed"):
        schema1.unsigned(json.dumps({"schemaVersion": 1, "signatures": signatures}).encode())


def test_signatures_of_different_documents_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="of different documents"):
        schema1.unsigned(signed(b'{"schemaVersion": 1\n}', b"\n}", b", \n}"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fsLayers": []}, "not lists of one length"),
        ({"history": 5}, "not lists of one length"),
        ({"fsLayers": [{"blobSum": "sha256:../../x"}] * 2}, r"fsLayers\[0\].blobSum: not a digest"),
        ({"history": [{"v1Compatibility": "[]"}] * 2}, r"history\[0\].v1Compatibility: not a JSON object"),
        ({"history": [{}] * 2}, r"history\[0\].v1Compatibility: not a string"),
        ({"fsLayers": [{}] * 2000, "history": [{}] * 2000}, "more than 1270 entries"),
    ],
)
def test_a_malformed_document_is_refused(
    store: ImageStore, hostile: HostileRegistry, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    made, document = old_image(BASE, **changes)
    with pytest.raises(InvalidArgument, match=words):
        store.pull(serve_old(hostile, made, json.dumps(document).encode()))
    assert_nothing_left(tmp_path / "store")


# Foreign layers


def foreign(image: Picture, *urls: str) -> dict[str, Any]:
    def change(document: dict[str, Any]) -> None:
        document["layers"][0] |= {"mediaType": FOREIGN[1], "urls": list(urls)}

    return changed(image, change)


def test_a_foreign_layer_comes_from_where_its_manifest_says(store: ImageStore, hostile: HostileRegistry) -> None:
    elsewhere = HostileRegistry()
    try:
        image = picture(BASE)
        name = hostile.serve("app", image)
        layer = changed(image, lambda document: None)["layers"][0]["digest"]
        del hostile.routes[f"/v2/app/blobs/{layer}"]
        elsewhere.routes["/layer"] = reply(200, image.blobs[layer])
        urls = ["ftp://example.invalid/x", f"http://{elsewhere.address}/gone", f"http://{elsewhere.address}/layer"]
        document = json.dumps(foreign(image, *urls)).encode()
        hostile.routes["/v2/app/manifests/latest"] = reply(200, document, {"Content-Type": OCI_MANIFEST})
        assert store.pull(name).layers == (sha256(BASE),)
        assert [path for path, _ in elsewhere.requests] == ["/gone", "/layer"]
        assert all("Authorization" not in headers for _, headers in elsewhere.requests)
    finally:
        elsewhere.close()


def test_a_foreign_layer_that_nobody_has_is_told(store: ImageStore, hostile: HostileRegistry) -> None:
    image = picture(BASE)
    name = hostile.serve("app", image)
    layer = changed(image, lambda document: None)["layers"][0]["digest"]
    del hostile.routes[f"/v2/app/blobs/{layer}"]
    urls = f"http://{hostile.address}/no", f"http://{hostile.address}/nor"
    document = json.dumps(foreign(image, *urls)).encode()
    hostile.routes["/v2/app/manifests/latest"] = reply(200, document, {"Content-Type": OCI_MANIFEST})
    told = rf"{layer} of .*HTTP 404.*'{urls[0]}'.*HTTP 404.*'{urls[1]}'.*HTTP 404"
    with pytest.raises(Unavailable, match=told):
        store.pull(name)


def test_an_ordinary_layer_comes_from_the_registry_only(store: ImageStore, hostile: HostileRegistry) -> None:
    image = picture(BASE)
    name = hostile.serve("app", image)
    document = foreign(image, f"http://{hostile.address}/elsewhere")
    document["layers"][0]["mediaType"] = GZIP_LAYER
    del hostile.routes[f"/v2/app/blobs/{document['layers'][0]['digest']}"]
    raw = json.dumps(document).encode()
    hostile.routes["/v2/app/manifests/latest"] = reply(200, raw, {"Content-Type": OCI_MANIFEST})
    with pytest.raises(NotFound):
        store.pull(name)
    assert hostile.count("/elsewhere") == 0


# Artifacts


def artifact(*files: tuple[str, bytes]) -> tuple[Picture, dict[str, Any]]:
    made = Picture()
    entries = []
    for title, data in files:
        annotations = {"org.opencontainers.image.title": title} if title else {}
        entries.append(made.put("application/octet-stream", data) | {"annotations": annotations})
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.example.model",
        "config": made.put("application/vnd.oci.empty.v1+json", b"{}"),
        "layers": entries,
    }
    made.manifest = made.put(OCI_MANIFEST, json.dumps(document).encode())
    return made, document


def test_an_artifact_becomes_its_files(store: ImageStore, registry: Registry, tmp_path: Path) -> None:
    files = [
        ("weights.bin", b"\1" * 5000),
        ("docs/" + "long" * 50 + ".md", b"words"),
        ("", b"untitled"),
        ("empty", b""),
    ]
    made, document = artifact(*files)
    pulled = store.pull(registry.push("models/small", "v1", made, document=document))
    assert pulled.config["artifactType"] == "application/vnd.example.model"
    assert pulled.manifest_digest == sha256(json.dumps(document).encode())
    found = {
        str(path.relative_to(base)): path.read_bytes()
        for base in layers_of(store, pulled, tmp_path / "c")
        for path in base.rglob("*")
        if path.is_file()
    }
    untitled = sha256(b"untitled").replace(":", "-")
    assert found == {(title or untitled): data for title, data in files}
    again = store.pull(f"{registry.address}/models/small:v1")
    assert again.id == pulled.id
    store.remove(pulled.id)
    assert_nothing_left(tmp_path / "store")


@pytest.mark.parametrize("title", ["../escape", "/../../escape", "a/../../b", "x" * 300])
def test_a_title_leads_nowhere_outside(store: ImageStore, registry: Registry, tmp_path: Path, title: str) -> None:
    made, document = artifact((title, b"x"))
    with pytest.raises(CrioError, match="layer sha256:"):
        store.pull(registry.push("models/evil", "v1", made, document=document))
    assert_nothing_left(tmp_path / "store")


def test_artifacts_may_be_switched_off(tmp_path: Path, hostile: HostileRegistry) -> None:
    made, _ = artifact(("a", b"1"))
    with contextlib.closing(ImageStore(tmp_path / "off", settings=Settings(artifacts=False))) as store:
        with pytest.raises(Unimplemented, match=r"artifact of type 'application/vnd\.example\.model'.*is off"):
            store.pull(hostile.serve("app", made))


def test_an_artifact_with_other_content_is_refused(store: ImageStore, hostile: HostileRegistry, tmp_path: Path) -> None:
    made, _ = artifact(("a", b"right"))
    name = hostile.serve("app", made)
    hostile.routes[f"/v2/app/blobs/{sha256(b'right')}"] = reply(200, b"wrong")
    with pytest.raises(Unavailable, match="gave other content"):
        store.pull(name)
    assert_nothing_left(tmp_path / "store")


# What is refused


def test_an_encrypted_layer_that_is_for_nobody_is_refused(store: ImageStore, registry: Registry) -> None:
    image = picture(BASE)

    def change(document: dict[str, Any]) -> None:
        document["layers"][0]["mediaType"] = GZIP_LAYER + "+encrypted"

    name = registry.push("formats/encrypted", "v1", image, document=changed(image, change))
    with pytest.raises(PermissionRefused, match=r"layer sha256:\w{64} is encrypted .* for nobody"):
        store.pull(name)


def test_an_unknown_layer_is_refused_with_what_is_known(store: ImageStore, hostile: HostileRegistry) -> None:
    image = picture(BASE)
    document = changed(image, lambda document: document["layers"][0].update(mediaType="application/x-lz4"))
    name = hostile.serve("app", image)
    hostile.routes["/v2/app/manifests/latest"] = reply(200, json.dumps(document).encode())
    with pytest.raises(Unimplemented, match="media type 'application/x-lz4'; known: ") as error:
        store.pull(name)
    assert all(kind in str(error.value) for kind in LAYERS)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"architecture": "z80"}, r"\.architecture: not an arch.*'z80'"), ({"os": "plan9"}, r"\.os: this node.*'plan9'")],
)
def test_a_config_for_no_such_machine_is_refused(
    store: ImageStore, registry: Registry, tmp_path: Path, config: dict[str, str], words: str
) -> None:
    name = registry.push("formats/odd", "v1", picture(BASE, config=config))
    with pytest.raises(InvalidArgument, match=words):
        store.pull(name)
    assert_nothing_left(tmp_path / "store")


def test_a_config_for_another_machine_is_let_through_with_a_warning(
    store: ImageStore, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    store.pull(registry.push("formats/own", "v1", picture(tar(member("x")))))
    assert not caplog.records
    name = registry.push("formats/other", "v1", picture(tar(member("x")), config={"architecture": "s390x"}))
    assert store.pull(name).config["architecture"] == "s390x"
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"image {name}: it is for linux/s390x, and this host is linux/{store_architecture()}" in record.getMessage()


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({}, False),
        ({"architecture": "unknown"}, False),
        ({"architecture": "amd64"}, False),
        ({"architecture": "386", "os": "linux"}, False),
        ({"architecture": "amd64", "variant": "v1"}, False),
        ({"architecture": "amd64", "variant": "v4"}, True),
        ({"architecture": "arm64", "variant": "v8"}, True),
        ({"architecture": "arm64", "variant": ["v8"]}, True),
    ],
)
def test_what_is_of_another_machine(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], warned: bool) -> None:
    monkeypatch.setattr(Platform, "host", lambda: Platform("amd64", variant="v2"))
    assert bool(of_another_machine(config)) == warned
