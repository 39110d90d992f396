"""create and run: a container is made here, and nothing half-made stays.

The order: claim the id, record the intent, make the cgroup and limit it, clone the init, wait until it is ready,
record its pid, tell the engine (pid file, pidfd, terminal), let it wait for `start`.  What fails undoes all before it.
"""

from __future__ import annotations

import _socket
import os
from types import SimpleNamespace

from crio_native.errors import AlreadyExists, CrioError, FailedPrecondition, Internal, InvalidArgument, StepFailed
from crio_native.linux import process, syscalls
from crio_native.linux.cgroup import hierarchy
from crio_native.oci import spec as specs
from crio_native.oci.builtin import plan as plans
from crio_native.oci.builtin import steps, wire
from crio_native.oci.builtin.standalone import channel, child, laboratory, log, state, terminal
from crio_native.oci.builtin.standalone.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from crio_native.linux.cgroup import Cgroup
    from crio_native.oci.builtin.plan import Plan


def create(options: SimpleNamespace) -> int:
    """`crio-oci create`: made up to its command, which `start` lets run."""
    made = Made(options, starts=False)
    try:
        made.hand_over_terminal()
        made.answer(b"W")
    except BaseException:
        made.undo()
        raise
    return 0


def run(options: SimpleNamespace) -> int:
    """`crio-oci run`: create, start and, unless detached, wait for the end and delete."""
    foreground = not options.detach
    if foreground:
        terminal.block_signals()
        if not options.no_subreaper:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    made = Made(options, starts=True)
    try:
        made.hand_over_terminal(keep=foreground)
        made.start()
        if not foreground:
            return 0
        code = terminal.Foreground(made.pid, made.pidfd, made.master).wait()
    except BaseException:
        made.undo()
        raise
    if not options.keep:
        made.forget()
        poststop(made.state)
    return code


