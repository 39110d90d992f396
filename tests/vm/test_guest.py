"""That the guest is what the rig promises."""

from __future__ import annotations

import os
import platform

import pytest


@pytest.mark.vm
def test_the_default_guest_has_cgroup_v2_with_its_controllers() -> None:
    with open("/sys/fs/cgroup/cgroup.subtree_control") as file:
        assert {"cpu", "io", "memory", "pids"} <= set(file.read().split())
    assert platform.node() == "vm"


@pytest.mark.vm
def test_the_hosts_files_cannot_be_written() -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        os.mkdir("/etc/crio-native-test")


@pytest.mark.vm(cgroup="v1")
def test_a_v1_guest_has_one_hierarchy_a_controller() -> None:
    assert os.path.exists("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    assert not os.path.exists("/sys/fs/cgroup/cgroup.controllers")


@pytest.mark.vm(lsm="apparmor")
def test_a_guest_with_apparmor_confines() -> None:
    with open("/sys/kernel/security/lsm") as file:
        assert "apparmor" in file.read()


@pytest.mark.vm(lsm="selinux")
def test_a_guest_with_selinux_waits_for_a_policy() -> None:
    with open("/sys/fs/selinux/enforce") as file:
        assert file.read() == "0"
    assert os.access("/sys/fs/selinux/load", os.W_OK)
