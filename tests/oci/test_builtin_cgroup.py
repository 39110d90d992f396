"""Containers in their cgroups: on the host's own hierarchies, and on a kernel with cgroup v2."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crio_native.errors import AlreadyExists, InvalidArgument, StepFailed
from crio_native.linux.cgroup import Cgroup, hierarchy
from crio_native.oci.builtin.runtime import BuiltinRuntime
from crio_native.oci.runtime import ExecSpec

from ..machine import assert_machine_unchanged, machine_state
from ..waiting import wait_for
from .conftest import Box, Container

PARENT = "/crio-native-test-oci"


def limited(box: Box, *args: str, **resources: object) -> Container:
    spec = box.spec(*args)
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{os.path.basename(box.directory)}-{len(box.containers)}"
    spec["linux"]["resources"] = resources
    return box.create(spec)


def is_member(pid: int, cgroup: str) -> bool:
    """Whether the process is in the group in every hierarchy of this host."""
    lists = [Path(mount + cgroup, "cgroup.procs").read_text().split() for mount in hierarchy().mounts]
    return all(str(pid) in pids for pids in lists)


def the_init_is_born_in_its_group(box: Box) -> None:
    container = limited(box, pids={"limit": 20})
    assert is_member(container.process.pid, container.cgroup)


def a_monitor_may_have_a_group_beside_its_containers(box: Box) -> None:
    box.runtime = BuiltinRuntime(box.runtime._launchers, monitor_cgroup="pod")
    container = limited(box, pids={"limit": 20}).start()
    group = f"{PARENT}/crio-conmon-{container.spec.id}"
    assert is_member(container.process.monitor_pid, group) and not is_member(container.process.pid, group)
    assert container.exec("true") == (0, "")
    assert Cgroup(group).processes() == [container.process.monitor_pid]
    box.remove_containers()
    assert not Cgroup(group).exists()


def a_monitors_group_that_is_taken_leaves_no_container(box: Box) -> None:
    box.runtime = BuiltinRuntime(box.runtime._launchers, monitor_cgroup="pod")
    other = limited(box)
    wanted = f"{PARENT}/{os.path.basename(box.directory)}-1"
    taken = Cgroup(f"{PARENT}/crio-conmon-box{os.getpid()}-1")
    taken.create()
    taken.take(other.process.monitor_pid)
    with pytest.raises(StepFailed, match="monitor_cgroup"):
        limited(box)
    assert not Cgroup(wanted).exists()


def an_exec_is_born_in_the_group(box: Box) -> None:
    container = limited(box, pids={"limit": 20}).start()
    request = {**container.spec.spec["process"], "args": ["sleep", "100"]}
    session = box.runtime.exec(container.spec.id, container.process, container.cgroup, ExecSpec(request))
    assert is_member(session.pid, container.cgroup)
    assert len(Cgroup(container.cgroup).processes()) == 2
    session.kill()
    assert session.result().code == 137
    session.close()


def memory_beyond_the_limit_is_told_as_such(box: Box) -> None:
    spec = limited(
        box, "sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M", memory={"limit": 32 << 20, "swap": 32 << 20}
    )
    status = spec.start().wait()
    assert status.oom_killed and status.code != 0


def forks_beyond_the_limit_fail(box: Box) -> None:
    container = limited(box, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 9 & done", pids={"limit": 4}).start()
    container.wait()
    assert "fork" in container.output("stderr")


def a_device_that_is_not_allowed_is_refused(box: Box) -> None:
    rules = [{"allow": False, "access": "rwm"}]
    spec = box.spec("sh", "-c", "head -c1 /dev/zero | wc -c; head -c1 /dev/kmsg || echo refused")
    spec["linux"]["devices"] = [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}]
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{os.path.basename(box.directory)}"
    spec["linux"]["resources"] = {"devices": rules}
    container = box.create(spec).start()
    container.wait()
    assert container.output() == "1\nrefused\n"


def killing_all_reaches_every_process(box: Box) -> None:
    container = limited(box, "sh", "-c", "sleep 100 & sleep 100 & echo up; wait").start()
    while "up" not in container.output():
        time.sleep(0.01)
    Cgroup(container.cgroup).kill()
    assert container.wait().signal == 9
    wait_for(lambda: not Cgroup(container.cgroup).processes())


def an_update_changes_the_live_limit(box: Box) -> None:
    container = limited(box, memory={"limit": 64 << 20}).start()
    box.runtime.update(container.spec.id, container.cgroup, {"memory": {"limit": 96 << 20}})
    stats = box.runtime.stats(container.spec.id, container.cgroup)
    assert stats.memory_limit == 96 << 20 and stats.cpu_usage and stats.memory_usage and stats.pids == 1


def the_container_sees_its_own_group_as_the_root(box: Box) -> None:
    spec = box.spec("sh", "-c", "cat /proc/self/cgroup; ls /sys/fs/cgroup; echo x > /sys/fs/cgroup/x || echo read-only")
    options = ["nosuid", "noexec", "nodev", "relatime", "ro"]
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options})
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{os.path.basename(box.directory)}"
    container = box.create(spec).start()
    container.wait()
    paths, rest = container.output().split("\n", 1)[0], container.output()
    assert paths.endswith(":/") and "read-only" in rest
    assert PARENT not in rest


def a_limit_that_is_too_small_is_refused(box: Box) -> None:
    before = machine_state("crio-native-test-oci")
    with pytest.raises(InvalidArgument, match="memory"):
        limited(box, memory={"limit": 4096})
    assert_machine_unchanged(before, "crio-native-test-oci/")


def a_limit_that_the_kernel_refuses_leaves_nothing(box: Box) -> None:
    """The init has been born by then, and waits for its groups."""
    limited(box, pids={"limit": 20})  # the groups' parent is made
    before = machine_state("crio-native-test-oci")
    with pytest.raises(StepFailed, match=r"linux.resources.cpu.quota"):
        limited(box, cpu={"quota": 500, "period": 100_000})
    assert_machine_unchanged(before, "crio-native-test-oci")


def a_group_that_is_in_use_is_refused_and_lives_on(box: Box) -> None:
    container = limited(box, pids={"limit": 20}).start()
    spec = box.spec()
    spec["linux"]["cgroupsPath"] = container.cgroup
    with pytest.raises(AlreadyExists, match=f"in use by processes {container.process.pid}"):
        box.create(spec)
    assert box.runtime.is_alive(container.process) and is_member(container.process.pid, container.cgroup)


BEHAVIOUR = [
    the_init_is_born_in_its_group,
    a_monitor_may_have_a_group_beside_its_containers,
    a_monitors_group_that_is_taken_leaves_no_container,
    an_exec_is_born_in_the_group,
    memory_beyond_the_limit_is_told_as_such,
    forks_beyond_the_limit_fail,
    a_device_that_is_not_allowed_is_refused,
    killing_all_reaches_every_process,
    an_update_changes_the_live_limit,
    the_container_sees_its_own_group_as_the_root,
    a_limit_that_is_too_small_is_refused,
    a_limit_that_the_kernel_refuses_leaves_nothing,
    a_group_that_is_in_use_is_refused_and_lives_on,
]


def by_name(function: Callable[[Box], None]) -> str:
    return function.__name__


@pytest.fixture(autouse=True)
def parent_group() -> object:
    yield
    parent = Cgroup(PARENT)
    if parent.exists():
        parent.remove()


@pytest.mark.root
@pytest.mark.parametrize("behaviour", BEHAVIOUR, ids=by_name)
def test_on_this_host(box: Box, behaviour: Callable[[Box], None]) -> None:
    behaviour(box)


@pytest.mark.vm
@pytest.mark.parametrize("behaviour", BEHAVIOUR, ids=by_name)
def test_on_cgroup_v2(box: Box, behaviour: Callable[[Box], None]) -> None:
    behaviour(box)
