"""A node with 500 containers: what a kubelet asks all the time, lists and statistics, beside containerd; and how long
a daemon that was killed takes to be there for them again."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.api.runtime.v1 import api_pb2_grpc
from crio_native.cli.scratch import MESSAGE_SIZE, ScratchDaemon, wait_for
from tests.perf import stub
from tests.perf.containerd import IMAGE, Containerd
from tests.perf.daemon import Client
from tests.perf.peers import SLEEP
from tests.perf.report import Result

OPTIONS = [("grpc.max_receive_message_length", MESSAGE_SIZE)]
PODS, EACH = 50, 10
LISTS, STATS = 100, 10  # rounds
STARTS = 5
START_GOAL = 2000  # ms
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
        sides = stub.runtime(daemon.socket), stub.runtime(peer.socket)
        for name, rounds in CALLS.items():
            progress(name)
            samples: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for runtime, found in zip(sides, samples, strict=True):
                    began = time.perf_counter()
                    getattr(runtime, name)(getattr(cri, f"{name}Request")(), timeout=60)
                    found.append(time.perf_counter() - began)
            title = f"{name}, {PODS * EACH} containers"
            for word, pick in (("median", statistics.median), ("p99", _p99)):
                mine, its = (pick(found) * 1e3 for found in samples)
                results.append(Result(f"{title}, {word}", "ms", mine, its, "containerd", 1.0))
    finally:
        peer.close()
    progress("the daemon's start")
    seconds = [_restart(daemon) for _ in range(STARTS)]
    spread = f"{min(seconds) * 1e3:.0f}..{max(seconds) * 1e3:.0f}"
    name = f"killed daemon's start until it lists {PODS * EACH} containers"
    return [*results, Result(name, "ms", statistics.median(seconds) * 1e3, None, None, START_GOAL, spread=spread)]


def _restart(daemon: ScratchDaemon) -> float:
    """Seconds from the process's start to an answer that has all containers running."""
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()
    began = time.perf_counter()
    daemon.launch()
    wait_for(lambda: _connects(daemon.socket), 30, "the daemon's socket")  # gRPC itself would look once a second
    with grpc.insecure_channel(f"unix://{daemon.socket}", options=OPTIONS) as channel:
        listed = api_pb2_grpc.RuntimeServiceStub(channel).ListContainers(cri.ListContainersRequest(), timeout=30)
    seconds = time.perf_counter() - began
    running = sum(container.state == cri.CONTAINER_RUNNING for container in listed.containers)
    if running != PODS * EACH:
        raise RuntimeError(f"{running} of {PODS * EACH} containers run after the start")
    return seconds


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


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
