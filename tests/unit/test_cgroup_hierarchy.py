"""Finding the hierarchies in a mountinfo, and which paths name a group."""

from __future__ import annotations

from pathlib import Path

import pytest

from crio_native.errors import InvalidArgument
from crio_native.linux.cgroup import Cgroup, cgroup_of
from crio_native.linux.cgroup.hierarchy import Hierarchy, detect

UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 31 0:31 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n"
    "35 31 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
    "36 31 0:30 / /another/view/of/memory rw - cgroup cgroup rw,memory\n"
)
HYBRID = V1 + "37 31 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


def detected(root: Path, mountinfo: str, controllers: str = "", kernel: str = "6.1.0-44-amd64") -> Hierarchy:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/osrelease").write_text(kernel)
    for point in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
        (root / point).mkdir(parents=True, exist_ok=True)
        for file in ("cgroup.controllers", "cgroup.subtree_control"):
            (root / point / file).write_text(controllers)
    return detect(str(root))


def test_v2(tmp_path: Path) -> None:
    host = detected(tmp_path, UNIFIED, "cpuset cpu io memory pids")
    assert host.mode == "v2" and host.mounts == (f"{tmp_path}/sys/fs/cgroup",)
    assert [host.version_of(name) for name in ("memory", "devices", "hugetlb")] == [2, 2, 0]
    assert host.mount_of("memory") == host.unified and host.mount_of("hugetlb") is None


def test_v1_has_each_hierarchy_once_the_named_one_too(tmp_path: Path) -> None:
    host = detected(tmp_path, V1)
    at = f"{tmp_path}/sys/fs/cgroup/"
    assert host.mode == "v1" and host.unified == ""
    assert host.mounts == (f"{at}cpu,cpuacct", f"{at}memory", f"{at}freezer", f"{at}systemd")
    assert host.mount_of("cpu") == host.mount_of("cpuacct") == f"{at}cpu,cpuacct"
    assert host.version_of("freezer") == 1 and host.version_of("devices") == 0


def test_hybrid_leaves_to_the_unified_hierarchy_what_it_does_better(tmp_path: Path) -> None:
    host = detected(tmp_path, HYBRID)
    assert host.mode == "hybrid"
    assert host.mounts[0] == host.unified and len(host.mounts) == 5
    assert [host.version_of(name) for name in ("memory", "devices", "freezer")] == [1, 2, 0]


def test_groups_are_found_by_name_wherever_they_are(tmp_path: Path) -> None:
    host = detected(tmp_path, HYBRID)
    for group in ("unified/a/b/crio-1", "memory/c/crio-1", "memory/c/crio-2", "freezer/crio-1/crio-3"):
        (tmp_path / "sys/fs/cgroup" / group).mkdir(parents=True)
    assert host.find(frozenset({"crio-1", "crio-3"})) == {"/a/b/crio-1", "/c/crio-1", "/crio-1", "/crio-1/crio-3"}


def test_hybrid_takes_no_controller_that_nobody_handed_down(tmp_path: Path) -> None:
    before = detected(tmp_path, HYBRID, "hugetlb")
    assert before.version_of("hugetlb") == 2
    (tmp_path / "sys/fs/cgroup/unified/cgroup.subtree_control").write_text("")
    assert detect(str(tmp_path)).version_of("hugetlb") == 0


def test_hybrid_on_an_old_kernel_uses_the_v1_freezer(tmp_path: Path) -> None:
    assert detected(tmp_path, HYBRID, kernel="5.4.0").version_of("freezer") == 1


def test_mount_points_with_blanks(tmp_path: Path) -> None:
    line = UNIFIED.replace("/sys/fs/cgroup", "/sys/fs/c\\040g")
    (tmp_path / "sys/fs/c g").mkdir(parents=True)
    for file in ("cgroup.controllers", "cgroup.subtree_control"):
        (tmp_path / "sys/fs/c g" / file).write_text("cpu")
    assert detected(tmp_path, line).unified == f"{tmp_path}/sys/fs/c g"


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mount cgroup2"):
        detected(tmp_path, "31 23 0:28 / / rw - tmpfs tmpfs rw\n")


@pytest.mark.parametrize(
    "path", ["", "/", "relative", "/a/../b", "/a//b", "/a/", "/./a", "/" + "a" * 256, "/a" * 600, "/a\nb", "/a\0b"]
)
def test_paths_that_name_no_group(path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Cgroup(path)
    assert caught.value.field == "linux.cgroupsPath"


def test_the_systemd_form_is_for_the_systemd_manager() -> None:
    with pytest.raises(InvalidArgument, match="systemd cgroup manager"):
        cgroup_of("system.slice:crio:abc")
    with pytest.raises(InvalidArgument, match="slice:prefix:name"):
        cgroup_of("/system.slice/abc", "systemd")
    with pytest.raises(InvalidArgument, match="'cgroupfs' or 'systemd'"):
        cgroup_of("/a", "docker")
    assert cgroup_of("/a/b").path == "/a/b"
