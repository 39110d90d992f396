"""The processes that a runner starts: their ends, what they say, and how none of them stays.

A runner is the parent, or as their subreaper becomes the parent, of all that a runtime starts; whoever asked for it
holds the other end of a reply socket, and when that closes, nobody waits any more.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import fcntl
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Sequence

CHUNK = 64 << 10
DRAIN_SECONDS = 0.5  # for what a runtime that has ended left in its pipes, should a child of it keep them open
FINISH_SECONDS = 1.0  # for a command to end by itself when nobody waits for it any more
END_SECONDS = 10.0  # for killed processes to be gone
STATUSES_MAX = 1024  # ends that are kept of processes that nobody asked for yet


class Unwanted(Exception):
    """The asker has gone."""


class Children:
    """The processes that this one is the parent or the subreaper of, and how they ended."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.wakeup, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)

    def reap(self, awaited: int) -> int | None:
        """Reap whatever has ended; the wait status of `awaited` once it has."""
        try:
            os.read(self.wakeup, 512)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == awaited or len(self.statuses) < STATUSES_MAX:
                self.statuses[pid] = status
        return self.statuses.get(awaited)


def spawn(line: Sequence[str], env: dict[str, str], stdio: Sequence[int]) -> int:
    """Start a program with three descriptors and every signal as it should be; OSError if it cannot be executed.

    In a process group of its own, but in the launcher's session, which has no terminal: where the kernel divides its
    time between sessions, a new one for each command has to wait longer (sched(7), autogroup).
    """
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in stdio]
    try:
        return os.posix_spawn(
            line[0],
            list(line),
            env,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(moved)],
            setpgroup=0,
            setsigmask=(),
            setsigdef=(_signal.SIGPIPE, _signal.SIGXFSZ),  # what Python ignores, its children would
        )
    finally:
        for fd in moved:
            os.close(fd)


class Tail:
    """What comes out of a pipe; of more than `most` bytes the end is kept, or the beginning."""

    def __init__(self, fd: int, most: int, *, end: bool) -> None:
        self.fd, self.most, self.end, self.open = fd, most, end, True
        self.data = b""
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Take what is there; False when nothing is."""
        try:
            chunk = os.read(self.fd, CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            self.open = False
            return False
        data = self.data + chunk
        self.data = data[-self.most :] if self.end else data[: self.most]
        return True


def wait_for(
    pid: int, children: Children, reply: _socket.socket, tails: Sequence[Tail], extra: dict[int, Callable[[], None]]
) -> int:
    """The wait status of a child, while its output is read; `extra` are descriptors with what to do when readable.

    Raises Unwanted when the asker goes.
    """
    while True:
        poll = select.poll()
        poll.register(children.wakeup, select.POLLIN)
        poll.register(reply.fileno(), select.POLLIN)
        for tail in tails:
            if tail.open:
                poll.register(tail.fd, select.POLLIN)
        for fd in extra:
            poll.register(fd, select.POLLIN)
        status = children.reap(pid)
        if status is not None:
            return status
        for fd, _ in poll.poll():
            if fd == reply.fileno():
                raise Unwanted
            if fd in extra:
                extra.pop(fd)()
        for tail in tails:
            tail.read()


def read_to_end(tail: Tail, reply: _socket.socket) -> None:
    """Raises Unwanted when the asker goes before."""
    poll = select.poll()
    poll.register(tail.fd, select.POLLIN)
    poll.register(reply.fileno(), select.POLLIN)
    while tail.open and b"\n" not in tail.data:
        for fd, _ in poll.poll():
            if fd == reply.fileno():
                raise Unwanted
        tail.read()


def drain(tails: Sequence[Tail]) -> None:
    end = time.monotonic() + DRAIN_SECONDS
    while any(tail.open for tail in tails) and time.monotonic() < end:
        if not sum(tail.read() for tail in tails if tail.open):
            time.sleep(0.002)


def let_finish(pid: int, children: Children, tails: Sequence[Tail]) -> None:
    """Time for a command whose asker has gone, before it is killed: a runtime that is killed in `start` leaves a
    container that runs, and that it takes for a created one for ever."""
    end = time.monotonic() + FINISH_SECONDS
    while children.reap(pid) is None and time.monotonic() < end:
        for tail in tails:
            tail.read()
        time.sleep(0.005)


def is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:
        return False
    return pid > 0


def parent_of(pid: int) -> int:
    """0 for a process that is not there."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return int(file.read().rpartition(b") ")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def kill_group(pid: int) -> None:
    """Not reaped yet, so pid and group are still this process's.  The group may be the runtime's, never ours."""
    os.killpg(os.getpgid(pid), _signal.SIGKILL)
    os.kill(pid, _signal.SIGKILL)  # it may have changed its group meanwhile


def kill_children() -> None:
    """Kill and reap every child and, as they become ours when their parents end, all below them."""
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb", buffering=0) as file:
            for pid in file.read(1 << 16).split():
                os.kill(int(pid), _signal.SIGKILL)  # its pid is its own until we reap it
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)
