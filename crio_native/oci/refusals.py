"""What other runtimes say of a value that the kernel refuses, as the step of the built-in executor that would fail.

runc, crun, shims over them and crio-oci tell a failure in words.  Few of these quote the value, as they were in runc
from 1.1 and in crun from 1.8 on; whatever else they say stays as it is.
"""

from __future__ import annotations

import errno
import os
import re

from crio_native.errors import StepFailed

# What the kernel says of a value that it cannot take, and not of a machine that has run out of something.
OF_VALUES = frozenset(
    {
        errno.EINVAL,
        errno.ERANGE,
        errno.EACCES,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    }
)
_NUMBERS = {os.strerror(number).lower(): number for number in OF_VALUES}
_OURS = re.compile(r"step '(\w+)' failed(?: on (.*?))? with (E[A-Z0-9]+) \([a-z ]+\)(?:: (.*))?$")  # crio-oci
_THEIRS = (
    ("bind", re.compile(r'error mounting "[^"]*" to rootfs at "/?([^"]*)"')),  # runc
    ("bind", re.compile(r"mount `[^`]*` to `/?([^`]*)`")),  # crun
    ("change_directory", re.compile(r"error during container init: mkdir /([^:]*): [a-z ]+$")),  # runc
    ("change_directory", re.compile(r'chdir to cwd \("/([^"]*)"\)')),  # runc
    ("change_directory", re.compile(r"chdir `/([^`]*)`")),  # crun
)
_CPUSET = re.compile(r"\bcpuset\.(cpus|mems)\b")


def as_step(error: StepFailed) -> StepFailed:
    """The failure that is told in the words of `error`; `error` itself where they are not known."""
    said = error.detail.strip()
    if ours := _OURS.search(said):
        return StepFailed(ours[1], getattr(errno, ours[3], 0), ours[2] or "", ours[4] or "")
    number = _NUMBERS.get(said.rpartition(": ")[2].lower(), 0)
    if not number:
        return error
    for step, pattern in _THEIRS:
        if found := pattern.search(said):
            return StepFailed(step, number, f"/{found[1]}", said)
    # Where there is no such file, it is the group that is not there.
    if (found := _CPUSET.search(said)) and number in (errno.EINVAL, errno.ERANGE):
        return StepFailed("cgroup", number, "", f"linux.resources.cpu.{found[1]}")
    return error
