"""Seccomp profiles as data: what is refused and where, and what a container's capabilities make of the conditions."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.config.installed import installed
from crio_native.config.values import CAPABILITIES
from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, NotFound
from crio_native.oci import seccomp, seccomp_profile

ALLOW = {"defaultAction": "SCMP_ACT_ALLOW"}


def with_rule(**rule: Any) -> dict[str, Any]:
    return ALLOW | {"syscalls": [{"names": ["dup"], "action": "SCMP_ACT_ERRNO"} | rule]}


def with_argument(**argument: Any) -> dict[str, Any]:
    return with_rule(args=[{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"} | argument])


@pytest.mark.parametrize(
    ("profile", "at"),
    [
        ([], ""),
        ({}, "defaultAction"),
        ({"defaultAction": "ALLOW"}, "defaultAction"),
        ({"defaultAction": ["SCMP_ACT_ALLOW"]}, "defaultAction"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5000}, "defaultErrnoRet"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrno": "EWHATEVER"}, "defaultErrno"),
        (ALLOW | {"defaultErrnoRet": 1}, "defaultErrnoRet"),
        (ALLOW | {"architectures": "SCMP_ARCH_X86_64"}, "architectures"),
        (ALLOW | {"architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_VAX"]}, "architectures[1]"),
        (ALLOW | {"flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}, "flags[0]"),
        (ALLOW | {"archMap": [{"architecture": "x"}]}, "archMap[0].architecture"),
        (ALLOW | {"listenerMetadata": "x"}, "listenerMetadata"),
        (ALLOW | {"syscalls": {}}, "syscalls"),
        (ALLOW | {"syscalls": [1]}, "syscalls[0]"),
        (ALLOW | {"syscalls": [{}] * (seccomp_profile.RULES_MAX + 1)}, "syscalls"),
        (with_rule(names=[]), "syscalls[0].names"),
        (with_rule(names=["open", "op en"]), "syscalls[0].names[1]"),
        (with_rule(names=["open"] * (seccomp_profile.NAMES_MAX + 1)), "syscalls[0].names"),
        (with_rule(action="SCMP_ACT_REFUSE"), "syscalls[0].action"),
        (with_rule(errnoRet=True), "syscalls[0].errnoRet"),
        (with_rule(errnoRet=-1), "syscalls[0].errnoRet"),
        (with_rule(action="SCMP_ACT_LOG", errnoRet=1), "syscalls[0].errnoRet"),
        (with_argument(index=6), "syscalls[0].args[0].index"),
        (with_argument(index=True), "syscalls[0].args[0].index"),
        (with_argument(value=-1), "syscalls[0].args[0].value"),
        (with_argument(value=2**64), "syscalls[0].args[0].value"),
        (with_argument(valueTwo="1"), "syscalls[0].args[0].valueTwo"),
        (with_argument(op="=="), "syscalls[0].args[0].op"),
        (with_rule(args=[{"index": 0, "op": "SCMP_CMP_EQ"}]), "syscalls[0].args[0].value"),
        (with_rule(includes={"caps": "CAP_CHOWN"}), "syscalls[0].includes.caps"),
        (with_rule(excludes={"minKernel": "new"}), "syscalls[0].excludes.minKernel"),
        (with_rule(includes={"hostname": "x"}), "syscalls[0].includes.hostname"),
    ],
)
def test_a_faulty_profile_is_refused_with_the_path_of_the_fault(profile: Any, at: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        seccomp_profile.load_profile(json.dumps(profile))
    assert caught.value.field == ("seccomp profile: " + at if at else "seccomp profile")
    with pytest.raises(InvalidArgument, match=r"linux\.seccomp"):
        seccomp.compile(profile)


@pytest.mark.parametrize("text", ["", "not json", "{", '{"defaultAction": "SCMP_ACT_ALLOW"', "[" * 100_000])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is not JSON|nested too deeply"):
        seccomp_profile.load_profile(text)


def test_a_file_that_is_no_profile_is_not_shown(tmp_path: Path) -> None:
    """A client names the path, and may not be one who may read it."""
    (tmp_path / "shadow").write_text("root:secret:19000::::::\n")
    with pytest.raises(InvalidArgument, match="is not JSON") as caught:
        seccomp_profile.load_profile(tmp_path / "shadow")
    assert "secret" not in str(caught.value)


def test_files_are_named_in_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=str(tmp_path / "none.json")):
        seccomp_profile.load_profile(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"defaultAction": "X"}')
    with pytest.raises(InvalidArgument, match=f"{tmp_path / 'bad.json'}: defaultAction: must be one of SCMP_ACT_KILL"):
        seccomp_profile.load_profile(tmp_path / "bad.json")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="is not UTF-8"):
        seccomp_profile.load_profile(tmp_path / "latin.json")
    with pytest.raises(FailedPrecondition, match="cannot be read: Is a directory"):
        seccomp_profile.load_profile(tmp_path)
    (tmp_path / "large.json").write_text(" " * (seccomp_profile.PROFILE_SIZE_MAX + 1))
    with pytest.raises(InvalidArgument, match="must be at most"):
        seccomp_profile.load_profile(tmp_path / "large.json")


def resolved(rule: dict[str, Any], capabilities: set[str], arch: str = "x86_64", kernel: str = "6.1.0-9") -> bool:
    profile = ALLOW | {"syscalls": [{"names": ["dup"], "action": "SCMP_ACT_LOG"} | rule]}
    seccomp_profile.check_profile(profile, "profile")
    return bool(seccomp_profile.resolve(profile, capabilities, arch, kernel)["syscalls"])


def test_conditions_by_capability_architecture_and_kernel() -> None:
    both = {"includes": {"caps": ["CAP_BPF", "CAP_PERFMON"]}}
    assert resolved(both, {"CAP_BPF", "CAP_PERFMON", "CAP_CHOWN"})
    assert not resolved(both, {"CAP_BPF"})
    either = {"excludes": {"caps": ["CAP_BPF", "CAP_PERFMON"]}}
    assert not resolved(either, {"CAP_BPF"})
    assert resolved(either, set())
    assert resolved({"includes": {"arches": ["amd64", "arm64"]}}, set(), "aarch64")
    assert not resolved({"includes": {"arches": ["amd64"]}}, set(), "aarch64")
    assert not resolved({"excludes": {"arches": ["s390x"]}}, set(), "s390x")
    assert resolved({"includes": {"minKernel": "4.8"}}, set(), kernel="4.10.0")
    assert not resolved({"includes": {"minKernel": "6.2"}}, set(), kernel="6.1.99")
    assert not resolved({"excludes": {"minKernel": "6.1"}}, set(), kernel="6.1.0-9-amd64")
    assert resolved({"includes": {}, "excludes": {}}, set())


def test_the_plain_form_holds_only_what_the_oci_specification_has() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrno": "ENOSYS",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {"name": "dup", "names": [], "action": "SCMP_ACT_ERRNO", "errno": "EACCES", "comment": "x", "args": []},
            {"names": ["open"], "action": "SCMP_ACT_ALLOW", "errnoRet": None, "includes": {}},
        ],
    }
    plain = seccomp_profile.resolve(seccomp_profile.load_profile(json.dumps(profile)), set(), "x86_64")
    assert plain == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {"names": ["dup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["open"], "action": "SCMP_ACT_ALLOW"},
        ],
    }
    assert seccomp_profile.resolve(plain, set(CAPABILITIES), "x86_64") == plain
    with pytest.raises(InvalidArgument, match="arch: must be one of x86_64"):
        seccomp_profile.resolve(profile, set(), "vax")


@pytest.mark.parametrize("machine", sorted(seccomp_profile.MACHINES))
def test_our_profile_serves_every_machine_and_never_allows_what_it_leaves_out(machine: str) -> None:
    profile = seccomp_profile.default_profile()
    capable = seccomp_profile.resolve(profile, set(CAPABILITIES), machine)
    allowed = {name for rule in capable["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    never = (
        "keyctl add_key request_key io_uring_setup userfaultfd kexec_load pivot_root swapon uselib _sysctl nfsservctl"
    )
    assert not allowed & set(never.split())
    plain = seccomp_profile.resolve(profile, set(), machine)
    without = {name for rule in plain["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert not without & set("mount setns unshare bpf chroot reboot init_module settimeofday".split())
    assert {"read", "execve", "futex", "openat", "clone", "exit_group"} <= without


def test_the_file_says_of_every_rule_what_it_is_for() -> None:
    profile = json.loads(installed("seccomp.json").read_text())
    assert all(rule["comment"].endswith((".", ".)")) for rule in profile["syscalls"])
    assert all(rule["names"] == sorted(set(rule["names"])) for rule in profile["syscalls"])
    conditions = [rule.get(key, {}) for rule in profile["syscalls"] for key in ("includes", "excludes")]
    assert {name for condition in conditions for name in condition.get("caps", ())} <= set(CAPABILITIES)
    assert {name for condition in conditions for name in condition.get("arches", ())} <= {
        "s390",
        *(go for go, _ in seccomp_profile.MACHINES.values()),
    }


def test_unknown_system_calls_are_passed_over() -> None:
    known = with_rule(names=["dup"])
    assert seccomp.compile(with_rule(names=["dup", "no_such_call"])).bpf == seccomp.compile(known).bpf


def test_a_profile_too_long_for_the_kernel_is_refused() -> None:
    pairs = [[{"index": index, "value": value, "op": "SCMP_CMP_EQ"} for index in (0, 1)] for value in range(2000)]
    rules = [{"names": ["dup2"], "action": "SCMP_ACT_LOG", "args": pair} for pair in pairs]
    with pytest.raises(InvalidArgument, match="must compile to at most 4096 instructions"):
        seccomp.compile(ALLOW | {"syscalls": rules})


def test_compiling_again_costs_almost_nothing_and_threads_get_one_result() -> None:
    plain = seccomp_profile.resolve(seccomp_profile.default_profile(), {"CAP_CHOWN"})
    plain["syscalls"].append({"names": ["getpid"], "action": "SCMP_ACT_LOG"})  # nobody compiled this one before
    barrier = threading.Barrier(8)

    def compile_at_once(_: int) -> seccomp.Compiled:
        barrier.wait(5)
        return seccomp.compile(plain)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(compile_at_once, range(8)))
    assert all(result is results[0] for result in results)
    assert seccomp.compile(dict(reversed(plain.items()))) is results[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(sorted(seccomp_profile.ACTIONS)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "defaultAction syscalls names action args index value op includes caps archMap flags".split()
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_whatever_the_json_it_is_taken_or_refused_but_nothing_else_happens(value: Any) -> None:
    try:
        seccomp.compile(seccomp_profile.resolve(seccomp_profile.load_profile(json.dumps(value)), set()))
    except CrioError:
        pass
