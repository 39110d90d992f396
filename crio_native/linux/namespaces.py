"""Making, joining and comparing namespaces, as far as that takes more than one system call.

For single-threaded callers (a launcher's clones); `differing` alone may be called anywhere.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import errno
import os

from crio_native.linux import control_files, syscalls

FILE = {
    "user": "user",
    "pid": "pid",
    "network": "net",
    "ipc": "ipc",
    "uts": "uts",
    "cgroup": "cgroup",
    "time": "time",
    "mount": "mnt",
}
FLAG = {
    "user": syscalls.CLONE_NEWUSER,
    "pid": syscalls.CLONE_NEWPID,
    "network": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "time": syscalls.CLONE_NEWTIME,
    "mount": syscalls.CLONE_NEWNS,
}
_FLAG_OF_FILE = [(FILE[kind], flag) for kind, flag in FLAG.items()]


def same(first: str | int, second: str | int) -> bool:
    """Whether two namespace files, by path or descriptor, are one namespace."""
    return os.path.samestat(os.stat(first), os.stat(second))


_own: dict[str, str] = {}  # what our namespace files say, as long as we stay in the same


def differing(pid: int) -> int:
    """CLONE_NEW* bits of the namespaces of process `pid` that are not our own; for setns(2) with its pidfd.

    For a process that stays in its namespaces.  Raises FileNotFoundError when there is no such process.
    """
    own = _own or _learn_own()
    directory = f"/proc/{pid}/ns/"
    return sum(flag for file, flag in _FLAG_OF_FILE if file in own and os.readlink(directory + file) != own[file])


def _learn_own() -> dict[str, str]:
    """All at once: another thread must not find a part of it."""
    found = {}
    for file in FILE.values():
        try:
            found[file] = os.readlink(f"/proc/self/ns/{file}")
        except FileNotFoundError:
            pass  # the kernel has no namespaces of this kind
    _own.update(found)
    return found


def new_user_namespace(uid_map: str, gid_map: str) -> int:
    """A descriptor of a new user namespace with these mappings ("INSIDE OUTSIDE COUNT" lines), which nobody is in.

    A child is born in it, and is of no more use once we have the descriptor.  Without CAP_SETUID in our own user
    namespace the mappings are written by newuidmap(1) and newgidmap(1), unless they map nothing but ourselves.
    Raises OSError.
    """
    told, tell = os.pipe2(os.O_CLOEXEC)
    wait, leave = os.pipe2(os.O_CLOEXEC)
    uid = os.geteuid()
    child = syscalls.clone3(syscalls.CLONE_NEWUSER, exit_signal=_signal.SIGCHLD)
    if child == 0:
        try:
            os.close(leave)
            if uid:  # else the kernel gives our files in /proc to root, and an unprivileged parent must write
                syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
            # /proc may show another PID namespace than ours, and then knows us by another number than clone says
            os.write(tell, os.readlink("/proc/self").encode())
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(tell)
    try:
        process = f"/proc/{os.read(told, 16).decode()}"
        _write_map(process, "uid", uid_map)
        _write_map(process, "gid", gid_map)
        return os.open(f"{process}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for end in (told, wait, leave):
            os.close(end)
        os.waitpid(child, 0)


def _write_map(process: str, kind: str, lines: str) -> None:
    path = f"{process}/{kind}_map"
    try:
        control_files.write(path, lines)
        return
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    if os.geteuid() != 0 and len(lines.split()) == 3 and lines.split()[2] == "1":
        _write_own_group(process, path, lines)
        return
    program = f"/usr/bin/new{kind}map"
    try:
        helper = os.posix_spawn(program, [program, process.rpartition("/")[2], *lines.split()], {})
    except FileNotFoundError:
        raise OSError(errno.EPERM, f"mapping more than the own id needs CAP_SETUID or {program}", path) from None
    _, status = os.waitpid(helper, 0)
    if status:
        raise OSError(errno.EPERM, f"{program} refused the mappings {lines.strip()!r}", path)


def _write_own_group(process: str, path: str, lines: str) -> None:
    """The kernel lets an unprivileged user map his own group once nobody in there can drop groups any more."""
    control_files.write(f"{process}/setgroups", "deny")
    control_files.write(path, lines)


def new_time_namespace(offsets: str) -> None:
    """Enter a new time namespace; offsets: lines "CLOCK SECONDS NANOSECONDS", as /proc/PID/timens_offsets takes them.

    unshare(2) makes it for children only, which is when offsets can be set; setns(2) then takes us there.
    """
    syscalls.unshare(syscalls.CLONE_NEWTIME)
    if offsets:
        control_files.write("/proc/self/timens_offsets", offsets)
    entered = os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.setns(entered, syscalls.CLONE_NEWTIME)
    os.close(entered)
