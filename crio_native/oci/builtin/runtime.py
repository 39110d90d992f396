"""The Runtime of the built-in executor: plans, and the launchers that are asked to carry them out."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import crio_native
from crio_native.errors import (
    AlreadyExists,
    CrioError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StartFailed,
    StepFailed,
)
from crio_native.linux import capabilities, process, resctrl, syscalls
from crio_native.linux.cgroup import Cgroup, cgroup_of, hierarchy
from crio_native.monitor import client as monitor
from crio_native.oci import criu, features
from crio_native.oci import seccomp as filters
from crio_native.oci import spec as specs
from crio_native.oci.builtin import late_hooks, restoring, wire
from crio_native.oci.builtin.execs import BuiltinExec, ExecPackets, Target, Targets, start_exec, stdio_of
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.plan import (
    DEFAULT_DEVICE_RULES,
    Host,
    Plan,
    container_plan,
    exec_plan,
    state_of,
)
from crio_native.oci.monitored import Monitored, monitor_arguments
from crio_native.oci.runtime import (
    Abilities,
    CheckpointSpec,
    ContainerSpec,
    ExecSpec,
    Process,
    ResolvedUser,
    check_not_paused,
)

log = logging.getLogger(__name__)

_RESTORED = "restored"  # in a run_dir: the cgroup of a container that was frozen when it was made


@functools.cache
def this_host() -> Host:
    """What plans have to know of this machine."""
    _, permitted, _ = syscalls.capget()
    least = -1000
    if not permitted & capabilities.mask(["CAP_SYS_RESOURCE"]):
        least = int(Path("/proc/self/oom_score_adj").read_text())
    return Host(capabilities.last_known(), permitted, least)


class _Gate:
    """Where an init waits for its cgroup.  Without one there is no gate."""

    def __init__(self, cgroup: Cgroup | None) -> None:
        """Makes the group as far as an init has to be born in it."""
        self._ours = -1
        self.descriptors: list[int] = []  # for the request: the init's end, and on a v2 host the group to be born in
        if cgroup is None:
            return
        cgroup.begin()
        theirs, self._ours = os.pipe2(os.O_CLOEXEC)
        self.descriptors.append(theirs)
        born_in = cgroup.descriptor()
        if born_in is not None:
            self.descriptors.append(born_in)

    def __enter__(self) -> _Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def open(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # an init that has failed waits no more, and says why
            os.write(self._ours, b"k")

    def close(self) -> None:
        """An init that waits yet ends."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1


