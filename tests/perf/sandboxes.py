"""Pods as a node makes them, with the default network: one at a time and eight, beside containerd with its CNI bridge.

A pod's life is timed in two parts, as a kubelet sees it: RunPodSandbox, CreateContainer and StartContainer; then
StopPodSandbox and RemovePodSandbox, which kill and remove the container too.  Storage is on one disk for both.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.cli.scratch import ScratchDaemon
from tests.perf import stub
from tests.perf.containerd import IMAGE, Containerd
from tests.perf.daemon import Client
from tests.perf.peers import SLEEP
from tests.perf.report import Result

AT_ONCE = 8
GOAL = 0.2
PEER = "containerd, runc, CNI bridge"


@dataclass
class Contestant:
    """A CRI server: its stub, what configures a pod of a name, the image, and the seconds of each pod so far."""

    runtime: Any
    pod: Callable[[str], Any]
    image: str
    names: Any = field(default_factory=itertools.count)

    def life(self) -> tuple[float, float]:
        """Seconds to make a pod with one container that runs, and to take it away again."""
        config = self.pod(f"pod{next(self.names)}")
        began = time.perf_counter()
        pod, _ = start(self.runtime, config, self.image)
        started = time.perf_counter()
        self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=120)
        self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=120)
        return started - began, time.perf_counter() - started


def start(runtime: Any, config: Any, image: str) -> tuple[str, str]:
    """A pod with one container that sleeps; their ids."""
    pod = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config), timeout=120).pod_sandbox_id
    container = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="main"), image=cri.ImageSpec(image=image), command=SLEEP
    )
    create = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
    made = runtime.CreateContainer(create, timeout=120).container_id
    runtime.StartContainer(cri.StartContainerRequest(container_id=made), timeout=120)
    return pod, made


def pod_of(daemon: ScratchDaemon, name: str) -> Any:
    """The configuration of a pod of ours; `Containerd.pod` is the peer's."""
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=name),
        linux=cri.LinuxPodSandboxConfig(
            cgroup_parent=daemon.cgroup_parent,
            security_context=cri.LinuxSandboxSecurityContext(
                namespace_options=cri.NamespaceOption(network=cri.POD, pid=cri.CONTAINER)
            ),
        ),
    )


def measure(daemon: ScratchDaemon, directory: Path, rounds: int, progress: Callable[[str], None]) -> list[Result]:
    """Medians and 95th percentiles; the rounds of both sides alternate.  A round of eight counts each of its pods."""
    peer = Containerd(directory / "containerd-pods", network=cri.POD)
    try:
        sides = [
            Contestant(stub.runtime(daemon.socket), lambda name: pod_of(daemon, name), Client(daemon).image),
            Contestant(stub.runtime(peer.socket), peer.pod, IMAGE),
        ]
        results: list[Result] = []
        for at_once in (1, AT_ONCE):
            samples: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
            with ThreadPoolExecutor(at_once) as workers:
                for number in range(max(rounds // at_once, 3) + 1):
                    progress(f"pods, {at_once} at a time: round {number}")
                    for side, found in zip(sides, samples, strict=True):
                        lives = list(workers.map(lambda _, side=side: side.life(), range(at_once)))
                        if number:  # the first one warms caches
                            found += lives
            results += _rows(f"{at_once} at a time", *samples)
        return results
    finally:
        peer.close()


def _rows(title: str, ours: Sequence[tuple[float, float]], peers: Sequence[tuple[float, float]]) -> list[Result]:
    results = []
    for index, part in enumerate(("pod and container started", "pod stopped and removed")):
        mine, its = ([life[index] * 1e3 for life in lives] for lives in (ours, peers))
        spread = f"least {min(mine):.1f} / {min(its):.1f}"
        for word, pick in (("median", statistics.median), ("p95", _p95)):
            name = f"{part}, {title}, {word}"
            results.append(Result(name, "ms", pick(mine), pick(its), PEER, GOAL, spread=spread))
    return results


def _p95(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=20, method="inclusive")[18]
