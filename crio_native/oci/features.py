"""What this executor can do on this machine: the OCI runtime features document (runtime-spec features.md).

Read from the kernel at the call, not remembered: a module may be loaded, a controller mounted.
"""

from __future__ import annotations

import os
from typing import Any

from crio_native.linux import capabilities, mounts, namespaces, resctrl, syscalls, trees
from crio_native.linux.cgroup import hierarchy
from crio_native.oci import seccomp_profile
from crio_native.oci import spec as specs

MIN_VERSION = "1.0.0"
# The kernel's names of the actions, in /proc/sys/kernel/seccomp/actions_avail.
_KERNEL_ACTIONS = {
    "SCMP_ACT_KILL": "kill_thread",
    "SCMP_ACT_KILL_THREAD": "kill_thread",
    "SCMP_ACT_KILL_PROCESS": "kill_process",
    "SCMP_ACT_TRAP": "trap",
    "SCMP_ACT_ERRNO": "errno",
    "SCMP_ACT_TRACE": "trace",
    "SCMP_ACT_ALLOW": "allow",
    "SCMP_ACT_LOG": "log",
    "SCMP_ACT_NOTIFY": "user_notif",
}


def features() -> dict[str, Any]:
    """The features document, as a dict to be printed as JSON."""
    options = set(mounts.KNOWN_OPTIONS)
    if not (trees.HAVE_TREES and trees.HAVE_SETATTR):
        options -= mounts.RECURSIVE_OPTIONS | {"idmap", "ridmap"}
    return {
        "ociVersionMin": MIN_VERSION,
        "ociVersionMax": specs.VERSION,
        "hooks": list(specs.HOOKS),
        "mountOptions": sorted(options),
        "linux": {
            "namespaces": [kind for kind, file in namespaces.FILE.items() if os.path.exists(f"/proc/self/ns/{file}")],
            "capabilities": list(capabilities.NAMES[: capabilities.last_known() + 1]),
            "cgroup": _cgroup(),
            "seccomp": _seccomp(),
            "apparmor": {"enabled": _read("/sys/module/apparmor/parameters/enabled") == "Y"},
            "selinux": {"enabled": os.path.exists("/sys/fs/selinux/enforce")},
            "intelRdt": {"enabled": bool(resctrl.mount_point())},
            "mountExtensions": {"idmap": {"enabled": trees.HAVE_TREES and trees.HAVE_SETATTR}},
            "netDevices": {"enabled": True},
        },
        "potentiallyUnsafeConfigAnnotations": [],
    }


def _cgroup() -> dict[str, bool]:
    try:
        found = hierarchy()
    except RuntimeError:  # none is mounted
        return {"v1": False, "v2": False, "systemd": False, "systemdUser": False, "rdma": False}
    return {
        "v1": found.mode != "v2",
        "v2": bool(found.unified),
        "systemd": os.path.isdir("/run/systemd/system"),
        "systemdUser": False,
        "rdma": found.version_of("rdma") > 0,
    }


def _seccomp() -> dict[str, Any]:
    available = _read("/proc/sys/kernel/seccomp/actions_avail").split()
    if not available:
        return {"enabled": False}
    return {
        "enabled": True,
        "actions": [action for action in seccomp_profile.ACTIONS if _KERNEL_ACTIONS[action] in available],
        "operators": list(seccomp_profile.OPERATORS),
        "archs": list(seccomp_profile.ARCHITECTURES),
        "knownFlags": list(seccomp_profile.FLAGS),
        "supportedFlags": [name for name, flag in seccomp_profile.FLAGS.items() if syscalls.has_seccomp_flag(flag)],
    }


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read(4096).strip()
    except OSError:
        return ""
