"""A launcher: the warm, single-threaded process that makes containers, by cloning itself.

Started by `client.Launchers` as `python -I -S -c BOOT REQUESTS CREATES PATH...`: two SEQPACKET
sockets that all launchers share, so that whichever is idle takes the next request.  A request is a packet with
descriptors, first its own reply socket.  `exec`, `namespaces`, `hook` and `ping` come on REQUESTS and are served here;
`create` comes on CREATES and is served by a spare (see `init.predecessor`), cloned before it is needed.  A launcher
holds no state that outlives a request but its running execs; one that dies loses only those.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import gc
import os
import select
import sys

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.linux import mounts, process, syscalls
from crio_native.oci.builtin import hooks, init, sockets, steps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

REFILL_DELAY = 15  # ms; a new spare is cloned when the container that took the last one is likely to run


class Exec:
    """A running exec: its pid and the daemon's reply socket, on which `kill` may come and the end is told."""

    def __init__(self, pid: int, reply: _socket.socket) -> None:
        self.pid, self.reply = pid, reply


class Launcher:
    def __init__(self, requests: _socket.socket, creates: _socket.socket) -> None:
        self.requests, self.creates = requests, creates
        self.execs: dict[int, Exec] = {}  # by pid
        self.spare = 0  # pid of the waiting spare, 0 for none
        self.own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.taken, self.taken_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.wakeup, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        self.poll = select.poll()
        for fd in (requests.fileno(), self.taken, self.wakeup):
            self.poll.register(fd, select.POLLIN)

    def serve(self) -> None:
        """Until the daemon closes the request socket; containers live on without us."""
        handlers = {"exec": self.exec, "namespaces": self.namespaces, "hook": self.hook, "ping": self.ping, "external": self.external, "sockets": self.sockets}
        self.refill()
        while True:
            events = self.poll.poll(None if self.spare else REFILL_DELAY)
            if not events:
                self.refill()
            for fd, _ in events:
                if fd == self.wakeup:
                    self.reap()
                elif fd == self.taken:
                    os.read(self.taken, 512)
                    self.spare = 0
                    self.poll.register(self.creates, select.POLLIN)
                elif fd == self.creates.fileno():
                    self.refill()  # a request waits already
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

    def refill(self) -> None:
        """Have a spare waiting.  While one does, we do not look at its socket: it would be awake for nothing."""
        if self.spare:
            return
        try:
            self.poll.unregister(self.creates)
        except KeyError:
            pass
        self.spare = self.clone(0)
        if self.spare == 0:
            _prctl.prctl(_prctl.PR_SET_NAME, "crio-spare")
            init.predecessor(self.creates, self.taken_write)

    def clone(self, flags: int, cgroup: int | None = None) -> int:
        """clone3; in the child Python's signal handling is detached from our wakeup pipe."""
        pid = syscalls.clone3(flags, exit_signal=_signal.SIGCHLD, cgroup=cgroup)
        if pid == 0:
            _signal.set_wakeup_fd(-1)
        return pid

    def exec(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Descriptors: reply, status, stdin, stdout, stderr, and the container's cgroup on a v2 host."""
        reply, status, *rest = descriptors
        stdio = [rest[number] if number >= 0 else -1 for number in request["stdio"]]
        try:
            container = os.pidfd_open(request["pid"])
            try:
                if process.start_time(request["pid"]) != request["start_time"]:
                    raise ProcessLookupError(3, "the container has ended")
                pid = self.clone_into(request, status, container, stdio, rest[-1] if request["cgroup"] else None)
            finally:
                os.close(container)
        except OSError as error:
            wire.tell(reply, {"error": {"step": "exec", "errno": error.errno or 0, "path": "", "detail": str(error)}})
            return
        channel = wire.channel(os.dup(reply))
        self.execs[pid] = Exec(pid, channel)
        self.poll.register(channel, select.POLLIN)
        wire.tell(reply, {"started": pid})

    def clone_into(
        self, request: dict[str, Any], status: int, container: int, stdio: list[int], cgroup: int | None
    ) -> int:
        """Our children are born in the container's PID namespace for the moment of one clone."""
        syscalls.setns(container, syscalls.CLONE_NEWPID)
        try:
            pid = self.clone(0, cgroup)
            if pid == 0:
                init.run_exec(request, status, container, stdio)
            return pid
        finally:
            syscalls.setns(self.own_pid_namespace, syscalls.CLONE_NEWPID)

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

    def external(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """An act of an OCI runtime's program, in a clone, which alone imports what that takes."""
        if self.clone(0) == 0:
            try:
                from crio_native.oci.external import runner

                runner.main(request, descriptors)
            finally:
                os._exit(1)

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
                try:
                    os.kill(-running.pid, _signal.SIGKILL)  # not reaped yet, so the group is still this one
                except ProcessLookupError:
                    os.kill(running.pid, _signal.SIGKILL)  # before its setsid
                return

    def reap(self) -> None:
        os.read(self.wakeup, 512)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.spare:
                self.spare = 0  # somebody killed it; the next round of the loop makes another
            ended = self.execs.pop(pid, None)
            if ended is not None:
                try:
                    self.poll.unregister(ended.reply)
                except KeyError:
                    pass
                code = os.waitstatus_to_exitcode(status)
                wire.tell(ended.reply.fileno(), {"exited": code if code >= 0 else 128 - code, "signal": max(-code, 0)})
                ended.reply.close()


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
    except OSError as error:
        wire.tell(
            reply, {"error": {"step": step, "errno": error.errno or 0, "path": error.filename or "", "detail": ""}}
        )
    except BaseException as error:
        wire.tell(reply, {"error": {"step": step, "errno": 0, "path": "", "detail": repr(error)}})
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
    requests, creates = (wire.channel(int(number)) for number in sys.argv[1:3])
    for channel in (requests, creates):
        os.set_inheritable(channel.fileno(), False)
    os.setsid()  # a Ctrl-C on the daemon's terminal is the daemon's business
    _prctl.prctl(_prctl.PR_SET_NAME, "crio-launcher")
    _prctl.prctl(_prctl.PR_SET_DUMPABLE, 0)  # no process of a container may look into a clone of us (CVE-2019-5736)
    if len(os.listdir("/proc/self/task")) != 1:
        raise SystemExit("a launcher must have one thread: cloning a threaded interpreter is not safe")
    launcher = Launcher(requests, creates)
    gc.collect()
    gc.freeze()  # what lives now is never looked at again, so clones do not copy its pages
    gc.disable()
    launcher.serve()
