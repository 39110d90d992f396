"""The whole daemon with ``cgroup_manager = "systemd"``, as a node has it, with a real systemd as the first process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import ScratchDaemon

from ..cri.conftest import Client
from .test_systemd import shown

pytestmark = pytest.mark.vm(systemd=True)

SETTINGS = """
[crio.runtime]
cgroup_manager = "systemd"
"""
POD = "kubepods-burstable-pod1.slice"
GROUP = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"
SLOW = 100.0  # seconds for a call: in there the daemon's first ones take their time


@pytest.fixture
def client() -> Iterator[Client]:
    daemon = ScratchDaemon(Path(tempfile.gettempdir()), settings=SETTINGS)
    own_group, daemon.cgroup_parent = daemon.cgroup_parent, POD
    try:
        daemon.start()
        yield Client(daemon)
    finally:
        daemon.cgroup_parent = own_group
        daemon.close()


def test_a_pod_of_a_kubelet_with_the_systemd_driver(client: Client) -> None:
    assert client.call("RuntimeConfig", seconds=SLOW).linux.cgroup_driver == pb.SYSTEMD
    client.load_image()
    pod = client.pod(namespaces={"network": pb.NODE}, seconds=SLOW)
    container = client.start(pod, "/bin/sleep", "1000", resources={"memory_limit_in_bytes": 96 << 20}, seconds=SLOW)
    unit = f"crio-{container}.scope"
    assert shown(unit, "ActiveState", "Slice", "MemoryMax") == {
        "ActiveState": "active",
        "Slice": POD,
        "MemoryMax": str(96 << 20),
    }
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    client.call("UpdateContainerResources", container_id=container, linux=resources, seconds=SLOW)
    assert shown(unit, "MemoryMax") == {"MemoryMax": str(64 << 20)}
    assert client.call("ContainerStats", container_id=container, seconds=SLOW).stats.memory.working_set_bytes.value > 0
    assert client.call("ExecSync", container_id=container, cmd=["/bin/true"], seconds=SLOW).exit_code == 0
    client.remove_pod(pod)
    assert shown(unit, "LoadState") == {"LoadState": "not-found"}
    assert not os.path.exists(f"/sys/fs/cgroup{GROUP}/{unit}")
