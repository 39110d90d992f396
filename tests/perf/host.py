"""The host as the benchmark needs it: mounts of its own, what Debian's crun asks for, and who used the CPU."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crio_native.cli.scratch import wait_for
from crio_native.errors import Unavailable
from crio_native.linux import mounts, syscalls
from crio_native.linux.cgroup import Cgroup, hierarchy
from crio_native.linux.cgroup.hierarchy import detect
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
            # A hierarchy that is unmounted while a removed group is still being freed stays bound for ever.
            with suppress(Unavailable):  # another benchmark may be at work
                wait_for(lambda: _hugetlb()[1] == 1, 10, "hugetlb's groups are freed")
            syscalls.umount2(str(HUGETLB))
            HUGETLB.rmdir()


@contextmanager
def in_memory(directory: Path) -> Iterator[Path]:
    """A directory that is a tmpfs of its own, within `private_mounts`."""
    directory.mkdir()
    syscalls.mount("tmpfs", str(directory), "tmpfs", 0)
    try:
        yield directory
    finally:
        syscalls.umount2(str(directory), mounts.MNT_DETACH)
        directory.rmdir()


class Account:
    """The CPU time of a daemon, all that it starts, and its pods: of one cgroup, with the pods' in it."""

    def __init__(self, cgroup: str, pid: int) -> None:
        """Move the daemon and its children to a group of their own in `cgroup`."""
        self._cgroup = Cgroup(cgroup)
        group = f"{cgroup}/daemon"
        Cgroup(group).create()
        host = hierarchy()
        account = host.unified or host.v1["cpuacct"]  # where `stats` looks
        for member in _descendants(pid):
            Path(f"{account}{group}/cgroup.procs").write_text(str(member))

    def seconds(self) -> float:
        return float(self._cgroup.stats()["cpu_usage"]) / 1e9


def _descendants(pid: int) -> list[int]:
    """The process, its children, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            parent = int(path.read_text().rpartition(") ")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def _mount_hugetlb() -> bool:
    """On a v1 host crun 1.8 refuses to run ("hybrid mode not supported") while the unified hierarchy has a controller,
    and hugetlb is there unless a v1 hierarchy has it.  Returns whether it made one."""
    if detect("/").version_of("memory") != 1 or _hugetlb()[0] != 0 or HUGETLB.exists():
        return False
    HUGETLB.mkdir()
    try:
        wait_for(_mounted, 30, "hugetlb is in use: end the containers whose cgroups are in the unified hierarchy")
    except BaseException:
        HUGETLB.rmdir()
        raise
    return True


def _mounted() -> bool:
    """The kernel does not take a controller from the unified hierarchy while a group there has it."""
    try:
        syscalls.mount("cgroup", str(HUGETLB), "cgroup", 0, "hugetlb")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _hugetlb() -> tuple[int, int]:
    """The number of the v1 hierarchy that has it (0: none), and how many groups there are.

    A kernel without it gets a number too, for there is nothing to mount then.
    """
    for line in Path("/proc/cgroups").read_text().splitlines():
        name, number, groups, _ = line.split()
        if name == "hugetlb":
            return int(number), int(groups)
    return -1, 0


def _remove_cgroups() -> None:
    """Ours, with what an interrupted measurement left running in it; also from hierarchies that only a peer uses."""
    cgroup = Cgroup(CGROUP)
    cgroup.kill()
    cgroup.remove()
    mounted = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup" in line)
    for row in mounted:
        for directory, _, _ in os.walk(f"{row[4]}{CGROUP}", topdown=False):
            os.rmdir(directory)
