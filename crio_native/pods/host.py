"""What this host can do, read once at start-up and handed to the pure functions that build specs."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

from crio_native.linux import capabilities, trees
from crio_native.pods import libselinux


@dataclass(frozen=True, slots=True)
class Host:
    """bounding: the daemon's capability bounding set, as names; a container cannot have more.

    oom_score_adj: the lowest value that a container may get (the daemon's own, without CAP_SYS_RESOURCE).
    user_namespaces: there are user namespaces, and mounts that show owners as one of them maps them.
    """

    bounding: frozenset[str]
    oom_score_adj: int
    apparmor: bool
    selinux: bool
    machine: str
    hostname: str
    user_namespaces: bool = True

    @classmethod
    def read(cls, *, selinux: bool = True) -> Host:
        """selinux: whether to use it where the host has it.  Raises FailedPrecondition where it cannot be."""
        bounding = _bounding_set()
        own_score = int(Path("/proc/self/oom_score_adj").read_text())
        return cls(
            bounding=bounding,
            oom_score_adj=-1000 if "CAP_SYS_RESOURCE" in bounding else own_score,
            apparmor=_read("/sys/module/apparmor/parameters/enabled").startswith("Y"),
            selinux=selinux and _selinux(),
            machine=platform.machine(),
            hostname=socket.gethostname(),
            user_namespaces=trees.HAVE_SETATTR and _read("/proc/sys/user/max_user_namespaces").strip() not in ("", "0"),
        )


def _bounding_set() -> frozenset[str]:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            mask = int(line.split()[1], 16) & ((1 << len(capabilities.NAMES)) - 1)
            return frozenset(capabilities.names(mask))
    return frozenset(capabilities.NAMES)


def _selinux() -> bool:
    """libselinux says so where a policy is loaded; it costs 4 MiB, so a kernel without is not asked."""
    return os.path.exists("/sys/fs/selinux/enforce") and libselinux.bindings().is_selinux_enabled() == 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
