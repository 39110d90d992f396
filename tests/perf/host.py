"""The host as the benchmark needs it: a mount namespace of its own, and what Debian's crun asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crio_native.linux import mounts, syscalls
from tests.perf.peers import CGROUP

HUGETLB = Path("/sys/fs/cgroup/hugetlb")


@contextmanager
def private_mounts() -> Iterator[None]:
    """Mounts made inside are seen by this process and its children only, and go with them.

    Call it while the process has one thread: unshare moves only the calling one.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, mounts.MS_REC | mounts.MS_PRIVATE)
    made = _mount_hugetlb()
    try:
        yield
    finally:
        _remove_cgroups()
        if made:
            syscalls.umount2(str(HUGETLB), mounts.MNT_DETACH)
            HUGETLB.rmdir()


def _mount_hugetlb() -> bool:
    """On a cgroup v1 host crun 1.8 fails when hugetlb exists without a hierarchy; returns whether it made one."""
    rows = [line.split() for line in Path("/proc/cgroups").read_text().splitlines()]
    is_v1 = any(row[0] == "memory" and row[1] != "0" for row in rows)
    if not is_v1 or any(row[0] == "hugetlb" and row[1] != "0" for row in rows) or HUGETLB.exists():
        return False
    HUGETLB.mkdir()
    syscalls.mount("cgroup", str(HUGETLB), "cgroup", 0, "hugetlb")
    return True


def _remove_cgroups() -> None:
    """Ours, also from hierarchies that only a peer uses; a container that lives on keeps its own and is told."""
    mounted = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup" in line)
    for row in mounted:
        for directory, _, _ in os.walk(f"{row[4]}{CGROUP}", topdown=False):
            os.rmdir(directory)
