"""A process in a shim's container: the caller's descriptors become its streams, its end an ExecSession."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Mapping
from typing import Any

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


class ShimExec:
    """See `oci.runtime.ExecSession`."""

    def __init__(self, tasks: Tasks, container_id: str, exec_id: str) -> None:
        self._tasks, self._container_id, self._exec_id = tasks, container_id, exec_id
        self.pid = 0
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._end = tasks.wait(container_id, exec_id)
        ready = os.dup(self._ready)  # of the callback's own: the session may be closed before the process ends
        self._end.add_done_callback(lambda _: _signal(ready))

    def fileno(self) -> int:
        return self._ready

    def result(self) -> ExitStatus:
        end = self._end.result()
        return ExitStatus(end.code, finished_at=end.finished_at)

    def kill(self) -> None:
        with contextlib.suppress(NotFound, Unavailable):
            self._tasks.kill(self._container_id, 9, self._exec_id)

    def resize(self, height: int, width: int) -> None:
        """Set its terminal's size, in characters."""
        self._tasks.resize(self._container_id, height, width, self._exec_id)

    def close(self) -> None:
        """Have the shim forget it, which it does once the process has ended."""
        if self._ready < 0:
            return
        os.close(self._ready)
        self._ready = -1
        tasks, container_id, exec_id = self._tasks, self._container_id, self._exec_id
        self._end.add_done_callback(lambda _: tasks.forget(container_id, exec_id))


def _signal(ready: int) -> None:
    os.eventfd_write(ready, 1)
    os.close(ready)


def start(tasks: Tasks, container_id: str, request: ExecSpec) -> ShimExec:
    """Raises StartFailed when the command cannot be executed."""
    exec_id = f"exec-{os.getpid()}-{next(_numbers)}"  # of this daemon; an earlier one's may still run
    terminal = bool(request.process.get("terminal"))
    streams = Streams(
        _path(request.stdin, "stdin"),
        _path(request.stdout, "stdout"),
        "" if terminal else _path(request.stderr, "stderr"),
        terminal,
    )
    tasks.exec(container_id, exec_id, _process(request), streams)
    session = None
    try:
        session = ShimExec(tasks, container_id, exec_id)
        session.pid = tasks.start(container_id, exec_id)
    except (Unavailable, DeadlineExceeded, NotFound):
        _abandon(tasks, container_id, exec_id, session)
        raise
    except CrioError as error:
        _abandon(tasks, container_id, exec_id, session)
        raise StartFailed("exec", 0, str(request.process["args"][0]), str(error)) from None
    if streams.stdin:
        tasks.close_stdin(container_id, exec_id)
    return session


def _abandon(tasks: Tasks, container_id: str, exec_id: str, session: ShimExec | None) -> None:
    if session is not None:
        with contextlib.suppress(CrioError):
            session.kill()
        session.close()
    tasks.forget(container_id, exec_id)


def _process(request: ExecSpec) -> Mapping[str, Any]:
    return {key: value for key, value in request.process.items() if value is not None}


def _path(descriptor: int, name: str) -> str:
    """A path by which the shim opens the caller's own pipe, so that nothing need be copied; "" for none."""
    if descriptor < 0:
        return ""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        raise InvalidArgument(name, descriptor, "a shim's process can only have pipes for streams")
    return f"/proc/{os.getpid()}/fd/{descriptor}"
