"""Whatever a config, an image's files, a profile or a kernel table contains: understood, or refused in our words."""

from __future__ import annotations

import copy
import json
import os
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crio_native.errors import CrioError, InvalidArgument
from crio_native.linux import mountinfo, mounts
from crio_native.oci import seccomp, seccomp_profile, spec
from crio_native.oci.builtin import users
from crio_native.oci.builtin.plan import Host, container_plan
from crio_native.oci.builtin.steps import sysctl_path
from crio_native.oci.diff import diff
from crio_native.oci.explain import explain
from crio_native.oci.runtime import ContainerSpec

from ..oci.conftest import spec_of

QUICK = settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.too_slow])
EVERYTHING = Host(40, (1 << 41) - 1)

leaf = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=True)
    | st.text(max_size=30)
    | st.sampled_from(["", "/", "..", "/proc", "/proc/self", "a\0b", "/a/../..", "bind", "rbind", "ro", "-1", "0-3,"])
)
tree = st.recursive(
    leaf,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
MAPPING = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def full_config() -> dict[str, Any]:
    """A valid config with something of every section, for mutations to reach the depths of the checks."""
    config = spec_of("rootfs", ["sh", "-c", "true"])
    config["annotations"] = {"a": "b"}
    config["domainname"] = "example"
    config["hooks"] = {"createRuntime": [{"path": "/bin/hook", "args": ["hook"], "env": ["A=b"], "timeout": 3}]}
    config["mounts"].append({"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "rro"]})
    config["process"] |= {
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
        "user": {"uid": 1, "gid": 2, "additionalGids": [3], "umask": 18},
        "oomScoreAdj": 5,
        "apparmorProfile": "a",
        "selinuxLabel": "b",
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "scheduler": {"policy": "SCHED_OTHER", "nice": 3},
        "execCPUAffinity": {"initial": "0", "final": "0"},
        "consoleSize": {"height": 1, "width": 2},
    }
    config["linux"] |= {
        "namespaces": [*config["linux"]["namespaces"], {"type": "user"}, {"type": "time"}],
        "uidMappings": MAPPING,
        "gidMappings": MAPPING,
        "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 2}},
        "sysctl": {"net.ipv4.ip_forward": "1", "kernel.msgmax": "9000"},
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438}],
        "cgroupsPath": "/pod/box",
        "rootfsPropagation": "rslave",
        "mountLabel": "x",
        "personality": {"domain": "LINUX"},
        "memoryPolicy": {"mode": "MPOL_INTERLEAVE", "nodes": "0"},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [
                {
                    "names": ["read", "socket"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "resources": {
            "memory": {"limit": 1 << 26, "swap": 1 << 27},
            "cpu": {"shares": 512, "quota": 1000, "period": 2000, "cpus": "0"},
            "pids": {"limit": 5},
            "devices": [{"allow": False, "access": "rwm"}],
        },
    }
    return config


FULL = full_config()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*path, key))


PLACES = list(places(FULL))


def changed(path: tuple[Any, ...], value: Any, action: str) -> dict[str, Any]:
    config = copy.deepcopy(FULL)
    holder: Any = config
    for key in path[:-1]:
        holder = holder[key]
    if action == "replace":
        holder[path[-1]] = value
    elif action == "remove":
        del holder[path[-1]]
    elif isinstance(holder, list):
        holder.append(value)
    else:
        holder[str(value)[:20]] = copy.deepcopy(holder[path[-1]])
    return config


def test_the_mutated_config_is_valid() -> None:
    spec.validate(FULL)
    assert len(PLACES) > 150
    explain(FULL)


@QUICK
@given(tree)
@example({"ociVersion": "1.3.0", "root": {"path": "/"}, "process": {"args": ["x"], "cwd": "/"}})
def test_any_json_is_accepted_or_refused_with_a_field(config: Any) -> None:
    try:
        spec.validate(config)
    except InvalidArgument as refused:
        assert refused.field and "\n" not in refused.field


@settings(QUICK, max_examples=600)
@given(st.sampled_from(PLACES), leaf | tree, st.sampled_from(["replace", "remove", "add"]))
@example(("linux", "resources"), {"memory": {"limit": True}}, "replace")
@example(("mounts", 0, "options"), {"a": 1}, "replace")
def test_what_is_accepted_can_be_planned(path: tuple[Any, ...], value: Any, action: str) -> None:
    """A config that the door lets in makes a plan, an explanation and a comparison, or is refused for what it says."""
    config = changed(path, value, action)
    try:
        spec.validate(config)
    except InvalidArgument as refused:
        assert refused.field
        return
    for use in (lambda: explain(config), lambda: diff(FULL, config), lambda: diff(config, FULL)):
        try:
            use()
        except CrioError as refused_:
            assert str(refused_)


@QUICK
@given(st.dictionaries(st.text(max_size=40), st.text(max_size=40), max_size=8))
def test_annotations_never_change_a_plan(annotations: dict[str, str]) -> None:
    """CVE-2024-3154: apart from the state that hooks and listeners are told, which has them by the specification."""
    config = copy.deepcopy(FULL)
    del config["hooks"]
    plain = plan_of(config)
    config["annotations"] = {**annotations, "org.systemd.property.ExecStart": "x", "run.oci.hooks.stdout": "/etc/x"}
    try:
        spec.validate(config)
    except InvalidArgument:
        return
    assert plan_of(config) == plain


def plan_of(config: dict[str, Any]) -> list[tuple[str, Any, str]]:
    container = ContainerSpec("box", config, Path("/bundle"), Path("/run"))
    steps = container_plan(container, EVERYTHING, cgroup_files=[]).steps
    return [(step.name, dict(step.args), step.source) for step in steps]


# -- mount options -----------------------------------------------------------------------------------------------

KNOWN_OPTIONS = [*mounts._FLAGS, *mounts._RECURSIVE, *mounts.PROPAGATION, *mounts.EXTENSIONS]
option = st.sampled_from(KNOWN_OPTIONS) | st.text(string.ascii_letters + "=,%/", min_size=1, max_size=12)


@QUICK
@given(st.lists(option, max_size=12))
def test_mount_options_are_flags_or_data(options: list[str]) -> None:
    parsed = mounts.parse(options)
    known = set(KNOWN_OPTIONS)
    assert parsed.data == ",".join(word for word in options if word not in known)
    assert not parsed.flags & parsed.cleared
    to_set, to_clear = mounts.attributes(parsed.flags, parsed.cleared)
    assert not to_set & to_clear & ~mounts.MOUNT_ATTR_ATIME
    assert not parsed.tree_set & parsed.tree_clear & ~mounts.MOUNT_ATTR_ATIME


@pytest.mark.parametrize("name", [name for name, (sets, flag) in mounts._FLAGS.items() if sets and flag])
def test_the_last_of_two_contrary_options_counts(name: str) -> None:
    flag = mounts._FLAGS[name][1]
    contrary = [other for other, (sets, bit) in mounts._FLAGS.items() if not sets and bit & flag]
    for other in contrary:
        assert mounts.parse([name, other]).flags & mounts._FLAGS[other][1] == 0
        assert mounts.parse([other, name]).flags & flag == flag


@QUICK
@given(st.integers(0, 2**27))
def test_flag_names_lose_no_bit(flags: int) -> None:
    value = 0
    for name in mounts.flag_names(flags).split("|"):
        value |= getattr(mounts, name) if name.startswith("MS_") else int(name, 0)
    assert value == flags


# -- the image's users -------------------------------------------------------------------------------------------

word = st.text(max_size=10)
line = st.lists(word | st.integers(-1, 2**33).map(str), min_size=1, max_size=9).map(":".join)
table = st.lists(line, max_size=12).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(
    max_size=300
)


@settings(QUICK, max_examples=300)
@given(table, table, word | st.integers(-1, 2**33).map(str), word, st.booleans())
@example(b"root:x:0:0:root:/root:/bin/sh", b"", "4294967296", "", True)
@example(b"a:x:0:4294967296::/:", b"a:x:9999999999:a", "a", "a", True)
@example("a:x:٣:٣::/:".encode(), b"", "a", "", True)
def test_users_of_any_image(passwd: bytes, group: bytes, user: str, in_group: str, merge: bool) -> None:
    """Whoever is found has numbers that the kernel has; what asks for a number gets that one or nothing."""
    with tempfile.TemporaryDirectory(prefix="crio-native-users-") as name:
        (Path(name) / "etc").mkdir()
        (Path(name) / "etc/passwd").write_bytes(passwd)
        (Path(name) / "etc/group").write_bytes(group)
        root = os.open(name, os.O_PATH | os.O_DIRECTORY)
        try:
            found = users.find(root, user, in_group, [7], merge)
        except users.NoSuchUser as refused:
            assert str(refused)
            return
        finally:
            os.close(root)
    assert all(0 <= number <= users.MAX_ID for number in (found.uid, found.gid, *found.groups))
    assert found.gid in found.groups and 7 in found.groups
    name_ = user.partition(":")[0]
    if name_.isascii() and name_.isdigit():
        assert found.uid == int(name_)


# -- seccomp profiles --------------------------------------------------------------------------------------------

PROFILE = FULL["linux"]["seccomp"]


@settings(QUICK, max_examples=300)
@given(tree, st.sampled_from([*PROFILE, *PROFILE["syscalls"][0], *PROFILE["syscalls"][0]["args"][0], ""]))
def test_any_profile_compiles_or_is_refused(value: Any, key: str) -> None:
    profile = copy.deepcopy(PROFILE)
    for holder in (profile, profile["syscalls"][0], profile["syscalls"][0]["args"][0]):
        if key in holder:
            holder[key] = value
    candidate = value if key == "" else profile
    try:
        text = json.dumps(candidate)
    except ValueError:
        return
    try:
        compiled = seccomp.compile(seccomp_profile.resolve(seccomp_profile.load_profile(text), set()))
    except CrioError as refused:
        assert str(refused)
        return
    assert len(compiled.bpf) % 8 == 0 and len(compiled.bpf) // 8 <= seccomp.BPF_MAXINSNS


@QUICK
@given(st.text(max_size=200))
def test_a_profiles_text_is_anything(text: str) -> None:
    try:
        seccomp_profile.load_profile(text)
    except InvalidArgument as refused:
        assert "seccomp profile" in refused.field


# -- the kernel's tables -----------------------------------------------------------------------------------------

path_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)


@QUICK
@given(st.text(max_size=500))
def test_any_mountinfo_is_read(text: str) -> None:
    for mount in mountinfo.parse(text):
        assert mount.id >= 0 and mount.fstype is not None


def escaped(path: str) -> str:
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in path)


