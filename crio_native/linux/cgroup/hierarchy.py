"""What control groups this host has mounted, and where; nothing about any one group."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    Mode = Literal["v2", "hybrid", "v1"]

_V1_CONTROLLERS = frozenset(
    "cpu cpuacct cpuset memory devices freezer blkio pids hugetlb net_cls net_prio rdma".split()
)
# What every unified hierarchy does itself, with or without controllers, and better: device rules as one BPF program
# (20 microseconds to attach, where v1 takes a write a rule), cgroup.kill and cgroup.freeze, cpu.stat.
_BETTER_UNIFIED = frozenset(("devices", "freezer", "cpuacct"))


class Hierarchy:
    """The mounted control groups.

    mode: v2 when all is in one unified hierarchy, v1 when there is none, hybrid when there are both.
    unified: mount point of cgroup2, "" on v1.
    v1: controller -> mount point, of those that are used through their own hierarchy.  v2: those that are used through
    the unified one.
    mounts: every hierarchy's mount point, the unified one first.  A container's group is made in all of them, used or
    not: a process that stayed in a hierarchy's root could mount it in a user namespace of its own and reach its
    neighbours' groups.
    v1_freezer: mount point of the v1 freezer, used or not; "" without one.
    """

    __slots__ = ("mode", "mounts", "unified", "v1", "v1_freezer", "v2")

    def __init__(
        self, mode: Mode, unified: str, v1: Mapping[str, str], v2: frozenset[str], mounts: tuple[str, ...]
    ) -> None:
        self.mode, self.unified, self.v1, self.v2, self.mounts = mode, unified, v1, v2, mounts
        freezers = (mount for mount in mounts if mount != unified and "freezer" in os.path.basename(mount).split(","))
        self.v1_freezer = next(freezers, "")

    def mount_of(self, controller: str) -> str | None:
        """Where the controller's files are; None when this host does not have it."""
        if controller in self.v1:
            return self.v1[controller]
        return self.unified if controller in self.v2 else None

    def version_of(self, controller: str) -> int:
        """1 or 2, which decides its files' names; 0 when this host does not have it."""
        return 1 if controller in self.v1 else 2 if controller in self.v2 else 0

    def directories(self, path: str) -> dict[str, str]:
        """What a container sees as its control groups: name below /sys/fs/cgroup ("" on a v2 host) -> its own group's
        directory on the host.  path: the group's, from each hierarchy's root."""
        if self.mode == "v2":
            return {"": self.unified + path}
        return {os.path.basename(mount): mount + path for mount in self.mounts}

    def find(self, names: frozenset[str]) -> set[str]:
        """The paths, from a hierarchy's root, of all groups of these names, whichever hierarchies they are in."""
        return {
            f"{parent}/{name}"[len(mount) :]
            for mount in self.mounts
            for parent, children, _ in os.walk(mount)
            for name in names.intersection(children)
        }


_this_host: list[Hierarchy] = []


def hierarchy() -> Hierarchy:
    """This host's, looked up once."""
    if not _this_host:
        _this_host.append(detect("/"))
    return _this_host[0]


def detect(root: str) -> Hierarchy:
    """What is mounted according to ``proc/self/mountinfo`` below root.  Raises RuntimeError when nothing is."""
    unified = ""
    v1: dict[str, str] = {}
    mounts: dict[str, str] = {}  # device number of the hierarchy -> mount point
    with open(os.path.join(root, "proc/self/mountinfo")) as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            _, _, device, _, point = before.split()[:5]
            if kind not in ("cgroup", "cgroup2") or device in mounts:
                continue
            mounts[device] = point = os.path.join(root, _unescaped(point).lstrip("/"))
            if kind == "cgroup2":
                unified = point
            else:
                v1 |= {name: point for name in options.split(",") if name in _V1_CONTROLLERS}
    if not mounts:
        raise RuntimeError("no control groups are mounted: mount cgroup2 on /sys/fs/cgroup")
    points = sorted(mounts.values(), key=lambda point: point != unified)
    mode: Mode = "v1" if not unified else "hybrid" if len(points) > 1 else "v2"
    if unified and _kernel(root) >= (5, 14):
        v1 = {name: point for name, point in v1.items() if name not in _BETTER_UNIFIED}
    # On a hybrid host a controller that the unified hierarchy could have, but hands to nobody, is somebody's else to
    # mount: handing it down would take it from all v1 users of the machine.
    available = "cgroup.controllers" if mode == "v2" else "cgroup.subtree_control"
    v2 = _unified_controllers(unified, available) if unified else frozenset()
    return Hierarchy(mode, unified, v1, v2 - v1.keys(), tuple(points))


def _unified_controllers(unified: str, file: str) -> frozenset[str]:
    """Those of the file's names, and the device controller, which is a BPF program and has no file."""
    with open(os.path.join(unified, file)) as names:
        return frozenset(names.read().split()) | {"devices"}


def _kernel(root: str) -> tuple[int, ...]:
    """The kernel's version, major and minor."""
    with open(os.path.join(root, "proc/sys/kernel/osrelease")) as file:
        major, minor, *_ = file.read().split(".")
    return int(major), int(minor.partition("-")[0])


def _unescaped(path: str) -> str:
    """A mountinfo field as a path: blanks and the like are octal there."""
    first, *others = path.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in others)
