"""OCI limits as file writes, for either kernel interface, without a kernel."""

from __future__ import annotations

from typing import Any

import pytest

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.linux.cgroup.resources import plan, weight_of_shares

V1 = dict.fromkeys("cpu cpuset memory pids blkio hugetlb net_cls net_prio rdma".split(), 1)
V2 = dict.fromkeys("cpu cpuset memory pids io hugetlb rdma".split(), 2)


class FakeHost:
    """A host with these controllers; every file exists unless it is listed as missing."""

    def __init__(self, versions: dict[str, int], missing: tuple[str, ...] = (), **contents: str) -> None:
        self._versions, self._missing, self._contents = versions, missing, contents

    def version(self, controller: str) -> int:
        return self._versions.get(controller, 0)

    def read(self, controller: str, file: str) -> str | None:
        return None if file in self._missing else self._contents.get(file.replace(".", "_"), "")


def writes(resources: dict[str, Any], host: FakeHost) -> list[tuple[str, str]]:
    made, warnings = plan(resources, host)
    assert not warnings
    return [(write.file, write.value) for write in made]


@pytest.mark.parametrize(
    ("memory", "v1", "v2"),
    [
        ({"limit": 1 << 20}, [("memory.limit_in_bytes", "1048576")], [("memory.max", "1048576")]),
        ({"limit": 0}, [], []),
        (
            {"limit": -1},  # swap without a limit would refuse memory without one
            [("memory.limit_in_bytes", "-1"), ("memory.memsw.limit_in_bytes", "-1")],
            [("memory.swap.max", "max"), ("memory.max", "max")],
        ),
        (
            {"limit": 1 << 20, "swap": 3 << 20},  # OCI's swap is both together, v2's is swap alone
            [("memory.limit_in_bytes", "1048576"), ("memory.memsw.limit_in_bytes", "3145728")],
            [("memory.swap.max", "2097152"), ("memory.max", "1048576")],
        ),
        ({"reservation": 4096}, [("memory.soft_limit_in_bytes", "4096")], [("memory.low", "4096")]),
    ],
)
def test_memory(memory: dict[str, int], v1: list[tuple[str, str]], v2: list[tuple[str, str]]) -> None:
    assert writes({"memory": memory}, FakeHost(V1)) == v1
    assert writes({"memory": memory}, FakeHost(V2)) == v2


