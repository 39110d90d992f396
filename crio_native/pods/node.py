"""What a pod is made with: the node's parts, gathered once by the daemon and shared by `sandboxes` and `containers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from crio_native.config import Config
from crio_native.config.tables import RuntimeTable
from crio_native.errors import InvalidArgument
from crio_native.images import ImageStore
from crio_native.network import PodNetwork
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.runtime import Runtime
from crio_native.pods.cgroup_parents import CgroupParents
from crio_native.pods.exits import ExitWatcher
from crio_native.pods.handlers import Handlers
from crio_native.pods.host import Host
from crio_native.pods.io_classes import BlockIo
from crio_native.pods.locks import KeyedLocks
from crio_native.pods.profiles import SeccompProfiles
from crio_native.pods.records import Container, Layout, Pod
from crio_native.pods.seccomp_notifier import Notifiers
from crio_native.pods.store import Store

Stage = Callable[[str], None]
"""Told what a long act is doing now, for the error of a call that runs out of time."""


@dataclass(slots=True)
class Node:
    """namespaces: who makes and pins them.  workers: where ends are cleaned up after.

    config: replaced as a whole by a reload, so whoever reads it twice may meet two.  reloaded: how the last one went.
    All else stays for the life of the daemon.
    """

    config: Config
    host: Host
    layout: Layout
    store: Store
    images: ImageStore
    network: PodNetwork
    namespaces: Launchers
    handlers: Handlers
    profiles: SeccompProfiles
    exits: ExitWatcher
    workers: ThreadPoolExecutor
    block_io: BlockIo = field(default_factory=BlockIo)
    locks: KeyedLocks = field(default_factory=KeyedLocks)
    reloaded: Mapping[str, Any] = field(default_factory=dict)
    notifiers: Notifiers = field(init=False)
    parents: CgroupParents = field(init=False)

    def __post_init__(self) -> None:
        self.notifiers = Notifiers(self.layout.runroot / "seccomp")
        self.parents = CgroupParents(self.layout.runroot / "cgroup-parents.json")

    @property
    def settings(self) -> RuntimeTable:
        """The configuration's part about making pods and containers."""
        return self.config.runtime

    def executor(self, pod: Pod) -> Runtime:
        """Who runs a pod's containers: its handler as it was when the pod was made."""
        return self.handlers.of(pod.handler, pod.executor)

    def executor_of(self, container: Container) -> Runtime:
        """The same of one of its containers.  Raises NotFound."""
        return self.executor(self.store.get(Pod, container.pod_id))

    def cgroup_path(self, parent: str, object_id: str) -> str:
        """A container's cgroup in the words of the cgroup manager."""
        if self.settings.cgroup_manager == "systemd":
            return f"{parent}:crio:{object_id}"
        return f"{parent}/crio-{object_id}"

    def cgroup_parent(self, asked: str) -> str:
        """The pod's cgroup, checked.  Raises InvalidArgument."""
        field = "config.linux.cgroup_parent"
        if ".." in asked.split("/") or len(asked) > 1024 or any(c.isspace() for c in asked):
            raise InvalidArgument(field, asked, "must be a plain path or slice name")
        if self.settings.cgroup_manager == "systemd":
            if asked and not asked.endswith(".slice"):
                raise InvalidArgument(field, asked, "must be a slice, because crio.runtime.cgroup_manager is systemd")
            return asked.rsplit("/", 1)[-1] or "system.slice"
        if asked and not asked.startswith("/"):
            raise InvalidArgument(field, asked, "must be an absolute cgroup path, because cgroup_manager is cgroupfs")
        return asked.rstrip("/") or "/crio-native"
