"""The built-in executor beside crun and runc, and the monitor beside conmon: one bundle, interleaved rounds.

Ours runs inside this process as it does inside the daemon: through BuiltinRuntime, with gRPC loaded and the launchers
started before it.  The peers are programs, so starting them is part of what they cost.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crio_native.oci.builtin.runtime import BuiltinRuntime
from crio_native.oci.runtime import ContainerSpec, ExecSpec, Process
from tests.perf.peers import SLEEP, Bundle, conmon_container, program, proportional_set_size, run
from tests.perf.report import Result, compare

TRUE = ("/bin/true",)
Timed = Callable[[], None]


def rounds(count: int, contestants: Mapping[str, Timed]) -> dict[str, list[float]]:
    """Seconds of each, interleaved, so that a slow moment of the machine strikes all; two rounds first warm caches."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(count + 2):
        for name, act in contestants.items():
            began = time.perf_counter()
            act()
            if number >= 2:
                samples[name].append(time.perf_counter() - began)
    return samples


class Ours:
    """Containers of the built-in executor, made the way that pods/ makes them."""

    def __init__(self, runtime: BuiltinRuntime, bundle: Bundle, directory: Path) -> None:
        self.runtime, self.bundle, self.directory = runtime, bundle, directory

    def create(self, name: str, spec: Mapping[str, Any]) -> tuple[Process, Path]:
        run_dir = self.directory / name
        run_dir.mkdir(mode=0o700)
        log = str(self.directory / f"{name}.log")
        container = ContainerSpec(id=name, spec=spec, bundle=self.bundle.directory, run_dir=run_dir, log_path=log)
        return self.runtime.create(container), run_dir

    def start(self, name: str, spec: Mapping[str, Any]) -> Process:
        process, run_dir = self.create(name, spec)
        self.runtime.start(name, run_dir)
        return process

    def delete(self, name: str, spec: Mapping[str, Any]) -> None:
        self.runtime.delete(name, self.directory / name, spec["linux"]["cgroupsPath"])
        run_dir = self.directory / name
        for file in run_dir.iterdir():
            file.unlink()
        run_dir.rmdir()

    def run(self, spec: Mapping[str, Any]) -> None:
        """create, start, wait for the end, delete."""
        _, run_dir = self.create("run", spec)
        with self.runtime.watch("run", run_dir) as watch:
            self.runtime.start("run", run_dir)
            select.select([watch], [], [], 10)
            status = self.runtime.read_exit(watch)
        if status is None or status.code != 0:
            raise RuntimeError(f"/bin/true ended with {status}")
        self.delete("run", spec)

    def exec(self, process: Process, spec: Mapping[str, Any]) -> None:
        words = {**spec["process"], "args": list(TRUE)}
        session = self.runtime.exec("exec", process, spec["linux"]["cgroupsPath"], ExecSpec(process=words, waits=False))
        status = session.result()
        session.close()
        if status.code != 0:
            raise RuntimeError(f"/bin/true ended with {status}")


def measure_run(ours: Ours, bundle: Bundle, count: int, seccomp: dict[str, Any] | None) -> list[Result]:
    """A whole container; the peers' whole life is their `run`."""
    name = "run /bin/true, default seccomp" if seccomp else "run /bin/true"
    root = bundle.directory / "state"
    spec = bundle.spec(TRUE, cgroup="ours", seccomp=seccomp)
    contestants: dict[str, Timed] = {"ours": lambda: ours.run(spec)}
    for peer in ("crun", "runc"):
        directory = bundle.sibling(f"{peer}{bool(seccomp):d}", bundle.spec(TRUE, cgroup=peer, seccomp=seccomp))
        contestants[peer] = peer_run(peer, root, directory)
    samples = rounds(count, contestants)
    return compare(name, samples["ours"], {"crun run": (samples["crun"], 0.6), "runc run": (samples["runc"], 0.25)})


def peer_run(peer: str, root: Path, directory: Path) -> Timed:
    words = (program(peer), "--root", root / peer, "run", "--bundle", directory, f"bench-{peer}")
    return lambda: run(*words)


def measure_exec(ours: Ours, bundle: Bundle, count: int) -> list[Result]:
    """A command in a container that runs already."""
    root = bundle.directory / "state" / "crun"
    spec = bundle.spec(SLEEP, cgroup="ours-exec")
    process = ours.start("sleeper", spec)
    directory = bundle.sibling("crun-exec", bundle.spec(SLEEP, cgroup="crun-exec"))
    crun = (program("crun"), "--root", root)
    run(*crun, "run", "--detach", "--bundle", directory, "bench-exec")
    try:
        contestants: dict[str, Timed] = {
            "ours": lambda: ours.exec(process, spec),
            "crun": lambda: run(*crun, "exec", "bench-exec", *TRUE),
        }
        samples = rounds(count, contestants)
    finally:
        run(*crun, "delete", "--force", "bench-exec")
        ours.delete("sleeper", spec)
    return compare("exec /bin/true", samples["ours"], {"crun exec": (samples["crun"], 0.6)})


def measure_monitor(ours: Ours, bundle: Bundle) -> list[Result]:
    """The memory that watching one sleeping container costs."""
    spec = bundle.spec(SLEEP, cgroup="ours-monitor")
    process = ours.start("watched", spec)
    directory = bundle.sibling("conmon", bundle.spec(SLEEP, cgroup="crun-monitor"))
    try:
        conmon = conmon_container(directory, "bench-monitor")
        time.sleep(0.5)  # both have settled
        mine, theirs = proportional_set_size(process.monitor_pid), proportional_set_size(conmon)
    finally:
        run(program("crun"), "--root", directory / "state", "delete", "--force", "bench-monitor")
        ours.delete("watched", spec)
    return [Result("monitor, memory (PSS)", "KiB", mine, theirs, "conmon", 0.15)]
