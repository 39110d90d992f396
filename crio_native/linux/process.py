"""Processes as the kernel knows them: identity by pid and start time, and an executable nobody can write to."""

from __future__ import annotations

import errno
import fcntl
import os


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (clock ticks since boot); None when there is no such process or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the command's name may contain blanks and brackets
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def descendants(pid: int) -> list[int]:
    """All that live below a process; what is born or orphaned meanwhile may be missing."""
    found: list[int] = []
    parents = [pid]
    while parents:
        parent = parents.pop()
        for thread in threads(parent):
            try:
                with open(f"/proc/{parent}/task/{thread}/children", "rb", buffering=0) as file:
                    children = [int(child) for child in file.readall().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents += children
            found += [child for child in children if start_time(child) is not None]
    return found


def threads(pid: int) -> list[int]:
    """Of a process; none when it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped it."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(b")") + 2 :][:1] == b"T"


def is_child(pid: int) -> bool:
    """Whether it is a child of the caller, ended or not."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (ChildProcessError, OverflowError, ValueError):
        return False
    return pid > 0


def open_namespace(path: str) -> int:
    """A descriptor of a namespace file; refuses anything that is not on nsfs (a stranger's file would be setns'd)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(fd).st_dev != os.stat("/proc/self/ns/mnt").st_dev:  # nsfs is one file system, also where it is bound
        os.close(fd)
        raise OSError(errno.EINVAL, "not a namespace", path)
    return fd


def unwritable_executable(path: str) -> int:
    """A descriptor to exec `path` by, through which the file can never be opened for writing.

    A process that was exec'ed through it shows it as /proc/PID/exe, and a container that gets at that link
    (CVE-2019-5736) must find a read-only view: a detached, read-only mount of the file, or a sealed copy where the
    kernel has no detached mounts.
    """
    from crio_native.linux import mounts, syscalls  # here: most who ask for a start time make no system calls

    try:
        tree = syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
            raise
        return _sealed_copy(path)
    try:
        syscalls.mount_setattr(
            tree, 0, set_=mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV
        )
    except OSError:
        os.close(tree)
        return _sealed_copy(path)
    return tree


def _sealed_copy(path: str) -> int:
    copy = os.memfd_create(os.path.basename(path), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(path, "rb") as source:
        while sent := os.sendfile(copy, source.fileno(), None, 1 << 30):
            del sent
    fcntl.fcntl(
        copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    )
    fcntl.fcntl(copy, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return copy
