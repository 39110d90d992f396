"""Differences are found, weighed and worded; equal configs have none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crio_native.cli import oci
from crio_native.errors import InvalidArgument
from crio_native.oci.diff import diff

from ..oci.conftest import spec_of

Spec = dict[str, Any]


def base() -> Spec:
    spec = spec_of("/rootfs", ["sh"])
    spec["mounts"].append({"destination": "/data", "type": "bind", "source": "/srv", "options": ["bind", "ro"]})
    spec["mounts"].append({"destination": "/vol", "type": "bind", "source": "/vol", "options": ["rbind", "ro"]})
    spec["linux"] |= {
        "cgroupsPath": "/box",
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}],
        },
        "resources": {"memory": {"limit": 1000}, "devices": [{"allow": False, "access": "rwm"}]},
    }
    return spec


def no_filter(spec: Spec) -> None:
    del spec["linux"]["seccomp"]


def more_calls(spec: Spec) -> None:
    spec["linux"]["seccomp"]["syscalls"][0]["names"] += ["bpf", "mount"]


def other_default(spec: Spec) -> None:
    spec["linux"]["seccomp"]["defaultAction"] = "SCMP_ACT_LOG"


def conditions(spec: Spec) -> None:
    spec["linux"]["seccomp"]["syscalls"].append(
        {"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}
    )


def raw(spec: Spec) -> None:
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] = [*spec["process"]["capabilities"][kind], "CAP_NET_RAW"]


def bounding(spec: Spec) -> None:
    spec["process"]["capabilities"]["bounding"] = [*spec["process"]["capabilities"]["bounding"], "CAP_SYSLOG"]


def hosts_network(spec: Spec) -> None:
    spec["linux"]["namespaces"].remove({"type": "network"})


def joined_network(spec: Spec) -> None:
    spec["linux"]["namespaces"][1] = {"type": "network", "path": "/run/netns/x"}


def user_namespace(spec: Spec) -> None:
    spec["linux"]["namespaces"].append({"type": "user"})
    mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    spec["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}


def mapped_owners(spec: Spec) -> None:
    mapping = [{"containerID": 0, "hostID": 1000, "size": 10}]
    spec["mounts"][5] |= {"uidMappings": mapping, "gidMappings": mapping, "options": ["bind", "ro", "idmap"]}


def change(*path: Any, to: Any) -> Callable[[Spec], None]:
    def act(spec: Spec) -> None:
        holder: Any = spec
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = to

    act.__name__ = ".".join(map(str, path))
    return act


CHANGES: list[tuple[Callable[[Spec], None], str]] = [
    (no_filter, "B has no seccomp filter; A has a seccomp filter"),
    (more_calls, "B permits the system calls bpf, mount; A does not"),
    (other_default, "B has the seccomp defaultAction SCMP_ACT_LOG; A has SCMP_ACT_ERRNO"),
    (conditions, "A and B treat the system call read by different rules"),
    (raw, "B keeps CAP_NET_RAW; A does not"),
    (bounding, "B can gain CAP_SYSLOG by executing a file that has it; A cannot"),
    (hosts_network, "B shares the host's network namespace; A has a network namespace of its own"),
    (joined_network, "B joins the network namespace of /run/netns/x; A has a network namespace of its own"),
    (user_namespace, "B has a user namespace of its own; A shares the host's user namespace"),
    (user_namespace, "B maps users 0 to 65535 to the host's 100000 and up; A does not"),
    (change("linux", "readonlyPaths", to=[]), "B's /proc/sys is writable; A's /proc/sys is read-only"),
    (change("linux", "maskedPaths", to=[]), "B's /proc/kcore is writable; A's /proc/kcore is masked"),
    (
        change("linux", "maskedPaths", to=["/opt/x", "/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware"]),
        "B's /opt/x is masked; A's is not",
    ),
    (
        change("mounts", 5, "options", to=["bind"]),
        "B may write to /data from the host's /srv; A may read /data from the host's /srv",
    ),
    (
        change("mounts", 5, "source", to="/etc"),
        "B may read /data from the host's /etc; A may read /data from the host's /srv",
    ),
    (
        change("mounts", 5, "options", to=["bind", "ro", "rshared"]),
        "B has the mount propagation rec|shared on /data; A does not",
    ),
    (
        change("mounts", 3, "options", to=["nosuid", "nodev"]),
        "B executes programs on /dev/shm; A mounts /dev/shm noexec",
    ),
    (
        change("mounts", 5, "options", to=["bind", "ro", "rnosuid"]),
        "B mounts /data nosuid; A honours set-user-id programs on /data",
    ),
    (change("mounts", 6, "options", to=["rbind", "rro"]), "B mounts all below /vol read-only; A does not"),
    (
        change("mounts", 6, "options", to=["rbind", "ro", "rrw"]),
        "B may write to /vol from the host's /vol; A may read /vol from the host's /vol",
    ),
    (
        change("mounts", 6, "options", to=["rbind", "ro", "rsuid"]),
        "B honours set-user-id programs on all below /vol, even where the host is nosuid; A does not",
    ),
    (
        change("mounts", 5, "options", to=["bind", "ro", "nosymfollow"]),
        "B mounts /data nosymfollow; A follows symbolic links on /data",
    ),
    (mapped_owners, "B maps the owners of /data: users and groups 0 to 9 to the host's 1000 and up; A does not"),
    (
        change("process", "noNewPrivileges", to=False),
        "B can gain privileges by execve; A cannot gain privileges by execve (no_new_privs)",
    ),
    (change("process", "user", to={"uid": 7, "gid": 0}), "B runs as user 7; A runs as root"),
    (change("process", "user", to={"uid": 0, "gid": 0, "additionalGids": [5]}), "B belongs to group 5; A does not"),
    (
        change("process", "apparmorProfile", to="strict"),
        "B runs under the AppArmor label strict; A has no AppArmor label",
    ),
    (
        change("process", "rlimits", to=[{"type": "RLIMIT_NPROC", "soft": 5, "hard": 9}]),
        "B limits RLIMIT_NPROC to 5, at most 9; A does not",
    ),
    (change("process", "oomScoreAdj", to=-500), "B has oom_score_adj -500; A does not"),
    (change("root", "readonly", to=True), "B has a read-only root; A may write to its root file system"),
    (change("linux", "rootfsPropagation", to="shared"), "B has the mount propagation shared on its root; A does not"),
    (change("linux", "resources", "memory", to={}), "A is limited to 1000 bytes of memory; B is not"),
    (
        change("annotations", to={"run.oci.keep_original_groups": "1"}),
        "B keeps the supplementary groups of whoever runs it; A does not",
    ),
    (
        change("linux", "resources", "devices", to=[]),
        "B has no rules for devices; A has the device rules deny a *:* rwm",
    ),
    (
        change("linux", "devices", to=[{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]),
        "B has the device /dev/kvm (c 10:232); A does not",
    ),
    (
        change("linux", "sysctl", to={"net.ipv4.ip_forward": "1"}),
        "B sets the sysctl net.ipv4.ip_forward to 1; A does not",
    ),
    (change("hooks", to={"poststop": [{"path": "/bin/h"}]}), "B has /bin/h run on the host at poststop; A does not"),
    (
        change("linux", "personality", to={"domain": "LINUX32"}),
        'B has linux.personality {"domain": "LINUX32"}; A does not',
    ),
]


def ids(entry: tuple[Callable[[Spec], None], str]) -> str:
    return entry[0].__name__


@pytest.mark.parametrize("entry", CHANGES, ids=ids)
def test_a_difference_is_told(entry: tuple[Callable[[Spec], None], str]) -> None:
    act, words = entry
    other = base()
    act(other)
    texts = [difference.text for difference in diff(base(), other)]
    assert words in texts
    assert diff(other, copy.deepcopy(other)) == []


@pytest.mark.parametrize("entry", CHANGES, ids=ids)
def test_it_is_told_from_the_other_side_too(entry: tuple[Callable[[Spec], None], str]) -> None:
    act, _ = entry
    other = base()
    act(other)
    there, back = diff(base(), other), diff(other, base())
    assert {difference.topic for difference in there} == {difference.topic for difference in back}
    assert {difference.weight for difference in there} == {difference.weight for difference in back}


def test_equal_configs_and_what_does_not_isolate() -> None:
    other = base()
    other["process"] |= {"args": ["other"], "env": ["X=1"], "cwd": "/tmp", "terminal": True}
    other["root"]["path"] = "/elsewhere"
    other["hostname"], other["annotations"] = "x", {"a": "b"}
    del other["linux"]["cgroupsPath"]  # it gets a group all the same
    assert diff(base(), other) == []


def test_what_is_stricter_is_not_told_as_weaker() -> None:
    """A mount and its owners are one difference each."""
    stricter, mapped = base(), base()
    change("mounts", 6, "options", to=["rbind", "rro"])(stricter)
    mapped_owners(mapped)
    assert [found.text for found in diff(base(), stricter)] == ["B mounts all below /vol read-only; A does not"]
    assert len(diff(base(), mapped)) == 1


def test_what_gives_the_host_away_comes_first() -> None:
    other = base()
    for act in (change("process", "oomScoreAdj", to=1), no_filter, raw):
        act(other)
    assert [difference.topic for difference in diff(base(), other)] == [
        "seccomp filter",
        "CAP_NET_RAW",
        "oom_score_adj",
    ]


def test_a_wrong_config_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="ociVersion"):
        diff(base(), {})


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = base()
    raw(other)
    for name, spec in (("a", base()), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(spec))
    words = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert oci.command(["diff", *words]) == 1
    assert capfd.readouterr().out == "B keeps CAP_NET_RAW; A does not\n"
    assert oci.command(["diff", "--json", *words]) == 1
    assert json.loads(capfd.readouterr().out)[0]["topic"] == "CAP_NET_RAW"
    assert oci.command(["diff", words[0], words[0]]) == 0
    assert capfd.readouterr().out == ""
    # 1 is an answer, an error is not
    assert oci.command(["diff", words[0]]) == oci.command(["diff", words[0], str(tmp_path)]) == 2
    assert "takes 2 arguments, 1 were given" in capfd.readouterr().err
