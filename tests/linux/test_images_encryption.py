"""Encrypted layers that skopeo made: opened with the right key, and with no other."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import CrioError, InvalidArgument, PermissionRefused, Unavailable
from crio_native.images import ImageStore, Settings
from crio_native.images.encryption import PUBLIC, WRAPPED

from ..images_support import BASE, TOP, assert_nothing_left, picture, sha256, skopeo, write_layout

pytestmark = pytest.mark.root

KINDS = {"rsa": ("RSA", "rsa_keygen_bits:2048"), "ec": ("EC", "ec_paramgen_curve:P-256")}


def make_key(directory: Path, name: str, kind: str = "rsa") -> None:
    """NAME.pem and NAME.pub."""
    algorithm, option = KINDS[kind]
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    run("openssl", "genpkey", "-algorithm", algorithm, "-pkeyopt", option, "-out", private)
    run("openssl", "pkey", "-in", private, "-pubout", "-out", public)


def run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module", params=sorted(KINDS))
def encrypted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a layout for two recipients, and their keys and a stranger's."""
    directory = tmp_path_factory.mktemp(f"encrypted-{request.param}")
    for name in ("one", "two", "stranger"):
        make_key(directory, name, request.param)
    layout = write_layout(directory / "plain", picture(BASE, TOP))
    keys = [part for name in ("one", "two") for part in ("--encryption-key", f"jwe:{directory}/{name}.pub")]
    skopeo("copy", *keys, f"oci:{layout}:latest", f"oci:{directory}/layout:latest")
    return directory


@contextlib.contextmanager
def store_with(tmp_path: Path, encrypted: Path, *names: str) -> Iterator[ImageStore]:
    """A store with the private keys of some."""
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in names:
        (keys / f"{name}.pem").write_bytes((encrypted / f"{name}.pem").read_bytes())
    (keys / "README").write_text("no key")
    with contextlib.closing(ImageStore(tmp_path / "store", settings=Settings(keys=keys))) as store:
        yield store


@pytest.mark.parametrize("names", [("one",), ("two",), ("stranger", "two")])
def test_each_recipient_opens_it(tmp_path: Path, encrypted: Path, names: tuple[str, ...]) -> None:
    with store_with(tmp_path, encrypted, *names) as store:
        (image,) = store.load(f"oci:{encrypted}/layout")
        assert image.layers == (sha256(BASE), sha256(TOP))


@pytest.mark.parametrize(
    ("names", "words"), [((), "there is no private key in .*/keys"), (("stranger",), "none of the 1 private keys")]
)
def test_nobody_else_does(tmp_path: Path, encrypted: Path, names: tuple[str, ...], words: str) -> None:
    with store_with(tmp_path, encrypted, *names) as store:
        with pytest.raises(PermissionRefused, match=rf"layer sha256:\w{{64}} is encrypted .*{words}"):
            store.load(f"oci:{encrypted}/layout")
    assert_nothing_left(tmp_path / "store")


def test_without_a_directory_of_keys_that_is_said(tmp_path: Path, encrypted: Path) -> None:
    with contextlib.closing(ImageStore(tmp_path / "store")) as store:
        with pytest.raises(PermissionRefused, match="decryption_keys_path, which is not set"):
            store.load(f"oci:{encrypted}/layout")


def packed(document: object) -> str:
    return base64.b64encode(json.dumps(document).encode()).decode()


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        (WRAPPED, lambda value: "!", InvalidArgument, "not a JSON object in base64"),
        (WRAPPED, lambda value: packed([]), InvalidArgument, "not a JSON object"),
        (WRAPPED, lambda value: packed({"protected": 5}), PermissionRefused, "none of the 1 private keys"),
        (WRAPPED, lambda value: "", PermissionRefused, "encrypted for jwe, and only JWE"),
        (PUBLIC, lambda value: packed({"cipher": "ROT13"}), InvalidArgument, "malformed encryption options"),
        (PUBLIC, lambda value: packed({"cipher": "AES_256_CTR_HMAC_SHA256", "hmac": "AA=="}), InvalidArgument, "malf"),
        (
            PUBLIC,
            lambda value: packed({"cipher": "AES_256_CTR_HMAC_SHA256", "hmac": base64.b64encode(bytes(32)).decode()}),
            Unavailable,
            "its authentication code is another",
        ),
    ],
)
def test_what_was_tampered_with_is_refused(
    tmp_path: Path, encrypted: Path, name: str, change: Callable[[str], str], error: type[CrioError], words: str
) -> None:
    layout = tmp_path / "layout"
    run("cp", "-r", encrypted / "layout", layout)
    rewrite(layout, lambda layer: layer["annotations"].update({name: change(layer["annotations"][name])}))
    with store_with(tmp_path, encrypted, "one") as store, pytest.raises(error, match=words):
        store.load(f"oci:{layout}")
    assert_nothing_left(tmp_path / "store")


def rewrite(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change each layer of the layout's one manifest."""
    index = json.loads((layout / "index.json").read_text())
    (entry,) = index["manifests"]
    manifest = json.loads((layout / "blobs/sha256" / entry["digest"][7:]).read_text())
    for layer in manifest["layers"]:
        change(layer)
    raw = json.dumps(manifest).encode()
    (layout / "blobs/sha256" / sha256(raw)[7:]).write_bytes(raw)
    entry |= {"digest": sha256(raw), "size": len(raw)}
    (layout / "index.json").write_text(json.dumps(index))
