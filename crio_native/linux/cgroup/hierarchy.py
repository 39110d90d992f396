"""What control groups this host has mounted, and where; nothing about any one group."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["v2", "hybrid", "v1"]

# The v1 controllers that a container's limits or accounts need.  Each further hierarchy costs a mkdir, a join and a
# rmdir (70 microseconds together), so perf_event and misc are left alone.
_V1_CONTROLLERS = frozenset(
    "cpu cpuacct cpuset memory devices freezer blkio pids hugetlb net_cls net_prio rdma".split()
)
# What every unified hierarchy does itself, with or without controllers, and better: device rules as one BPF program
# (20 microseconds to attach, where v1 takes a write a rule), cgroup.kill and cgroup.freeze, cpu.stat.
_BETTER_UNIFIED = frozenset(("devices", "freezer", "cpuacct"))
_CGROUP2_MAGIC_FILE = "cgroup.controllers"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The mounted control groups.

    mode: v2 when all is in one unified hierarchy, v1 when there is none, hybrid when there are both.
    unified: mount point of cgroup2, "" on v1.
    v1: controller -> mount point of its own hierarchy.  v2: controllers that the unified hierarchy has.
    mounts: every mount point that a container's group is made in; the unified one first.
    """

    mode: Mode
    unified: str
    v1: Mapping[str, str]
    v2: frozenset[str]
    mounts: tuple[str, ...]

    def mount_of(self, controller: str) -> str | None:
        """Where the controller's files are; None when this host does not have it."""
        if controller in self.v1:
            return self.v1[controller]
        return self.unified if controller in self.v2 else None

    def version_of(self, controller: str) -> int:
        """1 or 2, which decides its files' names; 0 when this host does not have it."""
        return 1 if controller in self.v1 else 2 if controller in self.v2 else 0


@functools.cache
def hierarchy() -> Hierarchy:
    """This host's, looked up once."""
    return detect("/")


def detect(root: str) -> Hierarchy:
    """What is mounted according to ``proc/self/mountinfo`` below root.  Raises RuntimeError when nothing is."""
    unified = ""
    v1: dict[str, str] = {}
    with open(os.path.join(root, "proc/self/mountinfo")) as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            point = os.path.join(root, _unescaped(before.split()[4]).lstrip("/"))
            if kind == "cgroup2" and not unified:
                unified = point
            elif kind == "cgroup":
                for option in options.split(","):
                    v1.setdefault(option, point)
    systemd = v1.get("name=systemd")
    v1 = {name: point for name, point in v1.items() if name in _V1_CONTROLLERS}
    v2 = _unified_controllers(unified) if unified else frozenset()
    if not unified and not v1:
        raise RuntimeError("no control groups are mounted: mount cgroup2 on /sys/fs/cgroup")
    if unified and _kernel(root) >= (5, 14):
        v1 = {name: point for name, point in v1.items() if name not in _BETTER_UNIFIED}
    mounts = [unified, *v1.values()] if unified else [*v1.values()]
    if systemd and os.path.isdir(os.path.join(root, "run/systemd/system")):
        mounts.append(systemd)  # or systemd would count the container among its own service's processes
    mode: Mode = "v1" if not unified else "hybrid" if v1 else "v2"
    return Hierarchy(mode, unified, v1, v2 - v1.keys(), tuple(dict.fromkeys(mounts)))


def _unified_controllers(unified: str) -> frozenset[str]:
    """Those of the files' names, and the device controller, which is a BPF program and has no file."""
    with open(os.path.join(unified, _CGROUP2_MAGIC_FILE)) as file:
        return frozenset(file.read().split()) | {"devices"}


def _kernel(root: str) -> tuple[int, ...]:
    """The kernel's version, major and minor."""
    with open(os.path.join(root, "proc/sys/kernel/osrelease")) as file:
        return tuple(int(part) for part in re.findall(r"\d+", file.read())[:2])


def _unescaped(path: str) -> str:
    """A mountinfo field as a path: blanks and the like are octal there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
