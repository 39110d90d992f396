"""`ExternalRuntime`: the `Runtime` whose containers an OCI runtime's program makes.

The program creates, starts, signals, updates and deletes; our monitor is the container's parent, holds its output and
tells its end.  The root file system is mounted where the bundle says, for the program to find, and unmounted when the
container is deleted.  A container that its program cannot delete any more (it was uninstalled, it hangs) is taken apart
without it: nothing of a container may depend on a file that an operator may remove.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import shutil
import signal as signals
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StartFailed,
    StepFailed,
    Unavailable,
    Unimplemented,
)
from crio_native.linux import mounts, process, syscalls
from crio_native.linux.cgroup import Cgroup
from crio_native.monitor import client as monitor
from crio_native.oci.builtin.execs import BuiltinExec
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.external.mapped_roots import MappedRoots, with_hosts_sysfs
from crio_native.oci.external.program import ACT_SECONDS, Program, words
from crio_native.oci.monitored import Monitored, monitor_arguments
from crio_native.oci.runtime import (
    Abilities,
    CheckpointSpec,
    ContainerSpec,
    ExecSpec,
    Overlay,
    Process,
    ResolvedUser,
)

log = logging.getLogger(__name__)

# What every runtime serves.  The fields of later versions are looked at by those that know them, whatever this says,
# but older ones refuse a document of a version that they do not know.
OCI_VERSION = "1.0.2"
EXEC_SECONDS = 30.0  # for a process in a container to be started
OBEY_SECONDS = 5.0  # for a container to end by SIGKILL, before the runtime is not believed


class ExternalRuntime(Monitored):
    """name, settings: the handler.  scratch: a directory of ours on tmpfs, for what a start needs, with a short path.
    bundle: where a container's is, by its id."""

    def __init__(
        self,
        name: str,
        settings: RuntimeHandler,
        table: RuntimeTable,
        launchers: Launchers,
        *,
        scratch: Path,
        bundle: Callable[[str], Path],
    ) -> None:
        super().__init__(table.cgroup_manager, settings.monitor_cgroup)
        self._settings = settings
        self._launchers = launchers
        self._scratch = scratch
        self._bundle = bundle
        self._mapped = MappedRoots(scratch.with_name("roots"))
        self._no_pivot = table.no_pivot
        self._program = Program(
            launchers,
            name=name,
            path=settings.runtime_path,
            root=settings.runtime_root or f"/run/{name}",
            env=settings.monitor_env,
            systemd_cgroup=table.cgroup_manager == "systemd",
        )

    @property
    def program(self) -> str:
        return self._program.path

    def abilities(self) -> Abilities:
        self._monitor()
        return self._program.abilities()

    def create(self, container: ContainerSpec) -> Process:
        for directory in (self._program.root, self._scratch):
            os.makedirs(directory, 0o700, exist_ok=True)
        _refuse_bytes(container.spec["process"])
        if container.overlay is not None and container.overlay.mapped:
            self._mapped.make(container.id)
        _mark(container.run_dir).write_text(self._program.root)
        cgroups_path = (container.spec.get("linux") or {}).get("cgroupsPath", "")
        try:
            return self._create(container, cgroups_path)
        except BaseException:
            self.delete(container.id, container.run_dir, cgroups_path)
            raise

    def _create(self, container: ContainerSpec, cgroups_path: str) -> Process:
        with self._monitor_groups(container.id, cgroups_path) as groups:
            request = self._create_request(container, self._cgroup(cgroups_path), groups)
            with self._launchers.conversation(request) as reply:
                try:
                    created = monitor.read_reply(reply, self._settings.container_create_timeout or None)
                except StepFailed as error:
                    raise self._in_words(error) from None
        told = created.get("init") or {}
        if said := words(str(told.get("words", "")).encode()):
            log.warning("container %s: %s says: %s", container.id, self.program, said)
        user = ResolvedUser(told["uid"], told["gid"], tuple(told["groups"]), told["home"]) if "uid" in told else None
        return Process(created["pid"], process.start_time(created["pid"]) or 0, created["monitor"], user)

    def _create_request(self, container: ContainerSpec, cgroup: Cgroup | None, groups: list[str]) -> dict[str, Any]:
        spec = {**container.spec, "ociVersion": OCI_VERSION}
        process_object = _said(spec.pop("process"))
        spec["linux"] = _said(spec.get("linux") or {})
        if container.overlay is not None and container.overlay.mapped:
            spec["root"] = {**spec["root"], "path": self._mapped.path(container.id)}
            spec["mounts"] = with_hosts_sysfs(spec)
        terminal = bool(process_object.get("terminal"))
        pid_file = f"{container.run_dir}/pid"
        line = ["create", "--bundle", str(container.bundle), "--pid-file", pid_file]
        line += ["--no-pivot"] if self._no_pivot else []
        return {
            "op": "external",
            "act": "create",
            "line": self._program.line(*line, container.id),
            "env": self._program.env,
            "root": _overlay(container.overlay, spec) if container.overlay else None,
            "rootfs": spec["root"]["path"],
            "user": _user(container),
            "spec": json.dumps(spec).encode(),
            "process": process_object,
            "config": f"{container.bundle}/config.json",
            "run_dir": str(container.run_dir),
            "pid_file": pid_file,
            "scratch": str(self._scratch),
            "terminal": terminal,
            "stdin": container.stdin,
            "groups": groups,
            "monitor": {
                "path": self._monitor(),
                "arguments": monitor_arguments(container, cgroup, sync_log=not self._settings.no_sync_log),
            },
        }

    def start(self, container_id: str, run_dir: Path) -> None:
        self._require_monitor(run_dir)
        try:
            self._program.act("start", container_id)
        except StepFailed as error:
            if self._program.status(container_id) == "running":
                raise FailedPrecondition(f"container {container_id} was started before") from error
            with contextlib.suppress(NotFound):
                self._signal(container_id, run_dir, 9)
            raise StartFailed.from_dict(error.to_dict()) from None

    def kill(self, container_id: str, run_dir: Path, signal: int) -> None:
        """By the runtime, which knows what a signal means to its kind of container; by the monitor where it fails.

        A container that outlives the runtime's SIGKILL was not sent one.
        """
        with contextlib.closing(self.watch(container_id, run_dir)) as ending:
            try:
                self._program.act("kill", container_id, str(int(signal)))
                if signal != signals.SIGKILL or _is_told(ending):
                    return
                problem: object = f"it lives {OBEY_SECONDS:g} s after"
            except CrioError as error:
                problem = error
            log.info("container %s: the runtime did not send signal %d: %s", container_id, signal, problem)
            self._signal(container_id, run_dir, signal)

    def _require_monitor(self, run_dir: Path) -> None:
        """Raises NotFound when the container has ended."""
        monitor.Connection.connect(run_dir).close()

    def _signal(self, container_id: str, run_dir: Path, signal: int) -> None:
        """Without the runtime.  Raises NotFound."""
        super().kill(container_id, run_dir, signal)

    def delete(self, container_id: str, run_dir: Path, cgroups_path: str) -> None:
        cgroup = self._cgroup(cgroups_path)
        self._end(container_id, run_dir, cgroup)
        if self._knows(container_id, run_dir):
            self._forget(container_id)
            _mark(run_dir).unlink(missing_ok=True)
        for group in (cgroup, self._monitor_group(container_id, cgroups_path)):
            if group is not None:
                group.kill()
                group.remove()
        _unmount(str(self._bundle(container_id) / "rootfs"))
        self._mapped.remove(container_id)

    def _knows(self, container_id: str, run_dir: Path) -> bool:
        """Whether our runtime, and not another handler's, may know the container."""
        try:
            return _mark(run_dir).read_text() == self._program.root
        except FileNotFoundError:
            return os.path.lexists(f"{self._program.root}/{container_id}")

    def _forget(self, container_id: str) -> None:
        """Have the runtime delete the container; what it cannot, we do: its processes have ended already."""
        try:
            ended = self._program.run(self._program.line("delete", "--force", container_id))
            problem = "" if ended.code == 0 else ended.words
        except CrioError as error:
            problem = str(error)
        state = f"{self._program.root}/{container_id}"
        if os.path.lexists(state):
            log.warning(
                "container %s: %s could not delete it, so its state is removed: %s", container_id, self.program, problem
            )
            shutil.rmtree(state)

    def exec(self, container_id: str, process_: Process, cgroups_path: str, request: ExecSpec) -> BuiltinExec:
        reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        streams = [request.stdin, request.stdout, request.stderr]
        given = [fd for fd in streams if fd >= 0]
        message = {
            "op": "external",
            "act": "exec",
            "line": self._program.line("exec", container_id),
            "env": self._program.env,
            "process": json.dumps(self._process(request.process, process_)).encode(),
            "scratch": str(self._scratch),
            "terminal": bool(request.process.get("terminal")),
            "stdio": [given.index(fd) if fd >= 0 else -1 for fd in streams],
            "groups": self._exec_groups(cgroups_path),
        }
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            try:
                self._launchers.send(message, [theirs.fileno(), *given])
            finally:
                theirs.close()
            started, terminal = _started(reply, f"starting a process in container {container_id}")
            if "error" in started:
                raise self._exec_failed(StepFailed.from_dict(started["error"]), process_)
        except BaseException:
            reply.close()
            raise
        return BuiltinExec(reply, pid=started["started"], terminal=terminal)

    def _exec_failed(self, error: StepFailed, process_: Process) -> StepFailed:
        if error.number:
            return error  # the runtime's program did not run
        failed = self._program.failed("exec", words(error.detail.encode()))
        if not self.is_alive(process_):
            return StepFailed("exec", errno.ESRCH, "", f"the container has ended; {failed.detail}")
        return StartFailed.from_dict(failed.to_dict())

    def _in_words(self, error: StepFailed) -> StepFailed:
        """What the runner tells of a `create`, with the runtime's words without their log's frame."""
        if error.step != "create" or error.number:
            return error
        return self._program.failed("create", words(error.detail.encode()))

    def _process(self, process_object: Mapping[str, Any], process_: Process) -> Mapping[str, Any]:
        """With exec_cpu_affinity "first": the process begins on the first CPU of the container's set."""
        if self._settings.exec_cpu_affinity != "first":
            return _said(process_object)
        first = min(os.sched_getaffinity(process_.pid))
        return {**_said(process_object), "execCPUAffinity": {"initial": str(first)}}

    def _exec_groups(self, cgroups_path: str) -> list[str]:
        cgroup = self._cgroup(cgroups_path)
        if self._settings.monitor_exec_cgroup != "container" or cgroup is None:
            return []
        return cgroup.procs_files()

    def update(self, container_id: str, cgroups_path: str, resources: Mapping[str, Any]) -> None:
        self._program.act("update", "--resources", "-", container_id, stdin=json.dumps(dict(resources)).encode())

    def pause(self, container_id: str) -> None:
        """Freeze every process of the container.  Raises StepFailed."""
        self._program.act("pause", container_id)

    def resume(self, container_id: str) -> None:
        self._program.act("resume", container_id)

    def checkpoint(self, checkpoint: CheckpointSpec) -> None:
        """By the runtime's own way to CRIU."""
        line = ["checkpoint", "--leave-running", "--file-locks", "--tcp-established", "--ext-unix-sk"]
        line += ["--image-path", str(checkpoint.images), "--work-path", str(checkpoint.log), checkpoint.id]
        self._program.act(*line, seconds=checkpoint.seconds or 10 * ACT_SECONDS)
        self.freezer(checkpoint.id, checkpoint.cgroups_path).freeze()

    def restore(self, container: ContainerSpec, images: Path) -> Process:
        raise Unimplemented(f"{self.program} is not asked to restore a checkpoint in this version; builtin can")

    def _monitor(self) -> str:
        """The monitor's program: ours, or what monitor_path names.  Raises NotFound, FailedPrecondition."""
        path = self._settings.monitor_path
        if not path:
            return str(monitor.binary_path())
        if not os.access(path, os.X_OK):
            raise FailedPrecondition(f"monitor_path {path!r} is not an executable file")
        return path

    @contextlib.contextmanager
    def _monitor_groups(self, container_id: str, cgroups_path: str) -> Iterator[list[str]]:
        """Where the monitor writes "0" to join its group, which is held open meanwhile."""
        group = self._monitor_group(container_id, cgroups_path)
        if group is None:
            yield []
            return
        group.create()
        try:
            yield group.procs_files()
        finally:
            group.release()


