"""Spares: clones of a launcher that wait, warm, for the one request that each of them serves.

A spare gives its life and its memory to the process that it makes (see `linux.donation`).  Three kinds:

- for `create`, a pair: the C monitor, waiting for its container, and its child, the donor of the init.  When the donor
  dies, the init is the monitor's, which is the nearest subreaper.
- for `exec`, a donor alone, a child of the launcher, as the exec'ed process will be (CLONE_PARENT).  One that could be
  traced there has a parent until it is known, see `_serve_apart`.
- for `external`, no donor: it runs an OCI runtime's program itself (see `oci.external.runner`).

What it tells its launcher: ("taken", kind, flags) when it waits no more, with CLONE_NEW* of the namespaces that its
plan makes, for the next one to have them ready: who runs pods wants none, for a pod's are made once; for an exec
("asked", its own pid) with the daemon's reply socket, and later ("born", its own pid, pid) of the exec'ed process;
("pages", kind, runs), see `warmth`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import errno
import marshal
import os

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.linux import donation, process, syscalls
from crio_native.oci.builtin import init, parcel, parent, steps, wire
from crio_native.oci.builtin.warmth import Lesson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

    Runs = list[tuple[int, int]]


class Streams:
    """A container's pipes, (read, write), and the two ends of the init's channel."""

    def __init__(self) -> None:
        pair = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self.ours, self.theirs = (donation.moved(end.detach(), parcel.FIRST) for end in pair)
        self.stdin, self.stdout, self.stderr = (donation.pipe(parcel.FIRST) for _ in range(3))

    def of_init(self, terminal: bool, stdin: bool) -> list[int]:
        """Its standard streams; -1 for what this container does not have."""
        return [
            self.stdin[0] if stdin and not terminal else -1,
            -1 if terminal else self.stdout[1],
            -1 if terminal else self.stderr[1],
        ]

    def inits(self) -> list[int]:
        return [self.theirs, self.stdin[0], self.stdout[1], self.stderr[1]]

    def place_monitors(self) -> None:
        """The monitor's ends where it expects them; /dev/null keeps the numbers of what comes with the request."""
        null = donation.moved(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), parcel.FIRST)
        for number, end in enumerate((self.ours, null, null, self.stdin[1], self.stdout[0], self.stderr[0]), 3):
            os.dup2(end, number)


def for_create(
    monitor: str, creates: _socket.socket, news: _socket.socket, runs: Runs | None, unshared: int
) -> NoReturn:
    """In a clone of the launcher, that becomes the monitor.  monitor: its program; unshared: see `Namespaces`.

    A page that it writes after the next clone is copied once more, so it has prepared all by then.
    """
    _prctl.prctl(_prctl.PR_SET_CHILD_SUBREAPER, 1)  # now: a request may come before the monitor is up
    requests, news = (wire.channel(donation.moved(end.detach(), parcel.FIRST)) for end in (creates, news))
    streams = Streams()
    streams.place_monitors()
    donor = syscalls.clone3(0, exit_signal=_signal.SIGCHLD)
    if donor == 0:
        syscalls.close_others([requests.fileno(), news.fileno(), *streams.inits()])
        _serve_create(streams, Namespaces(unshared), *_wait("create", requests, news, runs))
    os.execve(monitor, ["crio-monitor", "--donor", str(donor)], {})


def for_exec(execs: _socket.socket, news: _socket.socket, runs: Runs | None) -> NoReturn:
    """In a clone of the launcher, that becomes the donor of an exec'ed process."""
    syscalls.close_others([execs.fileno(), news.fileno()])
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

    KINDS = ((syscalls.CLONE_NEWNET, "net"), (syscalls.CLONE_NEWIPC, "ipc"))

    def __init__(self, wanted: int) -> None:
        """wanted: CLONE_NEW* of those that are to be made; others are passed over."""
        self._hosts = {
            flag: os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            for flag, name in self.KINDS
            if wanted & flag
        }
        syscalls.unshare(sum(self._hosts))
        if syscalls.CLONE_NEWNET in self._hosts:
            steps.switch_loopback_on()

    def keep(self, flags: int) -> int:
        """Go back to the host's, but for those in flags, which are returned."""
        for flag, host in self._hosts.items():
            if not flag & flags:
                syscalls.setns(host, flag)
        return sum(flag for flag in self._hosts if flag & flags)


