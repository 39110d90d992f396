"""exec: one more process in a running container."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import fcntl
import os
import stat
import struct
import termios

import prctl

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.linux import capabilities, inroot, syscalls
from crio_native.linux.cgroup import Cgroup
from crio_native.oci import spec as specs
from crio_native.oci.builtin import init, steps, wire
from crio_native.oci.builtin import plan as plans
from crio_native.oci.builtin.standalone import channel, create, filters, laboratory, state, terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import SimpleNamespace
    from typing import Any, NoReturn

    from crio_native.oci.builtin.plan import Plan
    from crio_native.oci.builtin.standalone.state import State

_GPTPEER = 0x5441  # TIOCGPTPEER: the terminal's other end, without going through a path (CVE-2025-52565)


def exec_(options: SimpleNamespace) -> int:
    """`crio-oci exec`: the process's exit code, or 0 at once with --detach."""
    preserved = create.preserved_descriptors(options.preserve_fds)
    found = state.load(options.root, options.arguments[0])
    spec = found.config()
    process = process_object(options, spec["process"])
    specs.check_process(process)
    _check_terminal(options, process)
    _check_status(options, found)
    process = create.grantable(process, create.host())
    if not options.detach:
        terminal.block_signals()
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
    """What to run: --process as it is or the container's own process with another command, changed by the flags."""
    command = options.arguments[1:]
    process = state.read_json(options.process) if options.process else {**base, "terminal": False}
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
    if not (text.isascii() and text.isdecimal() and int(text) <= specs.MAX_ID):
        raise InvalidArgument(field, text, f"must be a number from 0 to {specs.MAX_ID}")
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


def _check_terminal(options: SimpleNamespace, process: Mapping[str, Any]) -> None:
    if process.get("terminal") and options.detach and not options.console_socket:
        raise InvalidArgument("--console-socket", "", "must be given with --detach and a terminal")
    if options.console_socket and not process.get("terminal"):
        raise InvalidArgument("--console-socket", options.console_socket, "is of no use without a terminal")


def _check_status(options: SimpleNamespace, found: State) -> None:
    status = found.status()
    if status == "paused" and not options.ignore_paused:
        raise FailedPrecondition(f"cannot exec in a paused container: {found.id!r} (use --ignore-paused)")
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
        preserved: int,
    ) -> None:
        self.options, self.preserved = options, preserved
        self.laboratory = laboratory.of(options.trace, options.fail)
        self.pid, self.pidfd, self.master, self.slave = 0, -1, -1, -1
        self.container = found.open_process()
        cgroup = _cgroup(found, options.cgroup)
        seccomp = filters.compiled((spec.get("linux") or {}).get("seccomp"), options.root)
        request: Any = SimpleNamespaceOf(process)
        joined = cgroup.join_files() if cgroup is not None else []
        plan = plans.exec_plan(request, create.host(), cgroup_files=joined, seccomp=seccomp)
        if self.laboratory is not None:
            self.laboratory.check(plan)
        if process.get("terminal"):
            self.master, self.slave = open_terminal(found.pid, process.get("consoleSize") or {})
        try:
            laboratory.own(self.laboratory, "clone", lambda: self._clone(plan, cgroup))
            channel.await_exec(self.status)
        except BaseException:
            self.kill()
            raise

    def _clone(self, plan: Plan, cgroup: Cgroup | None) -> None:
        self.status, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        descriptor = cgroup.descriptor() if cgroup is not None else None
        syscalls.setns(self.container, syscalls.CLONE_NEWPID)  # takes effect in children only
        self.pid = syscalls.clone3(0, exit_signal=_signal.SIGCHLD, cgroup=descriptor)
        if self.pid == 0:
            _become_exec(plan, theirs.detach(), self)
        theirs.close()
        if descriptor is not None:
            os.close(descriptor)
        self.pidfd = os.pidfd_open(self.pid)
        if self.slave >= 0:
            os.close(self.slave)

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
            create.kill_child(self.pid, self.pidfd)


class SimpleNamespaceOf:
    """What `exec_plan` reads of an ExecSpec."""

    def __init__(self, process: Mapping[str, Any]) -> None:
        self.process = process


def _become_exec(plan: Plan, status: int, running: Exec) -> NoReturn:
    prctl.set_name("crio-exec")
    watcher = running.laboratory
    if running.slave >= 0:
        for number in (0, 1, 2):
            os.dup2(running.slave, number)
    create.close_others(running.preserved, [status, running.container, watcher.trace if watcher else -1])
    context = steps.Context(wire.channel(status))
    context.container = running.container
    context.preserved = running.preserved
    context.terminal = 0 if running.slave >= 0 else -1
    acts = watcher.acts("exec", plan) if watcher else steps.STEPS
    failure = init.run([(step.name, dict(step.args)) for step in plan.steps], context, acts)
    context.sync.send(b"E" + wire.encode(failure).encode(), _socket.MSG_NOSIGNAL)
    os._exit(127)


def open_terminal(container: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(master, slave) of a new terminal in the container's own devpts, opened from outside.

    Raises InvalidArgument when the container's /dev/pts/ptmx is not what it should be.
    """
    root = os.open(f"/proc/{container}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        master = inroot.open_in_root(root, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        why = f"the container's /dev/pts/ptmx cannot be opened: {os.strerror(error.errno or 0).lower()}"
        raise InvalidArgument("process.terminal", True, why) from None
    finally:
        os.close(root)
    found = os.fstat(master)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != os.makedev(5, 2):
        os.close(master)
        raise InvalidArgument("process.terminal", True, "the container's /dev/pts/ptmx is not a terminal device")
    os.set_blocking(master, True)
    fcntl.ioctl(master, 0x40045431, struct.pack("i", 0))  # TIOCSPTLCK
    slave = fcntl.ioctl(master, _GPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if size:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", size.get("height", 0), size.get("width", 0), 0, 0))
    return master, slave


def _cgroup(found: State, below: list[str]) -> Cgroup | None:
    """The container's group, or an existing one below it."""
    cgroup = found.cgroup
    if cgroup is None or not below:
        return cgroup
    paths = {text.rpartition(":")[2].strip("/") for text in below}
    if len(paths) != 1:
        raise InvalidArgument("--cgroup", below, "all controllers must name the same group")
    path = paths.pop()
    child = Cgroup(f"{cgroup.path}/{path}") if path else cgroup
    if not child.exists():
        raise InvalidArgument("--cgroup", path, "the container has no such group")
    return child
