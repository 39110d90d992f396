"""What a control group does, whatever the hierarchy: real processes against real limits.

No tests run from this file: the host's session imports them as `test_cgroup`, the guests' as tests/vm/test_cgroup_*.
Members are forks of this process, not programs, because in a guest every exec is expensive.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from crio_native.errors import AlreadyExists, InvalidArgument, StepFailed
from crio_native.linux import syscalls
from crio_native.linux.cgroup import Cgroup, Hierarchy, hierarchy

from ..apart import MARK
from ..waiting import wait_for

MIB = 1 << 20
DENY_ALL = {"allow": False, "access": "rwm"}
NULL = {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
ZERO = NULL | {"minor": 5}
_counter = itertools.count()


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """An existing group two levels deep; afterwards it, its members and its ancestors are gone."""
    top = f"/{MARK}{next(_counter)}"
    group = Cgroup(f"{top}/pod/container")
    group.create()
    yield group
    Cgroup(top).kill()
    Cgroup(top).remove()


class Member:
    """A child that is born in the group, or joins it, and then does body; its exit status is body's return value."""

    def __init__(self, group: Cgroup, body: Callable[[], int | None]) -> None:
        ready, tell = os.pipe()
        directory = group.descriptor()
        self.pid = syscalls.clone3(0, exit_signal=signal.SIGCHLD, cgroup=directory)
        if self.pid == 0:
            try:
                for path in group.join_files():
                    descriptor = os.open(path, os.O_WRONLY)
                    os.write(descriptor, b"0")
                    os.close(descriptor)
                os.write(tell, b".")
                os._exit(body() or 0)
            finally:
                os._exit(99)
        if directory is not None:
            os.close(directory)
        os.close(tell)
        joined = os.read(ready, 1)
        os.close(ready)
        assert joined, f"the member ended with {self.wait()} before it had joined"

    def wait(self) -> int:
        """The exit status, negative when a signal ended it."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def sleep_long() -> None:
    time.sleep(60)


def try_open(path: str, flags: int = os.O_RDWR) -> int:
    """0, or the errno."""
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        return error.errno or 0
    return 0


# Making and removing


def test_a_group_is_made_everywhere_with_its_ancestors_and_removed_without_a_trace(group: Cgroup) -> None:
    top = "/" + group.path.split("/")[1]
    assert group.made == [top, f"{top}/pod"]
    directories = [mount + group.path for mount in hierarchy().mounts]
    assert all(map(os.path.isdir, directories)) and group.exists()
    group.remove()
    assert not any(map(os.path.exists, directories)) and not group.exists()
    group.remove()


def test_an_empty_group_may_be_there_already_one_in_use_may_not(group: Cgroup) -> None:
    Cgroup(group.path).create()
    member = Member(group, sleep_long)
    with pytest.raises(AlreadyExists, match=f"in use by processes {member.pid}"):
        Cgroup(group.path).create()
    assert group.processes() == [member.pid]
    group.kill()
    assert member.wait() == -signal.SIGKILL


def test_a_failed_create_leaves_nothing(group: Cgroup) -> None:
    host = hierarchy()
    broken = Hierarchy(host.mode, host.unified, host.v1, host.v2, (*host.mounts, "/proc/no/such/mount"))
    new = Cgroup(f"{group.path}/a/b", broken)
    with pytest.raises(StepFailed, match="/proc/no/such/mount"):
        new.create()
    assert not any(os.path.exists(f"{mount}{group.path}/a") for mount in host.mounts)


def test_a_cpuset_that_somebody_left_empty_is_filled(group: Cgroup) -> None:
    cpuset = hierarchy().v1.get("cpuset")
    if cpuset is None:
        return  # v2 has no empty cpusets, and a hybrid without cpuset none at all
    with open(f"{cpuset}{group.path}/cgroup.clone_children", "w") as file:
        file.write("0")
    os.mkdir(f"{cpuset}{group.path}/foreign")
    Cgroup(f"{group.path}/foreign/ours").create()
    assert Member(Cgroup(f"{group.path}/foreign/ours"), lambda: 0).wait() == 0


def test_removing_takes_what_the_container_made_below(group: Cgroup) -> None:
    Cgroup(f"{group.path}/its/own").create()
    group.remove()
    assert not group.exists()


def test_removing_refuses_while_processes_live_and_leaves_the_group_whole(
    group: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crio_native.linux.cgroup.group._REMOVE_SECONDS", 0.2)
    member = Member(group, sleep_long)
    with pytest.raises(StepFailed, match=f"processes {member.pid} live in it") as caught:
        group.remove()
    assert caught.value.number == errno.EBUSY
    assert all(os.path.isdir(mount + group.path) for mount in hierarchy().mounts)
    group.kill()
    member.wait()


def test_a_group_that_is_not_there() -> None:
    absent = Cgroup("/crio-native-test-absent/x")
    assert not absent.exists() and absent.processes() == [] and absent.events() == {}
    absent.kill()
    absent.remove()
    absent.thaw()
    with pytest.raises(StepFailed, match="no such group"):
        absent.freeze()
    with pytest.raises(StepFailed, match=r"linux.resources.pids.limit"):
        absent.apply({"pids": {"limit": 5}})


# Limits


def test_a_memory_hog_is_killed_and_counted(group: Cgroup) -> None:
    assert group.apply({"memory": {"limit": 24 * MIB, "swap": 24 * MIB}}) == []
    assert group.stats()["memory_limit"] == 24 * MIB
    hog = Member(group, lambda: len(bytearray(b"x") * (200 * MIB)))
    assert hog.wait() == -signal.SIGKILL
    assert group.events()["oom_kill"] == 1
    with open(group.oom_file()) as file:
        assert "oom_kill 1\n" in file.read()


def test_memory_and_swap_limits_go_up_and_down_together(group: Cgroup) -> None:
    for size in (64, 32, 128):
        group.apply({"memory": {"limit": size * MIB, "swap": size * MIB}})
        assert group.stats()["memory_limit"] == size * MIB
    group.apply({"memory": {"limit": -1}})
    assert group.stats()["memory_limit"] is None


def test_memory_limits_that_cannot_work(group: Cgroup) -> None:
    with pytest.raises(InvalidArgument, match=r"linux.resources.memory.limit: too small to start a process"):
        group.apply({"memory": {"limit": 4096}})
    ready, tell = os.pipe()

    def hold() -> None:
        held = bytearray(b"x") * (64 * MIB)
        os.write(tell, held[:1])
        sleep_long()

    member = Member(group, hold)
    os.read(ready, 1)
    with pytest.raises(StepFailed, match=r"memory.limit"):
        group.apply({"memory": {"limit": 1 * MIB, "checkBeforeUpdate": True}})
    assert group.events()["oom_kill"] == 0
    group.kill()
    member.wait()
    os.close(ready)
    os.close(tell)


def test_forks_end_at_the_limit_of_pids(group: Cgroup) -> None:
    group.apply({"pids": {"limit": 4}})

    def forks() -> int:
        """How many succeed; the children live on until the group is killed."""
        for count in range(10):
            try:
                if os.fork() == 0:
                    sleep_long()
            except BlockingIOError:
                return count
        return 10

    assert Member(group, forks).wait() == 3
    assert len(group.processes()) == 3 == group.stats()["pids"]
    group.kill()
    wait_for(lambda: group.processes() == [])


def test_the_cpu_quota_throttles(group: Cgroup) -> None:
    group.apply({"cpu": {"shares": 512, "quota": 5000, "period": 50000}})

    def spin() -> None:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            pass

    before = group.stats()["cpu_usage"]
    assert Member(group, spin).wait() == 0
    after = group.stats()
    assert after["extra"]["cpu"]["throttled_periods"] >= 5
    assert 0 < after["cpu_usage"] - before < 500_000_000  # a tenth of a second is allowed; a guest's clock is coarse


def test_a_quota_can_be_lifted(group: Cgroup) -> None:
    for quota, period in ((5000, 50000), (200000, 100000), (-1, 100000)):
        assert group.apply({"cpu": {"quota": quota, "period": period}}) == []


def test_devices_are_refused_until_a_rule_allows_them(group: Cgroup) -> None:
    group.apply_devices([DENY_ALL, NULL])
    assert Member(group, lambda: try_open("/dev/null")).wait() == 0
    assert Member(group, lambda: try_open("/dev/zero")).wait() == errno.EPERM
    group.apply_devices([DENY_ALL, NULL | {"access": "r"}, ZERO])
    assert Member(group, lambda: try_open("/dev/zero")).wait() == 0
    assert Member(group, lambda: try_open("/dev/null")).wait() == errno.EPERM
    assert Member(group, lambda: try_open("/dev/null", os.O_RDONLY)).wait() == 0


def test_mknod_is_an_access_of_its_own(group: Cgroup, tmp_path: object) -> None:
    group.apply_devices([DENY_ALL, NULL | {"access": "rw"}, ZERO | {"access": "m"}])

    def make(minor: int) -> int:
        try:
            os.mknod(f"{tmp_path}/device{minor}", 0o020600, os.makedev(1, minor))
        except OSError as error:
            return error.errno or 0
        return 0

    assert Member(group, lambda: make(3)).wait() == errno.EPERM
    assert Member(group, lambda: make(5)).wait() == 0


def test_no_device_is_open_to_all_while_rules_are_replaced(group: Cgroup) -> None:
    group.apply_devices([DENY_ALL, NULL])

    def watch() -> int:
        return int(any(try_open("/dev/zero") == 0 for _ in range(300)))

    member = Member(group, watch)
    for number in range(20):
        group.apply_devices([DENY_ALL, NULL if number % 2 else NULL | {"access": "r"}])
    assert member.wait() == 0


# Members


def test_kill_reaches_those_that_fork_and_those_below(group: Cgroup) -> None:
    below = Cgroup(f"{group.path}/below")
    below.create()

    def breed() -> None:
        os.setsid()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        while True:
            if os.fork() == 0:
                time.sleep(0.05)
                os._exit(0)
            time.sleep(0.001)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                continue

    if hierarchy().mode == "v2":  # there a group with members hands no controllers down, so none is in between
        members = [Member(below, breed), Member(below, sleep_long)]
    else:
        members = [Member(group, breed), Member(below, sleep_long)]
    wait_for(lambda: len(group.processes()) > 2)
    group.kill()
    assert [member.wait() for member in members] == [-signal.SIGKILL] * 2
    wait_for(lambda: group.processes() == [])
    group.remove()


def test_a_frozen_group_stands_still_and_can_be_killed(group: Cgroup) -> None:
    ticks, tick = os.pipe()
    os.set_blocking(ticks, False)

    def run() -> None:
        while True:
            os.write(tick, b".")
            time.sleep(0.001)

    def moved() -> bool:
        try:
            return len(os.read(ticks, 1 << 16)) > 0
        except BlockingIOError:
            return False

    member = Member(group, run)
    wait_for(moved)
    assert not group.frozen()
    group.freeze()
    assert group.frozen()
    moved()  # what was written before
    time.sleep(0.1)
    assert not moved()
    group.thaw()
    wait_for(moved)
    wait_for(lambda: not group.frozen())
    group.freeze()
    group.kill()
    assert member.wait() == -signal.SIGKILL
    os.close(ticks)
    os.close(tick)


def test_a_frozen_group_above_is_told(group: Cgroup) -> None:
    below = Cgroup(group.path + "/between/below")
    below.create()
    assert below.frozen_ancestors() == []
    group.freeze()
    assert below.frozen_ancestors() == [(hierarchy().unified or hierarchy().v1_freezer) + group.path]
    below.freeze()
    group.thaw()
    assert below.frozen_ancestors() == []
    below.thaw()


# Accounts


def test_the_accounts_of_a_working_group(group: Cgroup) -> None:
    ready, tell = os.pipe()

    def work() -> None:
        held = bytearray(b"x") * (16 * MIB)
        sum(range(200_000))
        os.write(tell, held[:1])
        sleep_long()

    member = Member(group, work)
    os.read(ready, 1)
    stats = group.stats()
    assert abs(stats["timestamp"] - time.time_ns()) < 10**10
    assert stats["pids"] == 1
    assert stats["cpu_usage"] > 0
    assert stats["memory_usage"] >= stats["memory_working_set"] >= 16 * MIB
    assert 16 * MIB <= stats["memory_rss"] < 64 * MIB
    assert stats["page_faults"] > 1000
    assert stats["memory_limit"] is None
    group.kill()
    member.wait()
    os.close(ready)
    os.close(tell)
