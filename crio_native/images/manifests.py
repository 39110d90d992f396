"""The documents of an image: index, manifest, config (OCI image-spec; Docker image manifest v2, schema 2).

From bytes of a stranger to checked values.  Nothing here fetches or stores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from crio_native.errors import InvalidArgument, NotFound, Unavailable, Unimplemented
from crio_native.images.model import ARCHITECTURES, Platform
from crio_native.images.references import check_digest
from crio_native.images.trust.documents import json_fault

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

INDEXES = (OCI_INDEX, DOCKER_LIST)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
ACCEPTED = (*INDEXES, *MANIFESTS)  # in an index

# Docker's first, obsolete form; with signatures it has its own media type.
SCHEMA1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)

# Archives of a layer's files.  Their compression is seen from their beginning; all forms of `unpacking` are read.
_OCI_LAYER, _OCI_FOREIGN = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
)
_DOCKER_LAYER, _DOCKER_FOREIGN = (
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
FOREIGN = (_OCI_FOREIGN, f"{_OCI_FOREIGN}+gzip", f"{_OCI_FOREIGN}+zstd", _DOCKER_FOREIGN, f"{_DOCKER_FOREIGN}.gzip")
LAYERS = (
    *(_OCI_LAYER, f"{_OCI_LAYER}+gzip", f"{_OCI_LAYER}+zstd"),
    *(_DOCKER_LAYER, f"{_DOCKER_LAYER}.gzip", f"{_DOCKER_LAYER}.zstd"),
    *FOREIGN,
)
ENCRYPTED = "+encrypted"

MAX_DOCUMENT = 4 << 20  # bytes
MAX_LAYERS = 127  # so many names still fit the kernel's page of mount options
MAX_LAYER = 1 << 40  # bytes, compressed
MAX_URLS = 16  # of a foreign layer
MAX_NESTING = 3  # documents from a name to its manifest
_ANYWHERE = {"", "unknown", "wasm"}  # architectures that are none of a machine's
_ALSO = {"amd64": {"386"}, "arm64": {"arm"}, "s390x": {"s390"}}  # what a kernel runs beside its own
_UNSPEAKABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a document says about another piece of content (image-spec, descriptor.md)."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its config and its layers, lowest first.

    artifact_type: "" for a container image, else what the manifest is instead (image-spec, "Guidelines for Artifact
    Usage"); its layers are then any blobs.  schema1: the document, where it is one of Docker's first form, which has
    neither config nor sizes.
    """

    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str = ""
    schema1: bytes = b""


def verified(pieces: Iterable[bytes], descriptor: Descriptor, origin: str) -> Generator[bytes, None, None]:
    """Pass content through; raise Unavailable as soon as it cannot be what the descriptor promises."""
    algorithm, _, expected = descriptor.digest.partition(":")
    digest, size = hashlib.new(algorithm), 0
    for piece in pieces:
        size += len(piece)
        if size > descriptor.size:
            break
        digest.update(piece)
        yield piece
    if size != descriptor.size:
        more = "more than " if size > descriptor.size else ""
        size = min(size, descriptor.size)
        raise Unavailable(f"{origin} gave {more}{size} bytes for {descriptor.digest}, which has {descriptor.size}")
    if digest.hexdigest() != expected:
        got = f"{algorithm}:{digest.hexdigest()}"
        raise Unavailable(f"{origin} gave other content than {descriptor.digest}: its digest is {got}")


