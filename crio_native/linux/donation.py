"""A child that goes on in its parent's memory, with nothing copied; the parent dies in its sleep.

A forked Python copies a page of its parent for nearly everything it touches, reference counts being what they are, and
those hundreds of copies are the larger part of what a container's start costs.  Here the child shares the memory
instead (CLONE_VM), while CLONE_VFORK holds the parent in the kernel until the child executes its program.  The parent
must not come back from there, for the stack that it would return to is the child's by then: a kill switch, prepared
beforehand, sees to that as the child's first act.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import ctypes
import fcntl
import os

from crio_native.linux import capabilities, syscalls

_MADV_POPULATE_WRITE = 23
_PAGE = os.sysconf("SC_PAGE_SIZE")
_OWN = 1 << 63 | 1 << 56  # of a pagemap entry: present, mapped by nobody else (admin-guide/mm/pagemap.rst)


_END = _signal.SIGUSR1
_LEAST = 19  # nice


class KillSwitch:
    """Ends the process that made it, from whatever PID namespace `press` is called in.

    A signal cannot be sent to a process that one's own PID namespace does not know.  But a pipe can have an owner who
    is signalled when something arrives (F_SETOWN, F_SETSIG), and the kernel then asks nobody.
    """

    def __init__(self, first: int = 0) -> None:
        """Its descriptors are numbered `first` or higher.  The caller becomes a process group of its own."""
        os.setpgid(0, 0)
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        self._may_yield = bool(syscalls.capget()[0] & capabilities.mask(["CAP_SYS_NICE"]))
        _signal.signal(_END, _nothing)
        self._watched, self._pressed = pipe(first)
        fcntl.fcntl(self._watched, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._watched, fcntl.F_SETSIG, _END)
        fcntl.fcntl(self._watched, fcntl.F_SETFL, os.O_ASYNC)
        self._end, self._alive = pipe(first)
        self.descriptors = [self._watched, self._pressed, self._end, self._alive]

    def press(self) -> None:
        """Have it end as soon as it wakes, which is when the memory is its own again: the kernel then takes that down
        in its time, and not in that of a container's start.

        A signal with a handler wakes nobody from the wait of a vfork; it is queued, and what it does is decided when
        it is taken.  By then it kills, for the two share their handlers.
        """
        os.write(self._pressed, b"x")
        _signal.signal(_END, _signal.SIG_DFL)
        if self._may_yield:
            self._yield()

    def _yield(self) -> None:
        """It wakes in the midst of the child's execve, often on the very processor that the child has, and its end
        takes as long as half of an exec: nobody is to wait for that.  Its pid may mean nothing here, but its group is
        ours."""
        os.setpriority(os.PRIO_PGRP, 0, _LEAST)
        os.setpriority(os.PRIO_PROCESS, 0, self._nice)

    def press_and_wait(self) -> None:
        """Have it end in its sleep, and go on when it is gone and its memory is of the caller alone: setns(2) refuses
        a time namespace to who shares his."""
        fcntl.fcntl(self._watched, fcntl.F_SETSIG, _signal.SIGKILL)
        os.write(self._pressed, b"x")
        os.close(self._alive)
        os.read(self._end, 1)


def pipe(first: int) -> list[int]:
    ends = os.pipe2(os.O_CLOEXEC)
    return [moved(end, first) for end in ends]


def moved(descriptor: int, first: int) -> int:
    """The descriptor under another number, `first` or higher, and close-on-exec."""
    other = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, first)
    os.close(descriptor)
    return other


def _nothing(number: int, frame: object) -> None:
    pass


def donate(switch: KillSwitch, flags: int, *, cgroup: int | None = None, alone: bool = False) -> int:
    """Give the calling process's life and memory to a new child.  Returns only in the child: its pid, as the caller's
    PID namespace has it.  flags, cgroup: as for `syscalls.clone3`, whose OSError is raised while nothing has happened.
    alone: the caller is gone by then; otherwise when the child executes a program, or ends.

    For a process with one thread.  The child has its own descriptors, and the caller's parent.
    """
    pid = ctypes.c_int()
    flags |= syscalls.CLONE_PARENT | syscalls.CLONE_VM | syscalls.CLONE_VFORK | syscalls.CLONE_SIGHAND
    if syscalls.clone3(flags, exit_signal=0, cgroup=cgroup, parent_tid=pid):  # 0: the caller's
        os._exit(1)  # the child never ran: it was killed before its first act
    if alone:
        switch.press_and_wait()
    else:
        switch.press()
    return pid.value


class Pages:
    """Which private pages a process has written: to have a clone write them in advance, out of anybody's time.

    Only of a process that shares its other pages with a parent.  To be made in the donor, for a descriptor of /proc
    goes by the memory, whoever has it then; it is numbered `first` or higher.
    """

    def __init__(self, first: int) -> None:
        self._writable = _writable()
        self.descriptor = moved(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC), first)

    def written(self) -> list[tuple[int, int]]:
        """(address, bytes) of each run of such pages."""
        found: list[tuple[int, int]] = []
        for start, end in self._writable:
            entries = os.pread(self.descriptor, (end - start) // _PAGE * 8, start // _PAGE * 8)
            for index in range(len(entries) // 8):
                if int.from_bytes(entries[index * 8 : index * 8 + 8], "little") & _OWN != _OWN:
                    continue
                address = start + index * _PAGE
                if found and found[-1][0] + found[-1][1] == address:
                    found[-1] = (found[-1][0], found[-1][1] + _PAGE)
                else:
                    found.append((address, _PAGE))
        return found


def _writable() -> list[tuple[int, int]]:
    with open("/proc/self/maps", "rb", buffering=0) as file:
        content = b"".join(iter(file.read, b""))
    spans = [line.split(None, 2) for line in content.splitlines()]
    ranges = [span.split(b"-") for span, permissions, _ in spans if permissions == b"rw-p"]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def write_pages(runs: list[tuple[int, int]]) -> None:
    """Have pages of one's own in these places; kernels before 5.14 cannot, and where there is no memory any more there
    is nothing to write."""
    for address, size in runs:
        syscalls.madvise(address, size, _MADV_POPULATE_WRITE)
