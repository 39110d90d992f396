"""The whole daemon: ExecSync through the CRI, memory at rest, and its growth over a thousand pods."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.cli import busybox
from crio_native.cli.scratch import ScratchDaemon
from tests.perf import stub
from tests.perf.containers import TRUE, rounds
from tests.perf.peers import SLEEP, Bundle, program, resident_set_size, run
from tests.perf.report import Result, compare

SAMPLE_EVERY = 25
WARM_UP = 100


class Client:
    """One pod with one container, by the CRI."""

    def __init__(self, daemon: ScratchDaemon) -> None:
        self.daemon, self.runtime = daemon, stub.runtime(daemon.socket)
        reference = busybox.build_layout(daemon.directory / "layout", "bench")
        request = cri.PullImageRequest(image=cri.ImageSpec(image=reference))
        self.image = daemon.images.PullImage(request, timeout=60).image_ref
        self.logs = daemon.directory / "logs"

    def run(self, name: str, command: Sequence[str]) -> tuple[str, str]:
        """Pod id and container id.  The PID namespace is the container's own, as a kubelet asks and as crun's is."""
        namespaces = cri.NamespaceOption(network=cri.POD, pid=cri.CONTAINER)
        pod_config = cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=name),
            log_directory=str(self.logs),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=self.daemon.cgroup_parent,
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=namespaces),
            ),
        )
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="main"),
            image=cri.ImageSpec(image=self.image),
            command=command,
            log_path=f"{name}.log",
            linux=cri.LinuxContainerConfig(
                security_context=cri.LinuxContainerSecurityContext(namespace_options=namespaces)
            ),
        )
        pod = self.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=pod_config), timeout=60).pod_sandbox_id
        create = cri.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=pod_config)
        container = self.runtime.CreateContainer(create, timeout=60).container_id
        self.runtime.StartContainer(cri.StartContainerRequest(container_id=container), timeout=60)
        return pod, container

    def remove(self, pod: str) -> None:
        self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=60)
        self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)

    def exec(self, container: str) -> None:
        answer = self.runtime.ExecSync(cri.ExecSyncRequest(container_id=container, cmd=TRUE, timeout=10), timeout=20)
        if answer.exit_code != 0:
            raise RuntimeError(f"/bin/true ended with {answer.exit_code}")


def measure_exec_sync(client: Client, bundle: Bundle, count: int) -> list[Result]:
    """ExecSync, with gRPC's way there and back, beside `crun exec`."""
    pod, container = client.run("exec", SLEEP)
    directory = bundle.sibling("crun-exec-sync", bundle.spec(SLEEP, cgroup="crun-exec-sync"))
    crun = (program("crun"), "--root", bundle.directory / "state" / "crun")
    run(*crun, "run", "--detach", "--bundle", directory, "bench-exec-sync")
    try:
        contestants: dict[str, Callable[[], None]] = {
            "ours": lambda: client.exec(container),
            "crun": lambda: run(*crun, "exec", "bench-exec-sync", *TRUE),
        }
        samples = rounds(count, contestants)
    finally:
        run(*crun, "delete", "--force", "bench-exec-sync")
        client.remove(pod)
    return compare("ExecSync /bin/true by the CRI", samples["ours"], {"crun exec": (samples["crun"], 0.6)})


def measure_rest(daemon: ScratchDaemon) -> list[Result]:
    """Resident memory of a daemon that has done nothing yet."""
    assert daemon.process is not None
    time.sleep(1)
    return [Result("daemon at rest, memory (RSS)", "MiB", resident_set_size(daemon.process.pid) / 1024, None, None, 60)]


def measure_growth(client: Client, pods: int, progress: Callable[[str], None]) -> list[Result]:
    """Resident memory over pods created and removed: the slope after the first hundred."""
    assert client.daemon.process is not None
    sizes: list[tuple[int, float]] = []
    began = time.perf_counter()
    for number in range(1, pods + 1):
        pod, _ = client.run(f"pod{number}", TRUE)
        client.remove(pod)
        if number % SAMPLE_EVERY == 0:
            sizes.append((number, resident_set_size(client.daemon.process.pid)))
            progress(f"pod {number} of {pods}, {sizes[-1][1] / 1024:.1f} MiB")
    each = (time.perf_counter() - began) / pods
    counted = [(number, size) for number, size in sizes if number >= WARM_UP]
    slope = statistics.linear_regression(*zip(*counted, strict=True)).slope
    name = f"daemon's growth, pods {WARM_UP} to {pods}"
    return [
        Result(
            name, "KiB/pod", round(slope, 2), None, None, 0, spread=f"{counted[0][1]:.0f}..{counted[-1][1]:.0f} KiB"
        ),
        Result("pod and container, made and removed", "ms", each * 1e3, None, None, None),
    ]
