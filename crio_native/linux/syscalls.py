"""Raw Linux system calls that the standard library lacks, one bound prototype each.

Every wrapper raises OSError with errno and, where there is one, the path.  Calls go through syscall(2) by number,
because libc lacks some of them and because a libc wrapper may do more than the call.  Prototypes are made once at
import and never changed, so threads may share them.  The library is loaded as PyDLL: the GIL stays held during a
call.  That is what makes `clone3` return safely into the interpreter: a child that had to take a GIL which another
thread owned at the moment of the clone would hang.  The calls on mounts and paths let it go: they wait for locks of
the kernel, for RCU (up to 40 ms on a busy machine) and for file systems that do not answer, while other threads of the
daemon have work to do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
from ctypes import c_char_p, c_int, c_long, c_uint, c_ulong, c_void_p

TYPE_CHECKING = False  # as typing's, which a launcher would import for nothing
if TYPE_CHECKING:
    from typing import Any

_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "mount": 165,
        "umount2": 166,
        "pivot_root": 155,
        "unshare": 272,
        "setns": 308,
        "prctl": 157,
        "capget": 125,
        "capset": 126,
        "keyctl": 250,
        "setdomainname": 171,
        "seccomp": 317,
        "personality": 135,
        "clone": 56,
        "ioprio_set": 251,
        "sched_setattr": 314,
        "set_mempolicy": 238,
        "madvise": 28,
        "ptrace": 101,
    },
    "aarch64": {
        "mount": 40,
        "umount2": 39,
        "pivot_root": 41,
        "unshare": 97,
        "setns": 268,
        "prctl": 167,
        "capget": 90,
        "capset": 91,
        "keyctl": 219,
        "setdomainname": 162,
        "seccomp": 277,
        "personality": 92,
        "clone": 220,
        "ioprio_set": 30,
        "sched_setattr": 274,
        "set_mempolicy": 237,
        "madvise": 233,
        "ptrace": 117,
    },
}
# Calls added since Linux 5.0 have the same number on every architecture.
_COMMON = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
}
_MACHINE = os.uname().machine
if _MACHINE not in _NUMBERS:
    raise ImportError(f"crio-native knows no system call numbers for {_MACHINE}; it runs on {', '.join(_NUMBERS)}")
NUMBER: dict[str, int] = {**_NUMBERS[_MACHINE], **_COMMON}

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_VM = 0x00000100
CLONE_SIGHAND = 0x00000800
CLONE_VFORK = 0x00004000
CLONE_PARENT = 0x00008000
CLONE_PARENT_SETTID = 0x00100000
CLONE_INTO_CGROUP = 0x200000000

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

CLOSE_RANGE_CLOEXEC = 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3

IOPRIO_WHO_PROCESS = 1

KEYCTL_JOIN_SESSION_KEYRING = 1


class clone_args(ctypes.Structure):
    """struct clone_args, 88 bytes (linux/sched.h)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    ]


class mount_attr(ctypes.Structure):
    """struct mount_attr, 32 bytes (linux/mount.h)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class open_how(ctypes.Structure):
    """struct open_how, 24 bytes (linux/openat2.h)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


class sock_fprog(ctypes.Structure):
    """struct sock_fprog (linux/filter.h): a BPF program by its count of instructions and its address."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", c_char_p)]


class sched_attr(ctypes.Structure):
    """struct sched_attr, 56 bytes (linux/sched/types.h)."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
        ("sched_util_min", ctypes.c_uint32),
        ("sched_util_max", ctypes.c_uint32),
    ]


class cap_header(ctypes.Structure):
    """struct __user_cap_header_struct."""

    _fields_ = [("version", ctypes.c_uint32), ("pid", c_int)]


class cap_data(ctypes.Structure):
    """struct __user_cap_data_struct; version 3 takes two of them, low and high half."""

    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


_cap_data_pair = cap_data * 2  # made once: a ctypes array type costs 100 times its value

