"""Images in a directory that a stranger wrote: what one that was found there is, and how its files are read.

Every path is resolved by the kernel inside the directory, and nothing but a regular file is read.  The formats are
`layouts` and `containers_storage`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from crio_native.errors import InvalidArgument, NotFound
from crio_native.images.manifests import MAX_DOCUMENT, Descriptor, Manifest
from crio_native.linux import inroot

PIECE = 256 << 10  # bytes that are read at once


class Blobs(Protocol):
    """Where content comes from."""

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """The bytes of a blob, unchecked."""


@dataclass(frozen=True, slots=True)
class Found:
    """An image on disk.

    names: complete ("registry/repository:tag"), as it is called there.  digests: of its index and its manifest, the
    manifest's last; none in a docker-archive.  transport, tag: what kind of place it is in, and its name there.
    """

    names: tuple[str, ...]
    manifest: Manifest
    digests: tuple[str, ...]
    blobs: Blobs
    transport: str
    tag: str = ""


@contextlib.contextmanager
def open_file(root: int, path: str) -> Iterator[int]:
    """A regular file inside a stranger's directory; links in it lead to nowhere outside.  Raises NotFound,
    InvalidArgument."""
    try:
        if "\0" in path:
            raise ValueError("its name has a NUL in it")
        fd = inroot.open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise NotFound("file", path, f"it is missing in the layout or archive ({error})") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument("file", path, "not a regular file")
        yield fd
    finally:
        os.close(fd)


def exists(root: int, path: str) -> bool:
    """Whether a regular file is there, to see what kind of directory this is."""
    try:
        return stat.S_ISREG(os.stat(path, dir_fd=root, follow_symlinks=False).st_mode)
    except OSError:
        return False


def read_file(root: int, path: str, most: int = MAX_DOCUMENT) -> bytes:
    """A file of bounded size inside a stranger's directory.  Raises NotFound, InvalidArgument."""
    with open_file(root, path) as fd:
        raw = b"".join(itertools.islice(pieces_of(fd), most // PIECE + 1))
    if len(raw) > most:
        raise InvalidArgument("file", path, f"larger than {most} bytes")
    return raw


def pieces_of(fd: int) -> Iterator[bytes]:
    while piece := os.read(fd, PIECE):
        yield piece
