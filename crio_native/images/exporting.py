"""Images of the store written to disk: OCI layout (directory or tar), docker-archive, skopeo's `dir`.

The store keeps directories and not the archives that they came from, so layers are archived anew: the same files with
the same attributes, but other digests, and so another id, than the image had.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from crio_native.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented
from crio_native.images.layers import Layer
from crio_native.images.layouts import FULL_NAME, REF_NAME
from crio_native.images.manifests import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from crio_native.images.model import Image
from crio_native.images.work import Stop
from crio_native.linux import copytree

TRANSPORTS = ("oci", "oci-archive", "docker-archive", "dir")
GZIP_LEVEL = 1
LAYER = "application/vnd.oci.image.layer.v1.tar"
MAX_FRAGMENTS = 1 << 16  # of a file with holes; what the unpacker takes
EPOCH = 0  # time of the archive's own entries: equal images make equal archives

Content = Mapping[str, Any]


def split_target(target: str) -> tuple[str, Path]:
    """(transport, path) of a place to save to.  Raises InvalidArgument."""
    transport, _, path = target.partition(":")
    if transport not in TRANSPORTS or not path.startswith("/") or "\0" in path or ":" in path:
        accepted = ", ".join(f"{name}:" for name in TRANSPORTS)
        raise InvalidArgument("target", target, f"not an absolute path, without ':', after one of {accepted}")
    return transport, Path(path)


def export(image: Image, layers: list[Layer], base: Path, target: str, scratch: Path, stop: Stop) -> None:
    """Write an image.  layers: its own, the lowest first, below base.  scratch: an empty directory for what is tarred.

    Raises InvalidArgument for a bad target, AlreadyExists, NotFound, Unimplemented for an artifact, OSError.  After an
    error nothing is left.
    """
    transport, path = split_target(target)
    if "artifactType" in image.config:
        raise Unimplemented(f"image {image.id} is an artifact; only container images are saved")
    try:
        with contextlib.ExitStack() as undo:
            if transport in ("oci", "dir"):
                path.mkdir()
                undo.callback(shutil.rmtree, path, ignore_errors=True)
                _DIRECTORIES[transport](_Writer(path, image, layers, base, stop))
            else:
                with path.open("xb") as file:
                    undo.callback(path.unlink)
                    _DIRECTORIES[transport](_Writer(scratch, image, layers, base, stop))
                    _archive(scratch, file, stop)
            undo.pop_all()
    except FileExistsError:
        raise AlreadyExists(f"{path} exists; an image is saved to a new file or directory") from None
    except (FileNotFoundError, NotADirectoryError):
        if path.parent.is_dir():
            raise
        raise NotFound("directory", str(path.parent), "make it first") from None


@dataclass(frozen=True, slots=True)
class _Writer:
    """An image being written into a directory."""

    directory: Path
    image: Image
    layers: list[Layer]
    base: Path
    stop: Stop

    def put(self, name: Callable[[str], str], write: Callable[[IO[bytes]], None]) -> tuple[str, int]:
        """A blob, under the name of its hex digest.  Returns digest and size."""
        partial = self.directory / "partial"
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            write(hashing)  # type: ignore[arg-type]  # as much of a file as tarfile wants
        final = self.directory / name(hashing.hash.hexdigest())
        final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(partial, final)
        return "sha256:" + hashing.hash.hexdigest(), hashing.size

    def put_bytes(self, name: Callable[[str], str], media_type: str, data: bytes) -> Content:
        def write(file: IO[bytes]) -> None:
            file.write(data)

        digest, size = self.put(name, write)
        return {"mediaType": media_type, "digest": digest, "size": size}

    def put_layer(self, name: Callable[[str], str], layer: Layer, *, compress: bool) -> tuple[str, Content]:
        """Its diff id and its descriptor."""
        diff = _Hashing(None)

        def write(file: IO[bytes]) -> None:
            diff.file = _Gzip(file) if compress else file
            _write_layer(self.base / layer.lower, layer, diff, self.stop)
            diff.close()

        digest, size = self.put(name, write)
        kind = f"{LAYER}+gzip" if compress else LAYER
        return "sha256:" + diff.hash.hexdigest(), {"mediaType": kind, "digest": digest, "size": size}

    def config(self, diff_ids: list[str]) -> bytes:
        document = copy.deepcopy(dict(self.image.config))
        document["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
        return json.dumps(document, separators=(",", ":")).encode()

    def write_json(self, name: str, document: object) -> None:
        (self.directory / name).write_text(json.dumps(document))


def _oci_parts(writer: _Writer, name: Callable[[str], str]) -> bytes:
    """Layers and config; returns the manifest."""
    made = [writer.put_layer(name, layer, compress=True) for layer in writer.layers]
    config = writer.put_bytes(name, OCI_CONFIG, writer.config([diff_id for diff_id, _ in made]))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config,
        "layers": [descriptor for _, descriptor in made],
    }
    return json.dumps(manifest).encode()


def _write_layout(writer: _Writer) -> None:
    def name(digest: str) -> str:
        return f"blobs/sha256/{digest}"

    manifest = writer.put_bytes(name, OCI_MANIFEST, _oci_parts(writer, name))
    entries: list[Content] = [
        {**manifest, "annotations": {FULL_NAME: full, REF_NAME: full.rpartition(":")[2]}} for full in writer.image.names
    ]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries or [manifest]}
    writer.write_json("index.json", index)
    writer.write_json("oci-layout", {"imageLayoutVersion": "1.0.0"})


def _write_directory(writer: _Writer) -> None:
    (writer.directory / "manifest.json").write_bytes(_oci_parts(writer, lambda digest: digest))
    (writer.directory / "version").write_text("Directory Transport Version: 1.1\n")


def _write_docker_archive(writer: _Writer) -> None:
    made = [writer.put_layer(lambda digest: f"{digest}.tar", layer, compress=False) for layer in writer.layers]
    config = writer.put_bytes(lambda digest: f"{digest}.json", "", writer.config([diff_id for diff_id, _ in made]))
    entry = {
        "Config": config["digest"].partition(":")[2] + ".json",
        "RepoTags": list(writer.image.names),
        "Layers": [descriptor["digest"].partition(":")[2] + ".tar" for _, descriptor in made],
    }
    writer.write_json("manifest.json", [entry])


_DIRECTORIES = {
    "oci": _write_layout,
    "oci-archive": _write_layout,
    "docker-archive": _write_docker_archive,
    "dir": _write_directory,
}


def _archive(directory: Path, file: IO[bytes], stop: Stop) -> None:
    """All files of a directory as a tar."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            stop.check()
            entry = tarfile.TarInfo(str(path.relative_to(directory)))
            entry.size, entry.mode, entry.mtime = path.stat().st_size, 0o644, EPOCH
            with path.open("rb") as content:
                archive.addfile(entry, content)