_MOST_DESCRIPTORS = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1] & 0x7FFFFFFF, 1 << 20)

_libc = ctypes.PyDLL(None, use_errno=True)
_libc_without_gil = ctypes.CDLL(None, use_errno=True)


def _bind(name: str, *argtypes: Any, library: ctypes.CDLL = _libc) -> Any:
    function, number = library["syscall"], NUMBER[name]  # indexing makes a new function object each time
    function.argtypes, function.restype = (c_long, *argtypes), c_long
    return lambda *args: function(number, *args)


_mount = _bind("mount", c_char_p, c_char_p, c_char_p, c_ulong, c_char_p, library=_libc_without_gil)
_umount2 = _bind("umount2", c_char_p, c_int, library=_libc_without_gil)
_pivot_root = _bind("pivot_root", c_char_p, c_char_p)
_unshare = _bind("unshare", c_ulong)
_setns = _bind("setns", c_int, c_int)
_prctl = _bind("prctl", c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_capget = _bind("capget", c_void_p, c_void_p)
_capset = _bind("capset", c_void_p, c_void_p)
_keyctl = _bind("keyctl", c_int, c_void_p, c_ulong, c_ulong, c_ulong)
_setdomainname = _bind("setdomainname", c_char_p, c_ulong)
_seccomp = _bind("seccomp", c_uint, c_uint, c_void_p)
_personality = _bind("personality", c_ulong)
_madvise = _bind("madvise", c_ulong, c_ulong, c_int)
_clone = _bind("clone", c_ulong, c_void_p, c_void_p, c_void_p, c_void_p)
_ioprio_set = _bind("ioprio_set", c_int, c_int, c_int)
_sched_setattr = _bind("sched_setattr", c_int, c_void_p, c_uint)
_set_mempolicy = _bind("set_mempolicy", c_int, c_void_p, c_ulong)
_ptrace = _bind("ptrace", c_long, c_long, c_void_p, c_void_p)
_open_tree = _bind("open_tree", c_int, c_char_p, c_uint, library=_libc_without_gil)
_move_mount = _bind("move_mount", c_int, c_char_p, c_int, c_char_p, c_uint, library=_libc_without_gil)
_fsopen = _bind("fsopen", c_char_p, c_uint)
_fsconfig = _bind("fsconfig", c_int, c_uint, c_char_p, c_char_p, c_int, library=_libc_without_gil)
_fsmount = _bind("fsmount", c_int, c_uint, c_uint, library=_libc_without_gil)
_clone3 = _bind("clone3", c_void_p, c_ulong)
_close_range = _bind("close_range", c_uint, c_uint, c_uint)
_openat2 = _bind("openat2", c_int, c_char_p, c_void_p, c_ulong, library=_libc_without_gil)
_mount_setattr = _bind("mount_setattr", c_int, c_char_p, c_uint, c_void_p, c_ulong, library=_libc_without_gil)


def _check(result: int, path: str | bytes | None = None) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


def _bytes(path: str | bytes | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2).  The error's path is the target."""
    _check(_mount(_bytes(source), _bytes(target), _bytes(fstype), flags, _bytes(data)), target)


def umount2(target: str, flags: int = 0) -> None:
    _check(_umount2(_bytes(target), flags), target)


def pivot_root(new_root: str, put_old: str) -> None:
    _check(_pivot_root(_bytes(new_root), _bytes(put_old)), new_root)


def unshare(flags: int) -> None:
    _check(_unshare(flags))


def setns(descriptor: int, kind: int = 0) -> None:
    _check(_setns(descriptor, kind))


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    return _check(_prctl(option, arg2, arg3, arg4, arg5))


def set_name(name: bytes) -> None:
    """What the kernel calls this thread, at most 15 bytes; and its command line, see `hide_command_line`."""
    buffer = ctypes.create_string_buffer(name)
    prctl(PR_SET_NAME, ctypes.addressof(buffer))
    hide_command_line(name)


def hide_command_line(name: bytes) -> None:
    """Let /proc/PID/cmdline say name, here and in clones made later: a container sees those that enter it, and ours has
    paths of the host.

    The memory is overwritten where it is, because to have the kernel look elsewhere (PR_SET_MM) takes CAP_SYS_RESOURCE.
    Nothing happens when the line is not there as it was given, so also the second time.
    """
    start = c_void_p.in_dll(_libc, "program_invocation_name").value  # argv[0], after which the others lie
    line = b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv)
    if start and ctypes.string_at(start, len(line)) == line and len(name) < len(line) - 1:
        # A last byte that is no zero tells the kernel that this is a title, which ends with its first zero.
        ctypes.memmove(start, name.ljust(len(line) - 1, b"\0") + b"\1", len(line))


