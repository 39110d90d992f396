"""The daemon's side of a command in a running container: its request, its start, and the session that follows."""

from __future__ import annotations

import contextlib
import errno
import json
import marshal
import os
import socket
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from cachetools import LRUCache

from crio_native.errors import DeadlineExceeded, Internal, StartFailed, StepFailed, Unavailable
from crio_native.linux import namespaces, process
from crio_native.linux.cgroup import Cgroup
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.replies import receive
from crio_native.oci.runtime import ExecSpec, ExitStatus, Process

PACKETS = 256  # so many are kept, of some 3 KiB each
TARGETS = 128  # so many are kept, of two descriptors each
_START_SECONDS = 30.0


class ExecPackets:
    """Requests for execs, packed.  A probe asks for the same command every few seconds, and to check, plan and pack it
    takes a tenth of what the whole exec does."""

    def __init__(self) -> None:
        self._made: LRUCache[Hashable, tuple[Any, bytes]] = LRUCache(PACKETS)
        self._lock = threading.Lock()

    def packet(self, asked: tuple[Hashable, ...], request: ExecSpec, make: Callable[[], bytes]) -> bytes:
        """asked: what the packet depends on beside the request."""
        words = marshal.dumps((dict(request.process), dict(request.linux)))
        key = (*asked, words, tuple(stdio_of(request)))
        with self._lock:
            seccomp, packet = self._made.get(key, (None, b""))
        if not packet or seccomp is not request.seccomp:
            packet = make()
            with self._lock:
                self._made[key] = request.seccomp, packet
        return packet


class Target:
    """A running container, as an exec needs it.

    pidfd: of its init.  namespaces: CLONE_NEW* of those to enter.  group: its directory in the unified hierarchy, -1 on
    a v1 host and without a group.  join_files: see `Cgroup.join_files`.
    """

    def __init__(self, init: Process, cgroup: Cgroup | None) -> None:
        """Raises StepFailed when it has ended."""
        self.group = self.pidfd = -1
        try:
            self.pidfd = os.pidfd_open(init.pid)
            self.namespaces = namespaces.differing(init.pid)
            if process.start_time(init.pid) != init.start_time:
                raise ProcessLookupError
        except (ProcessLookupError, FileNotFoundError):
            raise StepFailed("exec", errno.ESRCH, "", "the container has ended") from None
        if cgroup is not None:
            group = cgroup.descriptor()
            self.group = -1 if group is None else group
        self.join_files = cgroup.join_files() if cgroup is not None else []
        self.cgroup = cgroup

    def __del__(self) -> None:
        """When nobody sends the descriptors any more."""
        for fd in (self.pidfd, self.group):
            if fd >= 0:
                os.close(fd)


class Targets:
    """Those of the containers that had commands lately."""

    def __init__(self) -> None:
        self._known: LRUCache[str, tuple[Process, Target]] = LRUCache(TARGETS)
        self._lock = threading.Lock()

    def of(self, container_id: str, init: Process, cgroup: Callable[[], Cgroup | None]) -> Target:
        """Raises StepFailed when the container has ended."""
        with self._lock:
            known, target = self._known.get(container_id, (None, None))
        if target is None or known != init:
            target = Target(init, cgroup())
            with self._lock:
                self._known[container_id] = init, target
        return target

    def forget(self, container_id: str) -> None:
        with self._lock:
            self._known.pop(container_id, None)


def _given(request: ExecSpec) -> list[int]:
    return [fd for fd in (request.stdin, request.stdout, request.stderr) if fd >= 0]


def stdio_of(request: ExecSpec) -> list[int]:
    """The places of stdin, stdout and stderr among the streams that are given; -1 for /dev/null."""
    given = _given(request)
    return [given.index(fd) if fd >= 0 else -1 for fd in (request.stdin, request.stdout, request.stderr)]


