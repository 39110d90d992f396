"""What a container's root file system stands on, and what the storage driver's options say about it.

From layers to the words of a mount; the mounting itself is `oci/`'s.  Which layers an image has is `store`'s to know.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crio_native.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    StepFailed,
)
from crio_native.images.flattening import flatten
from crio_native.images.layers import EMPTY, Layer
from crio_native.images.work import in_time
from crio_native.linux import btrfs, quota, syscalls
from crio_native.linux.mounts import MNT_DETACH, MS_NODEV
from crio_native.oci.runtime import Overlay

if TYPE_CHECKING:
    from crio_native.config import Config

FIELD = "crio.storage_option"
UPPER = "diff"  # a container's own files, in its directory; cAdvisor knows them by this name
VOLUMES = "declared"  # others of them: directories, one for each volume that its image declares and that is mounted
# What overlayfs itself takes (Documentation/filesystems/overlayfs.rst) and what does not change where files are.
_DATA = re.compile(
    r"metacopy=(on|off)|volatile|index=(on|off)|xino=(on|off|auto)|redirect_dir=(on|off|follow|nofollow)"
)
_SIZE = re.compile(r"(\d{1,15})(?:([kmgt])i?)?b?", re.IGNORECASE)
_MOUNT_SECONDS = 30.0
_LOOK_SECONDS = 2.0
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

    driver: "overlay", "vfs" or "btrfs".  program: mounts overlays instead of the kernel (fuse-overlayfs).  data:
    further mount data of overlayfs.  flags: MS_* of the mount.  size, inodes: bounds of what a container may change, 0
    for none.  stores: directories of images that are only read.
    """

    driver: str = "overlay"
    program: str = ""
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
    program = ""
    stores: list[Path] = []
    for index, text in enumerate(given):
        field = f"{FIELD}[{index}]"
        key, equals, value = text.partition("=")
        name = key.removeprefix(f"{driver}.").removeprefix("overlay2.").removeprefix(".")
        if not equals or not value:
            raise InvalidArgument(field, text, "must be NAME=VALUE")
        if name == "mountopt" and driver == "overlay":
            found, more = _mount_options(value, field)
            data, flags = [*data, *found], flags | more
        elif name == "size":
            size = _bytes(value, field)
        elif name == "inodes" and driver != "btrfs":
            inodes = (
                int(value) if value.isascii() and value.isdigit() and len(value) < 16 else _refuse_number(value, field)
            )
        elif name == "mount_program" and driver == "overlay":
            program = _program(value, field)
        elif name in ("imagestore", "additionalimagestore"):
            stores += [_directory(path, field) for path in value.split(":")]
        else:
            further = {"overlay": ", inodes, mountopt, mount_program", "vfs": ", inodes"}.get(driver, "")
            known = f"size, imagestore{further}"
            raise InvalidArgument(field, text, f"no option of the {driver} driver here; there are {known}")
    if program and (data or flags):
        raise InvalidArgument(FIELD, given, "mountopt is for overlays of the kernel, and mount_program makes others")
    return Options(driver, program, tuple(dict.fromkeys(data)), flags, size, inodes, tuple(dict.fromkeys(stores)))


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


def prepare(tree: Tree, container_dir: Path, options: Options) -> Overlay | None:
    """Make what a container's root file system needs in the container's directory, all or nothing of it.

    Returns the overlay that the runtime mounts; None where `rootfs` in that directory already is the root file system:
    a copy (vfs), or mounted by a program, which `release` then undoes.
    Raises AlreadyExists (it was prepared before), ResourceExhausted, FailedPrecondition (no quotas there), Internal.
    """
    rootfs = container_dir / "rootfs"
    made: list[Path] = []
    try:
        for name in (UPPER, "work") if options.driver == "overlay" else ("rootfs",):
            directory = container_dir / name
            directory.mkdir(mode=0o700, exist_ok=name == "rootfs")
            made.append(directory)
        mode, uid, gid = tree.owner or (0o755, 0, 0)
        os.chown(made[0], uid, gid)
        os.chmod(made[0], mode)
        if options.size or options.inodes:
            _limit(container_dir, [*made, *container_dir.glob(f"{VOLUMES}/*")], options)
        if options.driver == "vfs":
            flatten([os.path.join(tree.base, lower) for lower in tree.lowers], os.fspath(rootfs))
            return None
        lowers = tree.lowers or (f"{EMPTY}/fs",)
        upper, work = map(str, made)
        overlay = Overlay(tree.base, lowers, upper, work, options=options.data, flags=options.flags)
        if not options.program:
            return overlay
        rootfs.mkdir(mode=0o700, exist_ok=True)
        _mount_by_program(options.program, overlay, rootfs)
        return None
    except BaseException as error:
        for directory in made:
            shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise translated(error, container_dir) from None
        raise


