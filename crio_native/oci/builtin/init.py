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

import prctl

from crio_native.linux import process, syscalls
from crio_native.oci.builtin import steps, wire

FIRST_FREE = 32  # above every descriptor number that an exec'ed program gets from us


def predecessor(creates: socket.socket, taken: int) -> NoReturn:
    """A spare: waits for a `create` request, makes the init run it, and execs the C monitor in its own place, so that
    the monitor is the init's real parent.

    The init is cloned before the request is there, in a PID namespace of its own, and waits too: that takes both
    clones out of the request's time.  This process stays out of all other namespaces of the container.
    taken: a byte is written to it when the spare is one no more.
    """
    process.prefault()
    channel, init = _clone_init(True, None, spare=True)
    data, descriptors = wire.receive(creates)
    if not data:
        os._exit(0)  # the daemon has ended; the init sees the end of its channel
    os.write(taken, b"x")
    become_monitor(json.loads(data), descriptors, channel, init)


def become_monitor(request: dict[str, Any], descriptors: list[int], channel: socket.socket, init: int) -> NoReturn:
    """request: see `client.BuiltinRuntime.create`; descriptors: the reply socket, a cgroup to be born in (v2)."""
    reply, *cgroup = descriptors
    try:
        if cgroup or not request["new_pid_namespace"]:
            channel.close()  # which ends the spare init: this container's must be born elsewhere
            if request["join_pid"]:
                syscalls.setns(process.open_namespace(request["join_pid"]), syscalls.CLONE_NEWPID)
            channel, init = _clone_init(request["new_pid_namespace"], cgroup[0] if cgroup else None)
        stdin, stdout, stderr = _pipes(request)
        streams = [fd for fd in (stdin[0], stdout[1], stderr[1]) if fd >= 0]
        wire.send(channel, request["steps"].encode(), streams)
        monitor = request["monitor"]
        wanted = {3: channel.fileno(), 4: reply, 5: os.open(monitor["run_dir"], os.O_PATH | os.O_DIRECTORY)}
        wanted |= {number: fd for number, fd in ((6, stdin[1]), (7, stdout[0]), (8, stderr[0])) if fd >= 0}
        _arrange(wanted)
        reply = 4
        _restore_signals()
        os.execve(monitor["path"], [*monitor["arguments"], "--pid", str(init)], {})
    except BaseException as error:
        os.kill(init, signal.SIGKILL)
        wire.tell(reply, {"error": _describe("monitor", error)})
        os._exit(1)


def _clone_init(new_pid_namespace: bool, cgroup: int | None, *, spare: bool = False) -> tuple[socket.socket, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    flags = syscalls.CLONE_NEWPID if new_pid_namespace else 0
    init = syscalls.clone3(flags, exit_signal=signal.SIGCHLD, cgroup=cgroup)
    if init == 0:
        _run_init(theirs.fileno(), spare)
    theirs.close()
    return ours, init


def _pipes(request: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(read, write) of stdin, stdout and stderr; -1 where there is none."""
    none = (-1, -1)
    if request["terminal"]:
        return none, none, none
    return os.pipe2(os.O_CLOEXEC) if request["stdin"] else none, os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)


def _arrange(wanted: dict[int, int]) -> None:
    """Move descriptors to the given numbers, inheritable, and close every other above 2."""
    moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for number, fd in wanted.items()}
    syscalls.close_range(3, FIRST_FREE - 1)
    for number, fd in moved.items():
        os.dup2(fd, number)
    syscalls.close_range(FIRST_FREE)


def _run_init(sync: int, spare: bool) -> NoReturn:
    """The container's first process.  Its only descriptors: stdio, and the monitor's socket as 3."""
    os.dup2(sync, 3, inheritable=False) if sync != 3 else None
    syscalls.close_range(4)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=3)
    prctl.set_name("crio-init")
    if spare:
        process.prefault()
    data, descriptors = wire.receive(channel)
    if not data:
        os._exit(0)
    _take_streams(descriptors)
    failure = _run(json.loads(data), steps.Context(channel))
    channel.send(b"E" + json.dumps(failure).encode())
    os._exit(1)


def _take_streams(descriptors: list[int]) -> None:
    """stdin is /dev/null unless it was given; with a terminal nothing is, and the terminal comes in a step."""
    null = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)] * (3 - len(descriptors))
    streams = [*null, *descriptors]
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in set(streams):
        os.close(fd)


def run_exec(request: dict[str, Any], status: int, container: int, stdio: list[int]) -> NoReturn:
    """One more process of a running container: born in its PID namespace and cgroup, enters the rest here.

    status: closed by a successful exec, else gets the failure.
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if -1 in stdio else -1
    sources = [null if fd < 0 else fd for fd in stdio]
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for fd in (*sources, status, container)]
    for number, fd in enumerate(high):
        os.dup2(fd, number, inheritable=number < 3)
    syscalls.close_range(5)
    context = steps.Context(None)
    context.container = 4
    failure = _run(request["steps"], context)
    wire.tell(3, {"error": failure})
    os._exit(127)


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


def _restore_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
