"""Steps that make the container's root file system, and in the end put the process into it."""

from __future__ import annotations

import errno
import os

from crio_native.linux import mounts, syscalls, trees
from crio_native.oci.builtin.steps.context import Context


def root_propagation(context: Context, flags: int) -> None:
    syscalls.mount(None, "/", None, flags)


def bind_root(context: Context, path: str, pivots: bool = True) -> None:
    """pivot_root(2) wants a mount point whose parent does not propagate: the root bound onto itself."""
    tree = trees.clone(syscalls.AT_FDCWD, path, recursive=True)
    tree.change(propagation=mounts.MS_SLAVE)  # nor may it propagate itself, to where it comes from
    if pivots:
        _make_parent_private(path)
    target = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    tree.attach(target)
    os.close(target)
    context.root = tree.fd


def map_layers(context: Context, base: str) -> None:
    """Cover the layers' directory with itself as the container's user namespace shows it, in a mount namespace that
    nobody else sees: no file of a layer has to be changed.  Not the upper directory: overlayfs works in there as the
    host's root, whom a mapped mount does not know."""
    tree = trees.clone(syscalls.AT_FDCWD, base)
    try:
        tree.map_ids(context.user_namespace, recursive=False)
    except OSError as error:
        why = " (its file system has no id-mapped mounts)" if error.errno == errno.EINVAL else ""
        raise OSError(error.errno, f"{error.strerror}{why}", base) from None
    tree.change(propagation=mounts.MS_PRIVATE)
    target = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    tree.attach(target)
    os.close(target)
    tree.close()


def overlay_root(context: Context, path: str, base: str, data: str, flags: int) -> None:
    """The layers' names are relative to `base`, so that 127 of them fit the page that mount data is bounded to."""
    _make_parent_private(path)
    os.chdir(base)
    syscalls.mount("overlay", path, "overlay", flags, data)
    os.chdir("/")
    context.root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _make_parent_private(path: str) -> None:
    """The mount that holds `path` must not be shared, else pivot_root fails and our mounts would reach its peers."""
    where = path
    while True:
        try:
            syscalls.mount(None, where, None, mounts.MS_PRIVATE)
            return
        except OSError as error:
            if error.errno != errno.EINVAL or where == "/":  # EINVAL: not a mount point
                raise
            where = os.path.dirname(where)


def open_root(context: Context, path: str) -> None:
    """The root as a tree to be placed in another mount namespace, from which nobody may be able to reach its path."""
    if context.root >= 0:  # an overlay that was mounted there
        os.close(context.root)
        context.root = -1
    tree = trees.clone(syscalls.AT_FDCWD, path, recursive=True)
    tree.change(propagation=mounts.MS_PRIVATE, recursive=True)
    context.trees["root"] = tree
    context.root_path = path


def place_root(context: Context) -> None:
    """On top of "/", which no path leads to: absolute ones start below it, and `..` stays there."""
    if not trees.HAVE_TREES:  # what is mounted there could not be found again
        bind_root(context, context.root_path)
        return
    syscalls.mount(None, "/", None, mounts.MS_PRIVATE)
    top = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    tree = context.trees["root"]
    tree.attach(top)
    os.close(top)
    context.root = tree.fd
    context.placed = True


def read_only_root(context: Context) -> None:
    trees.change_mounted(context.root, mounts.MOUNT_ATTR_RDONLY)


def pivot_root(context: Context) -> None:
    """Both arguments "." stack the old root under the new one, where it is detached at once; no directory is needed."""
    os.fchdir(context.root)
    old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.pivot_root(".", ".")
    os.fchdir(old)
    # The old root must not carry our unmounting to the host.
    syscalls.mount(None, ".", None, mounts.MS_SLAVE | mounts.MS_REC)
    syscalls.umount2(".", mounts.MNT_DETACH)
    _unmount_below()
    os.close(old)
    _leave_root(context)


def _unmount_below() -> None:
    """umount(2) takes the topmost of what is stacked on a mount.  Where a bind mount covers a root that was placed on
    the old one (`place_root`), that is not the old root yet; it is gone when the kernel knows nothing to unmount."""
    try:
        while True:
            syscalls.umount2(".", mounts.MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def move_root(context: Context) -> None:
    """For a host that boots into a ramfs, from which pivot_root(2) cannot move away."""
    os.fchdir(context.root)
    if not context.placed:
        syscalls.mount(".", "/", None, mounts.MS_MOVE)
    os.chroot(".")
    _leave_root(context)


def change_root(context: Context) -> None:
    """In a mount namespace of others: pivot_root(2) would take their root file system away."""
    os.fchdir(context.root)
    os.chroot(".")
    _leave_root(context)


def _leave_root(context: Context) -> None:
    os.close(context.root)
    context.root = -1
    os.chdir("/")


def propagate_root(context: Context, flags: int) -> None:
    syscalls.mount(None, "/", None, flags)


STEPS = (
    root_propagation,
    bind_root,
    map_layers,
    overlay_root,
    open_root,
    place_root,
    read_only_root,
    pivot_root,
    move_root,
    change_root,
    propagate_root,
)