# A layer as an archive


def _write_layer(root: Path, layer: Layer, file: _Hashing, stop: Stop) -> None:
    """A directory that overlayfs takes as a lower one, in the words of the image-spec (layer.md)."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        if layer.owner:
            entry = _entry(root, "./")
            entry.mode, entry.uid, entry.gid = layer.owner
            archive.addfile(entry)
        if layer.opaque:
            archive.addfile(tarfile.TarInfo(".wh..wh..opq"))
        first: dict[int, str] = {}
        for path, name in below(root, ""):
            stop.check()
            add(archive, path, name, first)


def below(directory: Path, prefix: str = "") -> Iterator[tuple[Path, str]]:
    """All that is in a directory that nobody changes meanwhile, with its name in an archive."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path, name = directory / entry.name, f"{prefix}{entry.name}"
        yield path, name
        if entry.is_dir(follow_symlinks=False):
            yield from below(path, f"{name}/")


def add(archive: tarfile.TarFile, path: Path, name: str, first: dict[int, str], *, sparse: bool = False) -> None:
    """One file of such a directory; overlayfs' whiteouts become the image-spec's.

    first: the names that hard links have in this archive, by inode.  sparse: files with holes are written as such, for
    readers that know them; a layer should have none (image-spec, layer.md, "Sparse files").
    """
    info = path.lstat()
    if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
        above, _, last = name.rpartition("/")
        archive.addfile(tarfile.TarInfo(f"{above and above + '/'}.wh.{last}"))
        return
    entry = _entry(path, name)
    if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
        known = first.setdefault(info.st_ino, name)
        if known != name:
            entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, known, 0
            entry.pax_headers = {}
            archive.addfile(entry)
            return
    if stat.S_ISREG(info.st_mode):
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as content:
            fragments = _fragments(content.fileno(), info.st_size) if sparse else []
            archive.addfile(entry, _Fragments(entry, content, fragments) if fragments else content)
        return
    archive.addfile(entry)
    if stat.S_ISDIR(info.st_mode) and _xattr(path, "trusted.overlay.opaque") == b"y":
        archive.addfile(tarfile.TarInfo(f"{name}/.wh..wh..opq"))


