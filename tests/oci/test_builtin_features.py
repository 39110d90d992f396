"""`features()` tells what is there: each thing is tried, or asked of the kernel in another way."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from crio_native.errors import FailedPrecondition, InvalidArgument, StepFailed
from crio_native.linux import resctrl
from crio_native.oci.features import features

from .conftest import Box


def test_it_is_a_features_document() -> None:
    found = json.loads(json.dumps(features()))
    assert set(found) <= {
        "ociVersionMin",
        "ociVersionMax",
        "hooks",
        "mountOptions",
        "annotations",
        "potentiallyUnsafeConfigAnnotations",
        "linux",
    }
    linux = found["linux"]
    assert set(linux) == {
        *("namespaces", "capabilities", "cgroup", "seccomp", "apparmor", "selinux", "intelRdt"),
        *("mountExtensions", "netDevices"),
    }
    assert set(linux["cgroup"]) == {"v1", "v2", "systemd", "systemdUser", "rdma"}
    assert all(isinstance(value, bool) for value in linux["cgroup"].values())
    assert linux["mountExtensions"]["idmap"]["enabled"] is True


def test_what_crun_finds_on_this_machine_we_find_too() -> None:
    theirs = json.loads(subprocess.run(["runc", "features"], check=True, capture_output=True).stdout)
    ours = features()
    assert set(theirs["linux"]["namespaces"]) <= set(ours["linux"]["namespaces"])
    assert set(theirs["linux"]["capabilities"]) <= set(ours["linux"]["capabilities"])
    assert set(theirs["mountOptions"]) <= set(ours["mountOptions"])
    assert set(theirs["hooks"]) <= set(ours["hooks"])
    assert set(theirs["linux"]["seccomp"]["actions"]) <= set(ours["linux"]["seccomp"]["actions"])
    assert set(theirs["linux"]["seccomp"]["operators"]) == set(ours["linux"]["seccomp"]["operators"])


@pytest.mark.root
def test_every_supported_seccomp_flag_can_be_loaded(box: Box) -> None:
    listening = ("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",)
    flags = [flag for flag in features()["linux"]["seccomp"]["supportedFlags"] if flag not in listening]
    assert {"SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG"} <= set(flags)
    spec = box.spec("true")
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "flags": flags}
    assert box.run(spec=spec).wait().code == 0


@pytest.mark.root
def test_every_flag_of_a_mount_is_accepted(box: Box) -> None:
    """Those that a tmpfs can have; the recursive ones and propagation have tests of their own."""
    options = [
        name for name in features()["mountOptions"] if not name.startswith("r") or name in ("ro", "rw", "relatime")
    ]
    words = {"bind", "idmap", "remount", "mand", "iversion", "tmpcopyup"}
    spec = box.spec("true")
    for index, option in enumerate(option for option in options if option not in words):
        spec["mounts"].append({"destination": f"/m{index}", "type": "tmpfs", "options": [option]})
    assert box.run(spec=spec).wait().code == 0


# -- Intel RDT: this machine's processor has none, so the groups are directories of a scratch one ---------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "present/mon_groups").mkdir(parents=True)
    (tmp_path / "present/schemata").write_text("    L3:0=00ff;1=000f\n    MB:0= 100;1= 20\n")
    (tmp_path / "mon_groups").mkdir()
    return tmp_path


def test_a_group_that_exists_is_used_when_it_is_what_was_asked_for(root: Path) -> None:
    for rdt in (
        {"closID": "present"},
        {"closID": "present", "l3CacheSchema": "L3:0=ff;1=f"},
        {"closID": "present", "schemata": ["MB:1=20"]},
    ):
        assert resctrl.prepare(rdt, "id", str(root)) == [f"{root}/present/tasks"]
        resctrl.remove(rdt, "id", str(root))
    assert (root / "present").is_dir()


def test_the_default_group_and_a_monitoring_group(root: Path) -> None:
    rdt = {"closID": "/", "enableMonitoring": True}
    assert resctrl.prepare(rdt, "id", str(root)) == [f"{root}/tasks", f"{root}/mon_groups/id/tasks"]
    resctrl.remove(rdt, "id", str(root))
    assert os.listdir(root / "mon_groups") == []


def test_a_group_of_its_own_goes_with_the_container(root: Path) -> None:
    assert resctrl.prepare({}, "id", str(root)) == [f"{root}/id/tasks"]
    resctrl.remove({}, "id", str(root))
    resctrl.remove({}, "id", str(root))
    assert not (root / "id").exists()


@pytest.mark.parametrize(
    ("rdt", "error"),
    [
        ({"closID": "absent"}, InvalidArgument),
        ({"closID": "present", "l3CacheSchema": "L3:0=f"}, InvalidArgument),
        ({"closID": "present", "memBwSchema": "MB:2=100"}, InvalidArgument),
        ({"closID": "absent/below", "memBwSchema": "MB:0=100"}, StepFailed),
    ],
)
def test_groups_that_cannot_be(root: Path, rdt: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"linux.intelRdt.closID|resctrl"):
        resctrl.prepare(rdt, "id", str(root))


@pytest.mark.root
@pytest.mark.parametrize(
    ("rdt", "field"),
    [
        ({"closID": "a/b"}, "closID"),
        ({"closID": ".."}, "closID"),
        ({"memBwSchema": "L3:0=f"}, "memBwSchema"),
        ({"l3CacheSchema": "L3:0=f\nMB:0=1"}, "l3CacheSchema"),
        ({"schemata": ["a", "b\n"]}, r"schemata\[1\]"),
    ],
)
def test_requests_that_cannot_be(box: Box, rdt: dict[str, object], field: str) -> None:
    spec = box.spec()
    spec["linux"]["intelRdt"] = rdt
    with pytest.raises(InvalidArgument, match=f"^linux.intelRdt.{field}:"):
        box.create(spec)


@pytest.mark.root
def test_a_processor_without_it(box: Box) -> None:
    if features()["linux"]["intelRdt"]["enabled"]:
        pytest.skip("this processor has it")
    spec = box.spec()
    spec["linux"]["intelRdt"] = {"closID": "some"}
    with pytest.raises(FailedPrecondition, match=r"linux.intelRdt: no resctrl file system is mounted"):
        box.create(spec)
