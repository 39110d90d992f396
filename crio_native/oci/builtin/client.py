"""The daemon's side of the built-in executor: the launchers, and the Runtime made of them.

Nothing here forks, clones or changes a namespace: that is the launchers' work, asked for over one shared socket.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import prctl

import crio_native
from crio_native.errors import (
    AlreadyExists,
    CrioError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StartFailed,
    StepFailed,
    Unavailable,
)
from crio_native.linux import capabilities, mounts, process, resctrl, syscalls
from crio_native.linux.cgroup import Cgroup, cgroup_of, hierarchy
from crio_native.monitor import client as monitor
from crio_native.oci import criu, features
from crio_native.oci import seccomp as filters
from crio_native.oci import spec as specs
from crio_native.oci.builtin import late_hooks, restoring, wire
from crio_native.oci.builtin.execs import BuiltinExec, ExecPackets, Target, Targets, start_exec, stdio_of
from crio_native.oci.builtin.plan import DEFAULT_DEVICE_RULES, Host, Plan, container_plan, exec_plan, state_of
from crio_native.oci.builtin.replies import receive
from crio_native.oci.monitored import Monitored, monitor_arguments
from crio_native.oci.runtime import Abilities, CheckpointSpec, ContainerSpec, ExecSpec, Process, ResolvedUser

log = logging.getLogger(__name__)

# The launcher's interpreter runs without `site`: what that imports would be copied into every container's init.
BOOT = "import sys; sys.path += sys.argv[3:]; from crio_native.oci.builtin.launcher import main; main()"
_RESTORED = "restored"  # in a run_dir: the cgroup of a container that was frozen when it was made
START_SECONDS = 20.0  # for a launcher to come up on a slow machine


class Launchers:
    """A few warm launcher processes behind one socket.

    `start` must be called before gRPC is imported: a launcher is a plain child, but the daemon stays clear of any
    process creation while gRPC's threads run, apart from replacing a launcher that died.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        # Our end of each, and the end that all launchers share; spares serve the last three, see `launcher`.
        self._requests, requests_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._creates, creates_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._execs, execs_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._externals, externals_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends = (requests_end, creates_end, execs_end, externals_end)
        self._executable = -1

    def start(self) -> None:
        """Start the launchers and wait until one answers.  Raises Unavailable when none does."""
        self._executable = process.unwritable_executable(os.path.realpath(sys.executable))
        self._revive()
        reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with reply, theirs:
            self.send({"op": "ping"}, [theirs.fileno()])
            theirs.close()
            answer = receive(reply, START_SECONDS, "waiting for a launcher")
        if "pong" not in answer:
            raise Unavailable(f"a launcher answered {answer!r} to a ping")

    def stop(self) -> None:
        """End the launchers; containers and their monitors live on."""
        for end in (self._requests, self._creates, self._execs, self._externals, *self._ends):
            end.close()
        for launcher in self._processes:
            try:
                launcher.wait(2)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        self._processes.clear()
        if self._executable >= 0:
            os.close(self._executable)
            self._executable = -1

    def pids(self) -> list[int]:
        return [launcher.pid for launcher in self._processes]

    def send(self, request: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Hand a request to whichever launcher is idle; the answer comes on descriptors[0]'s other end."""
        self.hand_on(request["op"], wire.pack(request), descriptors)

    def hand_on(self, op: str, packet: bytes, descriptors: Sequence[int]) -> None:
        """`send`, of a request that is packed already."""
        self._revive()
        spares = {"create": self._creates, "exec": self._execs, "external": self._externals}
        wire.send(spares.get(op, self._requests), packet, descriptors)

    def pin_namespaces(
        self, paths: Mapping[str, Path], *, hostname: str = "", sysctls: Mapping[str, str] | None = None
    ) -> socket.socket | None:
        """Make new namespaces (kinds "net", "ipc", "uts") and keep each alive by a bind mount at its path.

        The files must not exist; their directories are made.  Returns a NETLINK_ROUTE socket opened inside the new
        network namespace when there is one.  On an error nothing stays.
        """
        if not paths:
            return None
        names = {kind: str(path) for kind, path in paths.items()}
        try:
            for path in paths.values():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
                path.touch(mode=0o600, exist_ok=False)
            return self._pin(names, hostname, dict(sysctls or {}))
        except BaseException:
            self.unpin_namespaces(paths.values())
            raise

    def _pin(self, paths: dict[str, str], hostname: str, sysctls: dict[str, str]) -> socket.socket | None:
        request = {"op": "namespaces", "paths": paths, "hostname": hostname, "sysctls": sysctls}
        with self.conversation(request) as reply:
            reply.settimeout(30)
            data, descriptors, _, _ = socket.recv_fds(reply, 65536, 1)
        answer = json.loads(data or b"{}")
        if "error" in answer:
            raise StepFailed.from_dict(answer["error"])
        if not answer:
            raise Unavailable("the launcher died while it made the pod's namespaces")
        return socket.socket(fileno=descriptors[0]) if descriptors else None

    @staticmethod
    def unpin_namespaces(paths: Iterable[Path]) -> None:
        """Let pinned namespaces go; what is gone already is fine."""
        for path in paths:
            with contextlib.suppress(OSError):
                syscalls.umount2(str(path), mounts.MNT_DETACH)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def open_sockets(self, namespace: Path) -> list[socket.socket]:
        """TCP sockets, one a family that there is, of a pinned network namespace, to connect from here.

        Raises StepFailed when the namespace is gone, Unavailable when the launcher died.
        """
        with self.conversation({"op": "sockets", "path": str(namespace)}) as reply:
            reply.settimeout(30)
            data, descriptors, _, _ = socket.recv_fds(reply, 65536, 2, socket.MSG_CMSG_CLOEXEC)
        answer = json.loads(data or b"{}")
        if "error" in answer:
            raise StepFailed.from_dict(answer["error"])
        if not answer:
            raise Unavailable("the launcher died while it opened sockets in a pod's network")
        return [socket.socket(fileno=descriptor) for descriptor in descriptors]

    @contextlib.contextmanager
    def conversation(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> Iterator[socket.socket]:
        """Send a request with a reply socket of its own and yield the end to read the answer from."""
        reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            try:
                self.send(request, [theirs.fileno(), *descriptors])
            finally:
                theirs.close()
            yield reply
        finally:
            reply.close()

    def _revive(self) -> None:
        with self._lock:
            alive = [launcher for launcher in self._processes if launcher.poll() is None]
            for dead in set(self._processes) - set(alive):
                log.error("launcher %d ended with status %d; starting another", dead.pid, dead.returncode)
            while len(alive) < self.count:
                alive.append(self._spawn())
            self._processes = alive

    def _spawn(self) -> subprocess.Popen[bytes]:
        """No preexec_fn: subprocess then uses vfork, which is safe beside threads.

        The executable is named through our own /proc entry, because close_fds has closed the child's copy by then.
        """
        numbers = [end.fileno() for end in self._ends]
        sockets = ",".join(map(str, numbers))
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOT, sockets, _monitor_program(), *_module_paths()],
            executable=f"/proc/{os.getpid()}/fd/{self._executable}",
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )


