"""Running OCI hooks: programs that the configuration names, with the container's state on their standard input.

The caller decides which hooks, in which namespaces, and what a failure means.  For single-threaded processes, among
them a container's init: nothing is imported late, and nothing of ours stays open in a hook.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import errno
import os
import select
import time

from crio_native.oci.builtin import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

MAX_OUTPUT = 4096  # bytes of a hook's output that its error shows; the rest is read and dropped
_SIGNALS = (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGINT, _signal.SIGCHLD, _signal.SIGTERM, _signal.SIGHUP)


class HookFailed(Exception):
    """A hook could not be run, failed, or took too long; `path` is its program, the message what happened."""

    def __init__(self, path: str, why: str, number: int = 0) -> None:
        super().__init__(why)
        self.path, self.number = path, number


def run(
    kind: str,
    hooks: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    first: int = 0,
    directory: str | int | None = None,
) -> None:
    """Run hooks (entries of config.json's `hooks.KIND` from `first` on) one after the other, each with `state` as JSON
    on stdin, in `directory` (a path or a descriptor): the bundle, if none is given.

    Raises HookFailed for the first that does not end with status 0 within its `timeout` (seconds); the rest do not run.
    """
    if not hooks:
        return
    try:
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # then no path that begins here can be meant either
        here = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _enter(state["bundle"] if directory is None else directory)
        for index, hook in enumerate(hooks, first):
            _run(f"hooks.{kind}[{index}]", kind, hook, wire.encode(dict(state)).encode())
    finally:
        os.fchdir(here)
        os.close(here)


def _enter(directory: str | int) -> None:
    try:
        os.chdir(directory)
    except FileNotFoundError:  # an engine may remove the bundle before the container
        os.chdir("/")


def _run(name: str, kind: str, hook: Mapping[str, Any], state: bytes) -> None:
    path = str(hook["path"])
    seconds = hook.get("timeout")
    deadline = time.monotonic() + seconds if seconds else None
    given = hook.get("env")  # without one a hook has our own: they need PATH, and runc has always let them have it
    environment = dict(os.environ) if given is None else dict(entry.partition("=")[::2] for entry in given)
    stdin = os.memfd_create("state", os.MFD_CLOEXEC)  # not a pipe: a hook that does not read must not stop us
    output, write = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(stdin, state)
        os.lseek(stdin, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in ((0, stdin), (1, write), (2, write))]
        try:
            pid = os.posix_spawn(
                path,
                list(hook.get("args") or [path]),
                environment,
                file_actions=actions,
                setpgroup=0,
                setsigmask=(),
                setsigdef=_SIGNALS,
            )
        except OSError as error:
            raise HookFailed(path, f"{name} cannot be executed", error.errno or 0) from None
        os.close(write)
        write = -1
        os.set_blocking(output, False)
        try:
            text = _await(pid, output, deadline)
        except BaseException:  # we are being interrupted: nothing of ours goes on
            os.kill(-pid, _signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        if text is None:
            os.kill(-pid, _signal.SIGKILL)
            os.waitpid(pid, 0)
            raise HookFailed(path, f"{name} did not end within its timeout of {seconds} s", errno.ETIMEDOUT)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        for fd in (stdin, output, write):
            if fd >= 0:
                os.close(fd)
    if code:
        how = f": {kind} hook failed with exit code {code}" if code > 0 else f" was ended by signal {-code}"
        said = text.decode("utf-8", "replace").strip()
        raise HookFailed(path, f"{name}{how}" + (f": {said}" if said else ""))


def _await(pid: int, output: int, deadline: float | None) -> bytes | None:
    """Read what it says until it has ended; None at the deadline.  What it left running does not hold us."""
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(output, select.POLLIN)
    text = b""
    try:
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
            ready = [fd for fd, _ in poll.poll(left)]
            if output in ready:
                try:
                    more = os.read(output, 65536)
                except BlockingIOError:
                    more = b""
                text += more[: MAX_OUTPUT - len(text)]
                if not more:
                    poll.unregister(output)
            elif ended in ready:
                return text
            if not ready:
                return None
    finally:
        os.close(ended)
