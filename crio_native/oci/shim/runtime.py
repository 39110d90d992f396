"""The Runtime (see `oci.runtime`) of handlers of runtime_type "vm": containers that a pod's shim makes.

What is true of a container is in its run_dir, as for other runtimes: `control` and `exit` are its monitor's, `shim`
is our record of the shim.  The pod's first container is its sandbox: a shim that runs virtual machines boots one for
it.  What a shim that has died, or does not answer, leaves behind is removed without it: by its program's own verb
`delete`, and by the container's cgroup.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal as signals
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from crio_native.api.shim.v1 import task_pb2
from crio_native.config.tables import RuntimeHandler
from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    StartFailed,
    Unavailable,
    Unimplemented,
)
from crio_native.linux import process
from crio_native.monitor import client as monitor
from crio_native.oci import spec as specs
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.monitored import Monitored
from crio_native.oci.runtime import Abilities, CheckpointSpec, ContainerSpec, ExecSpec, Process, Stats
from crio_native.oci.shim import bootstrap, bundle, executing, program, statistics
from crio_native.oci.shim.events import Events, mark_oom
from crio_native.oci.shim.loop import Loop
from crio_native.oci.shim.pod import PodShim
from crio_native.oci.shim.records import Record
from crio_native.oci.shim.task import End, Tasks

log = logging.getLogger(__name__)

MONITOR_SECONDS = 10.0
SHUTDOWN_SECONDS = 5.0  # for a shim that was told to end
KILL_SECONDS = 10.0  # for a container that got SIGKILL to end
SANDBOX_ANNOTATION = "io.kubernetes.cri-o.SandboxID"


class ShimRuntime(Monitored):
    """runs: the directory of all run_dirs, by container id.  cgroup_manager: see `linux.cgroup`."""

    def __init__(
        self, name: str, settings: RuntimeHandler, launchers: Launchers, runs: Path, *, cgroup_manager: str
    ) -> None:
        super().__init__(cgroup_manager)
        self._name, self._settings, self._launchers, self._runs = name, settings, launchers, runs
        self._loop = Loop()
        self._workers = ThreadPoolExecutor(4, "shim")
        self._pods: dict[str, PodShim] = {}
        self._lock = threading.Lock()
        self._events: Events | None = None

    @property
    def program(self) -> str:
        """The shim's program; "" when there is none."""
        with contextlib.suppress(CrioError):
            return bootstrap.find_program(self._name, self._settings.runtime_path)
        return self._settings.runtime_path

    def abilities(self) -> Abilities:
        shim = self._shim()
        bootstrap.check_virtualisation(shim.path)
        config = self._settings.runtime_config_path
        if config and not os.path.isfile(config):
            raise NotFound("shim configuration", config, "runtime_config_path names no file")
        return Abilities(version=bootstrap.version_of(shim, "/"))

    def create(self, container: ContainerSpec) -> Process:
        specs.validate(container.spec)
        if "user" in specs.namespace_paths(container.spec):
            raise Unimplemented("a pod with a user namespace cannot have a handler of runtime_type vm")
        linux = container.spec.get("linux") or {}
        pod_id = container.id if container.pause else _pod_of(container)
        record = Record(pod_id, str(container.bundle), linux.get("cgroupsPath", ""))
        record.write(container.run_dir)  # before anything is made, for whoever has to undo it
        try:
            return self._make(container, record)
        except BaseException:
            try:
                self.delete(container.id, container.run_dir, record.cgroup)
            except (CrioError, OSError) as error:  # why it could not be made is the better news
                log.error("container %s could not be cleaned up after its creation failed: %s", container.id, error)
            raise

    def _make(self, container: ContainerSpec, record: Record) -> Process:
        root = container.bundle / "rootfs"
        if container.overlay is not None:
            bundle.mount_root(container.overlay, root, (container.spec.get("linux") or {}).get("mountLabel", ""))
        if container.pause:
            bundle.place_pause(root)
        user = bundle.find_user(container, root)
        spec = bundle.complete(container, user, record.pod_id)
        bundle.write_config(container.bundle / "config.json", spec)
        pod = self._start_shim(container, record) if container.pause else self._pod(record.pod_id)
        terminal = bool(spec["process"].get("terminal"))
        streams = bundle.make_pipes(container.run_dir, stdin=container.stdin, terminal=terminal)
        monitor_pid = self._start_monitor(container)
        pid = pod.tasks().create(
            container.id,
            str(container.bundle),
            streams,
            config_path=self._settings.runtime_config_path,
            timeout=float(self._settings.container_create_timeout),
        )
        started = process.start_time(pid)
        if started is None:
            raise Internal(
                f"the shim says that container {container.id} is process {pid}, but there is no such process"
            )
        if container.pause:
            record.shim_pid = pod.tasks().connect(container.id)
            record.shim_start_time = process.start_time(record.shim_pid) or 0
        record.made = True
        record.write(container.run_dir)
        return Process(pid, started, monitor_pid, user)

    def start(self, container_id: str, run_dir: Path) -> None:
        tasks = self.tasks(container_id)
        try:
            tasks.start(container_id)
        except (Unavailable, DeadlineExceeded):
            raise
        except CrioError as error:
            self._tell(container_id, End(128, 0))
            raise StartFailed("start", executing.number_of(str(error)), "", str(error)) from None
        if (run_dir / "stdin").exists():
            tasks.close_stdin(container_id)

    def watch(self, container_id: str, run_dir: Path) -> socket.socket:
        sock = monitor.watch(run_dir)
        try:
            self._pod_of(container_id).watch(container_id)
        except CrioError as error:
            sock.close()
            self._tell(container_id, None)
            raise NotFound("shim", container_id, str(error)) from None
        return sock

    def kill(self, container_id: str, run_dir: Path, signal: int) -> None:
        """A shim that does not answer a SIGKILL is given up, and so are all containers of its pod."""
        try:
            self.tasks(container_id).kill(container_id, signal)
        except Unavailable as error:
            raise NotFound("shim", container_id, str(error)) from None  # its containers' end is noticed elsewhere
        except DeadlineExceeded as error:
            if signal != signals.SIGKILL:
                raise
            log.error("container %s: %s; the shim is killed", container_id, error)
            self._kill_shim(self._record(container_id).pod_id)

    def delete(self, container_id: str, run_dir: Path, cgroups_path: str) -> None:
        record = Record.read(run_dir)
        if record is None:
            return  # nothing was made, or all is removed
        place = Path(record.bundle)
        try:
            self._delete_task(container_id)
            if container_id == record.pod_id:
                self._shut_down(container_id)
        except (Unavailable, DeadlineExceeded, Internal, NotFound) as error:
            if record.made:
                log.warning("container %s is removed without its shim: %s", container_id, error)
            self._delete_dead(container_id, record)
        if container_id == record.pod_id:
            self._forget_pod(record)
        with contextlib.suppress(NotFound), monitor.Connection.connect(run_dir) as connection:
            connection.lost()
        self._end(container_id, run_dir, self._cgroup(cgroups_path))
        bundle.remove_pipes(run_dir)
        bundle.unmount_root(place / "rootfs")
        cgroup = self._cgroup(cgroups_path)
        if cgroup is not None:
            cgroup.remove()
        Record.remove(run_dir)

    def exec(self, container_id: str, process: Process, cgroups_path: str, request: ExecSpec) -> executing.ShimExec:
        return executing.start(self.tasks(container_id), container_id, cgroups_path, request)

    def update(self, container_id: str, cgroups_path: str, resources: Mapping[str, Any]) -> None:
        self.tasks(container_id).update(container_id, resources)

    def stats(self, container_id: str, cgroups_path: str) -> Stats:
        return statistics.read(*self.tasks(container_id).stats(container_id))

    def freezer(self, container_id: str, cgroups_path: str) -> Pausing:
        return Pausing(self, container_id)

    def checkpoint(self, checkpoint: CheckpointSpec) -> None:
        raise Unimplemented(f"container {checkpoint.id} is a shim's, and a shim's containers have no checkpoint here")

    def restore(self, container: ContainerSpec, images: Path) -> Process:
        raise Unimplemented(f"a container of handler {self._name!r} cannot be made from a checkpoint; builtin can")

    def resize(self, container_id: str, run_dir: Path, height: int, width: int) -> None:
        self.tasks(container_id).resize(container_id, height, width)

    def _shim(self) -> bootstrap.Shim:
        path = bootstrap.find_program(self._name, self._settings.runtime_path)
        return bootstrap.Shim(self._launchers, path, self._events.path if self._events else "")

    def _hear(self) -> None:
        """Serve the events of shims, from the first pod on; with the lock held."""
        if self._events is None:
            path = self._runs.parent / f"events-{self._name}.sock"
            self._events = Events(path, self._loop, lambda container_id: mark_oom(self._runs, container_id))

    def _record(self, container_id: str) -> Record:
        record = Record.read(self._runs / container_id)
        if record is None:
            raise NotFound("shim of container", container_id, "it has been removed")
        return record

    def tasks(self, container_id: str) -> Tasks:
        """The task service of the container's shim.  Raises NotFound, Unavailable."""
        return self._pod_of(container_id).tasks()

    def _pod_of(self, container_id: str) -> PodShim:
        return self._pod(self._record(container_id).pod_id)

    def _pod(self, pod_id: str) -> PodShim:
        """The pod's shim; after a restart of the daemon it is found by its record."""
        with self._lock:
            pod = self._pods.get(pod_id)
            if pod is None:
                record = self._record(pod_id)
                address = record.address or bootstrap.left_address(Path(record.bundle))
                if address is None:
                    raise Unavailable(f"the shim of pod {pod_id} was never started")
                pod = self._pods[pod_id] = PodShim(pod_id, address, self._loop, self._workers, self._tell)
                self._hear()
                with contextlib.suppress(OSError):
                    pod.follow_log(Path(record.bundle) / "log")
            return pod

    def _start_shim(self, container: ContainerSpec, record: Record) -> PodShim:
        pod = PodShim(container.id, bootstrap.Address(""), self._loop, self._workers, self._tell)
        pod.follow_log(container.bundle / "log")
        with self._lock:
            self._pods[container.id] = pod
            self._hear()
        seconds = float(self._settings.container_create_timeout)
        pod.address = record.address = self._shim().start(container.id, container.bundle, seconds)
        record.write(container.run_dir)
        return pod

    def _start_monitor(self, container: ContainerSpec) -> int:
        line = [str(monitor.binary_path()), "remote", "--id", container.id, "--run-dir", str(container.run_dir)]
        line += ["--stdin"] if container.stdin else []
        line += ["--stdin-once"] if container.stdin_once else []
        line += ["--log", container.log_path] if container.log_path else []
        if container.log_path and container.log_size_max > 0:
            line += ["--log-size-max", str(container.log_size_max)]
        line += ["--journal", container.journal] if container.journal else []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            program.run(
                self._launchers, line, cwd="/", env={}, seconds=MONITOR_SECONDS, stdout=theirs.fileno(), stderr=2
            )  # it keeps our stderr, for what it can tell nobody else
            theirs.close()
            return int(monitor.read_reply(ours, MONITOR_SECONDS)["monitor"])

    def _tell(self, container_id: str, end: End | None) -> None:
        """Tell the container's monitor, which tells everybody else."""
        run_dir = self._runs / container_id
        try:
            with monitor.Connection.connect(run_dir) as connection:
                if end is None:
                    connection.lost()
                else:
                    connection.ended(end.code, end.finished_at, oom_killed=self._oom_killed(run_dir))
        except NotFound:
            pass  # it knows already
        except CrioError as error:
            log.error("the monitor of container %s cannot be told of its end: %s", container_id, error)

    def _oom_killed(self, run_dir: Path) -> bool:
        """As far as the shim has told, and the container's cgroup on this host does."""
        if (run_dir / "oom").exists():
            return True
        record = Record.read(run_dir)
        cgroup = self._cgroup(record.cgroup) if record else None
        return cgroup is not None and cgroup.events().get("oom_kill", 0) > 0

    def _delete_task(self, container_id: str) -> None:
        """Kill the container, if it lives, and have its shim forget it; nothing happens if it has."""
        tasks = self.tasks(container_id)
        with contextlib.suppress(NotFound):
            status = tasks.state(container_id).status
            if status in (task_pb2.PAUSED, task_pb2.PAUSING):
                tasks.resume(container_id)  # what is frozen does not die
            if status != task_pb2.STOPPED:
                end = tasks.wait(container_id)
                tasks.kill(container_id, signals.SIGKILL, everyone=True)
                try:
                    end.result(KILL_SECONDS)
                except FutureTimeout:
                    message = f"container {container_id} lives {KILL_SECONDS:g} s after its shim was told to kill it"
                    raise DeadlineExceeded(message) from None
            self._tell(container_id, tasks.delete(container_id))

    def _shut_down(self, pod_id: str) -> None:
        """End the pod's shim.  Raises DeadlineExceeded when it does not end."""
        pod = self._pod(pod_id)
        with contextlib.suppress(Unavailable):
            pod.tasks().shutdown(pod_id)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while time.monotonic() < deadline:
            try:
                pod.address.connect(0).close()
            except Unavailable:
                return
            time.sleep(0.01)
        raise DeadlineExceeded(f"the shim of pod {pod_id} does not end, though it was told to")

    def _forget_pod(self, record: Record) -> None:
        """The shim has ended: its connection goes, and the socket that one leaves which was killed."""
        with self._lock:
            pod = self._pods.pop(record.pod_id, None)
        if pod is not None:
            pod.close()
        if record.address is not None:
            path = record.address.address.removeprefix("unix://")
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    os.unlink(path)

    def _delete_dead(self, container_id: str, record: Record) -> None:
        """Clean up without a shim, as far as it goes; the container's cgroup is seen to by the caller."""
        self._kill_shim(record.pod_id)
        try:
            self._shim().delete(container_id, Path(record.bundle))
        except CrioError as error:
            if record.made:
                log.warning("container %s: %s", container_id, error)

    def _kill_shim(self, pod_id: str) -> None:
        """SIGKILL to a pod's shim, if there is one: a process that works in the pod's bundle, and is the shim's program
        or the process that called itself the shim when it was started."""
        record = Record.read(self._runs / pod_id)
        if record is None:
            return
        path = os.path.realpath(self.program)
        for pid in _working_in(record.bundle):
            known = pid == record.shim_pid and process.start_time(pid) == record.shim_start_time
            with contextlib.suppress(OSError):
                if known or _runs(pid, path):
                    os.kill(pid, signals.SIGKILL)


