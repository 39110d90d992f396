"""A launcher whose clones note each step and each system call in a file; see `test_explain_truth`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

BOOT = (
    "import sys; sys.path += sys.argv[3:]; from tests.oci import observed; observed.observe({!r}); "
    "from crio_native.oci.builtin.launcher import main; main()"
)
NOTES = 200  # descriptor number, above all that are given to others on the way
KERNEL_NAMES = {
    "seccomp_filter": "seccomp",
    "join_session_keyring": "keyctl",
    "fsconfig_set": "fsconfig",
    "fsconfig_create": "fsconfig",
}
OF_OS = {
    "chdir": "chdir",
    "fchdir": "fchdir",
    "chroot": "chroot",
    "mknod": "mknodat",
    "symlink": "symlinkat",
    "chown": "fchownat",
    "setsid": "setsid",
    "setgroups": "setgroups",
    "setresgid": "setresgid",
    "setresuid": "setresuid",
    "umask": "umask",
    "execve": "execve",
}


def observe(path: str) -> None:
    """In a launcher, before it serves."""
    import _socket

    from crio_native.linux import syscalls
    from crio_native.oci.builtin import steps

    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), NOTES)
    for name, function in list(vars(syscalls).items()):
        if callable(function) and not name.startswith("_") and name.islower() and not isinstance(function, type):
            setattr(syscalls, name, noted("call", KERNEL_NAMES.get(name, name), function))
    syscalls.close_range = sparing_notes(syscalls.close_range)
    for name, called in OF_OS.items():
        setattr(os, name, noted("call", called, getattr(os, name)))
    _socket.sethostname = noted("call", "sethostname", _socket.sethostname)
    for name, act in list(steps.STEPS.items()):
        steps.STEPS[name] = noted("step", name, act)


def sparing_notes(close_range: Callable[..., None]) -> Callable[..., None]:
    """The notes have to be written after the root has changed, too."""

    def sparing(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
        if first < NOTES:
            close_range(first, min(last, NOTES - 1), flags)
        if last > NOTES:
            close_range(max(first, NOTES + 1), last, flags)

    return sparing


_in_a_step = [False]  # a launcher, and an init's parent, make calls that are no step's


def noted(kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    line = f"{kind} {name}\n".encode()

    def wrapped(*arguments: Any, **named: Any) -> Any:
        _in_a_step[0] |= kind == "step"
        if _in_a_step[0]:
            os.write(NOTES, line)
        return function(*arguments, **named)

    return wrapped
