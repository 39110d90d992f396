"""The systemd cgroup manager, with a real systemd as the guest's first process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import AlreadyExists, InvalidArgument, StepFailed
from crio_native.linux import cgroup
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime

from ..linux.cgroup_behaviour import DENY_ALL, MIB, NULL, Member, sleep_long, try_open
from ..oci.conftest import Box, box

pytestmark = pytest.mark.vm(systemd=True)
__all__ = ["box"]

SLICE = "crio-tests.slice"
OCI = str(Path(__file__).parents[2] / "build/crio-oci")


def shown(unit: str, *properties: str) -> dict[str, str]:
    """What systemd says of a unit."""
    asked = [argument for name in properties for argument in ("-p", name)]
    output = subprocess.run(["systemctl", "show", unit, *asked], capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in output.splitlines())


@pytest.fixture
def scope() -> Iterator[cgroup.Cgroup]:
    made = cgroup.cgroup_of(f"{SLICE}:crio:one", "systemd")
    made.create()
    yield made
    made.kill()
    made.remove()


def content(group: cgroup.Cgroup, file: str) -> str:
    return Path(f"/sys/fs/cgroup{group.path}/{file}").read_text()


def test_a_scope_is_where_its_name_says(scope: cgroup.Cgroup) -> None:
    assert scope.path == "/crio.slice/crio-tests.slice/crio-one.scope"
    assert shown("crio-one.scope", "Slice", "Delegate", "ActiveState", "ControlGroup") == {
        "Slice": SLICE,
        "Delegate": "yes",
        "ActiveState": "active",
        "ControlGroup": scope.path,
    }
    assert {"cpu", "memory", "io", "pids"} <= set(content(scope, "cgroup.controllers").split())


def test_it_lives_with_what_is_born_in_it_and_goes_when_removed(scope: cgroup.Cgroup) -> None:
    member = Member(scope, sleep_long)
    scope.release()
    assert scope.processes() == [member.pid]
    assert shown("crio-one.scope", "ActiveState") == {"ActiveState": "active"}
    scope.kill()
    member.wait()
    scope.remove()
    assert not scope.exists()
    assert shown("crio-one.scope", "LoadState") == {"LoadState": "not-found"}
    scope.remove()  # what has gone is no error
    scope.create()  # and its name is free


def test_a_scope_that_nothing_came_into_goes_with_its_holder() -> None:
    scope = cgroup.cgroup_of(f"{SLICE}:crio:empty", "systemd")
    scope.create()
    scope.release()
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert shown("crio-empty.scope", "ActiveState") == {"ActiveState": "inactive"}
    assert not scope.exists()


def test_a_name_that_is_taken_is_refused_and_stays(scope: cgroup.Cgroup) -> None:
    with pytest.raises(AlreadyExists, match=r"crio-one\.scope"):
        cgroup.cgroup_of(f"{SLICE}:crio:one", "systemd").create()
    assert len(scope.processes()) == 1


def test_limits_are_systemds_too_and_survive_a_reload(scope: cgroup.Cgroup) -> None:
    scope.apply(
        {
            "memory": {"limit": 64 * MIB, "reservation": 32 * MIB},
            "cpu": {"shares": 2048, "quota": 20500, "period": 100000},
            "pids": {"limit": 10},
            "unified": {"memory.high": str(60 * MIB)},
        }
    )
    files = ("memory.max", "memory.low", "memory.high", "cpu.weight", "pids.max")
    before = {file: content(scope, file) for file in files}
    assert before["memory.max"] == f"{64 * MIB}\n" and before["pids.max"] == "10\n"
    assert content(scope, "cpu.max") == "20500 100000\n"  # exactly, though systemd keeps whole percents
    assert shown(
        "crio-one.scope", "MemoryMax", "MemoryLow", "MemoryHigh", "CPUQuotaPerSecUSec", "TasksMax", "CPUWeight"
    ) == {
        "MemoryMax": str(64 * MIB),
        "MemoryLow": str(32 * MIB),
        "MemoryHigh": str(60 * MIB),
        "CPUQuotaPerSecUSec": "210ms",
        "TasksMax": "10",
        "CPUWeight": before["cpu.weight"].strip(),
    }
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert {file: content(scope, file) for file in files} == before
    scope.apply({"memory": {"limit": -1}, "pids": {"limit": 0}})
    assert shown("crio-one.scope", "MemoryMax", "TasksMax") == {"MemoryMax": "infinity", "TasksMax": "infinity"}
    assert content(scope, "memory.max") == content(scope, "pids.max") == "max\n"


def test_devices_are_allowed_by_both(scope: cgroup.Cgroup) -> None:
    scope.apply_devices([DENY_ALL, NULL])
    assert shown("crio-one.scope", "DevicePolicy", "DeviceAllow") == {
        "DevicePolicy": "strict",
        "DeviceAllow": "/dev/char/1:3 rwm",
    }
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert Member(scope, lambda: try_open("/dev/null")).wait() == 0
    assert Member(scope, lambda: try_open("/dev/zero")).wait() != 0
    scope.apply_devices([{"allow": True}])
    assert Member(scope, lambda: try_open("/dev/zero")).wait() == 0


def test_annotations_become_properties() -> None:
    annotations = {
        "org.systemd.property.Description": "'a test'",
        "org.systemd.property.TimeoutStopSec": "7",
        "org.systemd.property.After": "['tests.target']",
        "other": "not ours",
    }
    scope = cgroup.cgroup_of(f"{SLICE}:crio:annotated", "systemd", annotations)
    scope.create()
    try:
        assert shown("crio-annotated.scope", "Description", "TimeoutStopUSec") == {
            "Description": "a test",
            "TimeoutStopUSec": "7s",
        }
        assert "tests.target" in shown("crio-annotated.scope", "After")["After"]
    finally:
        scope.kill()
        scope.remove()


def test_what_systemd_refuses_leaves_nothing() -> None:
    scope = cgroup.cgroup_of(f"{SLICE}:crio:bad", "systemd", {"org.systemd.property.NoSuchThing": "true"})
    with pytest.raises(Exception, match=r"crio-bad\.scope.*NoSuchThing"):
        scope.create()
    assert not scope.exists() and "cat" not in children()


def test_a_malformed_annotation_is_refused_at_the_door() -> None:
    with pytest.raises(InvalidArgument, match=r"annotations\[org.systemd.property.After\]"):
        cgroup.cgroup_of(f"{SLICE}:crio:bad", "systemd", {"org.systemd.property.After": "[1, 'a']"})


def children() -> list[str]:
    """What our children run, those that nobody has waited for included.  An orphan of the machine's may be one."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]


