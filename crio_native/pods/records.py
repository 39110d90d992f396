"""What the program knows of a pod and of a container: immutable records, and where their things are.

A change makes a new record, so whoever reads one (a List call, a statistics reader) needs no lock.  The life cycle that
makes the changes is in `sandboxes` and `containers`; keeping them is `store`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from crio_native.config.tables import RuntimeHandler
from crio_native.oci.runtime import Process, ResolvedUser
from crio_native.pods.values import ContainerConfig, PodConfig, Resources, UserNamespace


class PodState(StrEnum):
    """`creating` and `removing` are intents: after a crash such a pod is undone, whatever of it exists."""

    CREATING = "creating"
    READY = "ready"
    NOT_READY = "not-ready"
    REMOVING = "removing"


class ContainerState(StrEnum):
    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    REMOVING = "removing"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """`oci.runtime.Process` as it is kept."""

    pid: int = 0
    start_time: int = 0
    monitor_pid: int = 0
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    home: str = "/"

    @classmethod
    def of(cls, process: Process) -> ProcessRecord:
        user = process.user
        return cls(
            process.pid,
            process.start_time,
            process.monitor_pid,
            user.uid if user else None,
            user.gid if user else None,
            tuple(user.groups) if user else (),
            user.home if user else "/",
        )

    @property
    def user(self) -> ResolvedUser | None:
        if self.uid is None or self.gid is None:
            return None
        return ResolvedUser(self.uid, self.gid, self.groups, self.home)

    def process(self) -> Process:
        return Process(self.pid, self.start_time, self.monitor_pid, self.user)


@dataclass(frozen=True, slots=True)
class HandlerRecord:
    """What of a handler's configuration its living containers are managed with (see `config.tables.RuntimeHandler`)."""

    runtime_type: str = "builtin"
    runtime_path: str = ""
    runtime_root: str = ""
    runtime_config_path: str = ""
    monitor_path: str = ""
    monitor_cgroup: str = ""
    monitor_env: tuple[str, ...] = ()
    monitor_exec_cgroup: str = ""

    @classmethod
    def of(cls, handler: RuntimeHandler) -> HandlerRecord:
        return cls(**{name: getattr(handler, name) for name in cls.__dataclass_fields__})

    def settings(self) -> RuntimeHandler:
        return RuntimeHandler(**{name: getattr(self, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class ImageVolume:
    """What the image of a mount came to.  index: of the mount in the container's configuration."""

    index: int = 0
    image_id: str = ""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod sandbox.

    created_at: ns since the epoch.  claimed: a caller was told the id (an unclaimed pod answers the retry of the call
    that made it).  infra: the pause process of a pod that shares its PID namespace.  cgroup: its containers' parent.
    userns: the mappings of its own user namespace.  selinux_level: "" where it is not confined.
    executor: what of its handler's configuration it was made with.
    """

    id: str
    name: str
    config: PodConfig
    handler: str
    created_at: int
    hostname: str = ""
    cgroup: str = ""
    state: str = PodState.CREATING
    claimed: bool = False
    ips: tuple[str, ...] = ()
    infra: ProcessRecord | None = None
    executor: HandlerRecord | None = None
    userns: UserNamespace | None = None
    selinux_level: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    """A container.  Times are ns since the epoch, 0 for not yet; `resources` are those in force (updates included)."""

    id: str
    name: str
    pod_id: str
    config: ContainerConfig
    handler: str
    created_at: int
    image_id: str = ""
    image_ref: str = ""
    log_path: str = ""
    cgroup: str = ""
    image_volumes: tuple[ImageVolume, ...] = ()
    stop_signal: int = 15
    resources: Resources = field(default_factory=Resources)
    state: str = ContainerState.CREATING
    claimed: bool = False
    process: ProcessRecord | None = None
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""

    @property
    def live(self) -> bool:
        return self.state in (ContainerState.CREATED, ContainerState.RUNNING)


Record = Pod | Container


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a pod and of a container is: a function of its id, so that a row is enough to find it all.

    root survives a reboot, runroot does not, nor what is mounted on a `pod_dir`.  A container's `bundle` holds
    config.json, upper, work and rootfs; its `run_dir` what monitor and launcher write.
    """

    root: Path
    runroot: Path
    namespaces: Path
    logs: Path

    def directories(self) -> tuple[Path, ...]:
        """The directories that exist before the first pod."""
        return (
            self.root,
            self.root / "containers",
            self.root / "sandboxes",
            self.runroot,
            self.runroot / "containers",
            self.runroot / "sandboxes",
        )

    def bundle(self, container_id: str) -> Path:
        return self.root / "containers" / container_id

    def run_dir(self, container_id: str) -> Path:
        return self.runroot / "containers" / container_id

    def pod_dir(self, pod_id: str) -> Path:
        return self.root / "sandboxes" / pod_id

    def pod_run_dir(self, pod_id: str) -> Path:
        return self.runroot / "sandboxes" / pod_id

    def shm(self, pod_id: str) -> Path:
        return self.pod_run_dir(pod_id) / "shm"

    def pins(self, pod_id: str) -> Mapping[str, Path]:
        """Where namespaces are pinned, by kind: ``net``, ``ipc``, ``uts``, ``user``; a pod may not have them all."""
        return {kind: self.namespaces / f"{kind}ns" / pod_id for kind in ("net", "ipc", "uts", "user")}
