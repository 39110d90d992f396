"""A launcher: the warm, single-threaded process that makes containers, by cloning itself.

Started by `launchers.Launchers` as `python -I -S -c BOOT SOCKETS MONITOR PATH...`: four SEQPACKET sockets that all
launchers share, so that whoever is idle takes the next request.  A request is a packet with descriptors, first its own
reply socket.  `namespaces`, `hook` and `ping` come on the first and are served here; `create`, `exec` and `external`
come on sockets of their own and are served by spares (see `spare`), cloned before they are needed.  A launcher holds
no state that outlives a request but its running execs; one that dies loses only those.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import gc
import marshal
import os
import select
import sys

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.linux import mounts, syscalls
from crio_native.oci.builtin import hooks, sockets, spare, steps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

REFILL_DELAY = 15  # ms; a new spare is cloned when the container that took the last one is likely to run


class Exec:
    """An exec: its pid, and the daemon's reply socket, on which `kill` may come and the end is told.

    Until it is born, its pid is its spare's, whose process group it is in when it is born.
    """

    def __init__(self, pid: int, reply: _socket.socket) -> None:
        self.pid, self.reply = pid, reply
        self.born = self.killed = False

    def kill(self) -> None:
        """What was born is not reaped yet, so the pid and the group are still this one; it may be before its setsid."""
        self.killed = True
        for send in (os.killpg, os.kill) if self.born else (os.killpg,):
            try:
                send(self.pid, _signal.SIGKILL)
                return
            except ProcessLookupError:
                pass

    def outlives(self, pid: int, code: int) -> bool:
        """Whether the end of a process of its group is not its own.  code: negative for a signal, by which a spare ends
        that gave its life (see `linux.donation`)."""
        if self.born or pid != self.pid:
            return self.born and pid != self.pid
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return code < 0


class Spare:
    """The spare of one kind: its pid while it waits, else 0; the pages that it does well to write, once known; and
    the namespaces that the last request wanted new (CLONE_NEW*).

    While it waits, its launcher does not look at its socket: it would be awake for nothing.  wanted: kept ready; else
    none is made before there is a request.
    """

    def __init__(self, requests: _socket.socket, become: Callable[[Spare], NoReturn], *, wanted: bool = True) -> None:
        self.requests, self.become, self.wanted = requests, become, wanted
        self.pid = 0
        self.runs: spare.Runs | None = None
        self.unshared = 0


class Launcher:
    def __init__(
        self,
        monitor: str,
        requests: _socket.socket,
        creates: _socket.socket,
        execs: _socket.socket,
        externals: _socket.socket,
    ) -> None:
        self.requests = requests
        self.news, self.tell = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)  # see `spare`
        self.spares = {
            "create": Spare(
                creates, lambda kind: spare.for_create(monitor, creates, self.tell, kind.runs, kind.unshared)
            ),
            "exec": Spare(execs, lambda kind: spare.for_exec(execs, self.tell, kind.runs)),
            # Who has no OCI runtime does not pay for one.
            "external": Spare(
                externals, lambda kind: spare.for_external(externals, self.tell, kind.runs), wanted=False
            ),
        }
        self.execs: dict[int, Exec] = {}  # by pid
        self.wakeup, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        self.poll = select.poll()
        for fd in (requests.fileno(), self.news.fileno(), self.wakeup):
            self.poll.register(fd, select.POLLIN)

    def serve(self) -> None:
        """Until the daemon closes the request socket; containers live on without us."""
        handlers = {
            "namespaces": self.namespaces,
            "hook": self.hook,
            "ping": self.ping,
            "sockets": self.sockets,
        }
        kinds = {kind.requests.fileno(): kind for kind in self.spares.values()}
        self.poll.register(self.spares["external"].requests, select.POLLIN)
        self.refill(*self.spares.values())
        while True:
            complete = all(kind.pid for kind in self.spares.values() if kind.wanted)
            events = self.poll.poll(None if complete else REFILL_DELAY)
            if not events:
                self.refill(*(kind for kind in self.spares.values() if kind.wanted))
            for fd, _ in events:
                if fd == self.wakeup:
                    self.reap()
                elif fd == self.news.fileno():
                    self.hear()
                elif fd in kinds:
                    self.want(kinds[fd])
                elif fd == self.requests.fileno():
                    received = receive(self.requests)
                    if received is None:
                        continue  # another launcher took it
                    request, descriptors = received
                    if not request:
                        return
                    try:
                        handlers[request["op"]](request, descriptors)
                    finally:
                        for descriptor in descriptors:
                            os.close(descriptor)
                else:
                    self.command(fd)

    def want(self, kind: Spare) -> None:
        """A request waits already."""
        if not kind.wanted:
            from crio_native.oci.external import runner  # noqa: F401  # here, for all spares to inherit it

            kind.wanted = True
        self.refill(kind)

    def refill(self, *kinds: Spare) -> None:
        for kind in kinds:
            if kind.pid:
                continue
            try:
                self.poll.unregister(kind.requests)
            except KeyError:
                pass
            kind.pid = self.clone(0)
            if kind.pid == 0:
                kind.become(kind)

    def emptied(self, kind: Spare) -> None:
        kind.pid = 0
        self.poll.register(kind.requests, select.POLLIN)

    def hear(self) -> None:
        """What spares tell, see there."""
        while True:
            try:
                data, descriptors = wire.receive(self.news, _socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            what, *rest = marshal.loads(data)
            if what == "taken":
                self.spares[rest[0]].unshared = rest[1]
                self.emptied(self.spares[rest[0]])
            elif what == "pages":
                self.spares[rest[0]].runs = rest[1]
            elif what == "asked":
                self.emptied(self.spares["exec"])
                self.execs[rest[0]] = Exec(rest[0], wire.channel(descriptors[0]))
                self.poll.register(descriptors[0], select.POLLIN)
            else:
                self.born(*rest)

    def born(self, spare: int, pid: int) -> None:
        running = self.execs.pop(spare, None)
        if running is None:
            os.kill(pid, _signal.SIGKILL)  # the spare was killed, and its end told
            return
        running.pid, running.born = pid, True
        self.execs[pid] = running
        if running.killed:
            running.kill()

    def clone(self, flags: int) -> int:
        """clone3; in the child Python's signal handling is detached from our wakeup pipe."""
        pid = syscalls.clone3(flags, exit_signal=_signal.SIGCHLD)
        if pid == 0:
            _signal.set_wakeup_fd(-1)
            _prctl.prctl(_prctl.PR_SET_NAME, "crio-spare")
        return pid

    def namespaces(self, request: dict[str, Any], descriptors: list[int]) -> None:
        flags = 0
        for kind in request["paths"]:
            flags |= {"net": syscalls.CLONE_NEWNET, "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS}[kind]
        if self.clone(flags) == 0:
            pin_namespaces(request, descriptors[0])

    def hook(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """One of the hooks that come when the container's init has the monitor for a parent."""
        if self.clone(0) == 0:
            run_hook(request, descriptors[0])

    def sockets(self, request: dict[str, Any], descriptors: list[int]) -> None:
        if self.clone(0) == 0:
            sockets.open_in(request["path"], descriptors[0])

    def ping(self, request: dict[str, Any], descriptors: list[int]) -> None:
        wire.tell(descriptors[0], {"pong": os.getpid()})

    def command(self, fd: int) -> None:
        """`kill` from the daemon, or its going away, which ends the exec too: nobody would read its output."""
        for running in self.execs.values():
            if running.reply.fileno() == fd:
                try:
                    running.reply.recv(16)  # closing a socket with something unread would lose what we tell at the end
                except OSError:
                    pass
                self.poll.unregister(fd)  # one command is all there is; a closed peer would poll ready for ever
                running.kill()
                return

    def reap(self) -> None:
        os.read(self.wakeup, 512)
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            self.hear()  # it may be an exec that has ended already, which said that it was born before it did
            self.end(found.si_pid)

    def end(self, pid: int) -> None:
        running = self.execs.get(pid) or self.execs.get(os.getpgid(pid))  # by its group: it ended before it said a word
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for kind in self.spares.values():
            if pid == kind.pid:
                self.emptied(kind)  # somebody killed it
        if running is None or running.outlives(pid, code):
            return
        known = running.pid
        self.hear()  # one that has left its spare's group by now has told before
        if running.pid != known:
            return
        del self.execs[known]
        try:
            self.poll.unregister(running.reply)
        except KeyError:
            pass
        wire.tell(running.reply.fileno(), {"exited": code if code >= 0 else 128 - code, "signal": max(-code, 0)})
        running.reply.close()


def pin_namespaces(request: dict[str, Any], reply: int) -> NoReturn:
    """In a clone with new namespaces: name the host, set sysctls, pin each by a bind mount, and hand out a netlink
    socket that belongs to the new network namespace."""
    step = ""
    try:
        if request["hostname"]:
            step = "set_hostname"
            _socket.sethostname(request["hostname"])
        step = "set_sysctls"
        steps.set_sysctls(steps.Context(None), request["sysctls"])
        step = "pin_namespace"
        for kind, path in request["paths"].items():
            syscalls.mount(f"/proc/self/ns/{kind}", path, None, mounts.MS_BIND)
        step = "netlink"
        sockets = []
        if "net" in request["paths"]:
            sockets = [_socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, 0).detach()]
        wire.send(wire.channel(reply), b'{"pinned":true}', sockets)
    except BaseException as error:
        wire.tell(reply, {"error": steps.describe(step, error)})
    finally:
        os._exit(0)


def run_hook(request: dict[str, Any], reply: int) -> NoReturn:
    """In a clone, for as long as the hook runs."""
    kind = request["kind"]
    try:
        hooks.run(kind, [request["entry"]], request["state"], request["index"])
        wire.tell(reply, {"done": kind})
    except hooks.HookFailed as error:
        failed = {"step": kind, "errno": error.number, "path": error.path, "detail": str(error)}
        wire.tell(reply, {"error": failed})
    except BaseException as error:
        wire.tell(reply, {"error": steps.describe(kind, error)})
    finally:
        os._exit(0)


def receive(requests: _socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request; ({}, []) at the end of the daemon; None when another launcher was faster."""
    try:
        data, descriptors = wire.receive(requests, _socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    return (wire.unpack(data) if data else {}), descriptors


def main() -> None:
    channels = [wire.channel(int(number)) for number in sys.argv[1].split(",")]
    for channel in channels:
        os.set_inheritable(channel.fileno(), False)
    os.setsid()  # a Ctrl-C on the daemon's terminal is the daemon's business
    _prctl.prctl(_prctl.PR_SET_NAME, "crio-launcher")
    _prctl.prctl(_prctl.PR_SET_CHILD_SUBREAPER, 1)  # for execs whose parent goes when they are born
    syscalls.hide_command_line(b"crio-launcher")
    _prctl.prctl(_prctl.PR_SET_DUMPABLE, 0)  # no process of a container may look into a clone of us (CVE-2019-5736)
    if len(os.listdir("/proc/self/task")) != 1:
        raise SystemExit("a launcher must have one thread: cloning a threaded interpreter is not safe")
    launcher = Launcher(sys.argv[2], *channels)
    gc.collect()
    gc.freeze()  # what lives now is never looked at again, so clones do not copy its pages
    gc.disable()
    launcher.serve()
