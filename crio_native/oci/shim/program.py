"""Running a shim's program to its end, through a launcher: the daemon itself never forks.

It runs on the host as it is, in a session and a process group of its own.  A process that it leaves behind, which is
the shim, goes on when it has ended.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crio_native.errors import DeadlineExceeded, StepFailed
from crio_native.oci.builtin.execs import Birth
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.replies import receive

OUTPUT_MAX = 64 << 10  # bytes kept of each of its streams; the rest is read and dropped
_DRAIN_SECONDS = 0.2  # for output that is still in the pipes when it has ended


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    stdout: bytes
    stderr: bytes

    @property
    def words(self) -> str:
        """What it said, for an error."""
        said = (self.stderr.strip() or self.stdout.strip()).decode(errors="replace")
        return said[-2000:] or f"it ended with status {self.code} and said nothing"


def run(
    launchers: Launchers,
    line: Sequence[str],
    *,
    cwd: str,
    env: Mapping[str, str],
    stdin: bytes = b"",
    seconds: float,
    stdout: int = -1,
    stderr: int = -1,
) -> Ended:
    """Run it; stdout, stderr: descriptors that it gets instead of a pipe that is read here, as who goes on in the
    background has to: a pipe of ours that stays open would be waited for.

    Raises DeadlineExceeded (its process group is killed then), StepFailed when it cannot be executed, Unavailable when
    its launcher died.
    """
    entries = [f"{name}={value}" for name, value in env.items()]
    steps = [
        ("new_session", {}),
        ("environment", {"entries": entries}),
        ("change_directory", {"path": cwd}),
        ("find_command", {"name": line[0]}),
        ("default_signals", {}),
        ("execute", {"args": list(line)}),
    ]
    outputs = _Outputs()
    memory = os.memfd_create("stdin", os.MFD_CLOEXEC)
    status, their_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ourselves = os.pidfd_open(os.getpid())
    request = {"op": "exec", "stdio": [0, 1, 2], "cgroup": False, "steps": steps}
    try:
        os.write(memory, stdin)
        os.lseek(memory, 0, os.SEEK_SET)
        streams = [ours if given < 0 else given for given, ours in zip((stdout, stderr), outputs.write, strict=True)]
        given = [their_status.fileno(), ourselves, memory, *streams]
        with launchers.conversation(request, given) as reply:
            their_status.close()
            outputs.close_write()
            Birth(status, f"starting {line[0]}", StepFailed, seconds).wait()
            code = _await(reply, outputs, line[0], seconds)
        return Ended(code, *outputs.data)
    finally:
        os.close(memory)
        os.close(ourselves)
        status.close()
        their_status.close()
        outputs.close()


class _Outputs:
    """Its stdout and stderr."""

    def __init__(self) -> None:
        pairs = [os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)]
        self.read, self.write = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.data = [b"", b""]
        for fd in self.read:
            os.set_blocking(fd, False)

    def take(self) -> bool:
        """Read what is there; False when nothing was."""
        found = False
        for index, fd in enumerate(self.read):
            if fd < 0:
                continue
            try:
                chunk = os.read(fd, 65536)
            except BlockingIOError:
                continue
            if not chunk:
                os.close(fd)
                self.read[index] = -1
            found = found or bool(chunk)
            self.data[index] += chunk[: OUTPUT_MAX - len(self.data[index])]
        return found

    def close_write(self) -> None:
        for fd in self.write:
            os.close(fd)
        self.write = []

    def close(self) -> None:
        self.close_write()
        for fd in self.read:
            if fd >= 0:
                os.close(fd)


def _await(reply: socket.socket, outputs: _Outputs, program: str, seconds: float) -> int:
    """Its status, while its output is read."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(reply.fileno(), select.POLLIN)
    while True:
        registered = [fd for fd in outputs.read if fd >= 0]
        for fd in registered:
            poll.register(fd, select.POLLIN)
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"{program} did not end within {seconds:g} s, and was killed")
        ready = [fd for fd, _ in poll.poll(left * 1000)]
        outputs.take()
        for fd in registered:
            poll.unregister(fd)
        if reply.fileno() in ready:
            break
    code = int(receive(reply, 1, f"{program} ended")["exited"])
    end = time.monotonic() + _DRAIN_SECONDS
    while outputs.take() or (any(fd >= 0 for fd in outputs.read) and time.monotonic() < end and not code):
        time.sleep(0.001)
    return code
