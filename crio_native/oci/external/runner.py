"""What runs an OCI runtime's program: a spare (see `builtin.spare`), for one act.

`run` runs a command to its end.  `create` becomes the container's monitor, which must be the parent of a process that
the runtime made and left: so this process is its subreaper, speaks to the monitor as an init would, and execs it.
`restore` does the same with processes that CRIU makes, for the built-in executor (`builtin.restoring`).
`execute` stays as the parent of a process that the runtime started inside a container, and tells its end.

Whoever asked holds the other end of `reply`; when that closes, nobody wants the act any more, and it is undone as far
as its processes go.  The runtime gets three descriptors and no other (CVE-2024-21626).
"""

from __future__ import annotations

import _socket
import os
import select

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.linux import process, staging, syscalls
from crio_native.oci.builtin import steps, wire
from crio_native.oci.external import making
from crio_native.oci.external.children import (
    Children,
    Tail,
    Unwanted,
    drain,
    kill_children,
    kill_group,
    let_finish,
    spawn,
    wait_for,
)
from crio_native.oci.external.making import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from crio_native.oci.builtin.warmth import Lesson

NETWORK_FD = 60  # where CRIU finds the network namespace that its processes are to join


def main(request: dict[str, Any], descriptors: list[int], lesson: Lesson | None) -> NoReturn:
    """descriptors: the reply socket, then the act's own.  lesson: what somebody wants to learn from an exec."""
    reply = wire.channel(descriptors[0])
    try:
        _prctl.prctl(_prctl.PR_SET_NAME, "crio-runner")
        _prctl.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        os.chdir("/")
        act(request["act"])(request, reply, descriptors[1:])
        if lesson is not None and request["act"] == "exec":
            lesson.tell()
    except Unwanted:
        kill_children()
    except BaseException as error:
        kill_children()  # nothing of the act may be left when the answer arrives
        answer(reply, {"error": steps.describe(request["act"], error)})
    finally:
        os._exit(0)


def answer(reply: _socket.socket, message: dict[str, Any]) -> None:
    try:
        wire.send(reply, wire.pack(message))
    except OSError:
        pass  # nobody listens any more


def run(request: dict[str, Any], reply: _socket.socket, descriptors: list[int]) -> None:
    """line, env, stdin (bytes), output_max -> code, signal, stdout, stderr."""
    children = Children()
    out, err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    stdin = os.memfd_create("stdin", os.MFD_CLOEXEC)
    os.write(stdin, request["stdin"])
    os.lseek(stdin, 0, os.SEEK_SET)
    pid = spawn(request["line"], request["env"], [stdin, out[1], err[1]])
    os.close(out[1])
    os.close(err[1])
    tails = [Tail(out[0], request["output_max"], end=False), Tail(err[0], making.WORDS_MAX, end=True)]
    try:
        status = wait_for(pid, children, reply, tails, {})
    except Unwanted:
        let_finish(pid, children, tails)
        raise
    drain(tails)
    code = os.waitstatus_to_exitcode(status)
    told = {"code": max(code, 0), "signal": max(-code, 0), "stdout": tails[0].data, "stderr": tails[1].data}
    answer(reply, told)


def create(request: dict[str, Any], reply: _socket.socket, descriptors: list[int]) -> None:
    """Mount the root, find the user, write config.json, have the runtime create the container, become its monitor.

    The monitor's reply is JSON (see `monitor.client.read_reply`), and so is a failure of ours.
    """
    with making.telling(request, reply) as step:
        hosts = making.own_mounts(request["scratch"]) if request["root"] and request["root"]["user_namespace"] else -1
        user = making.prepare(request, step)
        step.name = "create"
        made = making.Made(request, reply)
        words = made.create(made.line())
        step.name = "monitor"
        if hosts >= 0:
            syscalls.setns(hosts, syscalls.CLONE_NEWNS)
        made.become_monitor(reply, {**(user or {}), "words": words[-1024:].decode(errors="replace")})


