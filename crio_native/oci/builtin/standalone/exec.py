"""exec: one more process in a running container."""

from __future__ import annotations

import _socket
import os
from types import SimpleNamespace

from crio_native.errors import FailedPrecondition, InvalidArgument, StepFailed
from crio_native.linux import capabilities, namespaces, syscalls
from crio_native.linux import process as kernel
from crio_native.linux.cgroup import hierarchy
from crio_native.oci import spec as specs
from crio_native.oci.builtin import plan as plans
from crio_native.oci.builtin import steps, wire
from crio_native.oci.builtin.standalone import channel, child, laboratory, state, terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from crio_native.linux.cgroup import Cgroup
    from crio_native.oci.builtin.plan import Plan
    from crio_native.oci.builtin.standalone.state import State

MAX_ID = 2**32 - 2  # the kernel's -1 means: leave it as it is


def exec_(options: SimpleNamespace) -> int:
    """`crio-oci exec`: the process's exit code, or 0 at once with --detach."""
    preserved = child.preserved_descriptors(options)
    found = state.load(options.root, options.arguments[0])
    spec = found.config()
    process: Mapping[str, Any] = process_object(options, spec["process"])
    specs.check_process(process)
    _check_terminal(options, process)
    _check_status(options, found)
    own_user = namespaces.differing(found.pid) & syscalls.CLONE_NEWUSER
    process = child.grantable(process, child.ALL_CAPABILITIES if own_user else child.host().permitted)
    if not options.detach:
        terminal.block_signals(but=terminal.INTERRUPTS)  # in a paused container it may never get as far as its exec
    running = Exec(options, found, spec, process, preserved)
    try:
        running.hand_over()
        if options.detach:
            return 0
        return terminal.Foreground(running.pid, running.pidfd, running.master).wait()
    except BaseException:
        running.kill()
        raise


def process_object(options: SimpleNamespace, base: Mapping[str, Any]) -> dict[str, Any]:
    """What to run: --process as it is or the container's own process with another command, changed by the flags.
    Raises InvalidArgument."""
    command = options.arguments[1:]
    file = options.process
    process = state.read_foreign_json(file, "process") if file else {**base, "terminal": False}
    if command:
        process["args"] = command
    elif not options.process:
        raise InvalidArgument("COMMAND", command, "must be given, or --process")
    process["env"] = [*(process.get("env") or ()), *options.env]
    if options.cwd:
        process["cwd"] = options.cwd
    if options.tty:
        process["terminal"] = True
    if options.user:
        process["user"] = {**(process.get("user") or {}), **user_of(options.user)}
    if options.additional_gids:
        user = process.get("user") or {}
        gids = [_id("--additional-gids", gid) for gid in options.additional_gids]
        process["user"] = {**user, "additionalGids": [*(user.get("additionalGids") or ()), *gids]}
    for field, value in (("selinuxLabel", options.process_label), ("apparmorProfile", options.apparmor)):
        if value:
            process[field] = value
    if options.no_new_privs:
        process["noNewPrivileges"] = True
    if options.cap:
        process["capabilities"] = _with_capabilities(process.get("capabilities") or {}, options.cap)
    return process


def user_of(text: str) -> dict[str, int]:
    """UID or UID:GID.  Numbers only, and all of them: a name that is read as 0 is root (CVE-2026-30892)."""
    uid, colon, gid = text.partition(":")
    user = {"uid": _id("--user", uid)}
    return user | {"gid": _id("--user", gid)} if colon else user


def _id(field: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= MAX_ID):
        raise InvalidArgument(field, text, f"must be a number from 0 to {MAX_ID}")
    return int(text)


def _with_capabilities(sets: Mapping[str, Any], more: list[str]) -> dict[str, Any]:
    """Not in the inheritable set: what a process gets from there survives into any program (CVE-2022-29162)."""
    names = [name.upper() if name.upper().startswith("CAP_") else f"CAP_{name.upper()}" for name in more]
    for name in names:
        if name not in capabilities.NUMBER:
            raise InvalidArgument("--cap", name, "is not a capability that Linux has")
    widened = {kind: [*(sets.get(kind) or ()), *names] for kind in ("bounding", "effective", "permitted")}
    ambient = [*(sets.get("ambient") or ()), *(name for name in names if name in (sets.get("inheritable") or ()))]
    return {**sets, **widened, "ambient": ambient}


def _is_watched(spec: Mapping[str, Any]) -> bool:
    """Whether another process in its PID namespace may trace any there, as far as its config.json tells: one of another
    container, or one with the capability that the new one need not have."""
    joined = any(each["type"] == "pid" and each.get("path") for each in spec["linux"].get("namespaces") or ())
    return joined or "CAP_SYS_PTRACE" in ((spec["process"].get("capabilities") or {}).get("bounding") or ())


def _check_terminal(options: SimpleNamespace, process: Mapping[str, Any]) -> None:
    if process.get("terminal") and options.detach and not options.console_socket:
        raise InvalidArgument("--console-socket", "", "must be given with --detach and a terminal")
    if options.console_socket and not process.get("terminal"):
        raise InvalidArgument("--console-socket", options.console_socket, "is of no use without a terminal")


def _check_status(options: SimpleNamespace, found: State) -> None:
    status = found.status()
    if status == "paused" and not options.ignore_paused:
        what = "resume it first, or let the command wait for that with --ignore-paused"
        raise FailedPrecondition(f"cannot exec in a paused container: {found.id!r}; {what}")
    if status not in ("created", "running", "paused"):
        raise FailedPrecondition(f"container not running: cannot exec in container {found.id!r} that is {status}")


