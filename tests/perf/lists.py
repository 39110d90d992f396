"""What a kubelet asks all the time, with 500 containers present: lists and statistics, beside containerd."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.cli.scratch import ScratchDaemon
from tests.perf.containerd import IMAGE, Containerd
from tests.perf.daemon import Client
from tests.perf.peers import SLEEP
from tests.perf.report import Result

PODS, EACH = 50, 10
LISTS, STATS = 100, 10  # rounds
CALLS = {"ListContainers": LISTS, "ListPodSandbox": LISTS, "ListContainerStats": STATS, "ListPodSandboxStats": STATS}


def measure(daemon: ScratchDaemon, directory: Path, progress: Callable[[str], None]) -> list[Result]:
    """Medians and 99th percentiles; the rounds of both sides alternate."""
    progress(f"{PODS * EACH} containers: ours")
    ours = Client(daemon)
    _fill(daemon.runtime, lambda name: _pod(daemon, name), ours.image)
    peer = Containerd(directory / "containerd")
    try:
        progress(f"{PODS * EACH} containers: containerd")
        _fill(peer.runtime, peer.pod, IMAGE)
        results: list[Result] = []
        for name, rounds in CALLS.items():
            progress(name)
            samples: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for runtime, found in zip((daemon.runtime, peer.runtime), samples, strict=True):
                    began = time.perf_counter()
                    getattr(runtime, name)(getattr(cri, f"{name}Request")(), timeout=60)
                    found.append(time.perf_counter() - began)
            title = f"{name}, {PODS * EACH} containers"
            for word, pick in (("median", statistics.median), ("p99", _p99)):
                mine, its = (pick(found) * 1e3 for found in samples)
                results.append(Result(f"{title}, {word}", "ms", mine, its, "containerd", 1.0))
        return results
    finally:
        peer.close()


def _p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[98]


def _pod(daemon: ScratchDaemon, name: str) -> Any:
    namespaces = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=name),
        linux=cri.LinuxPodSandboxConfig(
            cgroup_parent=daemon.cgroup_parent,
            security_context=cri.LinuxSandboxSecurityContext(namespace_options=namespaces),
        ),
    )


def _fill(runtime: Any, pod: Callable[[str], Any], image: str) -> None:
    for number in range(PODS):
        config = pod(f"pod{number}")
        pod_id = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config), timeout=60).pod_sandbox_id
        for each in range(EACH):
            container = cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name=f"c{each}"), image=cri.ImageSpec(image=image), command=SLEEP
            )
            request = cri.CreateContainerRequest(pod_sandbox_id=pod_id, config=container, sandbox_config=config)
            made = runtime.CreateContainer(request, timeout=60).container_id
            runtime.StartContainer(cri.StartContainerRequest(container_id=made), timeout=60)
