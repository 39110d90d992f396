"""What runs in a clone of the launcher: the monitor's predecessor, the container's init, an exec'ed process.

Each of the three ends in exec or `_exit` and never returns to the launcher's loop.  A failure travels as the JSON
object of `errors.StepFailed`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import fcntl
import os

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.linux import process, syscalls
from crio_native.oci.builtin import parent, steps, wire
from crio_native.oci.builtin.steps import describe as describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

    Plan = list[tuple[str, dict[str, Any]]]

FIRST_FREE = 32  # above every descriptor number that an exec'ed program gets from us
NO_STREAM = (-1, -1)


def predecessor(creates: _socket.socket, taken: int) -> NoReturn:
    """A spare: waits for a `create` request, clones the init for it, and execs the C monitor in its own place, so that
    the monitor is the init's real parent.  It was cloned before the request was there, and has made what every request
    needs, to be out of its time: not the calls are what costs, but the pages that they write for the first time.

    taken: a byte is written to it when the spare is one no more.
    """
    made = Channels()
    wire.unpack(wire.pack({"steps": [("", {})]}))
    data, descriptors = wire.receive(creates)
    if not data:
        os._exit(0)  # the daemon has ended
    os.write(taken, b"x")
    become_monitor(wire.unpack(data), descriptors, made)


class Channels:
    """A container's pipes, (read, write), and the two ends of the init's channel."""

    def __init__(self) -> None:
        self.ours, self.theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self.stdin, self.stdout, self.stderr = (os.pipe2(os.O_CLOEXEC) for _ in range(3))

    def keep(self, terminal: bool, stdin: bool) -> None:
        """Close the pipes that this container does not have."""
        if terminal or not stdin:
            _close_both(self.stdin)
            self.stdin = NO_STREAM
        if terminal:
            _close_both(self.stdout)
            _close_both(self.stderr)
            self.stdout = self.stderr = NO_STREAM


def _close_both(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    os.close(pipe[1])


def become_monitor(request: dict[str, Any], descriptors: list[int], made: Channels) -> NoReturn:
    """request: see `client.BuiltinRuntime.create`; descriptors: the reply socket, a v2 cgroup to be born in.

    This process stays out of the container's namespaces, but for a PID namespace to join, which takes effect in
    children only.
    """
    reply, *cgroup = descriptors
    init = 0
    try:
        if request["join_pid"]:
            syscalls.setns(process.open_namespace(request["join_pid"]), syscalls.CLONE_NEWPID)
        made.keep(request["terminal"], request["stdin"])
        stdin, stdout, stderr = made.stdin, made.stdout, made.stderr
        monitor = request["monitor"]
        wanted = {3: made.ours.fileno(), 4: reply, 5: os.open(monitor["run_dir"], os.O_PATH | os.O_DIRECTORY)}
        wanted |= {number: fd for number, fd in ((6, stdin[1]), (7, stdout[0]), (8, stderr[0])) if fd >= 0}
        init_needs = _arrange(wanted, [stdin[0], stdout[1], stderr[1], made.theirs.fileno(), *cgroup])
        turn = os.pipe2(os.O_CLOEXEC)  # its write end is closed by the exec of the monitor
        reply = 4
        flags = syscalls.CLONE_NEWPID if request["new_pid_namespace"] else 0
        # From here to the exec as little as possible: what either writes, the kernel copies first.
        init = syscalls.clone3(flags, exit_signal=_signal.SIGCHLD, cgroup=init_needs[4] if cgroup else None)
        if init == 0:
            # When the other has execed, its pages are ours alone, and need not be copied when they are written.
            os.close(turn[1])
            os.read(turn[0], 1)
            run_init(request["steps"], init_needs[3], init_needs[:3])
        if request["duties"]:
            for fd in (*init_needs, *turn):
                os.close(fd) if fd >= 0 else None
            duties = parent.Duties(wire.channel(3), init, request["duties"])
            init = _serve(duties, wanted)
        steps.restore_signals()
        os.execve(monitor["path"], [*monitor["arguments"], "--pid", str(init)], {})
    except parent.Failed as failure:
        _give_up(reply, failure.init, failure.report)
    except BaseException as error:
        _give_up(reply, init, wire.encode(describe("monitor", error)).encode())


def _give_up(reply: int, init: int, report: bytes) -> NoReturn:
    """Leave no init, and say why; the init is reaped, so that nothing of it is left when the answer arrives."""
    if init > 0:
        os.kill(init, _signal.SIGKILL)
        os.waitpid(init, 0)
    try:
        wire.channel(reply).send(b'{"error":' + report + b"}", _socket.MSG_NOSIGNAL)
    finally:
        os._exit(1)


def _serve(duties: parent.Duties, monitors: Iterable[int]) -> int:
    """Be the init's parent for a while; returns its pid.  monitors: descriptors that only the monitor may inherit."""
    for fd in monitors:
        os.set_inheritable(fd, False)
    init = duties.serve()
    duties.channel.detach()
    for fd in monitors:
        os.set_inheritable(fd, True)
    return init


def _arrange(wanted: dict[int, int], others: list[int]) -> list[int]:
    """Move descriptors to the given numbers, inheritable; close every other above 2 but `others`.

    Returns where the others are now: above FIRST_FREE and close-on-exec.
    """
    moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 2 * FIRST_FREE) for number, fd in wanted.items()}
    kept = [fd if fd < 0 else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for fd in others]
    syscalls.close_range(3, FIRST_FREE - 1)
    for number, fd in moved.items():
        os.dup2(fd, number)
    syscalls.close_range(2 * FIRST_FREE)
    return kept


def run_init(plan: Plan, sync: int, stdio: list[int]) -> NoReturn:
    """The container's first process.  Its only descriptors: stdio, and the monitor's socket as 3."""
    _prctl.prctl(_prctl.PR_SET_NAME, "crio-init")
    _take_descriptors(stdio, [sync])
    channel = wire.channel(3)
    failure = steps.run(plan, steps.Context(channel))
    channel.send(b"E" + wire.encode(failure).encode())
    os._exit(1)


def run_exec(request: dict[str, Any], status: int, container: int, stdio: list[int]) -> NoReturn:
    """One more process of a running container: born in its PID namespace and cgroup, enters the rest here.

    status: closed by a successful exec, else gets the failure.
    """
    _take_descriptors(stdio, [status, container])
    context = steps.Context(wire.channel(3))  # also where a terminal's master goes
    context.container = 4
    failure = steps.run(request["steps"], context)
    wire.tell(3, {"error": failure})
    os._exit(127)


def _take_descriptors(stdio: list[int], others: list[int]) -> None:
    """stdio (-1: /dev/null) as 0 to 2, the others close-on-exec from 3 on, and nothing else open."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if -1 in stdio else -1
    sources = [null if fd < 0 else fd for fd in stdio]
    moved = [fd if fd >= FIRST_FREE else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for fd in sources + others]
    for number, fd in enumerate(moved):
        os.dup2(fd, number, inheritable=number < 3)
    syscalls.close_range(len(moved))
