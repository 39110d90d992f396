"""What a config.json asks of crio-oci, and what it may not ask."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from ..waiting import wait_for
from .command_line import PROGRAM, Oci, oci
from .conftest import least_profile, spec_of

pytestmark = pytest.mark.root
__all__ = ["oci"]

IN_PRIVATE = ("unshare", "--mount", "--propagation", "private", "sh", "-euc")


def without_mount_namespace(oci: Oci, *args: str) -> dict[str, Any]:
    spec = oci.spec(*args)
    spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "mount"]
    return spec


@pytest.mark.parametrize("fail", ["", "--fail pivot", "--fail mask_paths"])
def test_without_a_mount_namespace_its_mounts_go_with_the_container(oci: Oci, fail: str) -> None:
    spec = without_mount_namespace(oci, "sh", "-c", "ls /proc/self/status; ls /rootfs 2>/dev/null || echo confined")
    script = """
        mount --bind /etc /mnt; mount --make-shared /mnt
        grep -E " (/|/mnt|$3.*) " /proc/self/mountinfo >"$3/before"
        "$1" --root "$2" $5 run --bundle "$4" c || echo "status $?"
        grep -E " (/|/mnt|$3.*) " /proc/self/mountinfo >"$3/after"
    """.replace("$5", fail.replace("pivot", "change_root"))
    line = [*IN_PRIVATE, script, "sh", str(PROGRAM), str(oci.state), str(oci.directory), str(oci.write(spec))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.stdout == ("status 1\n" if fail else "/proc/self/status\nconfined\n"), done.stderr
    # nothing stays, and no propagation of the host's mounts was changed
    assert (oci.directory / "before").read_text() == (oci.directory / "after").read_text()


def test_a_user_namespace_needs_a_mount_namespace(oci: Oci) -> None:
    spec = without_mount_namespace(oci, "true")
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 70000, "size": 10}]
    assert "linux.namespaces: a user namespace may change no mounts" in oci.refused("run", "-b", oci.write(spec), "c")
    assert not oci.left()


def test_a_user_namespace_without_mappings_has_its_caller_as_root(oci: Oci) -> None:
    spec = spec_of(str(oci.root), ("cat", "/proc/self/uid_map", "/proc/self/gid_map"))
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] != "devpts"]  # its group 5 is not mapped
    bundle = oci.write(spec)
    assert oci.ok("run", "-b", bundle, "c").split() == ["0", "0", "1"] * 2
    assert "enter_user_namespace" in oci.ok("explain", bundle)
    spec["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 0, "size": 1}]
    assert "linux.gidMappings: a new user" in oci.refused("run", "-b", oci.write(spec), "c")
    assert not oci.left()


@pytest.mark.parametrize("own_user", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_the_callers_groups_are_kept_when_an_annotation_says_so(oci: Oci, own_user: bool, kept: bool) -> None:
    """As podman asks for it; also groups that the user namespace does not know."""
    spec = spec_of(str(oci.root), ("grep", "Groups", "/proc/self/status"))
    if own_user:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 10}]
    spec["annotations"] = {"run.oci.keep_original_groups": "1" if kept else "0"}
    bundle = oci.write(spec)
    groups = oci.ok("run", "-b", bundle, "c", extra_groups=[7, 4711]).split()[1:]
    assert groups == (["7", "65534" if own_user else "4711"] if kept else [])
    assert ("setgroups(" in oci.ok("explain", bundle)) != kept


@pytest.mark.parametrize("name", ["hostname", "domainname"])
def test_a_name_by_sysctl_is_refused_where_it_has_a_field(oci: Oci, name: str) -> None:
    spec = spec_of(str(oci.root), ("true",)) | {name: "by-field"}
    spec["linux"]["sysctl"] = {f"kernel.{name}": "by-sysctl"}
    assert f"sysctl `kernel.{name}` conflicts with OCI field `{name}`" in oci.refused("run", "-b", oci.write(spec), "c")


def test_an_ambient_capability_that_cannot_be_is_a_warning(oci: Oci) -> None:
    held = ["CAP_KILL", "CAP_CHOWN"]
    sets = {"bounding": held, "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"], "inheritable": held}
    bundle = oci.bundle("grep", "CapAmb", "/proc/self/status", capabilities=sets | {"ambient": [*held, "CAP_SETUID"]})
    done = oci.call("run", "-b", bundle, "c")
    assert "process.capabilities.ambient: CAP_CHOWN, CAP_SETUID cannot be given" in done.stderr
    assert done.stdout.split() == ["CapAmb:", f"{1 << 5:016x}"]


def test_a_new_network_namespace_has_its_loopback_up(oci: Oci) -> None:
    assert "LOOPBACK,UP" in oci.ok("run", "-b", oci.bundle("sh", "-c", "ip link show lo 2>/dev/null || ip addr"), "c")


@pytest.mark.parametrize(("kind", "other"), [("ipc", "net"), ("uts", "ipc"), ("network", "uts")])
def test_a_namespace_of_another_kind_is_not_entered(oci: Oci, kind: str, other: str) -> None:
    spec = spec_of(str(oci.root), ("true",))
    spaces = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != kind]
    spec["linux"]["namespaces"] = [*spaces, {"type": kind, "path": f"/proc/{os.getpid()}/ns/{other}"}]
    assert f"of kind {kind}" in oci.refused("run", "-b", oci.write(spec), "c")
    assert not oci.left()


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_need_allow_no_more_than_the_command_needs(oci: Oci, no_new_privileges: bool) -> None:
    """Whatever we call ourselves on the way, and however often we are waited for: it comes before the filter."""
    spec = spec_of(str(oci.root), ("true",))
    spec["linux"]["seccomp"] = least_profile(no_new_privileges)
    spec["process"]["noNewPrivileges"] = no_new_privileges
    bundle = oci.write(spec)
    oci.ok("run", "-b", bundle, "c")
    oci.ok("create", "-b", bundle, "c")
    oci.ok("start", "c")
    wait_for(lambda: oci.status("c") == "stopped")
    oci.ok("delete", "c")
    spec["process"]["args"] = ["no-such-command"]
    assert "not found in $PATH" in oci.refused("create", "-b", oci.write(spec), "c")


def test_between_filter_and_exec_there_are_the_last_capabilities_alone(oci: Oci) -> None:
    denied = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["capset"], "action": "SCMP_ACT_ERRNO"}]}
    spec = spec_of(str(oci.root), ("true",))
    spec["linux"]["seccomp"] = denied
    spec["process"]["noNewPrivileges"] = False
    assert "step 'set_capabilities'" in oci.refused("run", "-b", oci.write(spec), "c")
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] = ["CAP_SYS_ADMIN"]
    oci.ok("run", "-b", oci.write(spec), "c")


@pytest.mark.parametrize("command", ["/bin", "bin"])
def test_a_directory_is_no_command(oci: Oci, command: str) -> None:
    assert "'find_command' failed on" in oci.refused("create", "-b", oci.bundle(command, cwd="/"), "c")
    assert not oci.left()


def test_an_unknown_system_call_in_a_profile_is_refused_when_an_annotation_says_so(oci: Oci) -> None:
    spec = spec_of(str(oci.root), ("true",))
    rule = {"names": ["chdir", "no_such_call"], "action": "SCMP_ACT_ERRNO"}
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    oci.ok("run", "-b", oci.write(spec), "c")
    spec["annotations"] = {"run.oci.seccomp_fail_unknown_syscall": "1"}
    assert "linux.seccomp.syscalls[0].names" in oci.refused("run", "-b", oci.write(spec), "c")
    assert not oci.left()
