"""Docker's first image manifest ("Image Manifest V 2, Schema 1"), signed or not, made into an OCI image.

It lists layers by the digest of their compressed bytes only, and has a config a layer as JSON within JSON.  What a
config must say, the digests of the layers' content, is found out by fetching and unpacking them; as nobody makes such
images any more, that costs a second unpacking.  The signatures are by keys that nobody knows, and are not looked at.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crio_native.errors import InvalidArgument
from crio_native.images.manifests import (
    MAX_LAYER,
    MAX_LAYERS,
    OCI_CONFIG,
    Descriptor,
    Manifest,
    parse_document,
    verified,
)
from crio_native.images.references import check_digest
from crio_native.images.unpacking import unpack

MAX_HISTORY = 10 * MAX_LAYERS  # most entries make no layer
PIECE = 256 << 10
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
# What a config of its own has, and an image's must not.
_OF_A_LAYER = ("id", "parent", "parent_id", "layer_id", "throwaway", "Size", "container", "container_config")


class Blobs(Protocol):
    """Where content comes from: by descriptor, and its size by digest."""

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]: ...

    def size(self, digest: str) -> int: ...


def unsigned(raw: bytes) -> bytes:
    """The bytes that the document's digest is of: all but the signatures.  Raises InvalidArgument."""
    what = "schema 1 manifest"
    signatures = parse_document(raw, what).get("signatures")
    if not signatures:
        return raw
    try:
        payloads = {_payload(raw, signature["protected"]) for signature in signatures}
        (payload,) = payloads
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidArgument(f"{what}.signatures", signatures, "malformed, or of different documents") from None
    return payload


def _payload(raw: bytes, protected: str) -> bytes:
    header = json.loads(_base64(protected))
    length = header["formatLength"]
    if type(length) is not int or not 0 < length <= len(raw):
        raise ValueError(length)
    return raw[:length] + _base64(header["formatTail"])


def _base64(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError(text) from error


@dataclass(frozen=True, slots=True)
class Spooled:
    """The layers as files of ours."""

    directory: Path

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        with (self.directory / descriptor.digest).open("rb", buffering=0) as file:
            while piece := file.read(PIECE):
                yield piece


def as_image(raw: bytes, blobs: Blobs, directory: Path, origin: str) -> tuple[Manifest, bytes, Spooled]:
    """An image of a schema 1 document: its manifest, the config made for it, and its layers in `directory`.

    Raises InvalidArgument for a malformed document; what blobs and unpacking raise.
    """
    document = parse_document(raw, "schema 1 manifest")
    history = list(_history(document))
    spooled = Spooled(directory)
    layers, diff_ids = [], []
    for digest, config in reversed(history):  # the document has the top layer first
        if config.get("throwaway"):
            continue
        descriptor = Descriptor(LAYER, digest, min(blobs.size(digest), MAX_LAYER))
        diff_ids.append(_fetch(descriptor, blobs, spooled, origin))
        layers.append(descriptor)
    if len(layers) > MAX_LAYERS:
        raise InvalidArgument("schema 1 manifest.fsLayers", len(layers), f"more than {MAX_LAYERS} layers")
    top = history[0][1]
    config = {key: value for key, value in top.items() if key not in _OF_A_LAYER}
    config.setdefault("architecture", document.get("architecture") or "")
    config["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    config["history"] = [_event(entry) for _, entry in reversed(history)]
    made = json.dumps(config).encode()
    described = Descriptor(OCI_CONFIG, "sha256:" + hashlib.sha256(made).hexdigest(), len(made))
    return Manifest(described, tuple(layers)), made, spooled


def _fetch(descriptor: Descriptor, blobs: Blobs, spooled: Spooled, origin: str) -> str:
    """Bring a layer here, checked; returns the digest of its content."""
    path = spooled.directory / descriptor.digest
    if not path.exists():
        with path.open("xb", buffering=0) as file:
            for piece in verified(blobs.blob(descriptor), descriptor, origin):
                file.write(piece)
    tree = spooled.directory / "tree"
    tree.mkdir()
    try:
        return unpack(tree, spooled.blob(descriptor), what=f"layer {descriptor.digest}").digest
    finally:
        shutil.rmtree(tree)


def _history(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(digest of the layer, its config), the top first."""
    layers, history = document.get("fsLayers"), document.get("history")
    if not isinstance(layers, list) or not isinstance(history, list) or not 0 < len(layers) == len(history):
        raise InvalidArgument(
            "schema 1 manifest", type(layers).__name__, "fsLayers and history are not lists of one length"
        )
    if len(layers) > MAX_HISTORY:
        raise InvalidArgument("schema 1 manifest.fsLayers", len(layers), f"more than {MAX_HISTORY} entries")
    for number, (layer, entry) in enumerate(zip(layers, history, strict=True)):
        where = f"schema 1 manifest.history[{number}]"
        digest = layer.get("blobSum") if isinstance(layer, dict) else None
        text = entry.get("v1Compatibility") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise InvalidArgument(f"{where}.v1Compatibility", text, "not a string")
        yield (
            check_digest(digest, f"schema 1 manifest.fsLayers[{number}].blobSum"),
            parse_document(text.encode(), f"{where}.v1Compatibility"),
        )


def _event(config: dict[str, Any]) -> dict[str, Any]:
    """An entry of the image config's history."""
    build = config.get("container_config")
    command = build.get("Cmd") if isinstance(build, dict) else None
    event = {
        "created": config.get("created"),
        "author": config.get("author"),
        "created_by": " ".join(command)
        if isinstance(command, list) and all(isinstance(c, str) for c in command)
        else None,
        "empty_layer": True if config.get("throwaway") else None,
    }
    return {key: value for key, value in event.items() if value}
