"""What a container's root file system stands on, and what the storage driver's options say about it.

From layers to the words of a mount; the mounting itself is `oci/`'s.  Which layers an image has is `store`'s to know.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crio_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from crio_native.images.layers import EMPTY, Layer
from crio_native.linux import quota
from crio_native.linux.mounts import MS_NODEV
from crio_native.oci.runtime import Overlay

if TYPE_CHECKING:
    from crio_native.config import Config

FIELD = "crio.storage_option"
# What overlayfs itself takes (Documentation/filesystems/overlayfs.rst) and what does not change where files are.
_DATA = re.compile(
    r"metacopy=(on|off)|volatile|index=(on|off)|xino=(on|off|auto)|redirect_dir=(on|off|follow|nofollow)"
)
_SIZE = re.compile(r"(\d{1,15})(?:([kmgt])i?)?b?", re.IGNORECASE)
_FIRST_PROJECT = 1 << 20  # above what /etc/projid usually gives out


@dataclass(frozen=True, slots=True)
class Tree:
    """An image's files as they are stored.

    base: directory that the lower names are relative to.  lowers: topmost first.  owner: (mode, uid, gid) of the root
    directory, None if no layer says.
    """

    base: str
    lowers: tuple[str, ...]
    owner: tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the storage driver.

    data: further mount data of overlayfs.  flags: MS_* of the mount.  size, inodes: bounds of what a container may
    change, 0 for none.  stores: directories of images that are only read.
    """

    data: tuple[str, ...] = ()
    flags: int = 0
    size: int = 0
    inodes: int = 0
    stores: tuple[Path, ...] = ()


def parse(driver: str, given: Sequence[str]) -> Options:
    """The options as containers/storage spells them: ``overlay.mountopt=nodev,metacopy=on``.

    Raises InvalidArgument, also for an option that has no effect here.
    """
    data: list[str] = []
    flags = size = inodes = 0
    stores: list[Path] = []
    for index, text in enumerate(given):
        field = f"{FIELD}[{index}]"
        key, equals, value = text.partition("=")
        name = key.removeprefix(f"{driver}.").removeprefix("overlay2.").removeprefix(".")
        if not equals or not value:
            raise InvalidArgument(field, text, "must be NAME=VALUE")
        if name == "mountopt":
            found, more = _mount_options(value, field)
            data, flags = [*data, *found], flags | more
        elif name == "size":
            size = _bytes(value, field)
        elif name == "inodes":
            inodes = (
                int(value) if value.isascii() and value.isdigit() and len(value) < 16 else _refuse_number(value, field)
            )
        elif name in ("imagestore", "additionalimagestore"):
            stores += [_directory(path, field) for path in value.split(":")]
        else:
            known = "mountopt, size, inodes, imagestore"
            raise InvalidArgument(field, text, f"no option of the {driver} driver here; there are {known}")
    return Options(tuple(dict.fromkeys(data)), flags, size, inodes, tuple(dict.fromkeys(stores)))


def stack(layers: Sequence[Layer]) -> tuple[tuple[str, ...], tuple[int, int, int] | None]:
    """From layers, lowest first, the lower names, topmost first, and the owner of the root directory."""
    lowers: dict[str, None] = {}  # a set in order: overlayfs refuses a layer that comes twice, and the upper
    owner = None  # occurrence shows all that the lower one would
    for layer in reversed(layers):
        lowers[layer.lower] = None
        owner = owner or layer.owner
        if layer.opaque:  # the kernel does not look for this mark on a layer's own root
            break
    return tuple(lowers), owner


def pinned(config: Config) -> tuple[str, ...]:
    """Patterns of the images that no kubelet may remove: those that the operator names, and the pause image."""
    return tuple(filter(None, (*config.image.pinned_images, config.image.pause_image)))


def prepare(tree: Tree, container_dir: Path, options: Options) -> Overlay:
    """Make `upper` and `work` in a container's directory, both or none.

    The upper directory gets mode and owner of the image's root directory: the mounted root shows its own.
    Raises AlreadyExists (it was prepared before), ResourceExhausted, FailedPrecondition (no quotas there), Internal.
    """
    upper, work = container_dir / "upper", container_dir / "work"
    made: list[Path] = []
    try:
        for directory in (upper, work):
            directory.mkdir(mode=0o700)
            made.append(directory)
        mode, uid, gid = tree.owner or (0o755, 0, 0)
        os.chown(upper, uid, gid)
        os.chmod(upper, mode)
        if options.size or options.inodes:
            _limit(container_dir, (upper, work), options)
    except BaseException as error:
        for directory in made:
            directory.rmdir()
        if isinstance(error, OSError):
            raise _translated(error, container_dir) from None
        raise
    lowers = tree.lowers or (f"{EMPTY}/fs",)
    return Overlay(tree.base, lowers, str(upper), str(work), options=options.data, flags=options.flags)


def view(tree: Tree, empty: str) -> Overlay:
    """The files alone, read-only.  empty: a directory without files, absolute or below the tree's base."""
    # An overlay without an upper directory takes two lower ones at least.
    lowers = tree.lowers if len(tree.lowers) > 1 else (*tree.lowers, empty)
    return Overlay(tree.base, lowers, "", "")


def _limit(container_dir: Path, directories: Sequence[Path], options: Options) -> None:
    """One project for both, by the container's own name: it goes with the directories, nobody has to remember it."""
    project = _FIRST_PROJECT + zlib.crc32(os.fsencode(container_dir)) % (1 << 31)
    try:
        for directory in directories:
            quota.set_limits(os.fspath(directory), project, size=options.size, inodes=options.inodes)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise FailedPrecondition(
            f"{FIELD}: size and inodes need a file system with project quotas below {container_dir.parent}: "
            "ext4 or xfs, mounted with prjquota; mount it so, or remove the option"
        ) from None


def _translated(error: OSError, container_dir: Path) -> Exception:
    if isinstance(error, FileExistsError):
        return AlreadyExists(f"{error.filename} exists: the container's root was prepared before")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"no space left on the device of {container_dir}; free some and retry")
    return Internal(f"cannot make {error.filename}: {error.strerror}")


def _mount_options(value: str, field: str) -> tuple[list[str], int]:
    data, flags = [], 0
    for option in value.split(","):
        if option == "nodev":
            flags |= MS_NODEV
        elif _DATA.fullmatch(option):
            data.append(option)
        else:
            known = "nodev, metacopy=on, volatile, index=, xino=, redirect_dir="
            raise InvalidArgument(field, option, f"no mount option for root file systems here; there are {known}")
    return data, flags


def _bytes(value: str, field: str) -> int:
    match = _SIZE.fullmatch(value)
    if not match:
        raise InvalidArgument(field, value, 'must be a size: "10G", "500m", or bytes')
    return int(match[1]) << {"k": 10, "m": 20, "g": 30, "t": 40, "": 0}[(match[2] or "").lower()]


def _refuse_number(value: str, field: str) -> int:
    raise InvalidArgument(field, value, "must be a number")


def _directory(value: str, field: str) -> Path:
    path = Path(value)
    if not path.is_absolute() or not path.is_dir():
        raise InvalidArgument(field, value, "must be the absolute path of a directory")
    return path
