"""Images on disk as sources: the OCI image layout (image-layout.md), the docker-archive that `docker save` writes,
skopeo's `dir`; and the way to `containers_storage`.

All are directories here; an archive file is unpacked into one first, by the confined unpacker (see `opened`).  All
that lies in such a directory is a stranger's: every path is resolved by the kernel inside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crio_native.errors import InvalidArgument, NotFound
from crio_native.images import containers_storage, references, schema1
from crio_native.images.containers_storage import STORAGE
from crio_native.images.directories import Found, exists, open_file, pieces_of, read_file
from crio_native.images.manifests import (
    DOCKER_CONFIG,
    MAX_DOCUMENT,
    MAX_LAYERS,
    OCI_INDEX,
    Descriptor,
    Manifest,
    choose,
    parse_config,
    parse_document,
    parse_manifest,
    resolve,
    verified,
)
from crio_native.images.model import Platform
from crio_native.images.unpacking import HEAD, compression, unpack

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"  # what docker and containerd write beside it
DIRECTORIES = ("oci", "dir", STORAGE)
TRANSPORTS = (*DIRECTORIES, "oci-archive", "docker-archive")


def split_source(source: str) -> tuple[str, str, str]:
    """(transport, path, tag) of a `load` argument; transport "" for a bare path, tag "" for all images.  Raises
    InvalidArgument."""
    transport, colon, rest = source.partition(":")
    path, tag = rest, ""
    if colon and transport in TRANSPORTS:
        path, _, tag = rest.partition(":")
    else:
        transport, path = "", source
    if not path.startswith("/") or "\0" in path:
        accepted = "an absolute path, alone or after oci:, oci-archive:, docker-archive:, dir: or containers-storage:"
        raise InvalidArgument("source", source, f"not {accepted}")
    return transport, path, tag


@contextlib.contextmanager
def opened(source: str, scratch: Path, platform: Platform) -> Iterator[list[Found]]:
    """The images of `source`; an archive file is unpacked in `scratch`, an empty directory, for that time.

    Raises InvalidArgument, NotFound, Unimplemented, and whatever unpacking raises.
    """
    transport, path, tag = split_source(source)
    root = _open_directory(transport, path, scratch)
    try:
        if transport in ("", "oci", "oci-archive") and exists(root, "oci-layout"):
            archive = os.path.isfile(path)
            yield _Layout(root, path, "oci-archive" if archive else "oci").images(tag, platform)
        elif transport in ("", "dir") and exists(root, "version") and exists(root, "manifest.json"):
            yield _Directory(root, path, "dir").images(tag, platform)
        elif transport in ("", STORAGE) and (driver := containers_storage.driver_of(root)):
            yield containers_storage.Storage(root, path, driver).images(tag)
        elif transport in ("", "docker-archive") and exists(root, "manifest.json"):
            yield _DockerArchive(root).images(tag)
        else:
            wanted = {
                "": "OCI layout, docker-archive, dir or containers-storage",
                "docker-archive": "docker-archive",
                "dir": "directory of the dir transport",
                STORAGE: "root of a containers/storage with the overlay or vfs driver",
            }
            raise InvalidArgument("source", source, f"this is no {wanted.get(transport, 'OCI layout')}")
    finally:
        os.close(root)


def _open_directory(transport: str, path: str, scratch: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("file", path) from None
    except OSError as error:
        raise InvalidArgument("source", path, f"it cannot be opened: {error.strerror}") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode) and transport in ("", *DIRECTORIES):
        return fd
    try:
        wants_directory = transport in DIRECTORIES
        if not stat.S_ISREG(mode) or wants_directory:
            raise InvalidArgument("source", path, f"not a {'directory' if wants_directory else 'file'}")
        unpack(scratch, pieces_of(fd), layer=False, what=f"archive {path}")
    finally:
        os.close(fd)
    return os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


class _Layout:
    """An OCI image layout."""

    def __init__(self, root: int, path: str, transport: str) -> None:
        self._root, self._path, self._transport = root, path, transport

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        with open_file(self._root, self._path_of(descriptor.digest)) as fd:
            yield from pieces_of(fd)

    @staticmethod
    def _path_of(digest: str) -> str:
        return f"blobs/{digest.replace(':', '/')}"

    def images(self, tag: str, platform: Platform) -> list[Found]:
        what = f"{self._path}/index.json"
        index = parse_manifest(read_file(self._root, "index.json"), OCI_INDEX, what)
        if isinstance(index, Manifest):
            raise InvalidArgument(what, "a manifest", "not an index")
        by_name: dict[str, list[Descriptor]] = {}
        for descriptor in index:
            full, short = descriptor.annotations.get(FULL_NAME, ""), descriptor.annotations.get(REF_NAME, "")
            if tag in ("", full, short):
                by_name.setdefault(full or short, []).append(descriptor)
        if not by_name:
            names = sorted({name for d in index for key in (FULL_NAME, REF_NAME) if (name := d.annotations.get(key))})
            raise NotFound("image", tag or what, f"the layout has {', '.join(names[:20]) or 'no image with a name'}")
        return [self._image(name, candidates, platform) for name, candidates in by_name.items()]

    def _image(self, name: str, candidates: list[Descriptor], platform: Platform) -> Found:
        what = f"{self._path}: {name or 'image'}"
        chosen = choose(candidates, platform, what)
        manifest, digests = resolve(self._document, self._document(chosen), chosen.media_type, platform, what)
        return Found(_names(name, self._path), manifest, digests, self, self._transport, name)

    def size(self, digest: str) -> int:
        with open_file(self._root, self._path_of(digest)) as fd:
            return os.fstat(fd).st_size

    def _document(self, descriptor: Descriptor) -> bytes:
        if descriptor.size > MAX_DOCUMENT:
            raise InvalidArgument(f"{descriptor.digest}.size", descriptor.size, f"more than {MAX_DOCUMENT} bytes")
        return b"".join(verified(self.blob(descriptor), descriptor, self._path))


class _Directory(_Layout):
    """What `skopeo copy ... dir:` writes: manifest.json, and every other blob under the hex digits of its digest."""

    @staticmethod
    def _path_of(digest: str) -> str:
        return digest.partition(":")[2]

    def images(self, tag: str, platform: Platform) -> list[Found]:
        if tag:
            raise InvalidArgument("source", tag, "a directory has one image, without a name")
        what = f"{self._path}/manifest.json"
        raw = read_file(self._root, "manifest.json")
        if parse_document(raw, what).get("schemaVersion") == 1:
            raw = schema1.unsigned(raw)
        manifest, digests = resolve(self._document, raw, "", platform, what)
        return [Found((), manifest, digests, self, self._transport)]

    def _document(self, descriptor: Descriptor) -> bytes:
        raw = read_file(self._root, f"{descriptor.digest.partition(':')[2]}.manifest.json")
        return b"".join(verified([raw], descriptor, self._path))


def _names(name: str, path: str) -> tuple[str, ...]:
    """The complete name of an image in a layout; a mere tag is taken as one of the layout's own name."""
    if not name:
        return ()
    if "/" in name or ":" in name:
        return (str(references.parse(name, f"{path}/index.json")),)
    stem = os.path.basename(path.rstrip("/")).lower().partition(".tar")[0].removesuffix(".tgz")
    try:
        return (str(references.parse(f"localhost/{stem}:{name}")),)
    except InvalidArgument:
        return ()


