"""The storage driver `btrfs`: each image once as a subvolume, of which a container gets a snapshot.

    wholes/ID    the layers of an image, one over the other; made when its first container is

The layers stay, as other images have them too; a whole shares their files' content on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

from crio_native.errors import FailedPrecondition
from crio_native.images.flattening import flatten
from crio_native.images.roots import FIELD, Tree, translated
from crio_native.images.work import Joining, Stop
from crio_native.linux import btrfs
from crio_native.linux.filesystem import syncfs

log = logging.getLogger(__name__)

_DIGITS = re.compile(r"[0-9a-f]{64}")


class Wholes:
    """The images of one store that are subvolumes.

    root: of the store.  scratch: a new directory on the same file system, for as long as it takes.
    Raises FailedPrecondition where the file system is not btrfs.
    """

    def __init__(self, root: Path, scratch: Callable[[], AbstractContextManager[Path]]) -> None:
        self._base, self._scratch, self._joining = root / "wholes", scratch, Joining()
        require_btrfs(root)
        self._base.mkdir(mode=0o700, exist_ok=True)

    def prepare(self, image_id: str, tree: Tree, container_dir: Path, size: int, stop: Stop) -> None:
        """Make `rootfs` in a container's directory, all or nothing of it.  size: bytes that it may change, 0 for any.

        Raises as `roots.prepare`.
        """
        whole, rootfs = self._base / _name(image_id), container_dir / "rootfs"
        try:
            self._joining.run(image_id, lambda: self._make(whole, tree), stop)
            with contextlib.suppress(FileNotFoundError):
                rootfs.rmdir()  # a snapshot is made, not filled
            btrfs.snapshot(os.fspath(whole), os.fspath(rootfs))
            if size:
                _limit(rootfs, size)
        except OSError as error:
            raise translated(error, container_dir) from None

    def _make(self, place: Path, tree: Tree) -> None:
        if place.is_dir():
            return
        with self._scratch() as directory:
            whole = directory / "whole"
            btrfs.create(os.fspath(whole))
            try:
                flatten([os.path.join(tree.base, lower) for lower in tree.lowers], os.fspath(whole))
                mode, uid, gid = tree.owner or (0o755, 0, 0)
                os.chown(whole, uid, gid)
                os.chmod(whole, mode)
                syncfs(os.fspath(whole))
                os.rename(whole, place)
            finally:
                with contextlib.suppress(OSError):
                    btrfs.destroy(os.fspath(whole))

    def keep(self, image_ids: Collection[str]) -> None:
        """Remove the subvolumes of all other images.  One that cannot be removed is logged, and tried again later."""
        _remove_all(self._base, {_name(image_id) for image_id in image_ids})


def require_btrfs(root: Path) -> None:
    """root: of a store, which need not be there yet.  Raises FailedPrecondition."""
    place = next(directory for directory in (root, *root.parents) if directory.is_dir())
    if not btrfs.is_btrfs(os.fspath(place)):
        raise FailedPrecondition(
            f'crio.storage_driver = "btrfs" needs {root} to be on btrfs, and it is not: use "overlay"'
        )


def forget(root: Path) -> None:
    """Remove what a store has from a time when it had this driver; containers keep their snapshots."""
    if (root / "wholes").is_dir():
        _remove_all(root / "wholes", ())


def _remove_all(base: Path, but: Collection[str]) -> None:
    for path in base.iterdir():
        if path.name not in but:
            try:
                btrfs.destroy(os.fspath(path))
            except OSError as error:
                log.warning("cannot remove the subvolume %s: %s", path, error)


def _limit(rootfs: Path, size: int) -> None:
    try:
        btrfs.limit(os.fspath(rootfs), size)
    except OSError as error:
        btrfs.destroy(os.fspath(rootfs))
        if error.errno != errno.ENOTCONN:
            raise
        raise FailedPrecondition(
            f"{FIELD}: size needs quotas on the btrfs of {rootfs.parent}: switch them on with `btrfs quota enable`, "
            "or remove the option"
        ) from None


def _name(image_id: str) -> str:
    digits = image_id.removeprefix("sha256:")
    assert _DIGITS.fullmatch(digits)
    return digits
