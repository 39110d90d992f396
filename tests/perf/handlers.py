"""Our daemon with each kind of handler beside containerd with runc, all by the CRI: pods' start, exec, and memory.

All pods are in the host's network, so that neither side's network is measured; containerd has a pause process in each,
as Kubernetes runs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.api.runtime.v1 import api_pb2_grpc
from crio_native.cli import busybox
from crio_native.cli.scratch import ScratchDaemon, wait_for
from crio_native.linux import mounts, syscalls
from crio_native.linux.cgroup import Cgroup
from tests.perf.containers import TRUE
from tests.perf.peers import CGROUP, SLEEP, program, proportional_set_size
from tests.perf.report import Result, compare

HANDLERS = ("builtin", "crun", "runc", "shim")
PEER = "containerd, runc"
PODS = 10  # alive at once, to see what each costs in memory

SETTINGS = """
[crio.runtime.runtimes.runc]
runtime_root = "{directory}/run/runc"
[crio.runtime.runtimes.crun]
runtime_root = "{directory}/run/crun"
[crio.runtime.runtimes.shim]
runtime_type = "vm"
runtime_path = "/usr/bin/containerd-shim-runc-v2"
"""

CONTAINERD = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
address = "{directory}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "docker.io/library/pause:bench"
disable_tcp_service = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


class Contestant:
    """A handler of a CRI server."""

    def __init__(self, runtime: Any, image: str, logs: Path, handler: str) -> None:
        self.runtime, self.image, self.logs, self.handler = runtime, image, logs, handler
        self._number = 0

    def start(self) -> tuple[str, str]:
        """A pod with a container that sleeps; their ids."""
        self._number += 1
        name = f"{self.handler or 'peer'}{self._number}"
        node = cri.NamespaceOption(network=cri.NODE)
        pod_config = cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=name),
            log_directory=str(self.logs),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=f"{CGROUP}-pods",
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=node),
            ),
        )
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="main"),
            image=cri.ImageSpec(image=self.image),
            command=SLEEP,
            log_path=f"{name}.log",
            linux=cri.LinuxContainerConfig(
                security_context=cri.LinuxContainerSecurityContext(namespace_options=node),
            ),
        )
        run = cri.RunPodSandboxRequest(config=pod_config, runtime_handler=self.handler)
        pod = self.runtime.RunPodSandbox(run, timeout=60).pod_sandbox_id
        create = cri.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=pod_config)
        container = self.runtime.CreateContainer(create, timeout=60).container_id
        self.runtime.StartContainer(cri.StartContainerRequest(container_id=container), timeout=60)
        return pod, container

    def exec(self, container: str) -> None:
        answer = self.runtime.ExecSync(cri.ExecSyncRequest(container_id=container, cmd=TRUE, timeout=10), timeout=20)
        if answer.exit_code != 0:
            raise RuntimeError(f"/bin/true ended with {answer.exit_code}")

    def remove(self, pod: str) -> None:
        self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=60)
        self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)


def measure(directory: Path, rounds: int, progress: Callable[[str], None]) -> list[Result]:
    """Rows for each handler of ours beside containerd: a pod with its container started, ExecSync, memory."""
    with ExitStack() as stack:
        stack.callback(_remove_pods_cgroup)
        ours = stack.enter_context(_ours())
        logs = ours.directory / "logs"
        contestants = {name: Contestant(ours.runtime, image, logs, name) for name, image in _images(ours)}
        contestants[PEER] = stack.enter_context(_containerd(directory / "containerd"))
        starts: dict[str, list[float]] = {name: [] for name in contestants}
        execs: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 2):
            progress(f"pods and execs of every handler, round {number} of {rounds}")
            for name, contestant in contestants.items():
                started, executed = _round(contestant)
                if number >= 2:  # the first ones warm caches
                    starts[name].append(started)
                    execs[name].append(executed)
        memory = {name: _memory(contestant) for name, contestant in contestants.items()}
    results = []
    for name in HANDLERS:
        goal = None if name == "shim" else 1.0
        results += _beside(f"a pod and its container started, handler {name}", starts, name, goal)
        results += _beside(f"ExecSync, handler {name}", execs, name, goal)
        results.append(
            Result(f"memory beside a container (PSS), {name}", "KiB", memory[name], memory[PEER], PEER, goal)
        )
    return results


def _beside(what: str, samples: dict[str, list[float]], name: str, goal: float | None) -> list[Result]:
    if goal is not None:
        return compare(what, samples[name], {PEER: (samples[PEER], goal)})
    rows = compare(what, samples[name], {PEER: (samples[PEER], 0.0)})
    return [Result(r.name, r.unit, r.ours, r.peer, r.peer_name, None, spread=r.spread) for r in rows]


def _round(contestant: Contestant) -> tuple[float, float]:
    """Seconds of a start and of an exec."""
    began = time.perf_counter()
    pod, container = contestant.start()
    started = time.perf_counter()
    contestant.exec(container)
    executed = time.perf_counter()
    contestant.remove(pod)
    return started - began, executed - started


def _memory(contestant: Contestant) -> float:
    """KiB of the monitors or shims that one pod with one container adds; the peer's pause process is not counted."""
    before = _processes()
    pods = [contestant.start()[0] for _ in range(PODS)]
    time.sleep(1)
    try:
        return sum(proportional_set_size(pid) for pid in _processes() - before) / PODS
    finally:
        for pod in pods:
            contestant.remove(pod)