class _DockerArchive:
    """What `docker save` writes: manifest.json, and files for configs and layers."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._paths: dict[str, str] = {}  # digest -> file

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        with open_file(self._root, self._paths[descriptor.digest]) as fd:
            yield from pieces_of(fd)

    def images(self, tag: str) -> list[Found]:
        entries = parse_document(b'{"images":%s}' % read_file(self._root, "manifest.json"), "manifest.json")["images"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InvalidArgument("manifest.json", entries, "not a list of images")
        found = [self._image(entry, f"manifest.json[{number}]") for number, entry in enumerate(entries)]
        if tag:
            wanted = str(references.parse(tag, "source"))
            found = [image for image in found if wanted in image.names]
        if not found:
            raise NotFound("image", tag or "manifest.json", "the archive does not have it")
        return found

    def _image(self, entry: dict[str, Any], where: str) -> Found:
        config_path, layers, tags = entry.get("Config"), entry.get("Layers") or [], entry.get("RepoTags") or []
        if not isinstance(config_path, str) or not config_path:
            raise InvalidArgument(f"{where}.Config", config_path, "not a path")
        if not _is_texts(layers) or len(layers) > MAX_LAYERS:
            raise InvalidArgument(f"{where}.Layers", layers, f"not a list of up to {MAX_LAYERS} paths")
        if not _is_texts(tags):
            raise InvalidArgument(f"{where}.RepoTags", tags, "not a list of names")
        raw = read_file(self._root, config_path)
        diff_ids = parse_config(raw, len(layers), f"{where}.Config")["rootfs"]["diff_ids"]
        config = Descriptor(DOCKER_CONFIG, "sha256:" + hashlib.sha256(raw).hexdigest(), len(raw))
        self._paths[config.digest] = config_path
        blobs = tuple(self._layer(path, diff_id) for path, diff_id in zip(layers, diff_ids, strict=True))
        names = tuple(str(references.parse(name, f"{where}.RepoTags")) for name in tags)
        return Found(names, Manifest(config, blobs), (), self, "docker-archive")

    def _layer(self, path: str, diff_id: str) -> Descriptor:
        """A plain layer's digest is its diff id; only of a compressed one it has to be found out."""
        with open_file(self._root, path) as fd:
            digest = diff_id
            if compression(os.pread(fd, HEAD, 0)) != "none":
                hasher = hashlib.sha256()
                for piece in pieces_of(fd):
                    hasher.update(piece)
                digest = "sha256:" + hasher.hexdigest()
            size = os.fstat(fd).st_size
        self._paths[digest] = path
        return Descriptor("application/vnd.oci.image.layer.v1.tar", digest, size)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)
