"""What is said to systemd: names, paths, properties; and what is refused before anything is said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.errors import FailedPrecondition, InvalidArgument, Unavailable
from crio_native.linux import bpf
from crio_native.linux.cgroup import cgroup_of, systemd
from crio_native.linux.cgroup.resources import Write
from crio_native.linux.cgroup.systemd import bus, properties, units, variant

MAJORS = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n"
NO_LIMIT = 2**64 - 1


@pytest.mark.parametrize(
    "slice, path",
    [
        ("system.slice", "/system.slice"),
        ("-.slice", ""),
        ("a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice"),
        ("kubepods-pod1_2.slice", "/kubepods.slice/kubepods-pod1_2.slice"),
    ],
)
def test_slices_nest_by_their_dashes(slice: str, path: str) -> None:
    assert units.slice_path(slice) == path
    assert cgroup_of(f"{slice}:crio:id", "systemd").path == f"{path}/crio-id.scope"


@pytest.mark.parametrize("slice", ["a", "a-.slice", "-a.slice", "a--b.slice", ".slice", "a/b.slice", "a b.slice"])
def test_what_is_no_slice(slice: str) -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.cgroupsPath"):
        units.slice_path(slice)


@pytest.mark.parametrize(
    "path", ["", "/a/b", "a:b", "a.slice:b:", "a.slice:b:c:d", "a.slice:b:c/d", "a.slice:b:" + "c" * 250]
)
def test_what_is_no_scope(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.cgroupsPath"):
        cgroup_of(path, "systemd")


def test_an_empty_slice_or_prefix() -> None:
    assert units.parse("::id", False).path == "/system.slice/id.scope"
    assert units.parse(":crio:id", True).path.endswith(".service/user.slice/crio-id.scope")


def written(**files: str) -> dict[str, Any]:
    return dict(properties.of_writes(Write("x", file.replace("__", "."), value, "") for file, value in files.items()))


def test_limits_in_systemds_words() -> None:
    assert written(memory__max="max", pids__max="7", cpu__weight="39", io__weight="8:0 50", hugetlb__2MB__max="0") == {
        "MemoryMax": ("t", NO_LIMIT),
        "TasksMax": ("t", 7),
        "CPUWeight": ("t", 39),
    }
    assert written(cpuset__cpus="0-2,8", cpuset__mems="0") == {
        "AllowedCPUs": ("ay", b"\x07\x01"),
        "AllowedMemoryNodes": ("ay", b"\x01"),
    }
    assert written(cpuset__cpus="0-99999999999") == {}


@pytest.mark.parametrize(
    "files, quota, period",
    [
        ({"cpu__max": "50000 100000"}, 500_000, 100_000),
        ({"cpu__max": "12345 100000"}, 130_000, 100_000),  # whole percents, never less than asked for
        ({"cpu__max": "max 100000"}, NO_LIMIT, 100_000),
        ({"cpu__cfs_quota_us": "1000", "cpu__cfs_period_us": "1000000"}, 10_000, 1_000_000),
        ({"cpu__cfs_quota_us": "-1"}, NO_LIMIT, None),
    ],
)
def test_quotas(files: dict[str, str], quota: int, period: int | None) -> None:
    wanted = {"CPUQuotaPerSecUSec": ("t", quota)} | ({"CPUQuotaPeriodUSec": ("t", period)} if period else {})
    assert written(**files) == wanted


def allowed(*rules: bpf.Rule) -> list[tuple[str, str]]:
    policy, reset, *more = properties.of_devices(rules, MAJORS)
    assert policy == ("DevicePolicy", ("s", "strict")) and reset == ("DeviceAllow", ("a(ss)", []))
    return [entry for _, (_, entries) in more for entry in entries]


def test_devices_in_systemds_words() -> None:
    everything = bpf.READ | bpf.WRITE | bpf.MKNOD
    deny = bpf.Rule(False, bpf.ANY, bpf.ANY, bpf.ANY, everything)
    assert allowed(deny) == []
    assert allowed(
        deny,
        bpf.Rule(True, bpf.CHAR, 1, 3, everything),
        bpf.Rule(True, bpf.CHAR, 136, bpf.ANY, bpf.READ),
        bpf.Rule(True, bpf.BLOCK, bpf.ANY, bpf.ANY, bpf.MKNOD),
        bpf.Rule(False, bpf.CHAR, 1, 3, bpf.WRITE),  # what it cannot say is left to our own program
    ) == [("/dev/char/1:3", "rwm"), ("char-pts", "r"), ("block-*", "m")]
    unknown_driver = bpf.Rule(True, bpf.CHAR, 77, bpf.ANY, everything)
    for rules in ((deny, unknown_driver), (bpf.Rule(True, bpf.ANY, bpf.ANY, bpf.ANY, everything),)):
        assert allowed(*rules) == [("char-*", "rwm"), ("block-*", "rwm")]


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("true", ("b", True)),
        ("5", ("i", 5)),
        ("-5", ("i", -5)),
        ("uint64 5", ("t", 5)),
        ("'a b'", ("s", "a b")),
        ("1.5", ("d", 1.5)),
        ("['a', 'b']", ("as", ["a", "b"])),
        ("@as []", ("as", [])),
        ("[('a', 1)]", ("a(si)", [("a", 1)])),
    ],
)
def test_gvariant_text(text: str, parsed: tuple[str, Any]) -> None:
    assert variant.parse(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        "[1, 'a']",
        "uint64 -1",
        "99999999999",
        "byte 256",
        "uint32 'a'",
        "-'a'",
        "f()",
        "1 + 1",
        "string 1",
    ],
)
def test_what_is_no_gvariant(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"annotations\[org.systemd.property.X\]"):
        variant.of_annotations({"org.systemd.property.X": text})


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        ((_, (signature, _)),) = variant.of_annotations({"org.systemd.property.Name": text})
    except InvalidArgument:
        return
    assert signature


def test_seconds() -> None:
    assert variant.of_annotations({"org.systemd.property.TimeoutStopSec": "1.5", "x": "y"}) == [
        ("TimeoutStopUSec", ("t", 1_500_000))
    ]
    with pytest.raises(InvalidArgument, match="seconds"):
        variant.of_annotations({"org.systemd.property.TimeoutStopSec": "'long'"})


@pytest.mark.parametrize("name", ["", "lower", "Has-Dash", "Ünit"])
def test_what_is_no_property(name: str) -> None:
    with pytest.raises(InvalidArgument, match="name of a systemd property"):
        variant.of_annotations({f"org.systemd.property.{name}": "1"})


def test_without_systemd_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(bus, "_address", lambda user: (str(tmp_path / "private"), True))
    with pytest.raises(Unavailable, match=r"systemd does not answer on .*private"):
        systemd.check()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(FailedPrecondition, match=f"this user's systemd is not there .* neither {tmp_path}"):
        bus.Manager(True)
