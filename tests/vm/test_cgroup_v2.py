"""Control groups on cgroup v2: what every host does, and what only this one can."""

from __future__ import annotations

import errno
import functools
import mmap
import os
import time
from pathlib import Path

import pytest

from crio_native.errors import StepFailed
from crio_native.linux import bpf
from crio_native.linux.cgroup import Cgroup, hierarchy

from ..linux.cgroup_behaviour import *  # noqa: F403  (the tests)
from ..linux.cgroup_behaviour import DENY_ALL, MIB, NULL, Member, group, sleep_long, try_open

pytestmark = pytest.mark.vm
__all__ = ["group"]


def content(group: Cgroup, file: str) -> str:
    return Path(f"/sys/fs/cgroup{group.path}/{file}").read_text()


def test_this_host_is_v2_only() -> None:
    assert hierarchy().mode == "v2"


def test_the_files_of_a_limited_group(group: Cgroup) -> None:
    warnings = group.apply(
        {
            "memory": {"limit": 64 * MIB, "swap": 64 * MIB, "reservation": 32 * MIB},
            "cpu": {"shares": 1024, "quota": 20000, "period": 100000},
            "pids": {"limit": 10},
            "unified": {"memory.high": "50000000", "memory.oom.group": "1"},
        }
    )
    assert [warning.split()[0] for warning in warnings] in ([], ["linux.resources.memory.swap"])
    for file, text in {
        "memory.max": "67108864\n",
        "memory.low": "33554432\n",
        "memory.high": "49999872\n",
        "memory.oom.group": "1\n",
        "cpu.max": "20000 100000\n",
        "cpu.weight": "100\n",
        "pids.max": "10\n",
    }.items():
        assert content(group, file) == text
    group.apply({"cpu": {"period": 50000}})
    assert content(group, "cpu.max") == "20000 50000\n"


def test_io_limits_slow_the_device_down(group: Cgroup) -> None:
    disk = os.stat("/dev/ubda").st_rdev
    device = {"major": os.major(disk), "minor": os.minor(disk)}
    group.apply({"blockIO": {"throttleWriteBpsDevice": [device | {"rate": MIB}]}})
    assert content(group, "io.max") == f"{os.major(disk)}:{os.minor(disk)} rbps=max wbps=1048576 riops=max wiops=max\n"

    def write() -> None:
        buffer = mmap.mmap(-1, MIB)  # aligned, as O_DIRECT wants it
        os.write(os.open("/dev/ubda", os.O_WRONLY | os.O_DIRECT), buffer)

    start = time.monotonic()
    assert Member(group, write).wait() == 0
    assert 0.8 < time.monotonic() - start < 10
    (counts,) = group.stats()["extra"]["io"]
    assert counts["device"] == f"{os.major(disk)}:{os.minor(disk)}" and counts["wbytes"] == MIB


def test_an_io_limit_on_a_device_that_is_not_there(group: Cgroup) -> None:
    with pytest.raises(StepFailed, match=r"blockIO.throttleReadBpsDevice\[0\]") as caught:
        group.apply({"blockIO": {"throttleReadBpsDevice": [{"major": 4000, "minor": 1, "rate": MIB}]}})
    assert caught.value.number == errno.ENODEV


def test_a_controller_that_the_host_lacks_is_a_warning(group: Cgroup) -> None:
    assert group.apply({"cpu": {"cpus": "0"}}) == [
        "linux.resources.cpu.cpus is not applied: this host has no cpuset cgroup controller"
    ]


def test_a_parent_with_processes_cannot_have_limited_groups_below(group: Cgroup) -> None:
    member = Member(group, sleep_long)
    with pytest.raises(StepFailed, match=f"processes {member.pid} are in .* itself") as caught:
        Cgroup(f"{group.path}/below").create()
    assert caught.value.number == errno.EBUSY and caught.value.path.endswith("cgroup.subtree_control")
    assert not Cgroup(f"{group.path}/below").exists()
    group.kill()
    member.wait()


def test_a_process_is_born_in_its_group(group: Cgroup) -> None:
    assert group.join_files() == []

    def look() -> int:
        with open("/proc/self/cgroup") as file:
            return int(file.read() != f"0::{group.path}\n")

    assert Member(group, look).wait() == 0


def test_memory_events_tell_why(group: Cgroup) -> None:
    group.apply({"memory": {"limit": 24 * MIB, "swap": 24 * MIB}})
    Member(group, lambda: len(bytearray(b"x") * (200 * MIB))).wait()
    events = group.events()
    assert events["oom"] >= 1 and events["oom_kill"] == 1 and events["max"] >= 1


def test_another_managers_device_program_stays(group: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "NAME", b"someone_else")
    group.apply_devices([DENY_ALL, NULL, NULL | {"minor": 5}])
    monkeypatch.undo()
    group.apply_devices([DENY_ALL, NULL, NULL | {"minor": 7}])
    group.apply_devices([{"allow": True}])
    paths = ("/dev/null", "/dev/zero", "/dev/full")
    opened = [Member(group, functools.partial(try_open, path)).wait() for path in paths]
    assert opened == [0, 0, errno.EPERM]  # what both allow


def test_device_rules_bind_groups_below(group: Cgroup) -> None:
    group.apply_devices([DENY_ALL, NULL])
    below = Cgroup(f"{group.path}/below")
    below.create()
    below.apply_devices([{"allow": True}])
    assert Member(below, lambda: try_open("/dev/zero")).wait() == errno.EPERM
    assert Member(below, lambda: try_open("/dev/null")).wait() == 0


def test_a_program_that_the_verifier_refuses_says_why() -> None:
    with pytest.raises(OSError) as caught:
        bpf.load_device_program(bpf.device_program([])[:-8])  # without its exit
    assert caught.value.errno == errno.EINVAL and "last insn" in str(caught.value.filename)