class Exec:
    """A process that has been started.  Raises StepFailed with the step that failed; then it is gone."""

    def __init__(
        self,
        options: SimpleNamespace,
        found: State,
        spec: Mapping[str, Any],
        process: Mapping[str, Any],
        preserved: list[int],
    ) -> None:
        self.options, self.preserved = options, preserved
        self.laboratory = laboratory.of(options.trace, options.fail)
        self.pid, self.pidfd, self.master = 0, -1, -1
        self.appeared = False
        self.container = found.open_process()
        self.namespaces = namespaces.differing(found.pid)
        self.membership = Membership(found.cgroup, options.cgroup)
        linux = spec.get("linux") or {}
        seccomp = child.compiled(linux.get("seccomp"), options.root)
        request: Any = SimpleNamespace(process=process, seccomp=linux.get("seccomp"), shared_pids=_is_watched(spec))
        plan = plans.exec_plan(
            request,
            child.host(),
            cgroup_files=self.membership.files,
            seccomp=seccomp,
            namespaces=self.namespaces,
            state={name: found.record[name] for name in ("ociVersion", "id", "bundle")} | {"status": "running"},
            linux=linux,
        )
        if self.laboratory is not None:
            self.laboratory.check(plan)
        try:
            laboratory.own(self.laboratory, "clone", lambda: self._clone(plan))
            if self.status.recv(1) == b"A":
                options.view.close()
            self.master = channel.await_exec(self.status, self._born)
            if not options.detach:
                terminal.block_signals()  # the command is there to take them
        except BaseException:
            self.kill()
            raise

    def _clone(self, plan: Plan) -> None:
        self.status, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        descriptor = self.membership.descriptor()
        by_itself = any(step.name in ("enter_pid_namespace", "appear") for step in plan.steps)
        if self.namespaces & syscalls.CLONE_NEWPID and not by_itself:
            syscalls.setns(self.container, syscalls.CLONE_NEWPID)  # takes effect in children only
        child.clone(self, 0, descriptor, lambda: _become_exec(plan, theirs.detach(), self))
        theirs.close()
        if descriptor is not None:
            os.close(descriptor)

    def _born(self, pid: int) -> None:
        """Our child has had another for us, which waits until we know it, see steps.surroundings.  Once: that one may
        speak for a tracer in the container."""
        if self.appeared or not kernel.is_child(pid):
            raise StepFailed("exec", 0, "", f"what came of it is not to be believed: pid {pid}")
        self.appeared = True
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pid, self.pidfd = pid, os.pidfd_open(pid)
        self.status.send(b"k%d" % pid, _socket.MSG_NOSIGNAL)

    def hand_over(self) -> None:
        """Tell the engine: pid file, pidfd, terminal."""
        options = self.options
        if options.pid_file:
            laboratory.own(self.laboratory, "write_pid_file", lambda: state.write_pid_file(options.pid_file, self.pid))
        if options.pidfd_socket:
            terminal.send_descriptor("--pidfd-socket", options.pidfd_socket, "pidfd", self.pidfd)
        if self.master >= 0 and options.console_socket:
            terminal.send_descriptor("--console-socket", options.console_socket, "/dev/ptmx", self.master)
            self.master = -1

    def kill(self) -> None:
        if self.pidfd >= 0:
            child.kill(self.pid, self.pidfd)


def _become_exec(plan: Plan, status: int, running: Exec) -> None:
    syscalls.set_name(b"crio-exec")
    watcher = running.laboratory
    syscalls.close_others([*running.preserved, status, running.container, watcher.trace if watcher else -1])
    to_parent = wire.channel(status)
    to_parent.send(b"A", _socket.MSG_NOSIGNAL)
    context = steps.Context(to_parent)
    context.container = running.container
    context.preserved = max(running.preserved, default=2) - 2
    acts = watcher.acts("exec", plan) if watcher else steps.STEPS
    failure = steps.run([(step.name, dict(step.args)) for step in plan.steps], context, acts)
    to_parent.send(b"E" + wire.encode(failure).encode(), _socket.MSG_NOSIGNAL)
    os._exit(127)


class Membership:
    """Where the process is to be, in every hierarchy: the container's group, or an existing one below it.

    below: the values of --cgroup, `[CONTROLLER,...:]PATH`.  Raises InvalidArgument when no hierarchy has the group.
    """

    def __init__(self, cgroup: Cgroup | None, below: list[str]) -> None:
        self.files: list[str] = []
        self._unified = ""
        if cgroup is None:
            return
        wanted = [_below(text) for text in below]
        used = set()
        for mount in hierarchy().mounts:
            unified = mount == hierarchy().unified
            names = {""} if unified else set(os.path.basename(mount).split(","))
            directory = mount + cgroup.path
            for controllers, path in wanted:
                if (not controllers or controllers & names) and os.path.isdir(f"{directory}/{path}"):
                    directory = f"{directory}/{path}".rstrip("/")
                    used.add(path)
            if unified:
                self._unified = directory
            else:
                self.files.append(directory + "/tasks")
        for _, path in wanted:
            if path not in used:
                raise InvalidArgument("--cgroup", path, "the container has no such group")

    def descriptor(self) -> int | None:
        """The group in the unified hierarchy, for CLONE_INTO_CGROUP."""
        return os.open(self._unified, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if self._unified else None


def _below(text: str) -> tuple[set[str], str]:
    controllers, colon, path = text.rpartition(":")
    if ".." in path.split("/"):
        raise InvalidArgument("--cgroup", path, "`..` components are not allowed")
    return set(controllers.split(",")) if colon else set(), path.strip("/")