def _processes() -> set[int]:
    return {int(path.name) for path in Path("/proc").glob("[0-9]*") if _helps(path)}


def _helps(path: Path) -> bool:
    try:
        program = (path / "cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return os.path.basename(program) in (b"crio-monitor", b"containerd-shim-runc-v2")


@contextmanager
def _ours() -> Iterator[ScratchDaemon]:
    server = ScratchDaemon(settings=SETTINGS)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _images(server: ScratchDaemon) -> list[tuple[str, str]]:
    reference = busybox.build_layout(server.directory / "layout", "bench")
    request = cri.PullImageRequest(image=cri.ImageSpec(image=reference))
    image = server.images.PullImage(request, timeout=60).image_ref
    return [(name, image) for name in HANDLERS]


@contextmanager
def _containerd(directory: Path) -> Iterator[Contestant]:
    """containerd with a configuration and a store of its own, in this process's mount namespace."""
    directory.mkdir()
    (directory / "config.toml").write_text(CONTAINERD.replace("{directory}", str(directory)))
    with (directory / "log").open("wb") as log:
        command = [program("containerd"), "--config", str(directory / "config.toml")]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
    socket = directory / "containerd.sock"
    channel = grpc.insecure_channel(f"unix://{socket}")
    try:
        wait_for(socket.exists, 20, "containerd's socket")
        _import(directory, "pause", ("sleep", "1000000"))
        _import(directory, "bench", ("sh",))
        yield Contestant(api_pb2_grpc.RuntimeServiceStub(channel), "docker.io/library/bench:bench", directory, "")
    finally:
        channel.close()
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        _unmount_below(directory)


def _import(directory: Path, name: str, command: Sequence[str]) -> None:
    layout, archive = directory / name, directory / f"{name}.tar"
    busybox.build_layout(layout, "bench", command)
    subprocess.run(["tar", "-C", layout, "-cf", archive, "."], check=True)
    ctr = [program("ctr"), "--address", str(directory / "containerd.sock"), "--namespace", "k8s.io"]
    line = [*ctr, "images", "import", "--base-name", f"docker.io/library/{name}", str(archive)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def _unmount_below(directory: Path) -> None:
    rows = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    for target in sorted((row[4] for row in rows if row[4].startswith(f"{directory}/")), reverse=True):
        syscalls.umount2(target, mounts.MNT_DETACH)


def _remove_pods_cgroup() -> None:
    cgroup = Cgroup(f"{CGROUP}-pods")
    cgroup.kill()
    cgroup.remove()
    for each in Path("/sys/fs/cgroup").glob(f"*{CGROUP}-pods"):
        os.rmdir(each)