@pytest.mark.parametrize(
    ("cpu", "v1", "v2"),
    [
        ({"shares": 1024}, [("cpu.shares", "1024")], [("cpu.weight", "100")]),
        (
            {"quota": 5000, "period": 10000},
            [("cpu.cfs_period_us", "10000"), ("cpu.cfs_quota_us", "5000")],
            [("cpu.max", "5000 10000")],
        ),
        ({"quota": -1}, [("cpu.cfs_quota_us", "-1")], [("cpu.max", "max 25000")]),
        ({"period": 50000}, [("cpu.cfs_period_us", "50000")], [("cpu.max", "700 50000")]),
        (
            {"burst": 10, "idle": 1},
            [("cpu.cfs_burst_us", "10"), ("cpu.idle", "1")],
            [("cpu.max.burst", "10"), ("cpu.idle", "1")],
        ),
        (
            {"cpus": "0-1", "mems": "0"},
            [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")],
            [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")],
        ),
    ],
)
def test_cpu(cpu: dict[str, Any], v1: list[tuple[str, str]], v2: list[tuple[str, str]]) -> None:
    assert writes({"cpu": cpu}, FakeHost(V1)) == v1
    assert writes({"cpu": cpu}, FakeHost(V2, cpu_max="700 25000")) == v2


def test_shares_map_to_weights_at_the_ends_and_at_the_default() -> None:
    assert [weight_of_shares(shares) for shares in (0, 2, 1024, 262144, 1 << 40)] == [1, 1, 100, 10000, 10000]
    weights = [weight_of_shares(shares) for shares in range(2, 5000)]
    assert weights == sorted(weights)


@pytest.mark.parametrize(("limit", "value"), [(7, "7"), (0, "max"), (-1, "max")])
def test_pids(limit: int, value: str) -> None:
    assert writes({"pids": {"limit": limit}}, FakeHost(V2)) == [("pids.max", value)]


def test_block_io() -> None:
    block = {
        "weight": 500,
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
    }
    assert writes({"blockIO": block}, FakeHost(V1)) == [
        ("blkio.bfq.weight", "500"),
        ("blkio.throttle.read_bps_device", "8:0 600"),
        ("blkio.throttle.write_iops_device", "8:16 0"),
    ]
    assert writes({"blockIO": block}, FakeHost(V2, missing=("io.bfq.weight",))) == [
        ("io.weight", "4950"),
        ("io.max", "8:0 rbps=600"),
        ("io.max", "8:16 wiops=max"),
    ]


def test_huge_pages_limit_reservations_too_where_the_kernel_can() -> None:
    limits = {"hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}]}
    assert writes(limits, FakeHost(V2)) == [("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304")]
    assert writes(limits, FakeHost(V1, missing=("hugetlb.2MB.rsvd.limit_in_bytes",))) == [
        ("hugetlb.2MB.limit_in_bytes", "4194304")
    ]


def test_rdma_network_and_unified() -> None:
    rdma = {"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10}}}
    assert writes(rdma, FakeHost(V2)) == [("rdma.max", "mlx5_1 hca_handle=3 hca_object=10")]
    network = {"network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 5}]}}
    assert writes(network, FakeHost(V1)) == [("net_cls.classid", "1048577"), ("net_prio.ifpriomap", "eth0 5")]
    raw = {"unified": {"memory.high": "10000", "io.max": "8:0 rbps=1\n8:16 rbps=2"}}
    assert writes(raw, FakeHost(V2)) == [
        ("memory.high", "10000"),
        ("io.max", "8:0 rbps=1"),
        ("io.max", "8:16 rbps=2"),
    ]


@pytest.mark.parametrize(
    ("resources", "host", "warning"),
    [
        (
            {"memory": {"swappiness": 3}},
            FakeHost(V2),
            "memory.swappiness is not applied: cgroup v2 has no such setting",
        ),
        (
            {"memory": {"limit": 1 << 20, "swap": 1 << 20}},
            FakeHost(V1, ("memory.memsw.limit_in_bytes",)),
            "memory.swap",
        ),
        ({"cpu": {"realtimeRuntime": 3}}, FakeHost(V2), "cpu.realtimeRuntime"),
        ({"cpu": {"cpus": "0"}}, FakeHost({"cpu": 2}), "cpu.cpus is not applied: this host has no cpuset"),
        ({"blockIO": {"leafWeight": 10}}, FakeHost(V1), "blockIO.leafWeight"),
        ({"blockIO": {"weight": 10}}, FakeHost(V2, ("io.weight", "io.bfq.weight")), "blockIO.weight"),
        ({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}, FakeHost({}), "hugepageLimits.limit"),
        ({"network": {"classID": 3}}, FakeHost(V2), "network.classID"),
    ],
)
def test_what_the_host_cannot_do_is_a_warning(resources: dict[str, Any], host: FakeHost, warning: str) -> None:
    _, warnings = plan(resources, host)
    assert len(warnings) == 1 and warnings[0].startswith(f"linux.resources.{warning}")


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ({"memory": []}, "memory"),
        ({"memory": {"limit": "1G"}}, "memory.limit"),
        ({"memory": {"limit": True}}, "memory.limit"),
        ({"memory": {"limit": 1 << 63}}, "memory.limit"),
        ({"memory": {"limit": 4096}}, "memory.limit"),
        ({"memory": {"swap": 1 << 20}}, "memory.swap"),
        ({"memory": {"limit": 2 << 20, "swap": 1 << 20}}, "memory.swap"),
        ({"memory": {"limit": -1, "swap": 1 << 20}}, "memory.swap"),
        ({"cpu": {"quota": 1.5}}, "cpu.quota"),
        ({"cpu": {"idle": 2}}, "cpu.idle"),
        ({"cpu": {"cpus": "0\n../../tasks"}}, "cpu.cpus"),
        ({"cpu": {"mems": "0-"}}, "cpu.mems"),
        ({"pids": {"limit": "many"}}, "pids.limit"),
        ({"blockIO": {"weight": 5}}, "blockIO.weight"),
        ({"blockIO": {"throttleReadBpsDevice": {}}}, "blockIO.throttleReadBpsDevice"),
        ({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0}]}}, "blockIO.throttleReadBpsDevice[0].rate"),
        (
            {"blockIO": {"throttleReadBpsDevice": [{"major": -8, "minor": 0, "rate": 1}]}},
            "blockIO.throttleReadBpsDevice[0].major",
        ),
        ({"hugepageLimits": [{"pageSize": "2MB/../x", "limit": 0}]}, "hugepageLimits[0].pageSize"),
        ({"hugepageLimits": [{}] * 257}, "hugepageLimits"),
        ({"rdma": {"a b": {}}}, "rdma.a b"),
        ({"unified": {"../memory.max": "1"}}, "unified"),
        ({"unified": {"cgroup.procs": "1"}}, "unified.cgroup.procs"),
        ({"unified": {"memory.max": 1}}, "unified.memory.max"),
        ({"unified": {"nosuch.max": "1"}}, "unified.nosuch.max"),
    ],
)
def test_bad_values_are_named(resources: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan(resources, FakeHost(V2))
    assert caught.value.field == f"linux.resources.{field}"


def test_raw_v2_files_need_a_v2_controller() -> None:
    with pytest.raises(InvalidArgument, match="controller `memory` is not available in a cgroup v2 hierarchy"):
        plan({"unified": {"memory.high": "1"}}, FakeHost(V1))


def test_check_before_update_refuses_a_limit_below_what_is_in_use() -> None:
    memory = {"limit": 1 << 20, "checkBeforeUpdate": True}
    assert writes({"memory": memory}, FakeHost(V2, memory_current="1000")) == [("memory.max", "1048576")]
    with pytest.raises(StepFailed, match="below the 2000000 in use"):
        plan({"memory": memory}, FakeHost(V2, memory_current="2000000"))
