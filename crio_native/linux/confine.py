"""Shutting the calling process into one directory, for a program that works on hostile input.

For single-threaded processes that were started for nothing else: none of this can be taken back.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable

from crio_native.linux import capabilities, syscalls

_NAMESPACES = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
# Not from `mounts`: what that imports to parse options would double the start of such a short process.
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SIGKILL, _SIGCHLD = 9, 17  # signal itself would make enumerations first, at every start of such a process
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


def bear_alone() -> int:
    """As fork, for a single-threaded caller: the child, where this is 0, can see and signal no other process.

    Without this, a process of root may signal every process of root, whatever its capabilities.  The child is killed
    when the caller ends, and has all its descriptors.
    """
    child = syscalls.clone3(syscalls.CLONE_NEWPID, exit_signal=_SIGCHLD)
    if child == 0:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, _SIGKILL)
    return child


def into_directory(path: str, keep: Iterable[str]) -> None:
    """Make `path` the root of all that the caller can reach: no other file, no network, no other capability.

    The directory is a mount without devices, setuid and execution, so what is written there works nowhere inside.
    keep: names of the capabilities that stay (CAP_SYS_ADMIN would make all this worthless).  Raises OSError.
    """
    last = capabilities.last_known()  # the last look at /proc
    syscalls.unshare(_NAMESPACES)
    syscalls.mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    syscalls.mount(path, path, None, _MS_BIND)
    harmless = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    syscalls.mount(None, path, None, _MS_BIND | _MS_REMOUNT | harmless)
    os.chdir(path)
    syscalls.pivot_root(".", ".")  # the old root is now on top of the new one
    syscalls.umount2(".", _MNT_DETACH)
    os.chdir("/")
    syscalls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    syscalls.prctl(_PR_SET_DUMPABLE, 0)
    capabilities.limit_bounding(0, last)
    capabilities.set_ambient(0)
    kept = capabilities.mask(keep) & syscalls.capget()[1]
    syscalls.capset(kept, kept, 0)


def limit_resources(*, memory: int, files: int, file_size: int, cpu: int) -> None:
    """Hard limits: bytes of address space, open descriptors, bytes of one file, CPU seconds; no core dumps."""
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in wanted.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