class Donor:
    """What a spare prepares: the switch that ends it, a parcel for the descriptors of who gets its memory, and a lesson
    if its launcher knows the pages not yet."""

    def __init__(self, kind: str, news: _socket.socket, runs: Runs | None) -> None:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, _signal.SIGKILL)
        self.switch = donation.KillSwitch(parcel.FIRST)
        self.parcel = parcel.Parcel()
        self.lesson = Lesson(kind, news) if runs is None else None
        self.news = news
        donation.write_pages(runs or [])

    def bear(self, plan: steps.Plan, flags: int, cgroup: int, stdio: list[int], others: list[int]) -> int:
        """Returns in the child, with its pid.  cgroup: to be born in, or -1.

        In the child, and here when OSError is raised, descriptors 0 to 2 are stdio, and the others follow them.
        """
        lessons = self.lesson.descriptors if self.lesson else []
        born_in = None if cgroup < 0 else donation.moved(cgroup, parcel.FIRST)
        self.parcel.pack(stdio, others, [*self.switch.descriptors, -1 if born_in is None else born_in, *lessons])
        try:
            return donation.donate(self.switch, flags, cgroup=born_in, alone=_enters_time(plan))
        finally:
            self.parcel.unpack(lessons)


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
    request = wire.unpack(data)
    if kind == "exec":
        # Now: a process that is in the container may be stopped by those that are there before it says a word.
        wire.send(news, marshal.dumps(("asked", os.getpid())), [descriptors[0]])
        os.close(descriptors.pop(0))
        return request, descriptors
    try:
        wire.send(news, marshal.dumps(("taken", kind, _unshared(request.get("steps", ())))))
    except OSError:
        pass  # the launcher is gone; the request is here
    return request, descriptors


def _serve_create(
    streams: Streams, namespaces: Namespaces, donor: Donor, request: dict[str, Any], descriptors: list[int]
) -> NoReturn:
    """request: see `client.BuiltinRuntime.create`; descriptors: the reply socket, and if there is to be a cgroup the
    gate where the init waits for it, and on a v2 host the group to be born in.

    A PID namespace to join takes effect in children only.
    """
    reply, gate, born_in, *_ = [*descriptors, -1, -1]
    sync = wire.channel(streams.theirs)
    try:
        _introduce(sync, reply, request["monitor"])
    except OSError as error:
        wire.tell(reply, {"error": steps.describe("monitor", error)})
        os._exit(1)
    os.close(reply)
    plan = request["steps"]
    stdio = streams.of_init(request["terminal"], request["stdin"])
    gates = [gate] if gate >= 0 else []
    try:
        if request["join_pid"]:
            syscalls.setns(process.open_namespace(request["join_pid"]), syscalls.CLONE_NEWPID)
        flags = syscalls.CLONE_NEWPID if request["new_pid_namespace"] else 0
        made = namespaces.keep(0 if request["duties"] else _unshared(plan))
        if request["duties"]:
            _bear_with_duties(donor, request, flags, born_in, sync, stdio, gates)
        if request["join_pid"]:
            _bear_a_copy(donor, plan, born_in, sync, stdio, gates, made)
    except BaseException as error:
        _give_up(sync, error)
    try:
        pid = donor.bear(plan, flags, born_in, stdio, [sync.detach(), *gates])
    except OSError as error:
        _give_up(wire.channel(3), error)
    init.run_init(plan, [3], bool(gates), donor.lesson, made, born=pid)


def _give_up(sync: _socket.socket, error: BaseException) -> NoReturn:
    if isinstance(error, parent.Failed):
        os.kill(error.init, _signal.SIGKILL)
        os.waitpid(error.init, 0)
        report = error.report
    else:
        report = wire.encode(steps.describe("monitor", error)).encode()
    sync.send(b"E" + report)
    os._exit(1)


def _unshared(plan: Iterable[tuple[str, dict[str, Any]]]) -> int:
    """CLONE_NEW* of the namespaces that the plan makes."""
    flags = 0
    for name, arguments in plan:
        if name == "new_namespaces":
            flags |= arguments["flags"]
    return flags


