"""Annotations that change how a pod is run: only where they are allowed, the nearest and newest first."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import pytest

from crio_native.config.tables import RuntimeHandler, Workload, WorkloadResources
from crio_native.errors import InvalidArgument
from crio_native.pods.pod_annotations import NAMES, Allowed
from crio_native.pods.values import Resources

EVERYTHING = RuntimeHandler(allowed_annotations=tuple(name for names in NAMES.values() for name in names))
NEW, OLD = NAMES["unified"]


def allowed(
    annotations: Mapping[str, str], handler: RuntimeHandler = EVERYTHING, workload: Workload | None = None
) -> Allowed:
    return Allowed(annotations, handler, {"mine": workload} if workload else {}, "web")


def test_nothing_happens_unless_it_is_allowed() -> None:
    asked = {new: "true" for new, _ in NAMES.values()}
    nobody = allowed(asked, RuntimeHandler())
    assert not any(nobody.is_set(what) for what in NAMES) and nobody.umask() is None and nobody.shm_size() == 0
    assert allowed(asked, RuntimeHandler(allowed_annotations=("cgroup2-mount",))).is_set("cgroup_rw")
    assert not allowed(asked, RuntimeHandler(allowed_annotations=("",))).is_set("cgroup_rw")


def test_a_workload_may_allow_more() -> None:
    workload = Workload(activation_annotation="active", allowed_annotations=("umask.crio.io",))
    assert allowed({"umask.crio.io": "027"}, RuntimeHandler(), workload).umask() is None
    assert allowed({"active": "", "umask.crio.io": "027"}, RuntimeHandler(), workload).umask() == 0o027


def test_the_containers_own_and_the_new_name_win() -> None:
    asked = {OLD: "a=1", NEW: "a=2"}
    assert allowed(asked).unified() == {"a": "2"}
    asked[f"{OLD}.web"] = "a=3"
    assert allowed(asked).unified() == {"a": "3"}
    asked[f"{NEW}/web"] = "a=4"
    assert allowed(asked).unified() == {"a": "4"}
    assert allowed({f"{NEW}/other": "a=5"}).unified() == {}


def test_values_of_cgroup_files_plain_and_encoded() -> None:
    value = "8:16 rbps=1;"
    encoded = base64.b64encode(value.encode()).decode()
    assert allowed({NEW: f"io.max={encoded};memory.high=1000;pids.max=max"}).unified() == {
        "io.max": value,
        "memory.high": "1000",
        "pids.max": "max",
    }
    with pytest.raises(InvalidArgument, match="FILE=VALUE"):
        allowed({NEW: "memory.high"}).unified()


@pytest.mark.parametrize("text", ["0778", "22", "x", "00022"])
def test_what_is_no_umask(text: str) -> None:
    with pytest.raises(InvalidArgument, match="umask"):
        allowed({"umask.crio.io": text}).umask()


@pytest.mark.parametrize("text", ["1", "-1", "many"])
def test_what_is_no_size_of_shared_memory(text: str) -> None:
    with pytest.raises(InvalidArgument, match="shm-size"):
        allowed({"shm-size.crio.io": text}).shm_size()


def test_resources_of_a_workload() -> None:
    limits = WorkloadResources(cpushares=10, cpuset="0-1")
    workload = Workload("active", "resources.example.com", (), limits)
    asked = Resources(cpu_shares=500, cpu_quota=1000, cpu_period=2000)
    assert allowed({}, workload=workload).resources(asked) == asked
    found = allowed({"active": ""}, workload=workload).resources(asked)
    assert (found.cpu_shares, found.cpuset_cpus, found.cpu_quota, found.cpu_period) == (10, "0-1", 1000, 2000)
    own = {"active": "", "resources.example.com/web": '{"cpushares": "77", "cpulimit": 500, "cpuset": "3"}'}
    found = allowed(own, workload=workload).resources(Resources())
    assert (found.cpu_shares, found.cpuset_cpus, found.cpu_quota, found.cpu_period) == (77, "3", 50000, 100000)
    for bad in ("[]", "{", '{"cpuset": "a"}', '{"cpushares": "x"}'):
        with pytest.raises(InvalidArgument, match=r"resources\.example\.com/web"):
            allowed({"active": "", "resources.example.com/web": bad}, workload=workload).resources(asked)
