"""What only a tracer is told of a thread (ptrace(2)): its seccomp filters."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import time
from collections.abc import Iterator

from crio_native.linux import syscalls

PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_SECCOMP_GET_FILTER = 0x420C
_INSTRUCTION = 8  # bytes of a struct sock_filter
_SECONDS = 5.0  # for a thread to stop


def seccomp_filters(thread: int) -> list[bytes]:
    """The BPF programs, as they were loaded, the newest first.

    A thread that a signal has stopped is stopped again afterwards.  One that a v1 control group has frozen cannot be
    asked.  Raises OSError: EACCES where we have a filter ourselves, ETIMEDOUT, EINVAL on a kernel without
    CONFIG_CHECKPOINT_RESTORE.
    """
    syscalls.ptrace(PTRACE_SEIZE, thread)
    try:
        syscalls.ptrace(PTRACE_INTERRUPT, thread)
        _await_stop(thread)
        return list(_filters(thread))
    finally:
        with contextlib.suppress(ProcessLookupError):
            syscalls.ptrace(PTRACE_DETACH, thread)


def _await_stop(thread: int) -> None:
    """Without wait(2), whose answer somebody else in this process may take: until it is, ptrace(2) knows no tracee."""
    end = time.monotonic() + _SECONDS
    while _size(thread, 0) is None:
        if time.monotonic() > end:
            raise OSError(errno.ETIMEDOUT, "it does not stop")
        time.sleep(0.001)


def _filters(thread: int) -> Iterator[bytes]:
    for number in itertools.count():
        size = _size(thread, number)
        if not size:
            return
        program = ctypes.create_string_buffer(size * _INSTRUCTION)
        syscalls.ptrace(PTRACE_SECCOMP_GET_FILTER, thread, number, program)
        yield program.raw


def _size(thread: int, number: int) -> int | None:
    """Instructions of a filter; 0 where there is none; None of a thread that has not stopped."""
    try:
        return syscalls.ptrace(PTRACE_SECCOMP_GET_FILTER, thread, number)
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        return 0
    except OSError as error:
        if error.errno == errno.EINVAL and _mode(thread) != "2":  # no filter has ever been loaded
            return 0
        raise


def _mode(thread: int) -> str:
    with open(f"/proc/{thread}/status") as file:
        return next((line.split()[1] for line in file if line.startswith("Seccomp:")), "0")
