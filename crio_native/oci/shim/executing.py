"""A process in a shim's container: the caller's descriptors become its streams, its end an ExecSession."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import tty
from collections.abc import Callable

from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    StartFailed,
    Unavailable,
)
from crio_native.oci.runtime import ExecSpec, ExitStatus
from crio_native.oci.shim.task import Streams, Tasks

_numbers = itertools.count()
_NUMBERS = {
    "no such file or directory": errno.ENOENT,
    "executable file not found": errno.ENOENT,
    "permission denied": errno.EACCES,
    "exec format error": errno.ENOEXEC,
}


class ShimExec:
    """See `oci.runtime.ExecSession`."""

    def __init__(
        self, tasks: Tasks, container_id: str, exec_id: str, pid: int, terminal: int, cgroups_path: str
    ) -> None:
        self._tasks, self._container_id, self._exec_id = tasks, container_id, exec_id
        self._cgroups_path = cgroups_path
        self.pid, self.terminal = pid, terminal
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._end = tasks.wait(container_id, exec_id)
        ready = os.dup(self._ready)  # of the callback's own: the session may be closed before the process ends
        self._end.add_done_callback(lambda _: _signal(ready))

    def when_ended(self, act: Callable[[], None]) -> None:
        self._end.add_done_callback(lambda _: act())

    def fileno(self) -> int:
        return self._ready

    def result(self) -> ExitStatus:
        end = self._end.result()
        return ExitStatus(end.code, finished_at=end.finished_at)

    def kill(self) -> None:
        """A shim signals one process; the rest of its group is killed here, where it is on this host."""
        if _leads_group(self.pid, self._cgroups_path):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, 9)
        with contextlib.suppress(NotFound, Unavailable):
            self._tasks.kill(self._container_id, 9, self._exec_id)

    def resized(self, height: int, width: int) -> None:
        self._tasks.resize(self._container_id, height, width, self._exec_id)

    def close(self) -> None:
        """Have the shim forget it; a process that still runs is killed, as nobody will read what it says."""
        if self._ready < 0:
            return
        os.close(self._ready)
        self._ready = -1
        if not self._end.done():
            with contextlib.suppress(CrioError):
                self.kill()
        tasks, container_id, exec_id = self._tasks, self._container_id, self._exec_id
        self._end.add_done_callback(lambda _: tasks.forget(container_id, exec_id))


def _signal(ready: int) -> None:
    os.eventfd_write(ready, 1)
    os.close(ready)


def _leads_group(pid: int, cgroups_path: str) -> bool:
    """Whether pid, which a shim told us, is what it says: a group's leader in the container's own cgroup."""
    try:
        if not cgroups_path or pid <= 0 or os.getpgid(pid) != pid:
            return False
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return any(line.rstrip("\n").endswith(f":{cgroups_path}") for line in file)
    except OSError:
        return False


def start(tasks: Tasks, container_id: str, cgroups_path: str, request: ExecSpec) -> ShimExec:
    """Raises StartFailed when the command cannot be executed."""
    if not request.process.get("terminal"):
        paths = {name: _path(getattr(request, name), name) for name in ("stdin", "stdout", "stderr")}
        streams = Streams(paths["stdin"], paths["stdout"], paths["stderr"])
        session = _start(tasks, container_id, cgroups_path, request, streams, -1)
        if request.stdin >= 0:
            # A shim may open it only after it said that the process runs; a pipe that nobody reads refuses what comes.
            reader = os.dup(request.stdin)
            session.when_ended(lambda: os.close(reader))
        return session
    # The shim copies between the process's own terminal and this one, which does nothing but pass bytes on.
    master, slave = os.openpty()
    try:
        tty.setraw(slave)
        path = f"/proc/{os.getpid()}/fd/{slave}"
        session = _start(tasks, container_id, cgroups_path, request, Streams(path, path, "", True), master)
    except BaseException:
        os.close(master)
        os.close(slave)
        raise
    # Until then it stays open: without any slave the master reads as hung up.
    session.when_ended(lambda: os.close(slave))
    return session


def _start(
    tasks: Tasks, container_id: str, cgroups_path: str, request: ExecSpec, streams: Streams, terminal: int
) -> ShimExec:
    exec_id = f"exec-{os.getpid()}-{next(_numbers)}"  # of this daemon; an earlier one's may still run
    tasks.exec(container_id, exec_id, request.process, streams)
    try:
        pid = tasks.start(container_id, exec_id)
    except (Unavailable, DeadlineExceeded, NotFound):
        tasks.forget(container_id, exec_id)
        raise
    except CrioError as error:
        tasks.forget(container_id, exec_id)
        raise StartFailed("exec", number_of(str(error)), str(request.process["args"][0]), str(error)) from None
    # Its end is asked for only now: of a process that never started a shim would answer never.
    session = ShimExec(tasks, container_id, exec_id, pid, terminal, cgroups_path)
    if streams.stdin and not streams.terminal:
        tasks.close_stdin(container_id, exec_id)
    return session


def _path(descriptor: int, name: str) -> str:
    """A path by which the shim opens the caller's own pipe, so that nothing need be copied; "" for none."""
    if descriptor < 0:
        return ""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        raise InvalidArgument(name, descriptor, "a shim's process can only have pipes for streams")
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def number_of(words: str) -> int:
    """The errno that a runtime's words mean, 0 when they tell none."""
    for text, number in _NUMBERS.items():
        if text in words:
            return number
    return 0
