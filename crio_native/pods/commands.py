"""What a command inside a container takes over from it: read from config.json once, for probes come every second."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

from crio_native.errors import Internal
from crio_native.oci import seccomp
from crio_native.pods.records import Layout

CONTAINERS = 256  # so many are remembered, at a few KiB each
_FOR_EVERY_PROCESS = ("personality", "memoryPolicy")


@dataclass(frozen=True, slots=True)
class Heritage:
    """process: as config.json has it.  linux: what of it holds for every process of the container."""

    process: Mapping[str, Any]
    seccomp: Mapping[str, Any] | None
    linux: Mapping[str, Any]


class Heritages:
    """Those of the containers that had commands lately; a container's never changes."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: LRUCache[str, Heritage] = LRUCache(CONTAINERS)
        self._lock = threading.Lock()

    def of(self, container_id: str) -> Heritage:
        with self._lock:
            known = self._known.get(container_id)
        if known is None:
            known = self._read(container_id)
            with self._lock:
                self._known[container_id] = known
        return known

    def _read(self, container_id: str) -> Heritage:
        path = self._layout.bundle(container_id) / "config.json"
        try:
            config = json.loads(path.read_bytes())
            process, linux = config["process"], config["linux"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise Internal(
                f"{path} is damaged ({error}): the container goes on, but no command can be run in it; replace it"
            ) from None
        profile = linux.get("seccomp")
        return Heritage(
            process,
            seccomp.share(profile) if profile else None,
            {name: linux[name] for name in _FOR_EVERY_PROCESS if name in linux},
        )