def parse_document(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object.  Raises InvalidArgument; `what` names the document."""
    if len(raw) > MAX_DOCUMENT:
        raise InvalidArgument(what, f"{len(raw)} bytes", f"larger than {MAX_DOCUMENT} bytes")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(what, raw[:60], f"not JSON ({json_fault(error)})") from None
    if not isinstance(document, dict):
        raise InvalidArgument(what, raw[:60], "not a JSON object")
    return document


def parse_manifest(raw: bytes, media_type: str, what: str) -> Manifest | tuple[Descriptor, ...]:
    """A manifest, or the descriptors of an index.

    media_type: what the sender called it; what the document calls itself decides, and both must not disagree.
    Raises InvalidArgument, and Unimplemented for what is no image or too old.
    """
    document = parse_document(raw, what)
    own = document.get("mediaType", "")
    kind = own or media_type
    if document.get("schemaVersion") == 1:
        return Manifest(Descriptor("", "", 0), (), schema1=raw)
    if document.get("schemaVersion") != 2:
        raise InvalidArgument(f"{what}.schemaVersion", document.get("schemaVersion"), "must be 2")
    if own and media_type in ACCEPTED and own != media_type:
        raise InvalidArgument(f"{what}.mediaType", own, f"it was sent as {media_type}")
    if kind in INDEXES and not {"config", "layers"} & document.keys():
        return tuple(_descriptors(document, "manifests", what))
    if kind not in MANIFESTS or "manifests" in document:  # a document of both kinds could be read in two ways
        raise InvalidArgument(f"{what}.mediaType", kind, f"not one image or index; known: {', '.join(ACCEPTED)}")
    config = _descriptor(document.get("config"), f"{what}.config", MAX_DOCUMENT)
    layers = tuple(_descriptors(document, "layers", what))
    if len(layers) > MAX_LAYERS:
        raise InvalidArgument(f"{what}.layers", len(layers), f"more than {MAX_LAYERS} layers")
    if config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        return Manifest(config, layers, _artifact_type(document, config, what))
    for layer in layers:
        _check_layer(layer)
    return Manifest(config, layers)


def _artifact_type(document: Mapping[str, Any], config: Descriptor, what: str) -> str:
    _check_fields(document, {"artifactType": _text}, what)
    return document.get("artifactType") or config.media_type or "unknown"


def _check_layer(layer: Descriptor) -> None:
    """Raises Unimplemented for what cannot be unpacked."""
    if layer.media_type.endswith(ENCRYPTED) and layer.media_type.removesuffix(ENCRYPTED) in LAYERS:
        return
    if layer.media_type not in LAYERS:
        known = ", ".join(LAYERS)
        raise Unimplemented(f"layer {layer.digest} has media type {layer.media_type!r}; known: {known}")


def choose(descriptors: Iterable[Descriptor], platform: Platform, what: str) -> Descriptor:
    """The manifest of an index that suits a platform best; one that names no platform is the last resort.  Raises
    NotFound."""
    offered = list(descriptors)
    suitable: list[tuple[int, int]] = []
    for position, descriptor in enumerate(offered):
        preference = 100 if descriptor.platform is None else platform.preference(descriptor.platform)
        if preference is not None and descriptor.media_type in ACCEPTED:
            suitable.append((preference, position))
    if not suitable:
        names = sorted({str(d.platform) for d in offered if d.platform and d.platform.os != "unknown"})
        raise NotFound("platform", str(platform), f"{what} has {', '.join(names[:20]) or 'no image at all'}")
    return offered[min(suitable)[1]]


def resolve(
    fetch: Callable[[Descriptor], bytes], raw: bytes, media_type: str, platform: Platform, what: str
) -> tuple[Manifest, tuple[str, ...]]:
    """From a document to the manifest for a platform, through indexes if need be.

    fetch: gets another document, verified.  Returns the manifest and the digests of all documents on the way, the
    manifest's own last.  Raises as `parse_manifest` and `choose`, and what fetch raises.
    """
    digests: list[str] = []
    for _ in range(MAX_NESTING):
        digests.append("sha256:" + hashlib.sha256(raw).hexdigest())
        parsed = parse_manifest(raw, media_type, what)
        if isinstance(parsed, Manifest):
            return parsed, tuple(digests)
        chosen = choose(parsed, platform, what)
        raw, media_type, what = fetch(chosen), chosen.media_type, f"manifest {chosen.digest}"
    raise InvalidArgument(what, digests[-1], f"indexes are nested more than {MAX_NESTING - 1} deep")


def parse_config(raw: bytes, layers: int, what: str) -> dict[str, Any]:
    """An image config with `rootfs.diff_ids` for so many layers; the fields that we use have the right types.  Raises
    InvalidArgument."""
    config = parse_document(raw, what)
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != layers:
        raise InvalidArgument(f"{what}.rootfs.diff_ids", diff_ids, f"not a list of {layers} digests, one a layer")
    for number, diff_id in enumerate(diff_ids):
        if not check_digest(diff_id, f"{what}.rootfs.diff_ids[{number}]").startswith("sha256:"):
            raise InvalidArgument(f"{what}.rootfs.diff_ids[{number}]", diff_id, "not a sha256 digest")
    _check_fields(config, {"architecture": _text, "os": _text, "created": _text}, what)
    _check_platform(config, what)
    if config.get("config") is not None:
        if not isinstance(config["config"], dict):
            raise InvalidArgument(f"{what}.config", config["config"], "not an object")
        _check_fields(config["config"], _CONFIG_FIELDS, f"{what}.config")
    return config


def _check_platform(config: Mapping[str, Any], what: str) -> None:
    """An image for another known machine is let through, as people label them wrongly; a word of no sense is not."""
    architecture, os_ = config.get("architecture") or "", config.get("os") or "linux"
    if architecture and architecture not in ARCHITECTURES:
        raise InvalidArgument(f"{what}.architecture", architecture, "not an architecture that there is (GOARCH)")
    if os_ != "linux":
        raise InvalidArgument(f"{what}.os", os_, "this node runs images for linux")


def of_another_machine(config: Mapping[str, Any]) -> str:
    """In words, where a config is for a machine that this host is not; "" where it says none, or one that runs here."""
    offered = Platform(config.get("architecture") or "", config.get("os") or "linux", str(config.get("variant") or ""))
    host = Platform.host()
    if host.preference(offered) is not None or offered.architecture in _ANYWHERE | _ALSO.get(host.architecture, set()):
        return ""
    return f"it is for {offered}, and this host is {host}: what is in it will not run, unless it is labelled wrongly"


def _text(value: object) -> bool:
    """JSON can escape half of a character, which neither the CRI nor a file system can say."""
    return isinstance(value, str) and not _UNSPEAKABLE.search(value)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _text_map(value: object) -> bool:
    return isinstance(value, dict) and all(map(_text, value)) and all(map(_text, value.values()))


def _set(value: object) -> bool:
    return isinstance(value, dict) and all(map(_text, value))


_CONFIG_FIELDS = {
    "User": _text,
    "WorkingDir": _text,
    "StopSignal": _text,
    "Env": _texts,
    "Cmd": _texts,
    "Entrypoint": _texts,
    "Labels": _text_map,
    "Volumes": _set,
    "ExposedPorts": _set,
}
_KINDS = {_text: "a string", _texts: "a list of strings", _text_map: "an object of strings", _set: "an object"}


def _check_fields(document: Mapping[str, Any], fields: Mapping[str, Any], what: str) -> None:
    """A field that is absent or null is as good as empty."""
    for name, check in fields.items():
        value = document.get(name)
        if value is not None and not check(value):
            raise InvalidArgument(f"{what}.{name}", value, f"not {_KINDS[check]}, without NUL characters and half ones")


def _descriptors(document: Mapping[str, Any], key: str, what: str) -> Iterator[Descriptor]:
    entries = document.get(key)
    if not isinstance(entries, list):
        raise InvalidArgument(f"{what}.{key}", entries, "not a list of descriptors")
    most = MAX_LAYER if key == "layers" else MAX_DOCUMENT
    for number, entry in enumerate(entries):
        yield _descriptor(entry, f"{what}.{key}[{number}]", most)


def _descriptor(value: object, where: str, most: int) -> Descriptor:
    if not isinstance(value, dict):
        raise InvalidArgument(where, value, "not a descriptor")
    media_type, size = value.get("mediaType", ""), value.get("size")
    if not isinstance(media_type, str):
        raise InvalidArgument(f"{where}.mediaType", media_type, "not a string")
    if type(size) is not int or not 0 <= size <= most:
        raise InvalidArgument(f"{where}.size", size, f"not a number of bytes in 0..{most}")
    annotations = value.get("annotations") or {}
    if not _text_map(annotations):
        raise InvalidArgument(f"{where}.annotations", annotations, "not an object of strings")
    digest = check_digest(value.get("digest"), f"{where}.digest")
    urls = tuple(_urls(value.get("urls") or [], where)) if media_type in FOREIGN else ()
    return Descriptor(media_type, digest, size, _platform(value.get("platform"), where), annotations, urls)


def _urls(value: object, where: str) -> Iterator[str]:
    """Where a foreign layer is, beside the registry; of other kinds than web addresses nothing is made."""
    if not isinstance(value, list) or not all(map(_text, value)) or len(value) > MAX_URLS:
        raise InvalidArgument(f"{where}.urls", value, f"not a list of up to {MAX_URLS} addresses")
    yield from (url for url in value if url.startswith(("https://", "http://")))


def _platform(value: object, where: str) -> Platform | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}.platform", value, "not an object")
    _check_fields(value, {"os": _text, "architecture": _text, "variant": _text}, f"{where}.platform")
    return Platform(value.get("architecture") or "", value.get("os") or "", value.get("variant") or "")
