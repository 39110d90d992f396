"""A launcher: the warm, single-threaded process that makes containers, by cloning itself.

Started by `client.Launchers` as `python -I -m crio_native.oci.builtin.launcher FD`; FD is a SEQPACKET socket that all
launchers share, so that whichever is idle takes the next request.  A request is one JSON packet (or, when it is
large, an empty one with a memfd) with descriptors: first its own reply socket.  Holds no state that outlives a
request but the list of running execs; a launcher that dies loses only those.

Requests (`op`): `create`, `exec`, `namespaces`, `ping`.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Any, NoReturn

import prctl

from crio_native.linux import mounts, process, syscalls
from crio_native.oci.builtin import init, steps

MAX_PACKET = 96 * 1024
MAX_DESCRIPTORS = 8


class Exec:
    """A running exec: its pid and the daemon's reply socket, on which `kill` may come and the end is told."""

    def __init__(self, pid: int, reply: socket.socket) -> None:
        self.pid, self.reply = pid, reply


class Launcher:
    def __init__(self, requests: socket.socket) -> None:
        self.requests = requests
        self.execs: dict[int, Exec] = {}  # by pid
        self.own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.wakeup, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.poll = select.poll()
        self.poll.register(requests, select.POLLIN)
        self.poll.register(self.wakeup, select.POLLIN)

    def serve(self) -> None:
        """Until the daemon closes the request socket; containers live on without us."""
        handlers = {"create": self.create, "exec": self.exec, "namespaces": self.namespaces, "ping": self.ping}
        while True:
            for fd, _ in self.poll.poll():
                if fd == self.wakeup:
                    self.reap()
                elif fd == self.requests.fileno():
                    received = receive(self.requests)
                    if received is None:
                        continue  # another launcher took it
                    request, descriptors = received
                    if not request:
                        return
                    handlers[request["op"]](request, descriptors)
                    for descriptor in descriptors:
                        os.close(descriptor)
                else:
                    self.command(fd)

    def create(self, request: dict[str, Any], descriptors: list[int]) -> None:
        reply, *rest = descriptors
        pid = syscalls.clone3(0, exit_signal=signal.SIGCHLD)
        if pid == 0:
            signal.set_wakeup_fd(-1)
            init.become_monitor(request, reply, rest[0] if rest else None)

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
            send(reply, {"error": {"step": "exec", "errno": error.errno or 0, "path": "", "detail": str(error)}})
            return
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=os.dup(reply))
        self.execs[pid] = Exec(pid, channel)
        self.poll.register(channel, select.POLLIN)
        send(reply, {"started": pid})

    def clone_into(
        self, request: dict[str, Any], status: int, container: int, stdio: list[int], cgroup: int | None
    ) -> int:
        """Our children are born in the container's PID namespace for the moment of one clone."""
        syscalls.setns(container, syscalls.CLONE_NEWPID)
        try:
            pid = syscalls.clone3(0, exit_signal=signal.SIGCHLD, cgroup=cgroup)
            if pid == 0:
                signal.set_wakeup_fd(-1)
                init.run_exec(request, status, container, stdio)
            return pid
        finally:
            syscalls.setns(self.own_pid_namespace, syscalls.CLONE_NEWPID)

    def namespaces(self, request: dict[str, Any], descriptors: list[int]) -> None:
        flags = 0
        for kind in request["paths"]:
            flags |= {"net": syscalls.CLONE_NEWNET, "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS}[kind]
        pid = syscalls.clone3(flags, exit_signal=signal.SIGCHLD)
        if pid == 0:
            signal.set_wakeup_fd(-1)
            pin_namespaces(request, descriptors[0])

    def ping(self, request: dict[str, Any], descriptors: list[int]) -> None:
        send(descriptors[0], {"pong": os.getpid()})

    def command(self, fd: int) -> None:
        """`kill` from the daemon, or its going away, which ends the exec too: nobody would read its output."""
        for running in self.execs.values():
            if running.reply.fileno() == fd:
                running.reply.recv(16)
                self.poll.unregister(fd)  # one command is all there is; a closed peer would poll ready for ever
                try:
                    os.kill(-running.pid, signal.SIGKILL)  # not reaped yet, so the group is still this one
                except ProcessLookupError:
                    os.kill(running.pid, signal.SIGKILL)  # before its setsid
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
            ended = self.execs.pop(pid, None)
            if ended is not None:
                try:
                    self.poll.unregister(ended.reply)
                except KeyError:
                    pass
                code = os.waitstatus_to_exitcode(status)
                send(ended.reply.fileno(), {"exited": code if code >= 0 else 128 - code, "signal": max(-code, 0)})
                ended.reply.close()


def pin_namespaces(request: dict[str, Any], reply: int) -> NoReturn:
    """In a clone with new namespaces: name the host, set sysctls, pin each by a bind mount, and hand out a netlink
    socket that belongs to the new network namespace."""
    step = ""
    try:
        if request["hostname"]:
            step = "set_hostname"
            socket.sethostname(request["hostname"])
        step = "set_sysctls"
        steps.set_sysctls(steps.Context(None), request["sysctls"])
        step = "pin_namespace"
        for kind, path in request["paths"].items():
            syscalls.mount(f"/proc/self/ns/{kind}", path, None, mounts.MS_BIND)
        step = "netlink"
        sockets = []
        if "net" in request["paths"]:
            sockets = [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0).detach()]
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=reply)
        socket.send_fds(channel, [b'{"pinned":true}'], sockets)
    except OSError as error:
        send(reply, {"error": {"step": step, "errno": error.errno or 0, "path": error.filename or "", "detail": ""}})
    except BaseException as error:
        send(reply, {"error": {"step": step, "errno": 0, "path": "", "detail": repr(error)}})
    finally:
        os._exit(0)


def receive(requests: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request; ({}, []) at the end of the daemon; None when another launcher was faster."""
    try:
        data, descriptors, _, _ = socket.recv_fds(
            requests, MAX_PACKET, MAX_DESCRIPTORS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    if not data:
        return {}, []
    if data == b"memfd":
        fd = descriptors.pop()
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        os.close(fd)
    return json.loads(data), descriptors


def send(fd: int, message: dict[str, Any]) -> None:
    try:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        channel.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        channel.detach()
    except OSError:
        channel.detach()  # the daemon no longer listens for this one


def main() -> None:
    requests = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=int(sys.argv[1]))
    requests.set_inheritable(False)
    os.setsid()  # a Ctrl-C on the daemon's terminal is the daemon's business
    prctl.set_name("crio-launcher")
    prctl.set_dumpable(0)  # no process of a container may look into a clone of us (CVE-2019-5736)
    if len(os.listdir("/proc/self/task")) != 1:
        raise SystemExit("a launcher must have one thread: cloning a threaded interpreter is not safe")
    launcher = Launcher(requests)
    gc.collect()
    gc.freeze()  # what lives now is never looked at again, so clones do not copy its pages
    gc.disable()
    launcher.serve()


if __name__ == "__main__":
    main()
