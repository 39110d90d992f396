"""What pods and containers use now: readings of cgroups, networks and writable layers.

A reading is taken when somebody asks, or not older than the configured period.  Besides, what a single reading cannot
tell is kept: the rate of CPU use needs two, and to measure a writable layer is a walk over it, bounded, whose result
serves for a while.  What the figures are called on the wire is `cri`'s.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache, TTLCache

from crio_native.errors import CrioError
from crio_native.images.roots import UPPER, VOLUMES
from crio_native.linux.cgroup import cgroup_of
from crio_native.oci.runtime import Stats
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState, Pod
from crio_native.pods.trees import disk_usage
from crio_native.pods.values import NamespaceMode

_LAYER_SECONDS = 15.0
_SECOND = 10**9
_CACHED = 4096
_NET_DEV_MAX = 1 << 20  # bytes; a container may make interfaces


@dataclass(frozen=True, slots=True)
class Layer:
    """A writable layer, with the volumes that the image declares.  at: when it was measured, in ns."""

    at: int
    used: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Interface:
    """Counters of one network interface, since it was made."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


@dataclass(frozen=True, slots=True)
class ContainerUsage:
    """reading: None for a container that does not run.  nano_cores: CPU time in ns for each second since the last
    reading; None for the first."""

    container: Container
    reading: Stats | None = None
    nano_cores: int | None = None
    layer: Layer | None = None


@dataclass(frozen=True, slots=True)
class PodUsage:
    """interfaces: without the loopback; () where the pod has no network of its own, or no process to look from."""

    pod: Pod
    at: int
    reading: Stats | None = None
    nano_cores: int | None = None
    interfaces: tuple[Interface, ...] = ()
    containers: tuple[ContainerUsage, ...] = ()


class StatsReader:
    """Thread-safe; its calls block.  period: seconds that a reading may serve for; 0 to read whenever asked."""

    def __init__(self, node: Node, period: float) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._last: LRUCache[str, tuple[int, int]] = LRUCache(maxsize=_CACHED)
        self._layers: TTLCache[str, Layer] = TTLCache(maxsize=_CACHED, ttl=_LAYER_SECONDS)
        self._recent: TTLCache[str, ContainerUsage | PodUsage] = TTLCache(maxsize=_CACHED, ttl=period)

    def container(self, container: Container) -> ContainerUsage:
        """Of a container that does not run, only the writable layer."""
        with self._lock:
            recent = self._recent.get(container.id)
        if isinstance(recent, ContainerUsage) and recent.container is container:
            return recent
        reading = self._container_reading(container) if container.state == ContainerState.RUNNING else None
        usage = ContainerUsage(container, reading, self._rate(container.id, reading), self._layer(container.id))
        with self._lock:
            self._recent[container.id] = usage
        return usage

    def pod(self, pod: Pod) -> PodUsage:
        """With its running containers."""
        with self._lock:
            recent = self._recent.get(pod.id)
        if isinstance(recent, PodUsage) and recent.pod is pod:
            return recent
        running = [c for c in self._node.store.of_pod(pod.id) if c.state == ContainerState.RUNNING]
        containers = tuple(self.container(container) for container in running)
        reading = self._pod_reading(pod, containers)
        usage = PodUsage(
            pod, time.time_ns(), reading, self._rate(pod.id, reading), self._interfaces(pod, running), containers
        )
        with self._lock:
            self._recent[pod.id] = usage
        return usage

    def _container_reading(self, container: Container) -> Stats | None:
        try:
            pod = self._node.store.get(Pod, container.pod_id)
            return self._node.executor(pod).stats(container.id, container.cgroup)
        except (CrioError, OSError):
            return None  # it ended just now

    def _pod_reading(self, pod: Pod, containers: Iterable[ContainerUsage]) -> Stats | None:
        """The pod's own cgroup, which the caller named; where it named none, several pods share one, and the pod's
        figures are the sum of its containers'."""
        if not pod.config.linux.cgroup_parent:
            return _sum([usage.reading for usage in containers if usage.reading is not None])
        manager = self._node.settings.cgroup_manager
        child = cgroup_of(self._node.cgroup_path(pod.cgroup, pod.id), manager).path
        try:
            return Stats(**cgroup_of(os.path.dirname(child)).stats())
        except (CrioError, OSError):
            return None

    def _rate(self, object_id: str, reading: Stats | None) -> int | None:
        if reading is None or reading.cpu_usage is None:
            return None
        with self._lock:
            last = self._last.get(object_id)
            self._last[object_id] = reading.timestamp, reading.cpu_usage
        if last is None or reading.timestamp <= last[0]:
            return None
        return max(reading.cpu_usage - last[1], 0) * _SECOND // (reading.timestamp - last[0])

    def _layer(self, container_id: str) -> Layer | None:
        with self._lock:
            known = self._layers.get(container_id)
        if known is None:
            bundle = self._node.layout.bundle(container_id)
            try:
                found = [disk_usage(bundle / UPPER)]
                if (bundle / VOLUMES).exists():
                    found.append(disk_usage(bundle / VOLUMES))
            except FileNotFoundError:
                return None
            known = Layer(time.time_ns(), sum(used for used, _ in found), sum(inodes for _, inodes in found))
            with self._lock:
                self._layers[container_id] = known
        return known

    def _interfaces(self, pod: Pod, running: Iterable[Container]) -> tuple[Interface, ...]:
        """As a process of the pod sees them: to enter the namespace ourselves is not for a process with threads."""
        if pod.config.namespaces.network is NamespaceMode.NODE:
            return ()
        pids = [container.process.pid for container in running if container.process is not None]
        pids += [pod.infra.pid] if pod.infra is not None else []
        try:
            namespace = os.stat(self._node.layout.pins(pod.id)["net"])
        except OSError:
            return ()
        for pid in pids:
            try:
                # The container may have moved to another namespace, or its pid to another process.
                if os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), namespace):
                    return parse_net_dev(_bounded(f"/proc/{pid}/net/dev"))
            except OSError:
                continue
        return ()


def parse_net_dev(text: str) -> tuple[Interface, ...]:
    """The interfaces of a /proc/PID/net/dev (proc_net(5)), but the loopback."""
    found = []
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        counts = rest.split()
        if colon and len(counts) == 16 and name.strip() != "lo":
            rx, tx = map(int, counts[:4]), map(int, counts[8:12])
            found.append(Interface(name.strip(), *rx, *tx))
    return tuple(found)


def _bounded(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(_NET_DEV_MAX).rpartition(b"\n")[0].decode("ascii", "replace")


def _sum(readings: list[Stats]) -> Stats | None:
    """Of what adds up; a limit or a pressure does not."""
    if not readings:
        return None
    added: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(Stats) if f.name not in ("timestamp", "memory_limit", "extra")):
        values = [value for reading in readings if (value := getattr(reading, name)) is not None]
        added[name] = sum(values) if values else None
    return Stats(timestamp=max(reading.timestamp for reading in readings), **added)
