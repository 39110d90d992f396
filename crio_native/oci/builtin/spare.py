"""Spares: clones of a launcher that wait, warm, for the one request that each of them serves.

A spare gives its life and its memory to the process that it makes (see `linux.donation`).  Three kinds:

- for `create`, a pair: the C monitor, waiting for its container, and its child, the donor of the init.  When the donor
  dies, the init is the monitor's, which is the nearest subreaper.
- for `exec`, a donor alone, a child of the launcher, as the exec'ed process will be (CLONE_PARENT).
- for `external`, no donor: it runs an OCI runtime's program itself (see `oci.external.runner`).

What it tells its launcher: ("taken", kind) when it waits no more; ("born", pid) of an exec'ed process, with the
daemon's reply socket; ("pages", kind, runs), see `warmth`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import fcntl
import marshal
import os

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.linux import donation, process, syscalls
from crio_native.oci.builtin import init, parent, steps, wire
from crio_native.oci.builtin.warmth import Lesson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Runs = list[tuple[int, int]]

NO_STREAM = (-1, -1)


class Streams:
    """A container's pipes, (read, write), and the two ends of the init's channel."""

    def __init__(self) -> None:
        self.ours, self.theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self.stdin, self.stdout, self.stderr = (os.pipe2(os.O_CLOEXEC) for _ in range(3))

    def of_init(self, terminal: bool, stdin: bool) -> list[int]:
        """Its standard streams; -1 for what this container does not have."""
        return [
            self.stdin[0] if stdin and not terminal else -1,
            -1 if terminal else self.stdout[1],
            -1 if terminal else self.stderr[1],
        ]

    def close_monitors(self) -> None:
        self.ours.close()
        for fd in (self.stdin[1], self.stdout[0], self.stderr[0]):
            os.close(fd)


def for_create(monitor: str, creates: _socket.socket, news: _socket.socket, runs: Runs | None) -> NoReturn:
    """In a clone of the launcher, that becomes the monitor.  monitor: its program."""
    streams = Streams()
    _prctl.prctl(
        _prctl.PR_SET_CHILD_SUBREAPER, 1
    )  # before there is a child: a request may come before the monitor is up
    donor = syscalls.clone3(0, exit_signal=_signal.SIGCHLD)
    if donor == 0:
        streams.close_monitors()
        _serve_create(streams, Namespaces(), *_wait("create", creates, news, runs))
    null = os.open("/dev/null", os.O_RDWR)  # keeps the numbers of what comes with the request
    wanted = {3: streams.ours.fileno(), 4: null, 5: null}
    wanted |= {6: streams.stdin[1], 7: streams.stdout[0], 8: streams.stderr[0]}
    moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, init.FIRST_FREE) for number, fd in wanted.items()}
    for number, fd in moved.items():
        os.dup2(fd, number)
    syscalls.close_range(len(wanted) + 3)
    steps.restore_signals()
    os.execve(monitor, ["crio-monitor", "--donor", str(donor)], {})


def for_exec(execs: _socket.socket, news: _socket.socket, runs: Runs | None) -> NoReturn:
    """In a clone of the launcher, that becomes the donor of an exec'ed process."""
    _serve_exec(*_wait("exec", execs, news, runs))


def for_external(externals: _socket.socket, news: _socket.socket, runs: Runs | None) -> NoReturn:
    """In a clone of the launcher, that becomes a runner.  It stays when the launcher does not: a container's monitor
    may come of it."""
    from crio_native.oci.external import runner

    lesson = Lesson("external", news) if runs is None else None
    donation.write_pages(runs or [])
    request, descriptors = _receive("external", externals, news)
    runner.main(request, descriptors, lesson)


class Namespaces:
    """New ones that a spare moves into while it waits, for an init that wants them: a network takes as long to make
    as all else of a start that the kernel does.

    Not the UTS namespace, which would keep the host's name of long ago.
    """

    def __init__(self) -> None:
        self._hosts = {
            flag: os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            for flag, name in ((syscalls.CLONE_NEWNET, "net"), (syscalls.CLONE_NEWIPC, "ipc"))
        }
        syscalls.unshare(sum(self._hosts))
        steps.switch_loopback_on()

    def keep(self, flags: int) -> int:
        """Go back to the host's, but for those in flags, which are returned."""
        for flag, host in self._hosts.items():
            if not flag & flags:
                syscalls.setns(host, flag)
        return sum(flag for flag in self._hosts if flag & flags)


class Donor:
    """What a spare prepares: the switch that ends it, and a lesson if its launcher knows the pages not yet."""

    def __init__(self, kind: str, news: _socket.socket, runs: Runs | None) -> None:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, _signal.SIGKILL)
        self.switch = donation.KillSwitch()
        self.lesson = Lesson(kind, news) if runs is None else None
        self.news = news
        donation.write_pages(runs or [])


def _wait(
    kind: str, requests: _socket.socket, news: _socket.socket, runs: Runs | None
) -> tuple[Donor, dict[str, Any], list[int]]:
    donor = Donor(kind, news, runs)
    return donor, *_receive(kind, requests, news)


