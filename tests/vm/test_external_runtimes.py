"""OCI runtimes' programs on cgroup v2, which they drive themselves: by directories, and by systemd's units."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..cri.conftest import Client
from .conftest import daemon
from .test_systemd import shown

pytestmark = pytest.mark.vm
MIB = 1 << 20
OCI = Path(__file__).parents[2] / "build/crio-oci"
PROGRAMS = {"crio-oci": str(OCI), "crun": "", "runc": ""}
SLICE = "kubepods-burstable-pod2.slice"
SLOW = 100.0  # seconds for a call: in there programs take their time


def table(name: str) -> str:
    root = f"{{directory}}/run/{name}"
    return f'[crio.runtime.runtimes.{name}]\nruntime_path = "{PROGRAMS[name]}"\nruntime_root = "{root}"\n'


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with daemon("".join(map(table, PROGRAMS))) as client:
        yield client


@pytest.mark.parametrize("handler", sorted(PROGRAMS))
def test_a_life_on_cgroup_v2(cri: Client, handler: str) -> None:
    live(cri, cri.pod(handler=handler, namespaces={"network": pb.NODE}, seconds=SLOW))


def live(cri: Client, pod: str) -> str:
    """A container's limits are where the runtime put its processes, an exec's too, and change in place; its id."""
    asked = {"memory_limit_in_bytes": 64 * MIB, "cpu_quota": 20_000, "cpu_period": 100_000, "cpu_shares": 512}
    container = cri.start(pod, "sleep", "1000", resources=asked, seconds=SLOW)
    group = Path(f"/sys/fs/cgroup{group_of(cri, container)}")
    names = ("memory.max", "cpu.max", "cgroup.procs")

    def found() -> list[str]:
        return [(group / name).read_text().strip() for name in names]

    before = found()
    if SLICE in cri.daemon.cgroup_parent:
        unit = shown(f"crio-{container}.scope", "ActiveState", "Slice", "MemoryMax")
        assert unit == {"ActiveState": "active", "Slice": SLICE, "MemoryMax": str(64 * MIB)}
        monitors = group.with_name(f"crio-conmon-{container}.scope") / "cgroup.procs"
        assert len(monitors.read_text().split()) == 1
    assert before[:2] == [str(64 * MIB), "20000 100000"] and len(before[2].split()) == 1
    inside = cri.call("ExecSync", container_id=container, cmd=["cat", "/proc/self/cgroup"], seconds=SLOW)
    assert inside.stdout == b"0::/\n", inside.stderr
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, cpu_quota=50_000, cpu_period=100_000)
    cri.call("UpdateContainerResources", container_id=container, linux=limits, seconds=SLOW)
    assert found() == [str(96 * MIB), "50000 100000", before[2]]
    stats = cri.call("ContainerStats", container_id=container, seconds=SLOW).stats
    assert 0 < stats.memory.working_set_bytes.value < 96 * MIB and stats.cpu.usage_core_nano_seconds.value > 0
    cri.call("StopContainer", container_id=container, timeout=0, seconds=SLOW)
    assert cri.status(container).exit_code == 137
    cri.call("RemovePodSandbox", pod_sandbox_id=pod, seconds=SLOW)
    assert not group.exists()
    return container


def group_of(cri: Client, container: str) -> str:
    """Its processes' own, as the kernel has it."""
    info = cri.call("ContainerStatus", container_id=container, verbose=True).info["info"]
    return Path(f"/proc/{json.loads(info)['pid']}/cgroup").read_text().strip().removeprefix("0::")


def test_out_of_memory_is_the_reason(cri: Client) -> None:
    pod = cri.pod(handler="crun", namespaces={"network": pb.NODE}, seconds=SLOW)
    limit = {"memory_limit_in_bytes": 24 * MIB, "memory_swap_limit_in_bytes": 24 * MIB}
    eat = ("dd", "if=/dev/zero", "of=/dev/null", "bs=40000000", "count=1")
    status = cri.ended(cri.start(pod, *eat, resources=limit, seconds=SLOW), 30)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


@pytest.mark.vm(systemd=True)
def test_a_life_in_a_unit_of_systemd() -> None:
    """Made by the program, in a slice of a kubelet with the systemd driver.

    By runc alone: crun asks the system bus, which is not there, and `crio-oci` has tests of its own.
    """
    monitored = table("runc") + 'monitor_cgroup = "pod"\n'
    with daemon('[crio.runtime]\ncgroup_manager = "systemd"\n' + monitored) as client:
        own, client.daemon.cgroup_parent = client.daemon.cgroup_parent, SLICE
        try:
            pod = client.pod(handler="runc", namespaces={"network": pb.NODE}, seconds=SLOW)
            container = live(client, pod)
            for unit in (f"crio-{container}.scope", f"crio-conmon-{container}.scope"):
                assert shown(unit, "LoadState") == {"LoadState": "not-found"}
        finally:
            client.daemon.cgroup_parent = own
