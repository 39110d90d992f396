"""Container statistics: readings of cgroups and of writable layers, with what a single reading cannot tell.

The kubelet's rate of CPU use needs two readings, so the last one is kept.  To measure a writable layer is a walk over
it: that is bounded, and its result serves for a while.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from cachetools import LRUCache, TTLCache

from crio_native.cri import messages
from crio_native.errors import CrioError
from crio_native.pods.containers import Containers
from crio_native.pods.records import Container, ContainerState, Layout
from crio_native.pods.trees import disk_usage

_LAYER_SECONDS = 15.0
_SECOND = 10**9


class StatsReader:
    """Thread-safe; its calls block."""

    def __init__(self, containers: Containers, layout: Layout) -> None:
        self._containers = containers
        self._layout = layout
        self._lock = threading.Lock()
        self._last: LRUCache[str, tuple[int, int]] = LRUCache(maxsize=4096)
        self._layers: TTLCache[str, tuple[int, int, int]] = TTLCache(maxsize=4096, ttl=_LAYER_SECONDS)

    def read(self, container: Container) -> Any:
        """A ContainerStats message; of a container that does not run only the writable layer."""
        stats = None
        if container.state == ContainerState.RUNNING:
            try:
                stats = self._containers.stats(container)
            except (CrioError, OSError):
                stats = None  # it ended just now
        rate = self._rate(container.id, stats.timestamp, stats.cpu_usage) if stats else None
        mountpoint = str(self._layout.root / "containers")
        return messages.container_stats(container, stats, rate, self._layer(container.id), mountpoint)

    def _rate(self, container_id: str, timestamp: int, usage: int | None) -> int | None:
        """CPU time in ns for each second since the last reading."""
        if usage is None:
            return None
        with self._lock:
            last = self._last.get(container_id)
            self._last[container_id] = timestamp, usage
        if last is None or timestamp <= last[0]:
            return None
        return max(usage - last[1], 0) * _SECOND // (timestamp - last[0])

    def _layer(self, container_id: str) -> tuple[int, int, int] | None:
        with self._lock:
            known = self._layers.get(container_id)
        if known is None:
            try:
                used, inodes = disk_usage(self._layout.bundle(container_id) / "upper")
            except FileNotFoundError:
                return None
            known = time.time_ns(), used, inodes
            with self._lock:
                self._layers[container_id] = known
        return known
