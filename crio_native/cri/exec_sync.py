"""ExecSync: a command inside a container, its output collected on the event loop.

The command's output is hostile: what is kept is bounded, what exceeds the bound is read and dropped, so that the
command never blocks on us.  A grandchild may keep the pipes open after the command has ended: what comes within a
short time is still taken, then the pipes are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from crio_native.errors import CrioError, DeadlineExceeded, InvalidArgument, StepFailed
from crio_native.oci.external.program import words
from crio_native.oci.runtime import ExecSession, ExitStatus

OUTPUT_MAX = 16 << 20  # bytes kept of each stream
DRAIN_SECONDS = 0.5
KILL_SECONDS = 5.0
_CHUNK = 65536
_WORDS_MAX = 4096
_SAID_MAX = 4096  # bytes of a failed start's words

Start = Callable[[int, int], Awaitable[ExecSession]]


def check_command(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a command, for Exec too.  Raises InvalidArgument."""
    command = tuple(words)
    if not command or not command[0]:
        raise InvalidArgument("cmd", list(command), "names no command")
    if len(command) > _WORDS_MAX:
        raise InvalidArgument("cmd", f"{len(command)} words", f"must be at most {_WORDS_MAX}")
    for index, word in enumerate(command):
        if "\0" in word:
            raise InvalidArgument(f"cmd[{index}]", word, "contains a NUL character, which no system call can carry")
    return command


class _Stream:
    """The read end of a pipe on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._read, self.write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        self._kept: list[bytes] = []
        self._size = 0
        self.ended = asyncio.Event()
        loop.add_reader(self._read, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._read, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._read)
            self.ended.set()
        elif self._size < OUTPUT_MAX:
            self._kept.append(data[: OUTPUT_MAX - self._size])
            self._size += len(data)

    def close_write(self) -> None:
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def close(self) -> None:
        self.close_write()
        self._loop.remove_reader(self._read)
        os.close(self._read)

    def output(self) -> bytes:
        return b"".join(self._kept)


async def run(start: Start, seconds: float | None) -> tuple[bytes, bytes, int]:
    """(stdout, stderr, exit code) of the command that `start(stdout, stderr)` starts.

    seconds: the command is killed with its process group after that time, and DeadlineExceeded raised, which the
    kubelet's probes understand as their time limit; None for no limit.  A cancelled call kills the command too.
    """
    loop = asyncio.get_running_loop()
    out, err = _Stream(loop), _Stream(loop)
    try:
        try:
            session = await start(out.write, err.write)
        except StepFailed as error:
            raise await _with_words(error, err) from None
        out.close_write()
        err.close_write()
        try:
            status = await _result(loop, session, seconds)
        finally:
            session.close()
        await _drained(out, err)
        return out.output(), err.output(), status.code
    finally:
        out.close()
        err.close()


async def _with_words(error: StepFailed, err: _Stream) -> StepFailed:
    """What the command was to have as its standard error was that of an OCI runtime's program before."""
    err.close_write()
    await _drained(err)
    said = words(err.output()[-_SAID_MAX:])
    if not said or said in error.detail:
        return error
    return type(error)(error.step, error.number, error.path, "; ".join(filter(None, (error.detail, said))))


async def _drained(*streams: _Stream) -> None:
    """A command's end closes its pipes, so most often there is nothing to wait for."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            for stream in streams:
                await stream.ended.wait()


async def _result(loop: asyncio.AbstractEventLoop, session: ExecSession, seconds: float | None) -> ExitStatus:
    ended = asyncio.Event()
    loop.add_reader(session.fileno(), ended.set)
    try:
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            session.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_SECONDS):
                    await ended.wait()
            raise DeadlineExceeded(f"the command did not end within {seconds:g} s and was killed") from None
        return session.result()
    except asyncio.CancelledError:
        session.kill()
        raise
    finally:
        loop.remove_reader(session.fileno())


async def started(call: Any, function: Callable[..., ExecSession], *args: Any) -> ExecSession:
    """Start in a worker thread; a command that starts after its call was cancelled is killed, not forgotten."""
    future = call.thread(function, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(_abandon)
        raise


def _abandon(future: asyncio.Future[ExecSession]) -> None:
    try:
        session = future.result()
    except (CrioError, OSError):
        return
    session.kill()
    session.close()