class Made:
    """A container whose init is ready to run its command.

    starts: this command starts it too, so nobody else needs a way to.  Raises InvalidArgument and AlreadyExists before
    anything is made, StepFailed with the step that failed when all is undone.
    """

    def __init__(self, options: SimpleNamespace, *, starts: bool) -> None:
        self.options, self.starts = options, starts
        self.laboratory = laboratory.of(options.trace, options.fail)
        self.master = -1
        self.pid, self.pidfd = 0, -1
        self.grouped = False
        bundle = os.path.abspath(options.bundle or ".")
        path = os.path.join(bundle, options.config or "config.json")
        content = state.read_config(path)
        self.spec = specs.complete(state.foreign_json(content, path, ""), os.geteuid(), os.getegid())
        self.preserved = child.preserved_descriptors(options, listening())
        specs.validate(self.spec)
        self.spec = without_mount_label(self.spec)
        self._check_terminal()
        permitted = child.host().permitted if "user" not in specs.namespace_paths(self.spec) else child.ALL_CAPABILITIES
        self.spec = {**self.spec, "process": listen_environment(child.grantable(self.spec["process"], permitted))}
        if options.cgroup_manager == "systemd":
            from crio_native.linux.cgroup import systemd

            systemd.check()
        directory = state.claim(options.root, options.arguments[0])
        self.state = State(directory, self._record(bundle))
        try:
            self.state.save()
            self.state.keep_config(content)
            self._make()
        except BaseException as error:
            deleted = isinstance(error, OSError) and not os.path.isdir(directory)
            self.undo()
            if deleted:
                raise self._gone() from None
            raise

    def _check_terminal(self) -> None:
        socket = self.options.console_socket
        detached = not self.starts or self.options.detach
        wanted = bool(self.spec["process"].get("terminal"))
        if wanted and detached and not socket:
            raise InvalidArgument("--console-socket", "", "must be given: process.terminal is true, and we will detach")
        if socket and not wanted:
            raise InvalidArgument("--console-socket", socket, "is of no use where process.terminal is false")

    def _record(self, bundle: str) -> dict[str, Any]:
        root = self.spec["root"]["path"]
        linux, hooks = self.spec.get("linux") or {}, self.spec.get("hooks") or {}
        rootfs = root if root.startswith("/") else os.path.normpath(f"{bundle}/{root}")
        alone = "mount" in specs.namespace_paths(self.spec)
        container_id, options = self.options.arguments[0], self.options
        group, manager = group_of(linux, container_id, options.cgroup_manager, options.rootless)
        return {
            **({} if alone else {"mountsOnRoot": state.mounts_on(rootfs)}),
            "id": container_id,
            "ociVersion": self.spec["ociVersion"],
            "pid": 0,
            "startTime": 0,
            "creator": [os.getpid(), process.start_time(os.getpid())],
            "bundle": bundle,
            "rootfs": rootfs,
            "created": state.now(),
            "owner": "root" if os.geteuid() == 0 else str(os.geteuid()),
            "annotations": self.spec.get("annotations") or {},
            "cgroupsPath": group,
            "cgroupManager": manager,
            "madeCgroups": [],
            "hooks": {kind: hooks[kind] for kind in ("poststart", "poststop") if hooks.get(kind)},
        }

    def _make(self) -> None:
        linux = self.spec.get("linux") or {}
        cgroup = self.state.cgroup
        joined = cgroup.join_files() if cgroup is not None else []
        if linux.get("intelRdt") is not None:
            joined += laboratory.own(self.laboratory, "make_resctrl", lambda: self._join_resctrl(linux["intelRdt"]))
        seccomp = child.compiled(linux.get("seccomp"), self.options.root)
        if self.state.record["annotations"].get("run.oci.seccomp_fail_unknown_syscall") == "1":
            _refuse_unknown(linux.get("seccomp") or {})
        plan = self._plan(cgroup, joined, seccomp)
        if self.laboratory is not None:
            self.laboratory.check(plan)
        descriptor = None
        if cgroup is not None:
            self._make_cgroup(cgroup, linux.get("resources") or {})
            descriptor = cgroup.descriptor()
        listener = -1 if self.starts else channel.listen(self.state)
        try:
            laboratory.own(self.laboratory, "clone", lambda: self._clone(plan, descriptor, listener))
        finally:
            if cgroup is not None:
                cgroup.release()
        for fd in (descriptor, listener):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._await_ready(plan)
        laboratory.own(self.laboratory, "record_state", self._record_init)
        if self.options.pid_file:
            laboratory.own(
                self.laboratory, "write_pid_file", lambda: state.write_pid_file(self.options.pid_file, self.pid)
            )
        if self.options.pidfd_socket:
            terminal.send_descriptor("--pidfd-socket", self.options.pidfd_socket, "pidfd", self.pidfd)

    def _join_resctrl(self, rdt: Mapping[str, Any]) -> list[str]:
        from crio_native.linux import resctrl

        self.state.record["intelRdt"] = dict(rdt)
        self.state.save()
        return resctrl.prepare(rdt, self.state.id, resctrl.mount_point())

    def _plan(self, cgroup: Cgroup | None, joined: list[str], seccomp: tuple[bytes, int] | None) -> Plan:
        container: Any = SimpleNamespace(
            id=self.state.id,
            spec=self.spec,
            bundle=self.state.bundle,
            overlay=None,
            user=None,
            pause=False,
        )
        return plans.container_plan(
            container,
            child.host(),
            cgroup_files=joined,
            cgroup_directories=hierarchy().directories(cgroup.path) if cgroup is not None else {},
            seccomp=seccomp,
            keyring=not self.options.no_new_keyring,
            pivot=not self.options.no_pivot,
            notify_socket=os.environ.get("NOTIFY_SOCKET", ""),
            look_up=True,
            keep_groups=specs.keeps_groups(self.spec),
        )

    def _make_cgroup(self, cgroup: Cgroup, resources: Mapping[str, Any]) -> None:
        self.grouped = True
        try:
            laboratory.own(self.laboratory, "make_cgroup", cgroup.create)
        except AlreadyExists:
            self.state.record["cgroupManager"] = "disabled"  # it is another's, and not to be undone
            raise
        if cgroup.made:
            self.state.record["madeCgroups"] = cgroup.made
            self.state.save()
        for warning in laboratory.own(self.laboratory, "limit_cgroup", lambda: cgroup.apply(resources)):
            log.warning(warning)
        rules = [*(resources.get("devices") or ()), *plans.DEFAULT_DEVICE_RULES]
        if resources.get("devices"):
            laboratory.own(self.laboratory, "limit_devices", lambda: cgroup.apply_devices(rules))

    def _clone(self, plan: Plan, cgroup: int | None, listener: int) -> None:
        if plan.join_pid:  # takes effect in children only
            syscalls.setns(process.open_namespace(plan.join_pid), syscalls.CLONE_NEWPID)
        self.channel, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        flags = syscalls.CLONE_NEWPID if plan.new_pid_namespace else 0
        child.clone(self, flags, cgroup, lambda: _become_init(plan, theirs.detach(), listener, self))
        theirs.close()

    def _await_ready(self, plan: Plan) -> None:
        """Until the init says that it is ready; what it needs of its parent before that, it gets."""
        if self.channel.recv(1) == b"A":
            self.options.view.close()
        if plan.duties:
            self._serve(plan.duties)
        while True:
            message, descriptors = wire.receive(self.channel)
            if message[:1] == b"C":
                self.master = descriptors[0]
            elif message[:1] == b"R":
                return
            elif message[:1] == b"E":
                raise channel.failure(message[1:])
            else:
                raise Internal(f"the container's init ended {self._reaped()} before it was ready: was it killed?")

    def _serve(self, duties: Mapping[str, Any]) -> None:
        """Be the init's parent.  In a user namespace the init is another process afterwards: a child of the first."""
        from crio_native.oci.builtin.parent import Duties, Failed

        parent = Duties(self.channel, self.pid, duties)
        try:
            parent.serve()
            parent.release()
        except Failed as error:
            raise channel.failure(error.report) from None
        finally:
            if parent.init != self.pid:
                os.close(self.pidfd)
                self.pid, self.pidfd = parent.init, os.pidfd_open(parent.init)

    def _reaped(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return f"by signal {-code}" if code < 0 else f"with status {code}"

    def _record_init(self) -> None:
        self.state.record |= {"pid": self.pid, "startTime": process.start_time(self.pid) or 0}
        self.state.save()

    def hand_over_terminal(self, *, keep: bool = False) -> None:
        """Give the terminal's master to the engine; keep: it is for our own foreground."""
        if self.master >= 0 and self.options.console_socket:
            terminal.send_descriptor("--console-socket", self.options.console_socket, "/dev/ptmx", self.master)
            os.close(self.master)
            self.master = -1

    def answer(self, word: bytes) -> None:
        """Tell the init how it goes on.  Raises FailedPrecondition when it is not there any more."""
        try:
            self.channel.send(word, _socket.MSG_NOSIGNAL)
        except BrokenPipeError:
            raise self._gone() from None

    def start(self) -> None:
        """Let the command run.  Raises StepFailed when its exec fails, FailedPrecondition when it is gone."""
        self.answer(b"S")
        try:
            channel.await_exec(self.channel)
        except ConnectionResetError:  # it ended before it read that
            raise self._gone() from None
        self.channel.close()
        poststart(self.state)

    def _gone(self) -> FailedPrecondition:
        return FailedPrecondition(f"container {self.state.id!r} was deleted, or killed, while it was made")

    def undo(self) -> None:
        """Leave nothing: process, cgroup, pid file, state."""
        if self.pidfd >= 0:
            child.kill(self.pid, self.pidfd)
        if self.options.pid_file and self.pidfd >= 0:
            try:
                os.unlink(self.options.pid_file)
            except OSError:
                pass
        if not self.grouped:
            self.state.record["cgroupManager"] = "disabled"  # a group of that name is another's, with what is in it
        self.forget()

    def forget(self) -> None:
        try:
            self.state.remove_cgroup()
        except CrioError as error:
            log.warning(f"container {self.state.id}: {error}")
        self.state.unmount()
        self.state.remove()


def poststart(container: State) -> None:
    """Run the poststart hooks.  Raises StepFailed for the first that fails; then the container is to be stopped."""
    from crio_native.oci.builtin import hooks

    try:
        hooks.run("poststart", container.record["hooks"].get("poststart") or (), _told(container, "running"))
    except hooks.HookFailed as error:
        raise StepFailed("poststart", error.number, error.path, str(error)) from None


def poststop(container: State) -> None:
    """Run the poststop hooks: one that fails is a warning, and the others run."""
    from crio_native.oci.builtin import hooks

    for entry in container.record["hooks"].get("poststop") or ():
        try:
            hooks.run("poststop", [entry], _told(container, "stopped"))
        except hooks.HookFailed as error:
            log.warning(f"container {container.id}: {error.path}: {error}")


def _told(container: State, status: str) -> dict[str, Any]:
    """The state that hooks get."""
    told = {name: container.record[name] for name in ("ociVersion", "id", "bundle", "annotations")}
    return told | {"status": status, "pid": 0 if status == "stopped" else container.pid}


def _become_init(plan: Plan, creator: int, listener: int, made: Made) -> None:
    """The container's first process, in the clone: nothing of ours stays open but what it needs."""
    syscalls.set_name(b"crio-init")
    watcher, preserved = made.laboratory, made.preserved
    syscalls.close_others([*preserved, creator, listener, watcher.trace if watcher else -1])
    to_creator = channel.InitChannel(creator, listener)
    to_creator.send(b"A")
    context = steps.Context(to_creator)  # type: ignore[arg-type]
    context.preserved = max(preserved, default=2) - 2
    acts = watcher.acts("init", plan) if watcher else steps.STEPS
    failure = steps.run([(step.name, dict(step.args)) for step in plan.steps], context, acts)
    context.sync.send(b"E" + wire.encode(failure).encode())  # type: ignore[union-attr]


def _refuse_unknown(seccomp: Mapping[str, Any]) -> None:
    """What crun does for this annotation.  Elsewhere such names are passed over: profiles name those of all kernels."""
    from crio_native.oci import seccomp as filters

    for index, rule in enumerate(seccomp.get("syscalls") or ()):
        for name in rule.get("names") or ():
            if not filters.knows(name):
                why = "is no system call that libseccomp knows, and an annotation wants that refused"
                raise InvalidArgument(f"linux.seccomp.syscalls[{index}].names", name, why)


def listening() -> int:
    """How many sockets to listen on we were given, as sd_listen_fds(3) counts them: those for another process, of which
    only the variables came to us, are not ours.  Raises InvalidArgument."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return 0
    if int(count) > child.MAX_PRESERVED:
        raise InvalidArgument("LISTEN_FDS", count, f"must be a number from 0 to {child.MAX_PRESERVED}")
    return int(count)


def listen_environment(process: Mapping[str, Any]) -> Mapping[str, Any]:
    """The process object with what sd_listen_fds(3) reads, when we have been given sockets to listen on."""
    if not listening():
        return process
    names = [f"{name}={os.environ[name]}" for name in ("LISTEN_FDS", "LISTEN_FDNAMES") if name in os.environ]
    return {**process, "env": [*(process.get("env") or ()), *names, "LISTEN_PID=1"]}


def without_mount_label(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """A kernel without SELinux refuses the label's mount option, and has nothing that it would keep apart."""
    label = (spec.get("linux") or {}).get("mountLabel")
    if not label or os.path.isdir("/sys/fs/selinux"):
        return spec
    log.warning(f"linux.mountLabel {label!r} is left out: this kernel has no SELinux")
    return {**spec, "linux": {**spec["linux"], "mountLabel": ""}}


def group_of(linux: Mapping[str, Any], container_id: str, manager: str, rootless: bool) -> tuple[str, str]:
    """(cgroupsPath, manager) of the container's group: one that is named by its id where the configuration names none.

    linux: of a valid spec.  Who is not root has no groups to give, and where nothing asks for one none is made.
    """
    asked = linux.get("cgroupsPath") or ""
    if manager == "systemd":
        path = asked or f":crio-oci:{container_id}"
    else:
        path = "/" + specs.normalise(asked or container_id).lstrip("/")
    without = rootless and not asked and not linux.get("resources")
    return path, "disabled" if without else manager
