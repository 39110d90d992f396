"""What runs in a clone of the launcher: the monitor's predecessor, the container's init, an exec'ed process.

Each of the three ends in exec or `_exit` and never returns to the launcher's loop.  A failure travels as the JSON
object of `errors.StepFailed`.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from typing import Any, NoReturn

from crio_native.linux import process, syscalls
from crio_native.oci.builtin import steps

FIRST_FREE = 32  # above every descriptor number that an exec'ed program gets from us


def become_monitor(request: dict[str, Any], reply: int, cgroup: int | None) -> NoReturn:
    """Clone the init, then exec the C monitor, so that the monitor is the init's real parent.

    This process stays out of the init's namespaces (a PID namespace to join apart, which takes effect in children
    only).  request: see `client.BuiltinRuntime.create`.
    """
    init = 0
    try:
        if request["join_pid"]:
            syscalls.setns(process.open_namespace(request["join_pid"]), syscalls.CLONE_NEWPID)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stdin, stdout, stderr = _pipes(request)
        init = syscalls.clone3(request["namespaces"], exit_signal=signal.SIGCHLD, cgroup=cgroup)
        if init == 0:
            _run_init(request["steps"], theirs.fileno(), [stdin[0], stdout[1], stderr[1]])
        monitor = request["monitor"]
        wanted = {3: ours.fileno(), 4: reply, 5: os.open(monitor["run_dir"], os.O_PATH | os.O_DIRECTORY)}
        wanted |= {number: fd for number, fd in ((6, stdin[1]), (7, stdout[0]), (8, stderr[0])) if fd >= 0}
        # Read before the move: the descriptors that hold them get closed by it.
        path, arguments = monitor["path"], [*monitor["arguments"], "--pid", str(init)]
        _arrange(wanted)
        _restore_signals()
        os.execve(path, arguments, {})
    except BaseException as error:
        if init > 0:
            os.kill(init, signal.SIGKILL)
        _tell(reply, {"error": _describe("monitor", error)})
        os._exit(1)


def _pipes(request: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(read, write) of stdin, stdout and stderr; -1 where there is none."""
    none = (-1, -1)
    if request["terminal"]:
        return none, none, none
    return os.pipe2(os.O_CLOEXEC) if request["stdin"] else none, os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)


def _arrange(wanted: dict[int, int]) -> None:
    """Move descriptors to the given numbers, inheritable, and close every other above 2."""
    moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_FREE) for number, fd in wanted.items()}
    for number in range(3, FIRST_FREE):
        if number in moved:
            os.dup2(moved[number], number)
    highest = max(wanted, default=2)
    for number in range(3, highest):
        if number not in wanted:
            try:
                os.close(number)
            except OSError:
                pass
    syscalls.close_range(highest + 1)


def _run_init(plan: list[tuple[str, dict[str, Any]]], sync: int, stdio: list[int]) -> NoReturn:
    """The container's first process.  Its only descriptors: stdio, and the monitor's socket as 3."""
    channel = _take_descriptors(stdio, sync)
    context = steps.Context(channel)
    failure = _run(plan, context)
    channel.send(b"E" + json.dumps(failure).encode())
    os._exit(1)


def run_exec(request: dict[str, Any], status: int, container: int, stdio: list[int]) -> NoReturn:
    """One more process of a running container: born in its PID namespace and cgroup, enters the rest here.

    status: closed by a successful exec, else gets the failure.
    """
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for fd in (status, container)]
    for number, fd in enumerate(_or_null(stdio)):
        os.dup2(fd, number)
    os.dup2(high[0], 3, inheritable=False)
    os.dup2(high[1], 4, inheritable=False)
    syscalls.close_range(5)
    context = steps.Context(None)
    context.container = 4
    failure = _run(request["steps"], context)
    _tell(3, {"error": failure})
    os._exit(127)


def _take_descriptors(stdio: list[int], sync: int) -> socket.socket:
    high = fcntl.fcntl(sync, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for fd in _or_null(stdio)]
    for number, fd in enumerate(sources):
        os.dup2(fd, number)
    os.dup2(high, 3, inheritable=False)
    syscalls.close_range(4)
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=3)


def _or_null(stdio: list[int]) -> list[int]:
    if -1 not in stdio:
        return stdio
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    return [null if fd < 0 else fd for fd in stdio]


def _run(plan: list[tuple[str, dict[str, Any]]], context: steps.Context) -> dict[str, Any]:
    """Run the steps; returns only when one fails, with its description."""
    os.umask(0)  # device modes mean what they say; the process's own umask comes with its user
    name = ""
    try:
        for name, arguments in plan:
            steps.STEPS[name](context, **arguments)
    except BaseException as error:
        return _describe(name, error)
    return {"step": name, "errno": 0, "path": "", "detail": "the plan ended without an exec"}


def _describe(step: str, error: BaseException) -> dict[str, Any]:
    if isinstance(error, steps.Refused):
        return {"step": step, "errno": error.number, "path": error.path, "detail": error.why}
    if isinstance(error, OSError):
        number, path = error.errno or 0, error.filename
        usual = os.strerror(number) if number else ""
        detail = error.strerror if error.strerror and error.strerror != usual else ""
        detail = detail.removeprefix(usual).strip()
        text = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        return {"step": step, "errno": number, "path": text, "detail": detail}
    return {"step": step, "errno": 0, "path": "", "detail": f"{type(error).__name__}: {error}"}


def _tell(fd: int, message: dict[str, Any]) -> None:
    try:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        channel.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)
        channel.detach()
    except OSError:
        pass  # nobody listens any more


def _restore_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