def start_exec(
    hand_on: Callable[[str, bytes, Sequence[int]], None],
    container_id: str,
    packet: bytes,
    request: ExecSpec,
    target: Target,
) -> BuiltinExec:
    """Hand the request on and, if it waits, see that the command runs.

    Raises StepFailed, StartFailed when execve refuses, Unavailable when the launcher died, DeadlineExceeded.
    """
    group = [target.group] if target.group >= 0 else []
    status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reply, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session = BuiltinExec(reply, Birth(status, f"starting a process in container {container_id}"))
    try:
        try:
            hand_on("exec", packet, [far.fileno(), theirs.fileno(), target.pidfd, *_given(request), *group])
        finally:
            far.close()
            theirs.close()
        if request.waits:
            session.started()
    except BaseException:
        session.close()
        raise
    return session


class Birth:
    """What an exec'ed process tells until it executes its command, which closes the other end: first its pid, then its
    terminal's master if it has one, or how it failed."""

    def __init__(
        self,
        status: socket.socket,
        stage: str,
        failure: type[StepFailed] = StartFailed,
        seconds: float = _START_SECONDS,
    ) -> None:
        """stage: what one is at meanwhile, for a message.  failure: what to raise of a step of its plan.  seconds: from
        one word to the next."""
        self._status, self._stage, self._failure, self._seconds = status, stage, failure, seconds
        self.pid, self.terminal = 0, -1

    def wait(self) -> None:
        """Until it runs.  Raises as `start_exec`, and closes the socket."""
        self._status.settimeout(self._seconds)
        try:
            while self._heard():
                pass
        except BaseException:
            if self.terminal >= 0:
                os.close(self.terminal)
                self.terminal = -1
            raise
        finally:
            self._status.close()

    def _heard(self) -> bool:
        """Who may be traced in the container may speak for its tracer, see `spare._serve_apart`."""
        try:
            message, descriptors = wire.receive(self._status, large=False)
        except TimeoutError:
            raise DeadlineExceeded(f"nothing within {self._seconds:g} s while {self._stage}") from None
        for descriptor in descriptors:
            if message == b"C" and self.terminal < 0 and os.isatty(descriptor):
                self.terminal = descriptor
            else:
                os.close(descriptor)
        if message and message != b"C":
            self._told(message)
        elif not message and not self.pid:
            raise Unavailable(f"the launcher ended while {self._stage}")
        return bool(message)

    def _told(self, message: bytes) -> None:
        try:
            told = json.loads(message)
            failure = told.get("error")
            if failure is not None:
                failure = (self._failure if self.pid else StepFailed).from_dict(failure)
            self.pid = self.pid or int(told.get("started", 0))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Internal(f"what was said is not understood, while {self._stage}") from None
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._status.close()


class BuiltinExec:
    """An ExecSession of the built-in executor.  birth: of a process that is yet to be seen running."""

    def __init__(self, reply: socket.socket, birth: Birth | None = None, pid: int = 0, terminal: int = -1) -> None:
        self._reply, self._birth, self.pid, self.terminal = reply, birth, pid, terminal
        self._result: ExitStatus | None = None

    def started(self) -> None:
        """Wait until it runs.  Raises as `start_exec`."""
        birth, self._birth = self._birth, None
        if birth is not None:
            birth.wait()
            self.pid, self.terminal = birth.pid, birth.terminal

    def fileno(self) -> int:
        return self._reply.fileno()

    def result(self) -> ExitStatus:
        if self._result is None:
            try:
                answer = receive(self._reply, None, "a process ran in a container")
            finally:
                self.started()  # by now it has, or has said why not
            self._result = ExitStatus(answer["exited"], answer["signal"], False, time.time_ns())
        return self._result

    def resized(self, height: int, width: int) -> None:
        pass  # the terminal is the process's own, and has told it

    def kill(self) -> None:
        if self._result is None:
            with contextlib.suppress(OSError):
                self._reply.send(b"kill")

    def close(self) -> None:
        self._reply.close()
        if self._birth is not None:
            self._birth.close()