def release(container_dir: Path) -> None:
    """Undo a mount of `rootfs` by a program, lift a quota, remove a snapshot: of these, what there is."""
    with contextlib.suppress(OSError):  # what is no subvolume is whoever's to remove who removes the directory
        btrfs.destroy(os.fspath(container_dir / "rootfs"))
    with contextlib.suppress(OSError):
        quota.lift(os.fspath(container_dir), project(container_dir))
    while True:
        try:
            syscalls.umount2(os.fspath(container_dir / "rootfs"), MNT_DETACH)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
            return


def _mount_by_program(program: str, overlay: Overlay, target: Path) -> None:
    """The program stays in the background for as long as the mount is there."""
    command = [program, "-o", overlay.data(), os.fspath(target)]
    try:
        done = subprocess.run(
            command, cwd=overlay.base, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=_MOUNT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{program} has not mounted {target} within {_MOUNT_SECONDS:g} s") from None
    if done.returncode or not os.path.ismount(target):
        said = done.stderr[-500:].decode(errors="replace").strip() or f"status {done.returncode}"
        raise StepFailed("overlay_root", 0, os.fspath(target), f"{program}: {said}")


def view(tree: Tree, empty: str) -> Overlay:
    """The files alone, read-only.  empty: a directory without files, absolute or below the tree's base."""
    # An overlay without an upper directory takes two lower ones at least.
    lowers = tree.lowers if len(tree.lowers) > 1 else (*tree.lowers, empty)
    return Overlay(tree.base, lowers, "", "")


def _limit(container_dir: Path, directories: Sequence[Path], options: Options) -> None:
    """One project for all, by the container's own name: nobody has to remember it."""
    try:
        for directory in directories:
            quota.set_limits(os.fspath(directory), project(container_dir), size=options.size, inodes=options.inodes)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        raise FailedPrecondition(
            f"{FIELD}: size and inodes need a file system with project quotas below {container_dir.parent}: "
            "ext4 or xfs, mounted with prjquota; mount it so, or remove the option"
        ) from None


def project(container_dir: Path) -> int:
    """The number of a container's quota project.  What the container's files say of it is the container's to change."""
    return _FIRST_PROJECT + zlib.crc32(os.fsencode(container_dir)) % (1 << 31)


def translated(error: OSError, container_dir: Path) -> Exception:
    """What a failure to prepare a root is to the caller."""
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return AlreadyExists(f"{error.filename} exists: the container's root was prepared before")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"no space left on the device of {container_dir} (ENOSPC); free some and retry")
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


def _program(value: str, field: str) -> str:
    if not os.path.isabs(value) or not os.access(value, os.X_OK) or os.path.isdir(value):
        raise InvalidArgument(field, value, "must be the absolute path of a program, such as /usr/bin/fuse-overlayfs")
    return value


def _directory(value: str, field: str) -> Path:
    """One that does not answer may be another host's, which comes back: whoever reads it says so."""
    path = Path(value)
    try:
        usable = path.is_absolute() and in_time(path.is_dir, _LOOK_SECONDS)
    except OSError:  # TimeoutError among them
        usable = True
    if not usable:
        raise InvalidArgument(field, value, "must be the absolute path of a directory")
    return path
