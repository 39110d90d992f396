"""Indexes, manifests and configs: the choice of a platform, and every way in which a document can be wrong."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, NotFound, Unavailable, Unimplemented
from crio_native.images import manifests
from crio_native.images.manifests import FOREIGN, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest
from crio_native.images.model import Platform

from ..images_support import GZIP_LAYER, picture, sha256

AMD64, ARM64 = Platform("amd64", variant="v1"), Platform("arm64", variant="v8")


def descriptor(media_type: str, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{number:064x}", "size": 10, **more}


def manifest(**changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG),
        "layers": [descriptor(GZIP_LAYER)],
    }
    return json.dumps({key: value for key, value in (document | changes).items() if value is not None}).encode()


def index(*platforms: str | None) -> bytes:
    entries = []
    for number, text in enumerate(platforms):
        os_, _, rest = (text or "").partition("/")
        architecture, _, variant = rest.partition("/")
        platform = {"platform": {"os": os_, "architecture": architecture, "variant": variant}} if text else {}
        entries.append(descriptor(OCI_MANIFEST, number, **platform))
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


@pytest.mark.parametrize(
    ("platform", "offered", "chosen"),
    [
        (AMD64, ["linux/arm64/v8", "linux/amd64"], 1),
        (AMD64, ["windows/amd64", "linux/amd64"], 1),
        (AMD64, ["linux/amd64/v3", "linux/amd64"], 1),
        (AMD64, ["linux/386", None], 1),
        (AMD64, [None, "linux/amd64"], 1),
        (ARM64, ["linux/arm/v7", "linux/arm64"], 1),
        (Platform("arm64"), ["linux/arm64/v8"], 0),
        (Platform("arm", variant="v7"), ["linux/arm/v5", "linux/arm/v6", "linux/arm/v8"], 1),
        (Platform("arm", variant="v6"), ["linux/arm/v7", "linux/arm/v5"], 1),
        (Platform("amd64", variant="v3"), ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
    ],
)
def test_the_best_platform_of_an_index_is_chosen(platform: Platform, offered: list[str | None], chosen: int) -> None:
    entries = manifests.parse_manifest(index(*offered), OCI_INDEX, "m")
    assert isinstance(entries, tuple)
    assert manifests.choose(entries, platform, "m") is entries[chosen]


def test_an_index_without_our_platform_names_those_it_has() -> None:
    entries = manifests.parse_manifest(index("linux/s390x", "windows/amd64", "unknown/unknown"), OCI_INDEX, "m")
    assert isinstance(entries, tuple)
    with pytest.raises(NotFound, match=r"'linux/amd64/v1' not found: m has linux/s390x, windows/amd64$"):
        manifests.choose(entries, AMD64, "m")


def test_this_machine_has_a_platform() -> None:
    assert Platform.host().os == "linux"
    assert Platform.host().preference(Platform.host()) == 0


def test_indexes_are_followed_but_not_for_ever() -> None:
    def fetch(wanted: Descriptor) -> bytes:
        return documents[wanted.digest]

    inner = index("linux/amd64").replace(b'"manifests": [', b'"manifests": [')
    entry = {"mediaType": OCI_INDEX, "digest": sha256(inner), "size": len(inner)}
    outer = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()
    documents = {sha256(inner): inner, f"sha256:{0:064x}": manifest()}
    found, digests = manifests.resolve(fetch, outer, OCI_INDEX, AMD64, "m")
    assert isinstance(found, Manifest)
    assert digests == (sha256(outer), sha256(inner), sha256(manifest()))
    documents[f"sha256:{0:064x}"] = outer
    with pytest.raises(InvalidArgument):
        manifests.resolve(fetch, outer, OCI_INDEX, AMD64, "m")


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (b"{", InvalidArgument, "m: not JSON"),
        (b"[" * 100_000, InvalidArgument, r"m: not JSON \(nested too deeply\)"),
        (b"[]", InvalidArgument, "m: not a JSON object"),
        (b'{"a":"' + b"x" * (5 << 20) + b'"}', InvalidArgument, "m: larger than"),
        (manifest(schemaVersion=None), InvalidArgument, "m.schemaVersion: must be 2"),
        (manifest(schemaVersion="2"), InvalidArgument, "m.schemaVersion: must be 2"),
        (manifest(schemaVersion=3), InvalidArgument, "m.schemaVersion: must be 2"),
        (index("linux/amd64").replace(b'"schemaVersion": 2, ', b""), InvalidArgument, "m.schemaVersion: must be 2"),
        (manifest(mediaType="text/html"), InvalidArgument, "m.mediaType"),
        (manifest(mediaType=OCI_INDEX), InvalidArgument, "m.mediaType"),
        (manifest(manifests=[]), InvalidArgument, "m.mediaType"),
        (manifest(config=None), InvalidArgument, "m.config: not a descriptor"),
        (manifest(artifactType=5, config=descriptor("a/b")), InvalidArgument, "m.artifactType: not a string"),
        (manifest(layers=[descriptor(FOREIGN[0], urls="x")]), InvalidArgument, r"layers\[0\].urls: not a list"),
        (manifest(layers=[descriptor(FOREIGN[0], urls=["https://x"] * 17)]), InvalidArgument, r"\[0\].urls"),
        (manifest(layers=[descriptor(GZIP_LAYER)] * 10_000), InvalidArgument, "more than 127 layers"),
        (manifest(layers=[descriptor(GZIP_LAYER, digest=f"md5:{0:032x}")]), InvalidArgument, r"\[0\].digest"),
        (manifest(config=descriptor(OCI_CONFIG, size=5 << 20)), InvalidArgument, "m.config.size"),
        (manifest(layers={}), InvalidArgument, "m.layers: not a list"),
        (manifest(layers=[descriptor(GZIP_LAYER)] * 128), InvalidArgument, "more than 127 layers"),
        (manifest(layers=[descriptor("a/zstd")]), Unimplemented, "media type 'a/zstd'; known: "),
        (manifest(layers=[descriptor(GZIP_LAYER, size=-1)]), InvalidArgument, r"m.layers\[0\].size"),
        (manifest(layers=[descriptor(GZIP_LAYER, size=True)]), InvalidArgument, r"m.layers\[0\].size"),
        (manifest(layers=[descriptor(GZIP_LAYER, digest="sha256:../x")]), InvalidArgument, r"m.layers\[0\].digest"),
        (manifest(layers=[descriptor(GZIP_LAYER, annotations=[1])]), InvalidArgument, r"\[0\].annotations"),
        (manifest(layers=[descriptor(GZIP_LAYER, platform={"os": 5})]), InvalidArgument, r"platform.os"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_field(raw: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        manifests.parse_manifest(raw, OCI_MANIFEST, "m")


def test_a_config_that_we_can_use_is_kept_whole() -> None:
    image = picture(b"", b"x", config={"history": [{"created_by": "me"}]})
    document = next(data for data in image.blobs.values() if b"rootfs" in data)
    assert manifests.parse_config(document, 2, "c") == json.loads(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rootfs": None}, "c.rootfs.diff_ids"),
        ({"rootfs": {"diff_ids": []}}, "not a list of 1 digests"),
        ({"rootfs": {"diff_ids": ["sha256:1"]}}, r"c.rootfs.diff_ids\[0\]"),
        ({"rootfs": {"diff_ids": ["sha512:" + "0" * 128]}}, "not a sha256 digest"),
        ({"os": 1}, "c.os: not a string"),
        ({"config": []}, "c.config: not an object"),
        ({"config": {"User": 0}}, "c.config.User: not a string"),
        ({"config": {"Env": "A=B"}}, "c.config.Env: not a list of strings"),
        ({"config": {"Env": ["A=\0"]}}, "c.config.Env"),
        ({"config": {"User": "\ud800"}}, "c.config.User"),
        ({"config": {"Cmd": [1]}}, "c.config.Cmd"),
        ({"config": {"Labels": {"a": 1}}}, "c.config.Labels"),
        ({"config": {"Volumes": ["/x"]}}, "c.config.Volumes: not an object"),
    ],
)
def test_a_wrong_config_is_refused_with_its_field(change: dict[str, Any], words: str) -> None:
    document = {"rootfs": {"type": "layers", "diff_ids": [f"sha256:{0:064x}"]}} | change
    with pytest.raises(InvalidArgument, match=words):
        manifests.parse_config(json.dumps(document).encode(), 1, "c")


def test_null_is_as_good_as_absent_in_a_config() -> None:
    document = {"rootfs": {"diff_ids": []}, "config": {"Cmd": None, "Env": None, "User": None}}
    manifests.parse_config(json.dumps(document).encode(), 0, "c")


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([b"hel"], "gave 3 bytes for sha256:.*, which has 5"),
        ([b"hello", b"!"], "gave more than 5 bytes"),
        ([b"hel", b"la"], "gave other content than sha256:.*: its digest is sha256:"),
    ],
)
def test_content_that_is_not_what_was_promised_is_refused(pieces: list[bytes], words: str) -> None:
    promised = Descriptor("", "sha256:" + hashlib.sha256(b"hello").hexdigest(), 5)
    with pytest.raises(Unavailable, match=words):
        list(manifests.verified(pieces, promised, "the peer"))


def test_content_that_is_what_was_promised_passes() -> None:
    promised = Descriptor("", "sha512:" + hashlib.sha512(b"hello").hexdigest(), 5)
    assert list(manifests.verified([b"he", b"llo"], promised, "the peer")) == [b"he", b"llo"]


def test_an_endless_stream_is_left_at_once() -> None:
    def endless() -> Any:
        while True:
            yield b"x" * 1000

    promised = Descriptor("", sha256(b"x"), 5000)
    got = manifests.verified(endless(), promised, "the peer")
    with pytest.raises(Unavailable, match="more than 5000 bytes"):
        for _ in range(10):
            next(got)
