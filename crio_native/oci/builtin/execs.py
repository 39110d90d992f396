"""The daemon's side of a command in a running container: its request, its start, and the session that follows."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import socket
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from cachetools import LRUCache

from crio_native.errors import StartFailed, StepFailed
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.replies import receive
from crio_native.oci.runtime import ExecSpec, ExitStatus

PACKETS = 256  # so many are kept, of some 3 KiB each
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
    cgroup: int | None,
) -> BuiltinExec:
    """Hand the request on and wait for the command to run.  cgroup: a descriptor, closed here.

    Raises StepFailed, StartFailed when execve refuses, Unavailable when the launcher died, DeadlineExceeded.
    """
    extra = [] if cgroup is None else [cgroup]
    status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reply, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with status:
            try:
                hand_on("exec", packet, [far.fileno(), theirs.fileno(), *_given(request), *extra])
            finally:
                far.close()
                theirs.close()
                for fd in extra:
                    os.close(fd)
            started = receive(reply, _START_SECONDS, f"starting a process in container {container_id}")
            if "error" in started:
                raise StepFailed.from_dict(started["error"])
            terminal = _await_exec(status)
    except BaseException:
        reply.close()
        raise
    return BuiltinExec(reply, started["started"], terminal)


class BuiltinExec:
    """An ExecSession of the built-in executor."""

    def __init__(self, reply: socket.socket, pid: int, terminal: int = -1) -> None:
        self._reply, self.pid, self.terminal = reply, pid, terminal
        self._result: ExitStatus | None = None

    def fileno(self) -> int:
        return self._reply.fileno()

    def result(self) -> ExitStatus:
        if self._result is None:
            answer = receive(self._reply, None, "a process ran in a container")
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


def _await_exec(status: socket.socket) -> int:
    """Until the exec itself closes the socket; the master of the process's terminal, -1 for none.

    Raises StartFailed with what the process tells instead.
    """
    status.settimeout(30)
    terminal = -1
    while True:
        try:
            message, descriptors = wire.receive(status)
        except TimeoutError:
            message, descriptors = b'{"error":{"step":"execute","detail":"nothing happened for 30 s"}}', []
        if not message:
            return terminal
        if message == b"C":
            terminal = descriptors[0]
            continue
        if terminal >= 0:
            os.close(terminal)
        raise StartFailed.from_dict(json.loads(message)["error"])