@QUICK
@given(path_text, path_text, st.lists(st.integers(1, 9).map("master:{}".format), max_size=2))
def test_mountinfo_gives_back_what_the_kernel_escaped(root: str, point: str, fields: list[str]) -> None:
    words = ["36 35 98:0", f"/{escaped(root)}", f"/{escaped(point)}", "ro,nosuid", *fields, "-", "ext4", escaped(root)]
    line_ = " ".join([*words, "rw,x=y"])
    (mount,) = mountinfo.parse(f"cut off\n{line_}\n1 2 3")
    assert (mount.root, mount.point, mount.source) == (f"/{root}", f"/{point}", root)
    assert mount.fields == tuple(fields) and mount.read_only and "x=y" in mount.super_options


# -- sysctl names ------------------------------------------------------------------------------------------------


@settings(QUICK, max_examples=400)
@given(st.text("abnetkrl.mqueusy/_-*\n\0 1:+", max_size=40) | st.text(max_size=30), st.text(max_size=20))
@example("net/../kernel/core_pattern", "|/x")
@example("net.ipv4.ip_forward\n", "1")
@example("kernel.shmmax+kernel.core_pattern", "1")
@example("net..ipv4", "1")
def test_an_accepted_sysctl_stays_in_its_own_directory(name: str, value: str) -> None:
    config = copy.deepcopy(FULL)
    config["linux"]["sysctl"] = {name: value}
    try:
        spec.validate(config)
    except InvalidArgument:
        return
    path = "/proc/sys/" + sysctl_path(name)
    assert os.path.normpath(path) == path.rstrip("/").replace("//", "/"), path
    assert path.startswith(("/proc/sys/net/", "/proc/sys/kernel/", "/proc/sys/fs/mqueue/"))
    assert "\n" not in path and "\0" not in value
