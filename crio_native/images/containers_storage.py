"""A containers/storage root as a source: the images that podman, skopeo, buildah or CRI-O left on this machine.

Read only, and while its owner may be using it.  Its JSON files are replaced by rename, so each is whole when it is
read; a layer that its owner removes meanwhile is a file that is missing.  A layer is put together again as the archive
that it was unpacked from, byte by byte: the tar-split file has the headers, the layer's directory the contents.  Its
digest is then checked like that of any other layer, so nothing here is believed.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import os
import re
from collections.abc import Iterator
from typing import Any, Final

from crio_native.errors import InvalidArgument, NotFound
from crio_native.images import references
from crio_native.images.directories import Found, exists, open_file, pieces_of, read_file
from crio_native.images.manifests import (
    MAX_DOCUMENT,
    MAX_LAYER,
    MAX_LAYERS,
    OCI_CONFIG,
    Descriptor,
    Manifest,
    parse_config,
)

STORAGE: Final = "containers-storage"  # the transport
# Where a driver has a layer's files.  With vfs that is a whole file system, of which the tar-split names its part.
_DIRECTORIES: Final = {"overlay": "overlay/{}/diff", "vfs": "vfs/dir/{}"}
LAYER = "application/vnd.oci.image.layer.v1.tar"
MAX_LIST = 64 << 20  # bytes of layers.json and images.json
MAX_LINE = 4 << 20  # bytes of a tar-split's entry: the headers of one file
_FILE, _SEGMENT = 1, 2
_ID = re.compile(r"[0-9a-f]{64}")
_LINK = re.compile(r"[A-Z0-9]{26}")


def driver_of(root: int) -> str:
    """The driver whose images a directory holds; "" if it is no storage."""
    return next((driver for driver in _DIRECTORIES if exists(root, f"{driver}-images/images.json")), "")


class Storage:
    """A storage.  root: a descriptor of it; path: its name, for errors."""

    def __init__(self, root: int, path: str, driver: str) -> None:
        self._root, self._path, self._driver = root, path, driver
        self._layers = {
            str(entry.get("diff-digest")): entry for entry in self._list(f"{driver}-layers/layers.json") if entry
        }
        self._configs: dict[str, bytes] = {}

    def images(self, name: str) -> list[Found]:
        """All images, or the one of a name.  Raises NotFound, InvalidArgument."""
        entries = self._list(f"{self._driver}-images/images.json")
        if name:
            wanted = str(references.parse(name, "source"))
            entries = [entry for entry in entries if wanted in (entry.get("names") or ())]
        if not entries:
            raise NotFound("image", name or self._path, "the storage does not have it")
        return [self._image(entry) for entry in entries]

    def stacked(self) -> Iterator[tuple[Found, tuple[str, ...]]]:
        """Each image that is here, with its layers' directories below `overlay`, topmost first: to be mounted as they
        are.  Raises InvalidArgument, NotFound."""
        by_id = {entry.get("id"): entry for entry in self._layers.values()}
        for image in self._list("overlay-images/images.json"):
            found, lowers, id_ = self._image(image), list[str](), image.get("layer")
            while id_:
                if not isinstance(id_, str) or not _ID.fullmatch(id_) or id_ not in by_id or len(lowers) > MAX_LAYERS:
                    raise NotFound("layer", str(id_), f"the storage {self._path} does not have it, or not whole")
                lowers.append(self._short(id_))
                id_ = by_id[id_].get("parent")
            yield found, tuple(lowers)

    def _short(self, id_: str) -> str:
        """The symlink that a storage has beside each layer, so that many names fit a page of mount data."""
        link = read_file(self._root, f"overlay/{id_}/link", 64).decode("ascii", "replace")
        return f"l/{link}" if _LINK.fullmatch(link) else f"{id_}/diff"

    def config(self, image: Found) -> bytes:
        """The config's own bytes."""
        return self._configs[image.manifest.config.digest]

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        if descriptor.digest in self._configs:
            return iter((self._configs[descriptor.digest],))
        return self._layer(self._layers[descriptor.digest])

    def _image(self, entry: dict[str, Any]) -> Found:
        where = f"{self._path}: images.json"
        id_, names, digest = entry.get("id"), entry.get("names") or [], entry.get("digest")
        if not isinstance(id_, str) or not _ID.fullmatch(id_):
            raise InvalidArgument(f"{where}: id", id_, "not 64 hex digits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InvalidArgument(f"{where}: names", names, "not a list of names")
        key = base64.b64encode(f"sha256:{id_}".encode()).decode()
        raw = read_file(self._root, f"{self._driver}-images/{id_}/={key}", MAX_DOCUMENT)
        config = Descriptor(OCI_CONFIG, f"sha256:{id_}", len(raw))
        self._configs[config.digest] = raw
        manifest = Manifest(config, tuple(self._descriptors(raw, id_)))
        complete = tuple(str(references.parse(name, where)) for name in names)
        digests = (references.check_digest(digest, f"{where}: digest"),) if digest else ()
        return Found(complete, manifest, digests, self, STORAGE)

    def _descriptors(self, config: bytes, id_: str) -> Iterator[Descriptor]:
        what = f"{self._path}: config of {id_}"
        rootfs = parse_config(config, _count(config), what)["rootfs"]
        if len(rootfs["diff_ids"]) > MAX_LAYERS:
            raise InvalidArgument(f"{what}.rootfs.diff_ids", len(rootfs["diff_ids"]), f"more than {MAX_LAYERS} layers")
        for diff_id in rootfs["diff_ids"]:
            size = self._layers.get(diff_id, {}).get("diff-size")
            if type(size) is not int or not 0 <= size <= MAX_LAYER:
                raise NotFound("layer", diff_id, f"the storage {self._path} does not have it, or not whole")
            yield Descriptor(LAYER, diff_id, size)

    def _layer(self, entry: dict[str, Any]) -> Iterator[bytes]:
        """The archive that a layer was unpacked from."""
        id_ = str(entry.get("id"))
        if not _ID.fullmatch(id_):
            raise InvalidArgument(f"{self._path}: layers.json: id", id_, "not 64 hex digits")
        files = _DIRECTORIES[self._driver].format(id_)
        with open_file(self._root, f"{self._driver}-layers/{id_}.tar-split.gz") as fd:
            # isal's reader is for files by name; this is a tenth of the work.
            with gzip.open(os.fdopen(os.dup(fd), "rb")) as lines:
                while line := lines.readline(MAX_LINE):
                    yield from self._part(line, files)

    def _part(self, line: bytes, files: str) -> Iterator[bytes]:
        try:
            entry = json.loads(line)
            kind, size = entry["type"], entry.get("size", 0)
            name = base64.b64decode(entry["name_raw"]) if entry.get("name_raw") else str(entry.get("name")).encode()
            segment = base64.b64decode(entry["payload"] or "") if kind == _SEGMENT else b""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
            raise InvalidArgument(f"{self._path}: tar-split", line[:60], "malformed") from None
        if kind == _SEGMENT:
            yield segment
        elif kind == _FILE and size:
            with open_file(self._root, f"{files}/{os.fsdecode(name)}") as fd:
                yield from pieces_of(fd)

    def _list(self, name: str) -> list[dict[str, Any]]:
        try:
            entries = json.loads(read_file(self._root, name, MAX_LIST))
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{self._path}/{name}", str(error), "not JSON") from None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InvalidArgument(f"{self._path}/{name}", type(entries).__name__, "not a list of objects")
        return entries


def _count(config: bytes) -> int:
    """How many layers a config says that it has; `parse_config` looks at all else."""
    try:
        return len(json.loads(config)["rootfs"]["diff_ids"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