def _fragments(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of a file's data, as many as readers take, with the largest holes between them; none where there
    is no hole."""
    data = [(start, min(end, size)) for start, end in copytree.ranges_of_data(fd) if start < size]
    os.lseek(fd, 0, os.SEEK_SET)
    ends = [0, *(end for _, end in data)]
    holes = [(end, start) for end, (start, _) in zip(ends, [*data, (size, size)], strict=True) if end < start]
    holes = sorted(sorted(holes, key=lambda hole: hole[0] - hole[1])[: MAX_FRAGMENTS - 2])
    edges = [0, *(edge for hole in holes for edge in hole), size]
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)] if holes else []


class _Fragments:
    """The data of an entry of a file with holes: its map and its fragments, as PAX 1.0 has them (GNU tar manual,
    "Storing Sparse Files"); the entry is made one of that kind."""

    def __init__(self, entry: tarfile.TarInfo, content: IO[bytes], fragments: list[tuple[int, int]]) -> None:
        numbers = [len(fragments), *(number for fragment in fragments for number in fragment)]
        table = "".join(f"{number}\n" for number in numbers).encode()
        table += bytes(-len(table) % tarfile.BLOCKSIZE)
        told = {"major": "1", "minor": "0", "name": entry.name, "realsize": str(entry.size)}
        entry.pax_headers = {**entry.pax_headers, **{f"GNU.sparse.{key}": value for key, value in told.items()}}
        above, _, last = entry.name.rpartition("/")
        entry.name = f"{above or '.'}/GNUSparseFile.0/{last}"  # what a reader that knows no holes makes of it
        entry.size = len(table) + sum(length for _, length in fragments)
        self._table, self._content, self._fragments = io.BytesIO(table), content, iter(fragments)
        self._left = 0

    def read(self, count: int = tarfile.RECORDSIZE, /) -> bytes:
        """Exactly so many bytes, as tarfile wants them."""
        parts = [self._table.read(count)]
        count -= len(parts[0])
        while count:
            if not self._left:
                offset, self._left = next(self._fragments)
                self._content.seek(offset)
                continue
            part = self._content.read(min(count, self._left))
            if not part:
                break  # shorter than it was
            parts.append(part)
            count -= len(part)
            self._left -= len(part)
        return b"".join(parts)


def _entry(path: Path, name: str) -> tarfile.TarInfo:
    info = path.lstat()
    entry = tarfile.TarInfo(name)
    entry.mode, entry.uid, entry.gid = stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid
    entry.mtime = info.st_mtime_ns // 10**9
    entry.type = _TYPES[stat.S_IFMT(info.st_mode)]
    headers: dict[str, str] = {}
    entry.pax_headers = headers
    seconds, nanoseconds = divmod(info.st_mtime_ns, 10**9)
    if nanoseconds and seconds >= 0:
        headers["mtime"] = f"{seconds}.{nanoseconds:09d}"
    if stat.S_ISREG(info.st_mode):
        entry.size = info.st_size
    elif stat.S_ISLNK(info.st_mode):
        entry.linkname = os.readlink(path)
        return entry
    elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        entry.devmajor, entry.devminor = os.major(info.st_rdev), os.minor(info.st_rdev)
    for key in os.listxattr(path, follow_symlinks=False):
        if key == "security.capability" or key.startswith("user."):
            # tarfile writes headers as UTF-8 with surrogates for the bytes that are none.
            headers[f"SCHILY.xattr.{key}"] = os.getxattr(path, key).decode("utf-8", "surrogateescape")
    return entry


_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def _xattr(path: Path, name: str) -> bytes:
    try:
        return os.getxattr(path, name)
    except OSError:
        return b""


class _Hashing:
    """A file that knows the digest and the size of what was written to it."""

    def __init__(self, file: Any) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        if isinstance(self.file, _Gzip):
            self.file.finish()


class _Gzip:
    """RFC 1952 without a time: equal content makes equal bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        from isal import isal_zlib

        self._file, self._compressor = file, isal_zlib.compressobj(GZIP_LEVEL, wbits=31)

    def write(self, data: bytes) -> None:
        self._file.write(self._compressor.compress(data))

    def finish(self) -> None:
        self._file.write(self._compressor.flush())