class BuiltinRuntime(Monitored):
    """The Runtime (see `oci.runtime`) that makes containers itself.

    Where more is asked for than a restricted host permits, it gives what there is, with a warning.

    monitor_cgroup: see `Monitored`.  create_timeout: seconds.  sync_log: see `monitor.client.arguments`.  pivot: see
    `plan.container_plan`.
    """

    def __init__(
        self,
        launchers: Launchers,
        *,
        cgroup_manager: str = "cgroupfs",
        monitor_cgroup: str = "",
        create_timeout: float = 240.0,
        sync_log: bool = False,
        pivot: bool = True,
    ) -> None:
        super().__init__(cgroup_manager, monitor_cgroup)
        self._pivot = pivot
        self._sync_log = sync_log
        self._launchers = launchers
        self._create_timeout = create_timeout
        self._exec_packets = ExecPackets()
        self._targets = Targets()
        self._watches: dict[Path, socket.socket] = {}  # by run_dir, of containers that nobody has begun to watch yet

    def abilities(self) -> Abilities:
        document = features.features()
        options, linux = document["mountOptions"], document["linux"]
        mapped = "user" in linux["namespaces"] and linux["mountExtensions"]["idmap"]["enabled"]
        return Abilities(crio_native.__version__, "rro" in options, mapped, document)

    def create(self, container: ContainerSpec) -> Process:
        specs.validate(container.spec)
        own_user = "user" in specs.namespace_paths(container.spec)
        permitted = self._permitted(container.spec["process"], container.id, own_user)
        hooks = late_hooks.bounded(container.spec.get("hooks") or {}, int(self._create_timeout))
        container = replace(container, spec={**container.spec, "process": permitted, "hooks": hooks})
        linux = container.spec.get("linux") or {}
        cgroup = self._cgroup(linux.get("cgroupsPath", ""), container.spec.get("annotations"))
        cgroups_path = linux.get("cgroupsPath", "")
        try:
            late_hooks.record(container.run_dir, hooks, state_of(container))
            joined = cgroup.join_files() if cgroup is not None else []
            if linux.get("intelRdt") is not None:
                joined = [*joined, *_resctrl_files(container, linux["intelRdt"])]
            plan = container_plan(
                container,
                this_host(),
                cgroup_files=joined,
                cgroup_directories=hierarchy().directories(cgroup.path) if cgroup else {},
                cgroup_comes=cgroup is not None,
                seccomp=_compiled(linux.get("seccomp")),
                pause_program=(container.pause_program or str(monitor.binary_path())) if container.pause else "",
                pivot=self._pivot,
            )
            created = self._launch(container, plan, cgroup)
            late_hooks.record(container.run_dir, hooks, {**state_of(container), "pid": created.pid})
            self._place_monitor(container.id, cgroups_path, created.monitor_pid)
        except AlreadyExists:
            self.delete(container.id, container.run_dir, "")  # the group is somebody else's
            raise
        except BaseException:
            self.delete(container.id, container.run_dir, cgroups_path)
            raise
        finally:
            if cgroup is not None:
                cgroup.release()
        return created

    def _launch(self, container: ContainerSpec, plan: Plan, cgroup: Cgroup | None) -> Process:
        """The group is made while the init sets up what needs none, for it takes as long on a host with many
        hierarchies.  On any error the init has ended."""
        request = {
            "op": "create",
            "new_pid_namespace": plan.new_pid_namespace,
            "join_pid": plan.join_pid,
            "steps": [(step.name, dict(step.args)) for step in plan.steps],
            "duties": dict(plan.duties),
            "terminal": bool(container.spec["process"].get("terminal")),
            "stdin": container.stdin,
            "monitor": {
                "arguments": monitor_arguments(container, cgroup, sync_log=self._sync_log),
                "run_dir": str(container.run_dir),
            },
        }
        with _Gate(cgroup) as gate, self._launchers.conversation(request, gate.descriptors) as reply:
            try:
                if cgroup is not None:
                    cgroup.complete()
                    self._limit(cgroup, container.spec["linux"].get("resources") or {}, container.id)
                    gate.open()
            except BaseException:
                gate.close()
                with contextlib.suppress(CrioError):
                    monitor.read_reply(reply, self._create_timeout)
                raise
            created = monitor.read_reply(reply, self._create_timeout)
            reply.settimeout(None)
            self._watches[container.run_dir] = socket.socket(fileno=reply.detach())
        who = created.get("init") or {}
        user = ResolvedUser(who["uid"], who["gid"], tuple(who["groups"]), who["home"]) if who else None
        return Process(created["pid"], process.start_time(created["pid"]) or 0, created["monitor"], user)

    def restore(self, container: ContainerSpec, images: Path) -> Process:
        """CRIU leaves the processes stopped; in a frozen cgroup they are told to go on, as soon as they can."""
        spec, run_dir = container.spec, container.run_dir
        specs.validate(spec)
        criu.check_spec(spec)
        saved = criu.read(str(images))
        cgroups_path = (spec.get("linux") or {}).get("cgroupsPath", "")
        if not cgroups_path:
            raise FailedPrecondition(f"container {container.id} has no cgroup, and cannot be made from a checkpoint")
        cgroup = cgroup_of(cgroups_path, self._cgroup_manager, spec.get("annotations"))
        try:
            cgroup.create()
            cgroup.release()
            self._limit(cgroup, spec["linux"].get("resources") or {}, container.id)
            (run_dir / _RESTORED).write_text(cgroups_path)
            request = restoring.request(container, saved, images, cgroup, sync_log=self._sync_log)
            with self._launchers.conversation(request) as reply:
                try:
                    created = monitor.read_reply(reply, min(self._create_timeout, restoring.SECONDS))
                except StepFailed as error:
                    raise restoring.in_crius_words(error, run_dir) from None
            restoring.take_over(cgroup, created["pid"], spec)
            self._place_monitor(container.id, cgroups_path, created["monitor"])
        except AlreadyExists:
            self.delete(container.id, run_dir, "")  # the group is somebody else's
            raise
        except BaseException:
            self.delete(container.id, run_dir, cgroups_path)
            raise
        return Process(created["pid"], process.start_time(created["pid"]) or 0, created["monitor"])

    def _place_monitor(self, container_id: str, cgroups_path: str, pid: int) -> None:
        """Only now, for it was there before its container was known."""
        group = self._monitor_group(container_id, cgroups_path)
        if group is None:
            return
        try:
            group.create()
            group.take(pid)
        except AlreadyExists as error:  # of the container's own group that would mean that it is not ours to remove
            raise StepFailed("monitor_cgroup", errno.EBUSY, group.path, str(error)) from None
        finally:
            group.release()

    def watch(self, container_id: str, run_dir: Path) -> socket.socket:
        """The monitor takes who made the container for its first watcher."""
        return self._watches.pop(run_dir, None) or super().watch(container_id, run_dir)

    def start(self, container_id: str, run_dir: Path) -> None:
        if (run_dir / _RESTORED).exists():
            cgroup_of((run_dir / _RESTORED).read_text(), self._cgroup_manager).thaw()
            return
        connection = monitor.Connection.connect(run_dir)
        try:
            connection.start()
        finally:
            connection.close()
        try:
            late_hooks.run_poststart(self._launchers, run_dir)
        except StepFailed as error:
            with contextlib.suppress(NotFound):
                self.kill(container_id, run_dir, 9)
            raise StartFailed.from_dict(error.to_dict()) from None

    def delete(self, container_id: str, run_dir: Path, cgroups_path: str) -> None:
        self._targets.forget(container_id)
        cgroup = self._cgroup(cgroups_path)
        self._end(container_id, run_dir, cgroup)
        if cgroup is not None:
            cgroup.remove()
        if (monitors := self._monitor_group(container_id, cgroups_path)) is not None:
            monitors.kill()
            monitors.remove()
        _leave_resctrl(container_id, run_dir)
        late_hooks.run_poststop(self._launchers, run_dir, container_id)

    def exec(self, container_id: str, process_: Process, cgroups_path: str, request: ExecSpec) -> BuiltinExec:
        target = self._targets.of(container_id, process_, lambda: self._cgroup(cgroups_path))
        if target.cgroup is not None:
            check_not_paused(container_id, target.cgroup)
        asked = (container_id, cgroups_path, target.namespaces, request.shared_pids)
        packet = self._exec_packets.packet(asked, request, lambda: self._exec_packet(container_id, target, request))
        return start_exec(self._launchers.hand_on, container_id, packet, request, target)

    def _exec_packet(self, container_id: str, target: Target, request: ExecSpec) -> bytes:
        own_user = bool(target.namespaces & syscalls.CLONE_NEWUSER)
        plan = exec_plan(
            replace(request, process=self._permitted(request.process, container_id, own_user)),
            this_host(),
            cgroup_files=target.join_files,
            seccomp=_compiled(request.seccomp),
            namespaces=target.namespaces,
            state={"ociVersion": specs.VERSION, "id": container_id, "status": "running", "bundle": ""},
            linux=request.linux,
        )
        message = {
            "op": "exec",
            "stdio": stdio_of(request),
            "cgroup": target.group >= 0,
            "steps": [(step.name, dict(step.args)) for step in plan.steps],
        }
        return wire.pack(message)

    def update(self, container_id: str, cgroups_path: str, resources: Mapping[str, Any]) -> None:
        self._limit(cgroup_of(cgroups_path, self._cgroup_manager), resources, container_id)

    def checkpoint(self, checkpoint: CheckpointSpec) -> None:
        """CRIU leaves the processes stopped; in a frozen cgroup they are told to go on, as soon as they can."""
        criu.check_spec(checkpoint.spec)
        cgroup = cgroup_of(checkpoint.cgroups_path, self._cgroup_manager)
        saved = criu.describe(checkpoint.process.pid, checkpoint.spec)
        line = criu.dump_line(
            checkpoint.process.pid,
            checkpoint.spec,
            saved,
            criu.Options(tcp_established=True, file_locks=True, ext_unix_sk=True),
            images=str(checkpoint.images),
            work=str(checkpoint.log),
            root=str(checkpoint.root),
            leave="stopped",
        )
        stopped = {pid for pid in cgroup.processes() if process.is_stopped(pid)}
        try:
            with criu.locked(str(checkpoint.log)) as lock:
                criu.run(line, str(checkpoint.log), keep=[lock], seconds=checkpoint.seconds)
            criu.write(saved, str(checkpoint.images))
            cgroup.freeze()
        finally:
            for pid in set(cgroup.processes()) - stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @staticmethod
    def _limit(cgroup: Cgroup, resources: Mapping[str, Any], container_id: str) -> None:
        for warning in cgroup.apply(resources):
            log.warning("container %s: %s", container_id, warning)
        if resources.get("devices"):
            cgroup.apply_devices([*resources["devices"], *DEFAULT_DEVICE_RULES])

    def _permitted(self, wanted: Mapping[str, Any], container_id: str, own_user: bool) -> Mapping[str, Any]:
        """The process object with the capabilities that this host can give; a user namespace has them all."""
        sets = wanted.get("capabilities") or {}
        permitted = this_host().permitted
        excess = {name for names in sets.values() for name in names or () if not permitted >> _number(name) & 1}
        if not excess or own_user:
            return wanted
        log.warning("container %s: this host cannot give %s", container_id, ", ".join(sorted(excess)))
        return {
            **wanted,
            "capabilities": {kind: [n for n in names or () if n not in excess] for kind, names in sets.items()},
        }


def _resctrl_files(container: ContainerSpec, rdt: Mapping[str, Any]) -> list[str]:
    """The files by which the init joins its group, which is first put down in run_dir, to be removed with it."""
    (container.run_dir / "resctrl").write_text(json.dumps(dict(rdt)))
    return resctrl.prepare(rdt, container.id, resctrl.mount_point())


def _leave_resctrl(container_id: str, run_dir: Path) -> None:
    file = f"{run_dir}/resctrl"
    if not os.path.exists(file):
        return
    rdt = json.loads(Path(file).read_text())
    resctrl.remove(rdt, container_id, resctrl.mount_point())


def _number(name: str) -> int:
    try:
        return capabilities.NUMBER[name]
    except KeyError:
        raise InvalidArgument("process.capabilities", name, "is not a capability that Linux has") from None


def _compiled(seccomp: Mapping[str, Any] | None) -> tuple[bytes, int] | None:
    if not seccomp:
        return None
    compiled = filters.compile(seccomp)
    return compiled.bpf, compiled.flags