# crio-oci


def test_a_container_of_crio_oci_has_a_scope(tmp_path: Path) -> None:
    linux = {"cgroupsPath": f"{SLICE}:engine:c1", "resources": {"memory": {"limit": 96 * MIB}, "pids": {"limit": 20}}}
    bundle = make_bundle(tmp_path, ["/bin/busybox", "sleep", "60"], linux)
    oci = [OCI, "--root", str(tmp_path / "state"), "--systemd-cgroup"]
    subprocess.run([*oci, "run", "-d", "--bundle", str(bundle), "c1"], check=True, timeout=60, stdin=subprocess.DEVNULL)
    try:
        assert shown("engine-c1.scope", "ActiveState", "Slice", "MemoryMax", "TasksMax") == {
            "ActiveState": "active",
            "Slice": SLICE,
            "MemoryMax": str(96 * MIB),
            "TasksMax": "20",
        }
        state = json.loads(subprocess.run([*oci, "state", "c1"], check=True, capture_output=True).stdout)
        group = "/crio.slice/crio-tests.slice/engine-c1.scope"
        assert Path(f"/sys/fs/cgroup{group}/cgroup.procs").read_text() == f"{state['pid']}\n"
        subprocess.run([*oci, "update", "--memory", "64m", "c1"], check=True)
        assert shown("engine-c1.scope", "MemoryMax") == {"MemoryMax": str(64 * MIB)}
        subprocess.run([*oci, "exec", "c1", "/bin/busybox", "true"], check=True, timeout=60)
    finally:
        subprocess.run([*oci, "delete", "--force", "c1"], check=True, timeout=60)
    assert shown("engine-c1.scope", "LoadState") == {"LoadState": "not-found"}
    assert not os.path.exists(f"/sys/fs/cgroup{group}")