def _receive(kind: str, requests: _socket.socket, news: _socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The request that this spare is for."""
    data, descriptors = wire.receive(requests)
    if not data:
        os._exit(0)  # the daemon has ended
    try:
        wire.send(news, marshal.dumps(("taken", kind)))
    except OSError:
        pass  # the launcher is gone; the request is here
    return wire.unpack(data), descriptors


def _serve_create(
    streams: Streams, namespaces: Namespaces, donor: Donor, request: dict[str, Any], descriptors: list[int]
) -> NoReturn:
    """request: see `client.BuiltinRuntime.create`; descriptors: the reply socket, and if there is to be a cgroup the
    gate where the init waits for it, and on a v2 host the group to be born in.

    A PID namespace to join takes effect in children only.
    """
    reply, gate, born_in, *_ = [*descriptors, -1, -1]
    sync = streams.theirs
    try:
        _introduce(sync, reply, request["monitor"])
    except OSError as error:
        wire.tell(reply, {"error": steps.describe("monitor", error)})
        os._exit(1)
    os.close(reply)
    try:
        if request["join_pid"]:
            syscalls.setns(process.open_namespace(request["join_pid"]), syscalls.CLONE_NEWPID)
        flags = syscalls.CLONE_NEWPID if request["new_pid_namespace"] else 0
        stdio = streams.of_init(request["terminal"], request["stdin"])
        if request["duties"]:
            namespaces.keep(0)
            _bear_with_duties(request, flags, born_in, sync, gate, stdio)
            os._exit(0)
        made = namespaces.keep(_unshared(request["steps"]))
        pid = donation.donate(donor.switch, flags, cgroup=_descriptor(born_in))
        sync.send(b"B%d" % pid)
        if _enters_time(request["steps"]):
            donor.switch.wait()
        init.run_init(request["steps"], [sync.fileno()], gate, stdio, donor.lesson, made)
    except parent.Failed as failure:
        os.kill(failure.init, _signal.SIGKILL)
        os.waitpid(failure.init, 0)
        sync.send(b"E" + failure.report)
    except BaseException as error:
        sync.send(b"E" + wire.encode(steps.describe("monitor", error)).encode())
    finally:
        os._exit(1)


def _descriptor(number: int) -> int | None:
    return None if number < 0 else number


def _unshared(plan: init.Plan) -> int:
    """CLONE_NEW* of the namespaces that the plan makes."""
    flags = 0
    for name, arguments in plan:
        if name == "new_namespaces":
            flags |= arguments["flags"]
    return flags


def _enters_time(plan: init.Plan) -> bool:
    """Whether the plan enters a time namespace, which takes memory that not even a dying process shares."""
    for name, arguments in plan:
        if (
            name == "new_time_namespace"
            or (name == "enter_container" and arguments["flags"] & syscalls.CLONE_NEWTIME)
            or (name == "join_namespaces" and any(kind == "time" for kind, _ in arguments["namespaces"]))
        ):
            return True
    return False


def _introduce(sync: _socket.socket, reply: int, monitor: dict[str, Any]) -> None:
    """Tell the monitor whose it is."""
    run_dir = os.open(monitor["run_dir"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    words = [word.encode() + b"\0" for word in monitor["arguments"]]
    wire.send(sync, b"A" + b"".join(words), [reply, run_dir])
    os.close(run_dir)


def _bear_with_duties(
    request: dict[str, Any], flags: int, cgroup: int, sync: _socket.socket, gate: int, stdio: list[int]
) -> None:
    """An init that needs its parent for a while is cloned with a copy of the memory; raises parent.Failed."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    pid = syscalls.clone3(flags, exit_signal=_signal.SIGCHLD, cgroup=_descriptor(cgroup))
    if pid == 0:
        init.run_init(request["steps"], [sync.fileno(), theirs.fileno()], gate, stdio, None)
    theirs.close()
    duties = parent.Duties(ours, pid, request["duties"])
    sync.send(b"B%d" % duties.serve())
    duties.release()


def _serve_exec(donor: Donor, request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Descriptors: reply, status, stdin, stdout, stderr, and the container's cgroup on a v2 host."""
    reply, status, *rest = descriptors
    stdio = [rest[number] if number >= 0 else -1 for number in request["stdio"]]
    try:
        container = os.pidfd_open(request["pid"])
        if process.start_time(request["pid"]) != request["start_time"]:
            raise ProcessLookupError(3, "the container has ended")
        syscalls.setns(container, syscalls.CLONE_NEWPID)
        pid = donation.donate(donor.switch, syscalls.CLONE_PARENT, cgroup=rest[-1] if request["cgroup"] else None)
    except OSError as error:
        wire.tell(reply, {"error": {"step": "exec", "errno": error.errno or 0, "path": "", "detail": str(error)}})
        os._exit(1)
    wire.send(donor.news, marshal.dumps(("born", pid)), [reply])
    wire.tell(reply, {"started": pid})
    if _enters_time(request["steps"]):
        donor.switch.wait()
    init.run_exec(request["steps"], status, container, stdio, donor.lesson)