def _module_paths() -> list[str]:
    """Where a launcher finds this package, and prctl."""
    return [os.path.dirname(os.path.dirname(crio_native.__file__)), os.path.dirname(prctl.__file__)]


@functools.cache
def this_host(limited: bool) -> Host:
    """What plans have to know of this machine.  limited: stay within what a restricted host permits."""
    _, permitted, _ = syscalls.capget()
    least = -1000
    if limited and not permitted & capabilities.mask(["CAP_SYS_RESOURCE"]):
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

    clamp: give what the host permits, with a warning, where more is asked for (the CRI's way on a restricted host);
    otherwise such a request is refused.  create_timeout: seconds.  sync_log: see `monitor.client.arguments`.
    pivot: see `plan.container_plan`.
    """

    def __init__(
        self,
        launchers: Launchers,
        *,
        cgroup_manager: str = "cgroupfs",
        clamp: bool = True,
        create_timeout: float = 240.0,
        sync_log: bool = False,
        pivot: bool = True,
    ) -> None:
        super().__init__(cgroup_manager)
        self._pivot = pivot
        self._sync_log = sync_log
        self._launchers = launchers
        self._clamp = clamp
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
                this_host(self._clamp),
                cgroup_files=joined,
                cgroup_directories=hierarchy().directories(cgroup.path) if cgroup else {},
                cgroup_comes=cgroup is not None,
                seccomp=_compiled(linux.get("seccomp")),
                pause_program=(container.pause_program or _monitor_program()) if container.pause else "",
                pivot=self._pivot,
            )
            created = self._launch(container, plan, cgroup)
            late_hooks.record(container.run_dir, hooks, {**state_of(container), "pid": created.pid})
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
        except AlreadyExists:
            self.delete(container.id, run_dir, "")  # the group is somebody else's
            raise
        except BaseException:
            self.delete(container.id, run_dir, cgroups_path)
            raise
        return Process(created["pid"], process.start_time(created["pid"]) or 0, created["monitor"])

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
        _leave_resctrl(container_id, run_dir)
        late_hooks.run_poststop(self._launchers, run_dir, container_id)

    def exec(self, container_id: str, process_: Process, cgroups_path: str, request: ExecSpec) -> BuiltinExec:
        target = self._targets.of(container_id, process_, lambda: self._cgroup(cgroups_path))
        asked = (container_id, cgroups_path, target.namespaces)
        packet = self._exec_packets.packet(asked, request, lambda: self._exec_packet(container_id, target, request))
        return start_exec(self._launchers.hand_on, container_id, packet, request, target)

    def _exec_packet(self, container_id: str, target: Target, request: ExecSpec) -> bytes:
        own_user = bool(target.namespaces & syscalls.CLONE_NEWUSER)
        plan = exec_plan(
            replace(request, process=self._permitted(request.process, container_id, own_user)),
            this_host(self._clamp),
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
        permitted = this_host(self._clamp).permitted
        excess = {name for names in sets.values() for name in names or () if not permitted >> _number(name) & 1}
        if not excess or not self._clamp or own_user:
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


@functools.cache
def _monitor_program() -> str:
    return str(monitor.binary_path())


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