def _overlay(overlay: Overlay, spec: Mapping[str, Any]) -> dict[str, str]:
    label = (spec.get("linux") or {}).get("mountLabel", "")
    user = [each["path"] for each in spec["linux"]["namespaces"] if each["type"] == "user"] if overlay.mapped else [""]
    return {
        "base": overlay.base,
        "path": spec["root"]["path"],
        "data": overlay.data(label),
        "flags": overlay.flags,
        "user_namespace": user[0],
    }


def _started(reply: socket.socket, what: str) -> tuple[dict[str, Any], int]:
    """The runner's first packet, with the master of the process's terminal, -1 for none."""
    reply.settimeout(EXEC_SECONDS)
    try:
        data, descriptors, _, _ = socket.recv_fds(reply, 65536, 1)
    except TimeoutError:
        raise DeadlineExceeded(f"nothing within {EXEC_SECONDS:g} s while {what}") from None
    if not data:
        raise Unavailable(f"the process that ran the runtime ended while {what}")
    return json.loads(data), descriptors[0] if descriptors else -1


def _is_told(ending: socket.socket) -> bool:
    """Whether the end that is watched comes in time."""
    poll = select.poll()
    poll.register(ending, select.POLLIN)
    return bool(poll.poll(OBEY_SECONDS * 1000))


def _said(members: Mapping[str, Any]) -> dict[str, Any]:
    """Without empty strings: some runtimes take an empty label or profile for one that has to be set."""
    return {name: value for name, value in members.items() if value != ""}


def _user(container: ContainerSpec) -> dict[str, Any] | None:
    user = container.user
    if user is None:
        return None
    return {
        "user": user.user,
        "group": user.group,
        "supplementary": list(user.supplementary),
        "merge": user.merge,
    }


def _refuse_bytes(process_object: Mapping[str, Any]) -> None:
    """A config.json is UTF-8, and what is not would reach the command as another text."""
    for name in ("args", "env"):
        for index, text in enumerate(process_object.get(name) or ()):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise InvalidArgument(
                    f"process.{name}[{index}]",
                    text,
                    "is not UTF-8, which an OCI runtime needs; runtime_type builtin does not",
                )


def _mark(run_dir: Path) -> Path:
    """The file that exists while a runtime may know the container; it holds the root of that one's states."""
    return run_dir / "external"


def _unmount(path: str) -> None:
    while os.path.ismount(path):
        syscalls.umount2(path, mounts.MNT_DETACH)
