"""What this machine's kernel cannot show: control groups v2, labels of security modules, and a kernel of 2022."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import StepFailed
from crio_native.oci.features import features

from .conftest import PARENT, Box
from .test_builtin_hooks import test_each_runs_at_its_moment_with_the_state as hooks_at_their_moments
from .test_builtin_mounts import test_propagation_of_the_root as propagation_of_the_root
from .test_builtin_userns import in_user_namespace

PROFILE = """
profile crio-native-oci-test flags=(attach_disconnected) {
  file,
  capability,
  network,
  signal,
  deny /secret r,
}
"""


@pytest.mark.vm
class TestOnV2:
    def test_isolation_on_this_kernel(self, box: Box) -> None:
        """Masks, read-only paths, devices: on a kernel that clones no detached mount."""
        spec = box.spec(
            "sh", "-c", "cat /proc/keys; ls /sys/firmware /proc/acpi; echo x > /proc/sys/kernel/msgmax; echo $?"
        )
        (box.root / "proc-acpi").mkdir()
        spec["linux"]["maskedPaths"] += ["/tmp", "/root", "/etc"]
        container = box.run(spec=spec)
        assert container.output().splitlines()[-1] == "1" and "keys" not in container.output()
        assert os.listdir(box.root / "etc")

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("mode", ["ro", "rw"])
    def test_a_cgroup_mount_shows_its_own_group_only(self, box: Box, own: bool, mode: str) -> None:
        spec = box.spec(
            "sh",
            "-c",
            "cat /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/x && echo made; ls -d /sys/fs/cgroup/crio*",
        )
        if not own:
            spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "cgroup"]
        spec["linux"]["cgroupsPath"] = f"{PARENT}/v2"
        spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": [mode]})
        container = box.run(spec=spec)
        lines = container.output().splitlines()
        assert "1" in lines and ("made" in lines) == (mode == "rw")
        assert not any("crio" in line for line in lines)
        made = Path(f"/sys/fs/cgroup{PARENT}/v2/x")
        if made.exists():
            made.rmdir()

    def test_a_user_namespace(self, box: Box) -> None:
        script = "id -u; cat /proc/self/cgroup; mkdir /sys/fs/cgroup/x; ls /sys/class/net; stat -c %t:%T /dev/null"
        spec = in_user_namespace(box, "sh", "-c", script, cgroupsPath=f"{PARENT}/user")
        spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["rw"]})
        container = box.run(spec=spec)
        assert container.output().splitlines() == ["0", "0::/", "lo", "1:3"]
        assert "Permission denied" in container.output("stderr")  # the group is the host's root's

    def test_exec_into_a_user_namespace_is_born_in_the_group(self, box: Box) -> None:
        container = box.create(in_user_namespace(box, cgroupsPath=f"{PARENT}/user")).start()
        assert container.exec("sh", "-c", "cat /proc/self/cgroup; id -u")[1] == "0::/\n0\n"

    def test_device_rules(self, box: Box) -> None:
        spec = box.spec(
            "sh", "-c", "head -c 1 /dev/own-zero | wc -c; head -c 1 /dev/own-mem; echo $?; echo x > /dev/null; echo $?"
        )
        spec["linux"]["cgroupsPath"] = f"{PARENT}/devices"
        spec["linux"]["devices"] = [
            {"path": "/dev/own-zero", "type": "c", "major": 1, "minor": 5},
            {"path": "/dev/own-mem", "type": "c", "major": 1, "minor": 1},
        ]
        spec["linux"]["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
        assert box.run(spec=spec).output() == "1\n1\n0\n"

    def test_features(self) -> None:
        found = features()["linux"]
        assert found["cgroup"]["v2"] and not found["cgroup"]["v1"]
        assert not found["apparmor"]["enabled"] and not found["selinux"]["enabled"]

    def test_hooks(self, box: Box) -> None:
        hooks_at_their_moments(box, True)

    def test_propagation(self, box: Box) -> None:
        propagation_of_the_root(box, "shared", "shared:")


@pytest.fixture
def profile(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "profile"
    file.write_text(PROFILE)
    subprocess.run(["apparmor_parser", "--skip-cache", "--replace", str(file)], check=True)
    yield "crio-native-oci-test"
    subprocess.run(["apparmor_parser", "--remove", str(file)], check=True)


def with_secret(box: Box, **process: Any) -> dict[str, Any]:
    (box.root / "secret").write_text("secret\n")
    spec = box.spec("sh", "-c", "cat /proc/self/attr/current; cat /secret")
    spec["process"] |= process
    return spec


@pytest.mark.vm(lsm="apparmor")
class TestAppArmor:
    @pytest.mark.parametrize("no_new_privileges", [True, False])
    def test_a_container_runs_under_its_profile(self, box: Box, profile: str, no_new_privileges: bool) -> None:
        spec = with_secret(box, apparmorProfile=profile, noNewPrivileges=no_new_privileges)
        container = box.run(spec=spec)
        assert container.output() == f"{profile} (enforce)\n"
        assert "Permission denied" in container.output("stderr")

    def test_an_exec_does_too(self, box: Box, profile: str) -> None:
        container = box.create(box.spec()).start()
        assert container.exec("cat", "/proc/self/attr/current", apparmorProfile=profile)[1] == f"{profile} (enforce)\n"

    def test_in_a_user_namespace(self, box: Box, profile: str) -> None:
        spec = in_user_namespace(box, "cat", "/proc/self/attr/current")
        spec["process"]["apparmorProfile"] = profile
        assert box.run(spec=spec).output() == f"{profile} (enforce)\n"

    def test_a_profile_that_is_not_loaded(self, box: Box) -> None:
        spec = with_secret(box, apparmorProfile="no-such-profile")
        with pytest.raises(StepFailed, match=r"step 'write_labels' failed on no-such-profile with ENOENT"):
            box.create(spec)

    def test_features(self) -> None:
        assert features()["linux"]["apparmor"]["enabled"]


@pytest.mark.vm(lsm="selinux")
class TestSELinux:
    """Without a policy, which this guest has not, every label is the kernel's own; but it is taken, not refused."""

    LABEL = "system_u:system_r:container_t:s0:c1,c2"

    def test_a_label_is_taken_for_the_exec(self, box: Box) -> None:
        container = box.run(spec=with_secret(box, selinuxLabel=self.LABEL))
        assert container.output().startswith("kernel")
        assert box.create(box.spec()).start().exec("true", selinuxLabel=self.LABEL) == (0, "")

    def test_features(self) -> None:
        assert features()["linux"]["selinux"]["enabled"]