def _enters_time(plan: steps.Plan) -> bool:
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
    donor: Donor,
    request: dict[str, Any],
    flags: int,
    cgroup: int,
    sync: _socket.socket,
    stdio: list[int],
    gates: list[int],
) -> NoReturn:
    """An init that needs its parent for a while is cloned with a copy of the memory; raises parent.Failed."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    pid = syscalls.clone3(flags, exit_signal=_signal.SIGCHLD, cgroup=None if cgroup < 0 else cgroup)
    if pid == 0:
        try:
            donor.parcel.pack(stdio, [sync.detach(), theirs.detach(), *gates], [])
            donor.parcel.unpack([])
            init.run_init(request["steps"], [3, 4], bool(gates), None)
        finally:  # what the donor does when this fails is not the init's
            os._exit(1)
    theirs.close()
    duties = parent.Duties(ours, pid, request["duties"])
    sync.send(b"B%d" % duties.serve())
    duties.release()
    os._exit(0)


def _bear_a_copy(
    donor: Donor,
    plan: steps.Plan,
    cgroup: int,
    sync: _socket.socket,
    stdio: list[int],
    gates: list[int],
    made: int,
) -> NoReturn:
    """An init that processes of other containers may trace shares no memory with a process of the host."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    pid = syscalls.clone3(0, exit_signal=_signal.SIGCHLD, cgroup=None if cgroup < 0 else cgroup)
    if pid == 0:
        try:
            ours.close()
            if theirs.recv(1) == b"k":
                donor.parcel.pack(stdio, [sync.detach(), *gates], [])
                donor.parcel.unpack([])
                init.run_init(plan, [3], bool(gates), None, made)
        finally:  # what the donor does when this fails is not the init's
            os._exit(1)
    sync.send(b"B%d" % pid)
    ours.send(b"k")
    os._exit(0)


def _serve_exec(donor: Donor, request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Descriptors: status, the container's pidfd, the standard streams that there are, and its cgroup on a v2 host."""
    status, container, *rest = descriptors
    stdio = [rest[number] if number >= 0 else -1 for number in request["stdio"]]
    cgroup = rest[-1] if request["cgroup"] else -1
    if any(name == "appear" for name, _ in request["steps"]):
        _serve_apart(donor, request, status, container, stdio, cgroup)
    try:
        syscalls.setns(container, syscalls.CLONE_NEWPID)
    except OSError as error:
        _refuse_exec(status, error)
    spare = os.getpid()
    try:
        pid = donor.bear(request["steps"], 0, cgroup, stdio, [status, container, donor.news.detach()])
    except OSError as error:
        _refuse_exec(3, error)
    wire.tell(3, {"started": pid})
    news = wire.channel(5)
    _tell_birth(news, spare, pid)
    news.close()
    init.run_exec(request["steps"], donor.lesson)


def _serve_apart(
    donor: Donor, request: dict[str, Any], status: int, container: int, stdio: list[int], cgroup: int
) -> NoReturn:
    """For a process that others may trace as soon as it is in their PID namespace: nothing that it has may reach the
    host then, so it shares no memory, and it has no channel to us but one.

    A first child prepares, out of their sight; its own child, which is ours, goes on there (step `appear`).  What the
    channel brings may be the tracer's word: it is believed only where it names a child of ours.
    """
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        first = syscalls.clone3(0, exit_signal=_signal.SIGCHLD, cgroup=None if cgroup < 0 else cgroup)
    except OSError as error:
        _refuse_exec(status, error)
    if first == 0:
        try:
            donor.parcel.pack(stdio, [status, container, theirs.detach()], [])
            donor.parcel.unpack([])
            init.run_exec(request["steps"], None, parent=5)
        finally:  # what is further up the stack is the donor's
            os._exit(127)
    try:
        theirs.close()
        word = ours.recv(16)
        if word[:1] == b"B" and process.is_child(pid := int(word[1:])):
            wire.tell(status, {"started": pid})
            _tell_birth(donor.news, os.getpid(), pid)
            ours.send(b"k%d" % pid)
        os.waitpid(first, 0)
        if not word:  # it has said why, if its filter let it
            detail = "it could not appear: a filter that forbids clone, setsid or sendto, or a limit of memory"
            wire.tell(status, {"error": {"step": "appear", "errno": 0, "path": "", "detail": detail}})
    finally:
        os._exit(127)


def _tell_birth(news: _socket.socket, spare: int, pid: int) -> None:
    wire.send(news, marshal.dumps(("born", spare, pid)))


def _refuse_exec(status: int, error: OSError) -> NoReturn:
    detail = "the container has ended" if error.errno == errno.ESRCH else str(error)
    wire.tell(status, {"error": {"step": "exec", "errno": error.errno or 0, "path": "", "detail": detail}})
    os._exit(1)
