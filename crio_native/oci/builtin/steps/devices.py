"""Steps that fill /dev: device nodes, links, the terminal."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from crio_native.linux import inroot, mounts, syscalls, trees
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.steps.context import Context, Refused
from crio_native.oci.builtin.steps.mounting import attach_bind, is_null

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# As in asm-generic/ioctls.h, which all our architectures have; termios, which knows them, is a library to be loaded.
_TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441  # the terminal's other end, without going through a path (CVE-2025-52565)
_NODE_TYPE = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def make_devices(context: Context, nodes: list[dict[str, Any]]) -> None:
    for node in nodes:
        parent_path, _, name = node["path"].rpartition("/")
        parent = inroot.make_directories(context.root, parent_path)
        kind, number = _NODE_TYPE[node["type"]], os.makedev(node["major"], node["minor"])
        try:
            _make_node(parent, name, kind, number, node)
        except OSError as error:
            raise OSError(error.errno, error.strerror, node["path"]) from None
        finally:
            os.close(parent)


def _make_node(parent: int, name: str, kind: int, number: int, node: dict[str, Any]) -> None:
    try:
        os.mknod(name, kind | node["mode"], number, dir_fd=parent)
    except FileExistsError:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_IFMT(found.st_mode) != kind or (kind != stat.S_IFIFO and found.st_rdev != number):
            raise Refused(node["path"], "is something else already", errno.EEXIST) from None
        return
    if node["uid"] or node["gid"]:
        os.chown(name, node["uid"], node["gid"], dir_fd=parent, follow_symlinks=False)


def open_devices(context: Context, nodes: list[dict[str, Any]]) -> None:
    """The host's nodes, for a user namespace, whose root cannot make any; each is proven to be what was asked for."""
    for node in nodes:
        try:
            tree = trees.clone(syscalls.AT_FDCWD, node["path"])
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (the host's own device is bound)", node["path"]) from None
        found = os.fstat(tree.fd)
        wanted = _NODE_TYPE[node["type"]], os.makedev(node["major"], node["minor"])
        if (stat.S_IFMT(found.st_mode), found.st_rdev) != wanted:
            raise Refused(node["path"], "is another device on the host", errno.ENODEV)
        tree.change(mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NOEXEC)
        context.trees[f"device {node['path']}"] = tree


def prepare_devices(context: Context, nodes: list[dict[str, Any]], label: str) -> None:
    """The nodes that a spec asks for, for a user namespace, whose root cannot make any: made by the host's root, owned
    as asked, in a tmpfs that no path leads to.  label: SELinux's for its files, "" for none."""
    if not (trees.HAVE_TREES and trees.HAVE_FSOPEN):
        open_devices(context, nodes)
        return
    hidden = trees.new_tmpfs("mode=700", *([f"context={label}"] if label else []))
    # Attached, on top of "/", for kernels before 6.15 clone nothing of a detached mount.
    syscalls.mount(None, "/", None, mounts.MS_PRIVATE)
    top = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    hidden.attach(top)
    os.close(top)
    for number, node in enumerate(nodes):
        name = str(number)
        try:
            _make_node(hidden.fd, name, _NODE_TYPE[node["type"]], os.makedev(node["major"], node["minor"]), node)
        except OSError as error:
            raise OSError(error.errno, error.strerror, node["path"]) from None
        tree = trees.clone(hidden.fd, name)
        tree.change(mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NOEXEC, propagation=mounts.MS_PRIVATE)
        context.trees[f"device {node['path']}"] = tree
    syscalls.umount2(f"/proc/self/fd/{hidden.fd}", mounts.MNT_DETACH)
    hidden.close()


def bind_devices(context: Context, paths: list[str]) -> None:
    for path in paths:
        attach_bind(context, f"device {path}", path)


def link_devices(context: Context, links: list[list[str]]) -> None:
    for path, target in links:
        parent_path, _, name = path.rpartition("/")
        parent = inroot.make_directories(context.root, parent_path)
        try:
            os.symlink(target, name, dir_fd=parent)
        except FileExistsError:
            pass  # a mounted /dev, or the image, has its own
        finally:
            os.close(parent)


def console(context: Context, height: int, width: int) -> None:
    """A pty of the container's own devpts; its master goes to the monitor, the slave becomes stdio and /dev/console."""
    _open_terminal(context, height, width)
    context.trees["console"] = trees.clone(context.terminal, "")
    attach_bind(context, "console", "/dev/console")
    control_terminal(context)
    _put_on_streams(context)


def exec_console(context: Context, height: int, width: int, leader: bool = True) -> None:
    """The same for a process that is exec'ed into a container, which has its console already.  leader: of a session;
    else `control_terminal` comes when we are."""
    context.root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _open_terminal(context, height, width)
    if leader:
        control_terminal(context)
    _put_on_streams(context)
    os.close(context.root)
    context.root = -1


def _open_terminal(context: Context, height: int, width: int) -> None:
    master = inroot.open_in_root(context.root, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    if not stat.S_ISCHR(os.fstat(master).st_mode):
        raise Refused("/dev/pts/ptmx", "is not a character device", errno.ENODEV)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    context.terminal = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if height or width:
        fcntl.ioctl(master, _TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    assert context.sync is not None
    wire.send(context.sync, b"C", [master])
    os.close(master)


def control_terminal(context: Context) -> None:
    fcntl.ioctl(context.terminal, _TIOCSCTTY, 0)


def _put_on_streams(context: Context) -> None:
    for number in (0, 1, 2):
        os.dup2(context.terminal, number)


def reopen_null(context: Context) -> None:
    """Standard streams on the host's /dev/null become the container's own: root inside could change the host's mode
    and owner through them.  Descriptors that are not the container's are close-on-exec anyway; here that is made so for
    the one that somebody forgot."""
    syscalls.close_range(3 + context.preserved, flags=syscalls.CLOSE_RANGE_CLOEXEC)
    try:
        fd = os.open("/dev/null", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # a container without devices keeps the streams it has
    if is_null(fd):
        for number in (0, 1, 2):
            if is_null(number):
                os.dup2(fd, number)
    os.close(fd)


STEPS = (
    make_devices,
    open_devices,
    prepare_devices,
    bind_devices,
    link_devices,
    console,
    exec_console,
    control_terminal,
    reopen_null,
)
