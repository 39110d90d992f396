"""The daemon's side of the launchers: they are started, kept, and asked.

Nothing here forks, clones or changes a namespace: that is the launchers' work, asked for over shared sockets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import prctl

import crio_native
from crio_native.errors import StepFailed, Unavailable
from crio_native.linux import mounts, process, syscalls
from crio_native.monitor import client as monitor
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.replies import receive

log = logging.getLogger(__name__)

# The launcher's interpreter runs without `site`: what that imports would be copied into every container's init.
BOOT = "import sys; sys.path += sys.argv[3:]; from crio_native.oci.builtin.launcher import main; main()"
START_SECONDS = 20.0  # for a launcher to come up on a slow machine
_ASK_SECONDS = 30.0  # for an answer that takes a few system calls


class Launchers:
    """A few warm launcher processes, and their spares, behind shared sockets.

    `start` must be called before gRPC is imported: a launcher is a plain child, but the daemon stays clear of any
    process creation while gRPC's threads run, apart from replacing a launcher that died.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        # Our end of each, and the end that all launchers share; spares serve the last three, see `launcher`.
        self._requests, requests_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._creates, creates_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._execs, execs_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._externals, externals_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends = (requests_end, creates_end, execs_end, externals_end)
        self._executable = -1

    def start(self) -> None:
        """Start the launchers and wait until one answers.  Raises Unavailable when none does."""
        self._executable = process.unwritable_executable(os.path.realpath(sys.executable))
        self._revive()
        reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with reply, theirs:
            self.send({"op": "ping"}, [theirs.fileno()])
            theirs.close()
            answer = receive(reply, START_SECONDS, "waiting for a launcher")
        if "pong" not in answer:
            raise Unavailable(f"a launcher answered {answer!r} to a ping")

    def stop(self) -> None:
        """End the launchers; containers and their monitors live on."""
        for end in (self._requests, self._creates, self._execs, self._externals, *self._ends):
            end.close()
        for launcher in self._processes:
            try:
                launcher.wait(2)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        self._processes.clear()
        if self._executable >= 0:
            os.close(self._executable)
            self._executable = -1

    def pids(self) -> list[int]:
        return [launcher.pid for launcher in self._processes]

    def send(self, request: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Hand a request to whichever launcher is idle; the answer comes on descriptors[0]'s other end."""
        self.hand_on(request["op"], wire.pack(request), descriptors)

    def hand_on(self, op: str, packet: bytes, descriptors: Sequence[int]) -> None:
        """`send`, of a request that is packed already."""
        self._revive()
        spares = {"create": self._creates, "exec": self._execs, "external": self._externals}
        wire.send(spares.get(op, self._requests), packet, descriptors)

    def pin_namespaces(
        self, paths: Mapping[str, Path], *, hostname: str = "", sysctls: Mapping[str, str] | None = None
    ) -> socket.socket | None:
        """Make new namespaces (kinds "net", "ipc", "uts") and keep each alive by a bind mount at its path.

        The files must not exist; their directories are made.  Returns a NETLINK_ROUTE socket opened inside the new
        network namespace when there is one.  On an error nothing stays.
        """
        if not paths:
            return None
        names = {kind: str(path) for kind, path in paths.items()}
        try:
            for path in paths.values():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
                path.touch(mode=0o600, exist_ok=False)
            return self._pin(names, hostname, dict(sysctls or {}))
        except BaseException:
            self.unpin_namespaces(paths.values())
            raise

    def _pin(self, paths: dict[str, str], hostname: str, sysctls: dict[str, str]) -> socket.socket | None:
        request = {"op": "namespaces", "paths": paths, "hostname": hostname, "sysctls": sysctls}
        descriptors = self._ask(request, 1, "made the pod's namespaces")
        return socket.socket(fileno=descriptors[0]) if descriptors else None

    @staticmethod
    def unpin_namespaces(paths: Iterable[Path]) -> None:
        """Let pinned namespaces go; what is gone already is fine."""
        for path in paths:
            with contextlib.suppress(OSError):
                syscalls.umount2(str(path), mounts.MNT_DETACH)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def open_sockets(self, namespace: Path) -> list[socket.socket]:
        """TCP sockets, one a family that there is, of a pinned network namespace, to connect from here.

        Raises StepFailed when the namespace is gone, Unavailable when the launcher died.
        """
        descriptors = self._ask({"op": "sockets", "path": str(namespace)}, 2, "opened sockets in a pod's network")
        return [socket.socket(fileno=descriptor) for descriptor in descriptors]

    def _ask(self, request: dict[str, Any], most: int, what: str) -> list[int]:
        """The descriptors, at most so many, that come with the answer.  Raises StepFailed, Unavailable."""
        with self.conversation(request) as reply:
            reply.settimeout(_ASK_SECONDS)
            data, descriptors, _, _ = socket.recv_fds(reply, 65536, most, socket.MSG_CMSG_CLOEXEC)
        answer = json.loads(data or b"{}")
        if "error" in answer:
            raise StepFailed.from_dict(answer["error"])
        if not answer:
            raise Unavailable(f"the launcher died while it {what}")
        return descriptors

    @contextlib.contextmanager
    def conversation(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> Iterator[socket.socket]:
        """Send a request with a reply socket of its own and yield the end to read the answer from."""
        reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            try:
                self.send(request, [theirs.fileno(), *descriptors])
            finally:
                theirs.close()
            yield reply
        finally:
            reply.close()

    def _revive(self) -> None:
        with self._lock:
            alive = [launcher for launcher in self._processes if launcher.poll() is None]
            for dead in set(self._processes) - set(alive):
                log.error("launcher %d ended with status %d; starting another", dead.pid, dead.returncode)
            while len(alive) < self.count:
                alive.append(self._spawn())
            self._processes = alive

    def _spawn(self) -> subprocess.Popen[bytes]:
        """No preexec_fn: subprocess then uses vfork, which is safe beside threads.

        The executable is named through our own /proc entry, because close_fds has closed the child's copy by then.
        """
        numbers = [end.fileno() for end in self._ends]
        sockets = ",".join(map(str, numbers))
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOT, sockets, str(monitor.binary_path()), *_module_paths()],
            executable=f"/proc/{os.getpid()}/fd/{self._executable}",
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )


def _module_paths() -> list[str]:
    """Where a launcher finds this package, and prctl."""
    return [os.path.dirname(os.path.dirname(crio_native.__file__)), os.path.dirname(prctl.__file__)]