def capget() -> tuple[int, int, int]:
    """The calling thread's (effective, permitted, inheritable) sets as 64-bit masks."""
    header, data = cap_header(0x20080522, 0), _cap_data_pair()
    _check(_capget(ctypes.byref(header), data))
    low, high = data
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling thread's three sets from 64-bit masks."""
    header = cap_header(0x20080522, 0)
    masks = (effective, permitted, inheritable)
    data = _cap_data_pair(cap_data(*(m & 0xFFFFFFFF for m in masks)), cap_data(*(m >> 32 for m in masks)))
    _check(_capset(ctypes.byref(header), data))


def join_session_keyring(name: str) -> int:
    """A new session keyring of that name; returns its serial number."""
    return _check(_keyctl(KEYCTL_JOIN_SESSION_KEYRING, ctypes.c_char_p(name.encode()), 0, 0, 0))


def setdomainname(name: str) -> None:
    encoded = name.encode()
    _check(_setdomainname(encoded, len(encoded)))


def personality(persona: int) -> None:
    _check(_personality(persona))


def ioprio_set(priority: int) -> None:
    """The calling process's I/O priority: class << 13 | level."""
    _check(_ioprio_set(IOPRIO_WHO_PROCESS, 0, priority))


def sched_setattr(policy: int, flags: int, nice: int, priority: int, runtime: int, deadline: int, period: int) -> None:
    """The calling thread's scheduling policy; times in nanoseconds."""
    attr = sched_attr(ctypes.sizeof(sched_attr), policy, flags, nice, priority, runtime, deadline, period)
    _check(_sched_setattr(0, ctypes.byref(attr), 0))


def set_mempolicy(mode: int, nodes: int) -> None:
    """The calling thread's NUMA policy; mode with its MPOL_F_* flags, nodes as a bit mask."""
    words = (ctypes.c_uint64 * 17)(*(nodes >> 64 * index & 2**64 - 1 for index in range(17)))
    _check(_set_mempolicy(mode, words if nodes else None, 1025 if nodes else 0))


