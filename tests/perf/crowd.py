"""Containers as a node makes them: many at once, and one with a filter and a pod's usual number of volumes.

The peer of the crowd is crun as an external handler of this program: launchers and monitor are the same, so what
differs is who makes the container.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime
from crio_native.oci.external.runtime import ExternalRuntime
from crio_native.oci.runtime import ContainerSpec, Process
from tests.perf.containers import TRUE, Ours, Timed, peer_run, rounds
from tests.perf.peers import SLEEP, Bundle, program
from tests.perf.report import Result, compare

CONTAINERS = 200
AT_ONCE = 8
VOLUMES = 30
REPEATS = 3  # of both crowds, in turn


class Maker(Protocol):
    """The part of `oci.runtime.Runtime` that a crowd is made by."""

    def create(self, container: ContainerSpec) -> Process: ...
    def start(self, container_id: str, run_dir: Path) -> None: ...
    def delete(self, container_id: str, run_dir: Path, cgroups_path: str) -> None: ...


class Crowd:
    """Containers that sleep, made by one runtime, each with a bundle and a run_dir of its own."""

    def __init__(self, name: str, runtime: Maker, bundle: Bundle, directory: Path) -> None:
        self.runtime, self.directory = runtime, directory / f"crowd-{name}"
        self.name, self.bundle = name, bundle
        self.specs: dict[str, dict[str, Any]] = {}  # by id
        self.directory.mkdir()

    def seconds(self) -> float:
        """To make and start all, AT_ONCE at a time; they are removed again, off the clock."""
        ids = [f"{self.name}-{number}" for number in range(CONTAINERS)]
        for container_id in ids:
            (self.directory / container_id / "run").mkdir(parents=True, mode=0o700)
            self.specs[container_id] = self._spec(container_id)
        with ThreadPoolExecutor(AT_ONCE) as workers:
            try:
                began = time.perf_counter()
                list(workers.map(self._make, ids))
                return time.perf_counter() - began
            finally:
                list(workers.map(self._remove, ids))

    def _spec(self, container_id: str) -> dict[str, Any]:
        spec = self.bundle.spec(SLEEP, cgroup=container_id)
        return {**spec, "root": {**spec["root"], "path": str(self.bundle.directory / "rootfs")}}

    def _make(self, container_id: str) -> None:
        place = self.directory / container_id
        self.runtime.create(
            ContainerSpec(
                id=container_id,
                spec=self.specs[container_id],
                bundle=place,
                run_dir=place / "run",
                log_path=str(place / "log"),
            )
        )
        self.runtime.start(container_id, place / "run")

    def _remove(self, container_id: str) -> None:
        place = self.directory / container_id
        self.runtime.delete(container_id, place / "run", self.specs[container_id]["linux"]["cgroupsPath"])
        for directory in (place / "run", place):
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()


def measure_crowd(launchers: Launchers, bundle: Bundle, directory: Path) -> list[Result]:
    """Containers a second: the best of a few rounds each, because what the machine does besides only takes away."""
    crun = ExternalRuntime(
        "crun",
        RuntimeHandler(runtime_type="oci", runtime_path=program("crun"), runtime_root=str(directory / "crun-crowd")),
        RuntimeTable(cgroup_manager="cgroupfs"),
        launchers,
        scratch=directory / "scratch",
        bundle=lambda container_id: directory / "crowd-crun" / container_id,
    )
    crowds = {
        "ours": Crowd("ours", BuiltinRuntime(launchers), bundle, directory),
        "crun": Crowd("crun", crun, bundle, directory),
    }
    found: dict[str, list[float]] = {name: [] for name in crowds}
    for _ in range(REPEATS):
        for name, crowd in crowds.items():
            found[name].append(CONTAINERS / crowd.seconds())
    name = f"{CONTAINERS} containers, {AT_ONCE} at a time"
    ours, peer = max(found["ours"]), max(found["crun"])
    return [Result(name, "1/s", ours, peer, "crun, same monitor", 2.0, more_is_better=True)]


def measure_volumes(
    ours: Ours, bundle: Bundle, directory: Path, count: int, seccomp: Mapping[str, Any]
) -> list[Result]:
    """A whole container with a filter and bind mounts, as `containers.measure_run` times it."""
    mounts = []
    for number in range(VOLUMES):
        source = directory / f"volume-{number}"
        source.mkdir()
        options = ["rbind", "rprivate", *(["ro"] if number % 2 else [])]
        mounts.append({"destination": f"/mnt/{number}", "source": str(source), "type": "bind", "options": options})

    def spec(who: str) -> dict[str, Any]:
        base = bundle.spec(TRUE, cgroup=f"volumes-{who}", seccomp=dict(seccomp))
        return {**base, "mounts": [*base["mounts"], *mounts]}

    mine = spec("ours")
    contestants: dict[str, Timed] = {
        "ours": lambda: ours.run(mine),
        "crun": peer_run("crun", directory / "crun-volumes", bundle.sibling("crun-volumes", spec("crun"))),
    }
    samples = rounds(count, contestants)
    name = f"run /bin/true, default seccomp, {VOLUMES} bind mounts"
    return compare(name, samples["ours"], {"crun run": (samples["crun"], 0.45)})