def restore(request: dict[str, Any], reply: _socket.socket, descriptors: list[int]) -> None:
    """Mount the root and what was below binds, have CRIU make the container's processes, become their monitor: as
    `create`, in a mount namespace that nobody else sees.  A pod's network goes to CRIU as the descriptor that its line
    names."""
    with making.telling(request, reply) as step:
        step.name = "overlay_root"
        hosts = making.follow_mounts()
        making.mount_root(request)
        step.name = "bind_below"
        staging.bind_beneath(request["below"]["directory"], request["below"]["sources"])
        if request["network"]:
            os.dup2(process.open_namespace(request["network"]), NETWORK_FD)
        step.name = "criu restore"
        made = making.Made(request, reply)
        made.create(request["line"])
        step.name = "monitor"
        syscalls.setns(hosts, syscalls.CLONE_NEWNS)
        made.become_monitor(reply, {})


def execute(request: dict[str, Any], reply: _socket.socket, descriptors: list[int]) -> None:
    """Have the runtime start a process in a container, and be its parent until it ends.

    Tells {"started": pid} (with the terminal's master attached, if there is one), then {"exited", "signal"} as a
    launcher does.  "kill" on the reply socket, or its end, kills the process's group.
    """
    children = Children()
    base = f"{request['scratch']}/{os.getpid()}"
    files = {name: f"{base}.{name}" for name in ("process", "pid", "log", "tty")}
    stdio = [descriptors[number] if number >= 0 else -1 for number in request["stdio"]]
    try:
        try:
            for path in request["groups"]:
                making.join(path)
            pid, console = start(request, reply, children, files, stdio)
        finally:
            for path in files.values():
                making.forget(path)
            for fd in descriptors:
                os.close(fd)
    except (Refusal, OSError) as error:
        kill_children()
        refused = {"step": "exec", "errno": 0, "path": "", "detail": error.said} if isinstance(error, Refusal) else None
        wire.tell(reply.fileno(), {"error": refused or steps.describe("exec", error)})
        return
    wire.send(reply, wire.encode({"started": pid}).encode(), [console.master] if console else [])
    if console:
        os.close(console.master)
    code = os.waitstatus_to_exitcode(attend(pid, children, reply))
    wire.tell(reply.fileno(), {"exited": code if code >= 0 else 128 - code, "signal": max(-code, 0)})


def start(
    request: dict[str, Any], reply: _socket.socket, children: Children, files: dict[str, str], stdio: list[int]
) -> tuple[int, making.Console | None]:
    """The pid of the started process.  Raises Refusal."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    making.write_file(files["process"], request["process"])
    console = making.Console(files["tty"]) if request["terminal"] else None
    line = [*request["line"][:-1], "--detach", "--process", files["process"], "--pid-file", files["pid"]]
    line += ["--console-socket", files["tty"]] if console else []
    line[1:1] = ["--log", files["log"], "--log-format", "json"]
    try:
        runtime = spawn([*line, request["line"][-1]], request["env"], [fd if fd >= 0 else null for fd in stdio])
        extra = {console.fileno(): console.accept} if console else {}
        status = wait_for(runtime, children, reply, [], extra)
        if status != 0:
            raise Refusal(making.end_of(status, read_end(files["log"])))
        if console:
            console.accept()
    finally:
        if console:
            console.close()
        os.close(null)
    return making.child_of_file(files["pid"], children), console


def attend(pid: int, children: Children, reply: _socket.socket) -> int:
    """The wait status of the process, which is killed with its group when the asker says so, or goes."""
    poll = select.poll()
    poll.register(children.wakeup, select.POLLIN)
    poll.register(reply, select.POLLIN)
    while (status := children.reap(pid)) is None:
        for fd, _ in poll.poll():
            if fd == reply.fileno():
                poll.unregister(reply)  # one command is all there is; a closed peer would poll ready for ever
                try:
                    reply.recv(16)
                except OSError:
                    pass
                kill_group(pid)
    return status


def read_end(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(fd, making.WORDS_MAX, max(os.fstat(fd).st_size - making.WORDS_MAX, 0))
    finally:
        os.close(fd)


def act(name: str) -> Callable[[dict[str, Any], _socket.socket, list[int]], None]:
    if name == "conmon":
        from crio_native.oci.external import conmon_runner

        return conmon_runner.create
    return {"run": run, "create": create, "restore": restore, "exec": execute}[name]
