"""Mount trees that are complete before anybody can see them: cloned or made detached, changed, then attached.

Kernels before 5.2 have no detached trees, and before 5.12 none can be changed; there the tree is mounted first, by
mount(2), and changed in its place.  What such a kernel cannot do at all (attributes of a whole tree, id mappings) is
an OSError that says so.
"""

from __future__ import annotations

import errno
import os

from crio_native.linux import mounts, syscalls

_CLONE = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC


def _has(call: str, *arguments: object) -> bool:
    """Whether the kernel, and a filter that we run under, serve a call; asked with arguments that cannot succeed."""
    try:
        getattr(syscalls, call)(*arguments)
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


HAVE_TREES = _has("open_tree", -1, "", 0) and _has("move_mount", -1, -1)
HAVE_SETATTR = _has("mount_setattr", -1, 0)
HAVE_FSOPEN = _has("fsopen", "") and _has("fsmount", -1, 0)


class Tree:
    """A tree of mounts.  `fd` is open on its top: the detached mount, or after `attach` the mounted one; on a kernel
    without detached trees it is open on the origin until then."""

    __slots__ = ("_changes", "_detached", "_origin", "_tmpfs", "fd", "recursive")

    def __init__(self, fd: int, recursive: bool, detached: bool, *, origin: str = "", tmpfs: str = "") -> None:
        self.fd, self.recursive, self._detached, self._origin, self._tmpfs = fd, recursive, detached, origin, tmpfs
        self._changes: list[tuple[int, int, int]] = []

    def change(self, to_set: int = 0, to_clear: int = 0, propagation: int = 0, *, recursive: bool = False) -> None:
        """Set and clear MOUNT_ATTR_* bits of the top mount, or of all, and give them an MS_* propagation."""
        if not (to_set or to_clear or propagation):
            return
        if self._detached and HAVE_SETATTR:
            deep = syscalls.AT_RECURSIVE if recursive else 0
            syscalls.mount_setattr(self.fd, deep, set_=to_set, clear=to_clear, propagation=propagation)
            return
        if recursive and self.recursive and (to_set or to_clear):
            raise OSError(errno.ENOSYS, "this kernel has no mount_setattr (Linux 5.12), which recursive options need")
        self._changes.append((to_set, to_clear, propagation | (mounts.MS_REC if recursive else 0)))

    def map_ids(self, user_namespace: int, *, recursive: bool) -> None:
        """Show the tree's owners as the user namespace maps them (MOUNT_ATTR_IDMAP)."""
        if not (self._detached and HAVE_SETATTR):
            raise OSError(errno.ENOSYS, "this kernel has no mount_setattr (Linux 5.12), which id-mapped mounts need")
        deep = syscalls.AT_RECURSIVE if recursive else 0
        syscalls.mount_setattr(self.fd, deep, set_=mounts.MOUNT_ATTR_IDMAP, userns_fd=user_namespace)

    def attach(self, target: int) -> None:
        """Mount it on what `target` is open on."""
        if self._detached:
            syscalls.move_mount(self.fd, target)
            if not HAVE_SETATTR:
                self._change_mounted(f"/proc/self/fd/{self.fd}")
            return
        where = f"/proc/self/fd/{target}"
        covered = os.readlink(where)
        if self._tmpfs:
            syscalls.mount("tmpfs", where, "tmpfs", 0, self._tmpfs)
        else:
            self._bind(where)
        self._reopen(covered)
        self._change_mounted(f"/proc/self/fd/{self.fd}")

    def _bind(self, target: str) -> None:
        """By its descriptor; or by its path, when it was opened in a mount namespace that ours is a copy of."""
        origin, flags = f"/proc/self/fd/{self.fd}", mounts.MS_BIND | (mounts.MS_REC if self.recursive else 0)
        try:
            syscalls.mount(origin, target, None, flags)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._origin:
                raise
            syscalls.mount(self._origin, target, None, flags)

    def _reopen(self, path: str) -> None:
        """What is now on top there; a path that leads elsewhere by now would be changed in our place."""
        top = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        if self.fd >= 0:
            moved = not os.path.samestat(os.fstat(self.fd), os.fstat(top))
            os.close(self.fd)
            if moved:
                os.close(top)
                raise OSError(errno.EAGAIN, "the mount's target changed while it was mounted on", path)
        self.fd = top

    def _change_mounted(self, path: str) -> None:
        """Each change by a remount, which sets all of a mount's flags: so the present ones are read first."""
        for to_set, to_clear, propagation in self._changes:
            if to_set or to_clear:
                flags = mounts.remount_flags(os.statvfs(path).f_flag, to_set, to_clear)
                syscalls.mount(None, path, None, mounts.MS_REMOUNT | mounts.MS_BIND | flags)
            if propagation & ~mounts.MS_REC:
                syscalls.mount(None, path, None, propagation)
        self._changes = []

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def clone(directory: int, path: str, *, recursive: bool = False, follow: bool = True) -> Tree:
    """A copy of the mount at `path` below `directory` ("": what `directory` itself is open on); follow: where `path`
    is a symlink, of what it leads to."""
    if not (follow or HAVE_TREES):
        raise OSError(errno.ENOSYS, "this kernel has no open_tree (Linux 5.2), which mounting a symlink needs", path)
    if not HAVE_TREES:
        if not path:
            return Tree(os.dup(directory), recursive, False)
        dir_fd = None if directory == syscalls.AT_FDCWD else directory
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=dir_fd)
        return Tree(fd, recursive, False, origin=path if dir_fd is None else "")
    flags = _CLONE | (syscalls.AT_RECURSIVE if recursive else 0) | (0 if path else syscalls.AT_EMPTY_PATH)
    flags |= 0 if follow else syscalls.AT_SYMLINK_NOFOLLOW
    return Tree(syscalls.open_tree(directory, path, flags), recursive, True)


def new_tmpfs(*options: str) -> Tree:
    """An empty tmpfs; options as "size=64k"."""
    if not (HAVE_TREES and HAVE_FSOPEN):
        return Tree(-1, False, False, tmpfs=",".join(options))
    return new("tmpfs", *options)


def new(fstype: str, *options: str) -> Tree:
    """A new mount of a file system; options as "size=64k" or a word."""
    configuration = syscalls.fsopen(fstype)
    try:
        for option in options:
            syscalls.fsconfig_set(configuration, *option.split("=", 1))
        syscalls.fsconfig_create(configuration)
        return Tree(syscalls.fsmount(configuration, 0), False, True)
    finally:
        os.close(configuration)


def change_mounted(
    fd: int, to_set: int = 0, to_clear: int = 0, propagation: int = 0, *, recursive: bool = False
) -> None:
    """As `Tree.change`, for the mount whose root `fd` is open on."""
    if HAVE_SETATTR:
        deep = syscalls.AT_RECURSIVE if recursive else 0
        syscalls.mount_setattr(fd, deep, set_=to_set, clear=to_clear, propagation=propagation)
        return
    tree = Tree(fd, False, False)
    tree.change(to_set, to_clear, propagation, recursive=recursive and bool(propagation))
    tree._change_mounted(f"/proc/self/fd/{fd}")
