"""UpdateContainerResources and UpdatePodSandboxResources: in the kernel, in the status, and after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli import crioctl
from crio_native.linux.cgroup import hierarchy

from .conftest import Client, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode
MIB = 1 << 20


def resize(cri: Client, container: str, **limits: Any) -> None:
    cri.call("UpdateContainerResources", container_id=container, linux=pb.LinuxContainerResources(**limits))


def kernel(cri: Client, container: str, controller: str, v1: str, v2: str) -> str:
    host = hierarchy()
    file = v2 if host.version_of(controller) == 2 else v1
    return Path(f"{host.mount_of(controller)}{cri.daemon.cgroup_parent}/crio-{container}/{file}").read_text().strip()


def memory_limit(cri: Client, container: str) -> str:
    return kernel(cri, container, "memory", "memory.limit_in_bytes", "memory.max")


def test_in_place_and_after_a_restart(fresh: Client) -> None:
    container = fresh.start(
        fresh.pod(), "sleep", "60", resources={"memory_limit_in_bytes": 64 * MIB, "cpu_shares": 256}
    )
    pid = fresh.call("ContainerStatus", container_id=container, verbose=True).info["info"]
    resize(fresh, container, memory_limit_in_bytes=128 * MIB, cpu_quota=20_000, cpu_period=50_000)
    assert memory_limit(fresh, container) == str(128 * MIB)
    quota = kernel(fresh, container, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0]
    assert quota == "20000"
    fresh.restart()
    linux = fresh.status(container).resources.linux
    assert (linux.memory_limit_in_bytes, linux.cpu_quota, linux.cpu_period) == (128 * MIB, 20_000, 50_000)
    assert linux.cpu_shares == 256
    assert fresh.call("ContainerStatus", container_id=container, verbose=True).info["info"][:60] == pid[:60]
    resize(fresh, container, memory_limit_in_bytes=32 * MIB)  # and down again
    assert memory_limit(fresh, container) == str(32 * MIB)


def test_the_isolation_is_compared_with_the_new_limits(cri: Client, capsys: pytest.CaptureFixture[str]) -> None:
    def isolation() -> tuple[object, str]:
        with pytest.raises(SystemExit) as end:
            crioctl.main(["--socket", str(cri.daemon.socket), "isolation", container])
        return end.value.code, capsys.readouterr().out

    container = cri.start(cri.pod(), "sleep", "60", resources={"memory_limit_in_bytes": 64 * MIB, "cpu_shares": 256})
    resize(cri, container, memory_limit_in_bytes=128 * MIB, cpu_shares=512)
    code, shown = isolation()
    assert code == 0 and str(128 * MIB) in shown, shown
    resize(cri, container, memory_limit_in_bytes=32 * MIB)
    host = hierarchy()
    file = "memory.max" if host.version_of("memory") == 2 else "memory.limit_in_bytes"
    group = Path(f"{host.mount_of('memory')}{cri.daemon.cgroup_parent}/crio-{container}")
    (group / file).write_text(str(64 * MIB))
    code, shown = isolation()
    assert code == 1 and "! weaker    linux.resources.memory.limit" in shown


def test_a_container_that_was_not_started_yet(cri: Client) -> None:
    container = cri.create(cri.pod(), "sleep", "60", resources={"memory_limit_in_bytes": 64 * MIB})
    resize(cri, container, memory_limit_in_bytes=96 * MIB, cpu_shares=512)
    cri.call("StartContainer", container_id=container)
    assert memory_limit(cri, container) == str(96 * MIB)
    assert cri.status(container).resources.linux.cpu_shares == 512


def test_a_limit_can_be_taken_away(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "60", resources={"memory_limit_in_bytes": 64 * MIB, "cpu_quota": 10_000})
    resize(cri, container, memory_limit_in_bytes=-1, cpu_quota=-1)
    found = memory_limit(cri, container)
    assert found == "max" or int(found) > 1 << 60
    assert kernel(cri, container, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] in ("-1", "max")
    assert not cri.call("ContainerStats", container_id=container).stats.memory.HasField("available_bytes")


def test_what_is_in_use_cannot_be_taken_away(cri: Client) -> None:
    """The kernel would kill for it; instead nothing changes, the other limits of the call included."""
    script = "x=$(head -c 40000000 /dev/zero | tr '\\0' x); echo ready; sleep 60; echo $x"
    container = cri.start(cri.pod(), "sh", "-c", script, resources={"memory_limit_in_bytes": 256 * MIB})
    log = Path(cri.status(container).log_path)
    cri.until(lambda: "ready" in log.read_text(), 30)
    with refused(Code.INTERNAL, "memory"):
        resize(cri, container, memory_limit_in_bytes=16 * MIB, cpu_shares=300)
    assert memory_limit(cri, container) == str(256 * MIB)
    status = cri.status(container)
    assert status.state == pb.CONTAINER_RUNNING
    linux = status.resources.linux
    assert (linux.memory_limit_in_bytes, linux.cpu_shares) == (256 * MIB, 0)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"memory_limit_in_bytes": 4096}, "linux.memory_limit_in_bytes"),
        ({"memory_limit_in_bytes": -2}, "linux.memory_limit_in_bytes"),
        ({"cpu_period": 5}, "linux.cpu_period"),
        ({"cpu_quota": 5}, "linux.cpu_quota"),
        ({"cpu_shares": -1}, "linux.cpu_shares"),
        ({"cpuset_cpus": "all"}, "linux.cpuset_cpus"),
        ({"unified": {"../x": "1"}}, "linux.unified"),
        ({"oom_score_adj": 5000}, "linux.oom_score_adj"),
        ({"oom_score_adj": -2000}, "linux.oom_score_adj"),
    ],
)
def test_bad_limits_are_refused_by_their_field(cri: Client, limits: dict[str, Any], words: str) -> None:
    container = cri.start(cri.pod(), "sleep", "60")
    with refused(Code.INVALID_ARGUMENT, words):
        resize(cri, container, **limits)
    assert cri.status(container).resources.linux == pb.LinuxContainerResources()


def test_what_the_kernel_refuses_is_taken_back(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "60", resources={"cpu_shares": 256})
    with refused(Code.INVALID_ARGUMENT, "linux.cpuset_cpus: step 'cgroup'", "got '4000'"):
        resize(cri, container, cpu_shares=1000, cpuset_cpus="4000")
    assert cri.status(container).resources.linux.cpu_shares == 256
    assert kernel(cri, container, "cpu", "cpu.shares", "cpu.weight") in ("256", "35")


def test_only_what_lives_has_limits_to_change(cri: Client) -> None:
    container = cri.start(cri.pod(), "true")
    cri.ended(container)
    with refused(Code.FAILED_PRECONDITION, container, "exited"):
        resize(cri, container, cpu_shares=300)
    with refused(Code.NOT_FOUND, "nobody"):
        resize(cri, "nobody", cpu_shares=300)
    with refused(Code.UNIMPLEMENTED, "windows"):
        cri.call(
            "UpdateContainerResources",
            container_id=cri.start(cri.pod(), "sleep", "60"),
            windows=pb.WindowsContainerResources(cpu_shares=1),
        )


def test_the_pods_own_are_recorded(fresh: Client) -> None:
    pod = fresh.pod()
    asked = pb.LinuxContainerResources(cpu_shares=2048, memory_limit_in_bytes=512 * MIB)
    overhead = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    fresh.call("UpdatePodSandboxResources", pod_sandbox_id=pod, resources=asked, overhead=overhead)
    fresh.restart()
    info = fresh.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"]
    assert str(512 * MIB) in info and str(64 * MIB) in info
    with refused(Code.INVALID_ARGUMENT, "resources.cpu_period"):
        fresh.call("UpdatePodSandboxResources", pod_sandbox_id=pod, resources=pb.LinuxContainerResources(cpu_period=1))
    with refused(Code.NOT_FOUND, "nobody"):
        fresh.call("UpdatePodSandboxResources", pod_sandbox_id="nobody")
