"""What every OCI runtime offers to `pods/`: the interface, and the values that cross it.

Here belong the `Runtime` protocol and its plain data.  Implementations live beside this file (`builtin/`, later
`external` and `shim`).  All methods are synchronous, thread-safe and may block for milliseconds; none is called on
the event loop.  A container's directory is ``run_dir``: mode 0700, on tmpfs, made by the caller before `create` and
removed by the caller after `delete`; monitor and launcher write in it what is true of processes.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from crio_native.errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True, slots=True)
class Overlay:
    """A layered root file system that the runtime mounts inside the container's own mount namespace.

    base: directory that the lower names are relative to (short names keep the mount data under one page).
    lowers: layer directories relative to base, topmost first.  upper, work: absolute, on one file system, both
    existing; upper "" makes a read-only root of the lowers alone.  mapped: the lowers' owners are shown as the
    container's user namespace maps them; upper has the host's numbers.  options: further mount data, as overlayfs
    itself has it ("metacopy=on", "volatile").  flags: MS_* of the mount.
    """

    base: str
    lowers: Sequence[str]
    upper: str
    work: str
    mapped: bool = False
    options: Sequence[str] = ()
    flags: int = 0

    def data(self, label: str = "", base: str = "") -> str:
        """The mount data.  label: the files' SELinux label.  base: put before each lower name where the one who mounts
        stands elsewhere.  Raises InvalidArgument for a path that the kernel would take apart."""
        for name in (self.base, self.upper, self.work):
            if set(name) & set(":,\\"):
                raise InvalidArgument("root.path", name, "an overlay directory's path may not contain ':', ',' or '\\'")
        prefix = f"{base}/" if base else ""
        parts = ["lowerdir=" + ":".join(f"{prefix}{lower}" for lower in self.lowers)]
        if self.upper:
            parts += [f"upperdir={self.upper}", f"workdir={self.work}"]
        parts += self.options
        if label:
            parts.append(f'context="{label}"')
        return ",".join(parts)


@dataclass(frozen=True, slots=True)
class UserRequest:
    """Who the command runs as, in the image's or the pod's words; the init resolves it inside the root file system.

    user: name, number, or "" (root); "user:group" as an image config has it.  group: name or number, "" for the
    user's own.  ASCII digits are always a number.  supplementary: added to the groups that the image's /etc/group gives
    (`merge`), or instead of them.
    """

    user: str = ""
    group: str = ""
    supplementary: Sequence[int] = ()
    merge: bool = True


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """All that `create` needs to know.

    spec: a config.json as parsed JSON (runtime-spec 1.3); `root.path` is an existing directory, on which `overlay`
    (when given) is mounted in the container's mount namespace.  `linux.cgroupsPath` names the cgroup.
    log_path: CRI log file, "" for none.  tty comes from spec.process.terminal.
    user: when given it overrides spec.process.user, and HOME is set from the passwd entry unless env has it.
    journal: the container's name in the systemd journal, which then gets its output too; "" for none.
    pause: the command is the monitor program's own `pause` mode, exec'ed by descriptor; the root may be empty.
    pause_program: a copy of that program to exec instead, because a label of SELinux may not begin with the host's own.
    """

    id: str
    spec: Mapping[str, Any]
    bundle: Path
    run_dir: Path
    overlay: Overlay | None = None
    log_path: str = ""
    log_size_max: int = -1
    journal: str = ""
    stdin: bool = False
    stdin_once: bool = False
    user: UserRequest | None = None
    pause: bool = False
    pause_program: str = ""


@dataclass(frozen=True, slots=True)
class ResolvedUser:
    """The numbers that a UserRequest came to."""

    uid: int
    gid: int
    groups: Sequence[int] = ()
    home: str = "/"


@dataclass(frozen=True, slots=True)
class Process:
    """A live process of ours: pid in the daemon's PID namespace and its start time (field 22 of /proc/PID/stat).

    The pair identifies it for ever: a reused pid has another start time.
    """

    pid: int
    start_time: int
    monitor_pid: int = 0
    user: ResolvedUser | None = None


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended.  code: 0..255, 128+signal when a signal ended it.  finished_at: ns since the epoch."""

    code: int
    signal: int = 0
    oom_killed: bool = False
    finished_at: int = 0


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A process to run inside a running container.

    process: an OCI `process` object (args, env, cwd, user, capabilities, ...), complete: nothing is inherited from
    the container's own.  seccomp: the container's `linux.seccomp` object, None for none.  linux: the whole of its
    `linux` object, whose personality and memory policy hold for every process.  stdin, stdout, stderr: the
    caller's descriptors, -1 for /dev/null; still the caller's after the call.  With `process.terminal` they are all -1.
    shared_pids: whether processes of other containers are in its PID namespace.
    waits: for the command to run.  False where an executor need not: a start that fails is then told by the session's
    `result`, and `pid` and `terminal` are unknown.
    """

    process: Mapping[str, Any]
    seccomp: Mapping[str, Any] | None = None
    linux: Mapping[str, Any] = field(default_factory=dict)
    stdin: int = -1
    stdout: int = -1
    stderr: int = -1
    shared_pids: bool = False
    waits: bool = True


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """A running container to be saved, and where to.

    spec: its config.json.  root: its root file system as its bundle names it.  images, log: existing directories.
    seconds: until it is given up; None for no limit.
    """

    id: str
    process: Process
    cgroups_path: str
    spec: Mapping[str, Any]
    root: Path
    images: Path
    log: Path
    seconds: float | None = None


class ExecSession(Protocol):
    """A running exec.  `fileno()` polls readable when the process has ended (or its launcher died).

    terminal: the master of its pty, which is the caller's to close; -1 without `process.terminal`.
    """

    pid: int
    terminal: int

    def fileno(self) -> int: ...

    def result(self) -> ExitStatus:
        """The exit status; blocks until there is one.  Raises Unavailable when the launcher died first, and what
        `Runtime.exec` raises if that did not wait for the start."""

    def resized(self, height: int, width: int) -> None:
        """The caller has set its terminal's size: pass that on, where the terminal is not the process's own."""

    def kill(self) -> None:
        """SIGKILL to the whole process group.  Nothing happens when it has ended."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Stats:
    """One reading of a container's cgroup; times in ns, sizes in bytes; None where the host cannot tell."""

    timestamp: int
    cpu_usage: int | None = None
    memory_usage: int | None = None
    memory_working_set: int | None = None
    memory_rss: int | None = None
    memory_limit: int | None = None
    page_faults: int | None = None
    major_page_faults: int | None = None
    swap_usage: int | None = None
    pids: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an executor is and can do, as it tells itself.  features: its OCI features document, {} for none."""

    version: str = ""
    recursive_read_only_mounts: bool = False
    user_namespaces: bool = False
    features: Mapping[str, Any] = field(default_factory=dict)


class Freezer(Protocol):
    """A container that can be paused.  Each call raises StepFailed when it cannot, NotFound when it has gone."""

    def frozen(self) -> bool: ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def frozen_ancestors(self) -> list[str]:
        """What keeps it stopped that `thaw` does not: the directories of frozen groups above its own."""


def check_not_paused(container_id: str, group: Freezer) -> None:
    """Raises FailedPrecondition for a paused container: a command in it would be stopped as it is born."""
    if group.frozen():
        raise FailedPrecondition(f"cannot exec in a paused container: {container_id}; unpause it first")


class Runtime(Protocol):
    """A runtime handler's executor."""

    def abilities(self) -> Abilities:
        """Ask whether and what it can do; may take a second.  Raises CrioError with the reason when it cannot run."""

    def create(self, container: ContainerSpec) -> Process:
        """Make the container up to, not including, its command.

        Raises StepFailed with the failing step; then nothing is left (process, cgroup, mount), `run_dir` apart.
        """

    def start(self, container_id: str, run_dir: Path) -> None:
        """Let the command run.  Returns when execve succeeded; raises StartFailed when it did not (and the
        container has then ended, with an exit file)."""

    def watch(self, container_id: str, run_dir: Path) -> socket.socket:
        """A socket that becomes readable when the container ends, or when its monitor dies (EOF).

        Pass it to `read_exit`.  Raises NotFound when no monitor serves run_dir any more (then see `exit_status`).
        """

    def read_exit(self, watch: socket.socket) -> ExitStatus | None:
        """What `watch` brought; None when the monitor died without telling."""

    def exit_status(self, run_dir: Path) -> ExitStatus | None:
        """The recorded end of a container, from its exit file; None while it lives."""

    def is_alive(self, process: Process) -> bool:
        """Whether exactly this process still exists and is not a zombie."""

    def kill(self, container_id: str, run_dir: Path, signal: int) -> None:
        """Signal the init.  Raises NotFound when the container has ended."""

    def delete(self, container_id: str, run_dir: Path, cgroups_path: str) -> None:
        """Remove what is left of an ended container, a half-made one, or one that never was: processes, monitor,
        cgroup.  Idempotent; kills what still lives."""

    def exec(self, container_id: str, process: Process, cgroups_path: str, request: ExecSpec) -> ExecSession:
        """Start a process in the running container `process`.  Raises StartFailed when execve refuses, StepFailed."""

    def attach(self, container_id: str, run_dir: Path, *, stdin: bool) -> socket.socket:
        """The container's streams from now on, as packets (`monitor.client.attach`).

        Raises NotFound, ResourceExhausted.
        """

    def resize(self, container_id: str, run_dir: Path, height: int, width: int) -> None:
        """Set the size of the container's terminal.  Raises NotFound, StepFailed when it has none."""

    def reopen_log(self, container_id: str, run_dir: Path) -> None: ...

    def update(self, container_id: str, cgroups_path: str, resources: Mapping[str, Any]) -> None:
        """Apply an OCI `linux.resources` object to the live cgroup; only the fields present change."""

    def stats(self, container_id: str, cgroups_path: str) -> Stats: ...

    def freezer(self, container_id: str, cgroups_path: str) -> Freezer: ...

    def checkpoint(self, checkpoint: CheckpointSpec) -> None:
        """Write a container's processes into files (CRIU's images), and leave it frozen: its other files are to be read
        as they were then.

        Raises FailedPrecondition for one that cannot be saved, StepFailed with CRIU's words, DeadlineExceeded,
        Unimplemented; then it goes on.
        """

    def restore(self, container: ContainerSpec, images: Path) -> Process:
        """`create`, of processes that a checkpoint has; `start` lets them go on.

        The images may be anybody's: processes that are less isolated than the configuration asks for are refused.
        Raises as `create`, and as `criu.read`; Unimplemented.
        """
