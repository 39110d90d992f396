"""Runs a program on a kernel that seems to lack some system calls: `python -m tests.oci.without CALL,... PROGRAM...`.

A seccomp filter answers ENOSYS for them, to the program and all that it starts.  Needs CAP_SYS_ADMIN: without it a
filter takes no_new_privs, which containers would inherit.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

import pyseccomp

from crio_native.linux import syscalls


def forget(calls: list[str]) -> None:
    """From here on this process and its children do not have them."""
    program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    program.set_attr(pyseccomp.Attr.CTL_NNP, 0)
    for call in calls:
        program.add_rule(pyseccomp.ERRNO(errno.ENOSYS), syscalls.NUMBER[call])
    program.load()


def main() -> None:
    forget(sys.argv[1].split(","))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in sys.argv[1].split(","):  # or a test under it would prove nothing
        assert libc.syscall(syscalls.NUMBER[call], -1, -1, -1, -1, -1) == -1 and ctypes.get_errno() == errno.ENOSYS, (
            call
        )
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