def test_a_failed_create_leaves_no_scope(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, ["/bin/true"], {"cgroupsPath": f"{SLICE}:engine:c2"})
    oci = [OCI, "--root", str(tmp_path / "state"), "--systemd-cgroup", "--fail", "pivot_root"]
    done = subprocess.run([*oci, "run", "--bundle", str(bundle), "c2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "pivot_root" in done.stderr
    assert shown("engine-c2.scope", "LoadState") == {"LoadState": "not-found"}


def make_bundle(directory: Path, arguments: list[str], linux: dict[str, Any]) -> Path:
    """config.json as `crio-oci spec` writes it, and busybox for a root file system."""
    bundle = directory / "bundle"
    (bundle / "rootfs/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", bundle / "rootfs/bin/busybox")
    subprocess.run([OCI, "spec", "--bundle", str(bundle)], check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": arguments}
    config["linux"] |= linux
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


# The daemon's executor


@pytest.fixture(scope="module")
def runtime() -> Iterator[BuiltinRuntime]:
    launchers = Launchers(1)
    launchers.start()
    yield BuiltinRuntime(launchers, cgroup_manager="systemd")
    launchers.stop()


def test_a_container_of_the_daemons_executor(box: Box) -> None:
    spec = box.spec("sleep", "1000")
    spec["linux"] |= {"cgroupsPath": "crio-pod1.slice:crio:c1", "resources": {"memory": {"limit": 96 * MIB}}}
    spec["annotations"] = {"org.systemd.property.TimeoutStopSec": "3"}
    container = box.create(spec).start()
    assert shown("crio-c1.scope", "ActiveState", "Slice", "MemoryMax", "TimeoutStopUSec") == {
        "ActiveState": "active",
        "Slice": "crio-pod1.slice",
        "MemoryMax": str(96 * MIB),
        "TimeoutStopUSec": "3s",
    }
    group = "/crio.slice/crio-pod1.slice/crio-c1.scope"
    assert Path(f"/sys/fs/cgroup{group}/cgroup.procs").read_text() == f"{container.process.pid}\n"
    code, text = container.exec("cat", "/proc/self/cgroup")
    assert (code, text) == (0, "0::/\n")  # the scope is the root of its cgroup namespace
    box.runtime.update(container.spec.id, container.cgroup, {"memory": {"limit": 64 * MIB}})
    assert shown("crio-c1.scope", "MemoryMax") == {"MemoryMax": str(64 * MIB)}
    assert box.runtime.stats(container.spec.id, container.cgroup).memory_usage
    box.remove_containers()
    assert shown("crio-c1.scope", "LoadState") == {"LoadState": "not-found"}
    assert not os.path.exists(f"/sys/fs/cgroup{group}")


@pytest.mark.parametrize(("monitor_cgroup", "slice_"), [("pod", "crio-pod1.slice"), ("watch.slice", "watch.slice")])
def test_a_monitor_has_a_scope_in_the_pods_slice_or_another(box: Box, monitor_cgroup: str, slice_: str) -> None:
    box.runtime = BuiltinRuntime(box.runtime._launchers, cgroup_manager="systemd", monitor_cgroup=monitor_cgroup)
    spec = box.spec("sleep", "1000")
    spec["linux"]["cgroupsPath"] = "crio-pod1.slice:crio:c3"
    container = box.create(spec).start()
    unit = f"crio-conmon-{container.spec.id}.scope"
    assert shown(unit, "ActiveState", "Slice") == {"ActiveState": "active", "Slice": slice_}
    assert unit in Path(f"/proc/{container.process.monitor_pid}/cgroup").read_text()
    assert unit not in Path(f"/proc/{container.process.pid}/cgroup").read_text()
    box.remove_containers()
    assert shown(unit, "LoadState") == {"LoadState": "not-found"}


def test_a_failed_creation_of_the_daemons_executor_leaves_no_scope(box: Box) -> None:
    spec = box.spec("sleep", "1000")
    spec["linux"]["cgroupsPath"] = "crio-pod1.slice:crio:c2"
    spec["root"]["path"] = "/no/such/root"
    with pytest.raises(StepFailed, match="bind_root"):
        box.create(spec)
    assert shown("crio-c2.scope", "LoadState") == {"LoadState": "not-found"}