class Pausing:
    """See `oci.runtime.Freezer`."""

    def __init__(self, runtime: ShimRuntime, container_id: str) -> None:
        self._runtime, self._container_id = runtime, container_id

    def frozen(self) -> bool:
        state = self._runtime.tasks(self._container_id).state(self._container_id)
        return state.status in (task_pb2.PAUSED, task_pb2.PAUSING)

    def freeze(self) -> None:
        self._runtime.tasks(self._container_id).pause(self._container_id)

    def thaw(self) -> None:
        self._runtime.tasks(self._container_id).resume(self._container_id)

    def frozen_ancestors(self) -> list[str]:
        return []  # a shim's own affair, which its words have no place for


def _pod_of(container: ContainerSpec) -> str:
    annotation = (container.spec.get("annotations") or {}).get(SANDBOX_ANNOTATION)
    if not annotation:
        raise InvalidArgument("annotations", SANDBOX_ANNOTATION, "a shim's container must name its pod by it")
    return str(annotation)


def _working_in(directory: str) -> Iterator[int]:
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.readlink(f"/proc/{name}/cwd") == directory:
                yield int(name)


def _runs(pid: int, path: str) -> bool:
    """Whether a process was started from this program, or by an interpreter from this script."""
    if os.readlink(f"/proc/{pid}/exe") == path:
        return True
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return os.fsencode(path) in file.read(8192).split(b"\0")[:2]
