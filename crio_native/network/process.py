"""Running one program: some input, bounded output, a time limit, and nothing left of it when that has passed.

The program is started by the daemon itself.  A daemon with gRPC's threads must not fork, because a copy of its memory
would hold locks that no thread of the copy will open; subprocess uses vfork here (no preexec_fn, no other user), whose
child shares our memory for the moment until it execs, and no lock is taken in between (docs/decisions/0004).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crio_native.errors import DeadlineExceeded, StepFailed, Unavailable

MAX_OUTPUT = 1 << 20  # bytes on stdout; a result with hundreds of addresses has some ten thousand
MAX_MESSAGES = 16 << 10  # bytes of stderr that are kept, the last
_KILL_SECONDS = 5.0  # a process that waits for a device or a dead NFS server does not even end when it is killed


@dataclass(frozen=True, slots=True)
class Ended:
    """code: the exit status, negative for the number of the signal that ended it."""

    code: int
    output: bytes
    messages: bytes


def run(
    step: str,
    path: str,
    stdin: bytes,
    environment: Mapping[str, str],
    seconds: float,
    inherited: Sequence[int] = (),
    stop: int = -1,
    arguments: Sequence[str] = (),
) -> Ended:
    """Run the program until it ends.

    step names the run in errors.  inherited: descriptors that it has too, under their numbers.  stop: a descriptor that
    becomes readable when the run is to be given up.  Raises StepFailed when the program cannot be executed or prints
    more than MAX_OUTPUT bytes, DeadlineExceeded after `seconds`, Unavailable at `stop`; its process group is killed.
    What a program that ended by itself leaves running goes on: some start a daemon.
    """
    if seconds <= 0:
        raise DeadlineExceeded(f"step {step!r}: no time was left to run {path}")
    with contextlib.ExitStack() as stack:
        # Not a pipe: a program that does not read its input must not stop us.
        memory = os.memfd_create("stdin", os.MFD_CLOEXEC)
        stack.callback(os.close, memory)
        os.write(memory, stdin)
        os.lseek(memory, 0, os.SEEK_SET)
        try:
            process = subprocess.Popen(
                [path, *arguments],
                stdin=memory,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment),
                cwd="/",
                process_group=0,
                pass_fds=inherited,
                bufsize=0,
            )
        except OSError as error:
            raise StepFailed(step, error.errno or 0, path, "cannot be executed") from error
        assert process.stdout is not None and process.stderr is not None
        stack.enter_context(process.stdout)
        stack.enter_context(process.stderr)
        try:
            output, messages = _read(
                process, process.stdout.fileno(), process.stderr.fileno(), step, path, seconds, stop
            )
        except BaseException:
            _kill(process)
            raise
        return Ended(process.wait(), output, messages)


def _read(
    process: subprocess.Popen[bytes], stdout: int, stderr: int, step: str, path: str, seconds: float, stop: int
) -> tuple[bytes, bytes]:
    """What it prints until it has ended.  Its end counts, not the streams': a child of its own may hold these."""
    deadline = time.monotonic() + seconds
    kept = {stdout: bytearray(), stderr: bytearray()}
    poll = select.poll()
    ended = os.pidfd_open(process.pid)
    try:
        for fd in (ended, stdout, stderr, stop):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(max(deadline - time.monotonic(), 0) * 1000)}
            if not ready or time.monotonic() > deadline:
                said = text(bytes(kept[stderr] or kept[stdout]))
                raise DeadlineExceeded(
                    f"step {step!r}: {path} did not end within {seconds:.1f} s and was killed"
                    + (f"; it had said: {said}" if said else "")
                )
            if stop in ready:
                raise Unavailable(f"step {step!r}: {path} was killed because the daemon stops")
            if ready == {ended}:
                return bytes(kept[stdout]), bytes(kept[stderr])
            for fd in ready - {ended}:
                more = os.read(fd, 65536)
                if not more:
                    poll.unregister(fd)
                kept[fd] += more
            if len(kept[stdout]) > MAX_OUTPUT:
                raise StepFailed(step, 0, path, f"it printed more than {MAX_OUTPUT} bytes, and was killed")
            del kept[stderr][:-MAX_MESSAGES]
    finally:
        os.close(ended)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, while its leader is not reaped: so the number is still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)


def text(data: bytes, limit: int = 500) -> str:
    """What a program said, fit for one line of an error: the end of it."""
    line = " ".join(data.decode("utf-8", "replace").split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= limit else f"...{line[-limit:]}"