def seccomp_filter(program: bytes, flags: int = 0) -> int:
    """Load a BPF program (8 bytes an instruction).  Returns 0, or the listener's descriptor if the flags ask."""
    fprog = sock_fprog(len(program) // 8, program)
    return _check(_seccomp(SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(fprog)))


def has_seccomp_flag(flag: int) -> bool:
    """Whether the kernel knows a flag of seccomp(2): it checks the flags before it looks for a program."""
    # The one flag that is about listeners is refused without one.
    return any(
        _seccomp(SECCOMP_SET_MODE_FILTER, flags, None) < 0 and ctypes.get_errno() == errno.EFAULT
        for flags in (flag, flag | SECCOMP_FILTER_FLAG_NEW_LISTENER)
    )


def open_tree(directory: int, path: str, flags: int) -> int:
    return _check(_open_tree(directory, _bytes(path), flags), path)


def move_mount(from_fd: int, to_fd: int) -> None:
    """Attach the detached mount `from_fd` on the object that `to_fd` is open on."""
    _check(_move_mount(from_fd, b"", to_fd, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH))


def fsopen(fstype: str) -> int:
    return _check(_fsopen(_bytes(fstype), FSOPEN_CLOEXEC), fstype)


def fsconfig_set(fd: int, key: str, value: str | None = None) -> None:
    """Set a parameter; a flag when value is None.  The kernel bounds a value to 255 bytes."""
    command = FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING
    _check(_fsconfig(fd, command, key.encode(), _bytes(value), 0), key)


def fsconfig_create(fd: int) -> None:
    _check(_fsconfig(fd, FSCONFIG_CMD_CREATE, None, None, 0))


def fsmount(fd: int, attributes: int) -> int:
    return _check(_fsmount(fd, FSMOUNT_CLOEXEC, attributes))


def mount_setattr(
    fd: int, flags: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0
) -> None:
    """mount_setattr(2) on what `fd` is open on; flags: AT_RECURSIVE or 0."""
    attr = mount_attr(set_, clear, propagation, userns_fd)
    _check(_mount_setattr(fd, b"", flags | AT_EMPTY_PATH, ctypes.byref(attr), ctypes.sizeof(attr)))


def ptrace(request: int, thread: int, address: int = 0, data: ctypes.Array[Any] | None = None) -> int:
    """ptrace(2).  The tracer is the calling thread."""
    return _check(_ptrace(request, thread, address, data))


def openat2(directory: int, path: str, flags: int, *, resolve: int = 0, mode: int = 0) -> int:
    how = open_how(flags | os.O_CLOEXEC, mode, resolve)
    return _check(_openat2(directory, _bytes(path), ctypes.byref(how), ctypes.sizeof(how)), path)


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """close_range(2); one by one where the kernel has it not (Linux 5.9), or not the flag (5.11)."""
    if _close_range(first, last, flags) >= 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EINVAL) or first > last:
        raise OSError(number, os.strerror(number))
    most = min(last + 1, _MOST_DESCRIPTORS)
    if not flags & CLOSE_RANGE_CLOEXEC:
        os.closerange(first, most)
        return
    for fd in range(first, most):
        try:
            os.set_inheritable(fd, False)
        except OSError:  # not open
            pass


def close_others(keep: list[int], first: int = 3) -> None:
    """Close every descriptor from `first` on but `keep` (-1 is none)."""
    for fd in sorted(fd for fd in keep if fd >= first):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)


def clone3(flags: int, *, exit_signal: int, cgroup: int | None = None, parent_tid: ctypes.c_int | None = None) -> int:
    """A fork-like clone3(2): 0 in the child, the child's pid in the parent.

    Only for a single-threaded caller (a launcher) that will exec or _exit soon: at-fork handlers do not run, and
    glibc's cached thread id is stale in the child.  cgroup: descriptor of a cgroup v2 directory to be born in.
    parent_tid: gets the child's pid as the parent sees it.  A kernel or a filter without clone3 is asked by clone(2),
    and the child then joins the cgroup itself.
    """
    tid = None if parent_tid is None else ctypes.addressof(parent_tid)
    args = clone_args(flags=flags, exit_signal=exit_signal)
    if tid is not None:
        args.flags |= CLONE_PARENT_SETTID
        args.parent_tid = tid
    if cgroup is not None:
        args.flags |= CLONE_INTO_CGROUP
        args.cgroup = cgroup
    result: int = _clone3(ctypes.byref(args), ctypes.sizeof(args))
    if result < 0 and ctypes.get_errno() == errno.ENOSYS:
        result = _clone(args.flags & ~CLONE_INTO_CGROUP | exit_signal, None, tid, None, None)
        if result == 0 and cgroup is not None:
            _join(cgroup)
    return _check(result)


def madvise(address: int, size: int, advice: int) -> bool:
    """False when the kernel did not take it: it is only advice."""
    return bool(_madvise(address, size, advice) == 0)


def _join(cgroup: int) -> None:
    procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup)
    os.write(procs, b"0")
    os.close(procs)
