"""crio-oci pause, update and events: what the kernel's groups do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from crio_native.linux.cgroup import hierarchy

from ..waiting import wait_for
from .command_line import Oci, oci

pytestmark = pytest.mark.root
__all__ = ["oci"]
FREEZER_STATE = ("freezer.state", "FROZEN", "THAWED")


def test_pause_and_resume(oci: Oci) -> None:
    oci.running("c")
    assert "not paused" in oci.refused("resume", "c")
    oci.ok("pause", "c")
    assert oci.status("c") == "paused"
    assert "cannot be paused" in oci.refused("pause", "c")
    oci.ok("resume", "c")
    assert oci.status("c") == "running"
    oci.ok("pause", "c")
    oci.ok("delete", "--force", "c")
    assert not oci.left()


@pytest.mark.skipif(hierarchy().mode != "hybrid", reason="a host with two freezers")
def test_a_container_that_the_other_freezer_stopped_is_paused(oci: Oci) -> None:
    oci.running("c")
    Path(f"{hierarchy().v1_freezer}/{oci.name}/c/freezer.state").write_text("FROZEN")
    assert oci.status("c") == "paused"
    assert "paused container" in oci.refused("exec", "c", "id", code=255)
    oci.ok("resume", "c")
    assert oci.status("c") == "running"
    oci.ok("exec", "c", "id")


@pytest.mark.parametrize("paused", [False, True])
def test_resume_tells_of_a_frozen_group_above(oci: Oci, paused: bool) -> None:
    freezers = {hierarchy().unified: ("cgroup.freeze", "1", "0"), hierarchy().v1_freezer: FREEZER_STATE}
    for mount, (file, stop, go) in freezers.items():
        if not mount:
            continue
        oci.running("c")
        if paused:
            oci.ok("pause", "c")
        above = Path(f"{mount}/{oci.name}")
        (above / file).write_text(stop)
        wait_for(lambda: oci.status("c") == "paused")
        assert f"container 'c' stays paused: frozen above it is {above}\n" in oci.refused("resume", "c")
        (above / file).write_text(go)
        wait_for(lambda: oci.status("c") == "running")
        oci.ok("delete", "--force", "c")


def test_update_by_flags_and_by_file(oci: Oci) -> None:
    oci.running("c")
    oci.ok("update", "--pids-limit", "31", "--memory", "64m", "c")
    stats = json.loads(oci.ok("events", "--stats", "c"))["data"]
    assert (stats["pids"]["limit"], stats["memory"]["usage"]["limit"]) == (31, 64 << 20)
    oci.ok("update", "--resources", "-", "c", given='{"pids": {"limit": 32}}')
    assert json.loads(oci.ok("events", "--stats", "c"))["data"]["pids"] == {"current": 1, "limit": 32}
    assert "must be a number of bytes" in oci.refused("update", "--memory", "lots", "c")
    assert "is not JSON" in oci.refused("update", "-r", "-", "c", given="{")


def test_statistics_are_what_the_kernel_counts(oci: Oci) -> None:
    spec = oci.spec("sleep", "1000")
    spec["linux"]["resources"] = {"memory": {"limit": 50_000_000, "swap": 60_000_000}, "cpu": {"cpus": "0"}}
    oci.ok("run", "--detach", "-b", oci.write(spec), "c")
    stats = json.loads(oci.ok("events", "--stats", "c"))["data"]
    memory = stats["memory"]
    page = os.sysconf("SC_PAGESIZE")
    assert memory["swap"]["limit"] == 60_000_000 // page * page  # memory and swap together, as runc has it
    assert memory["swap"]["usage"] >= memory["usage"]["usage"] > 0
    assert stats["cpuset"]["cpus"] == [0] and stats["cpuset"]["mems"]
    assert all(set(counts) >= {"usage", "failcnt"} for counts in stats["hugetlb"].values())
    if Path("/sys/fs/cgroup/memory").exists():
        assert memory["swap"]["max"] > 0 < memory["kernel"]["max"]
        assert set(memory["kernelTCP"]) == {"limit", "usage", "max", "failcnt"}
        assert stats["cpuset"]["sched_load_balance"] == 1
