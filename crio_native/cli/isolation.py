"""What the kernel says about a process's isolation, in words.

Here belongs reading /proc and the cgroup files of one process; nothing here asks the runtime what it meant to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from crio_native.linux import capabilities
from crio_native.linux.cgroup import hierarchy

NAMESPACES = ("pid", "net", "ipc", "uts", "mnt", "cgroup", "user", "time")
SECCOMP_MODES = {"0": "off", "1": "strict", "2": "filter"}
# Controller, the v1 file, the v2 file; the numbers are shown in the file's own unit.
LIMITS = (
    ("memory", "memory.limit_in_bytes", "memory.max"),
    ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    ("pids", "pids.max", "pids.max"),
)


def describe(pid: int) -> dict[str, str]:
    """The isolation of a live process, one entry a subject.  Raises FileNotFoundError when there is no such process."""
    status = _status(pid)
    return {
        "process": f"pid {pid} on the host, {status['NSpid'].split()[-1]} in its own namespace",
        **_namespaces(pid),
        "user": f"uid {status['Uid'].split()[1]}, gid {status['Gid'].split()[1]}",
        "capabilities": _capabilities(status["CapEff"]),
        "  can ever gain": _capabilities(status["CapBnd"]),
        "no_new_privs": "yes" if status["NoNewPrivs"] == "1" else "no",
        "seccomp": f"{SECCOMP_MODES[status['Seccomp']]}, {status.get('Seccomp_filters', '?')} program(s)",
        **_cgroup(pid),
        "lsm": _lsm(pid),
    }


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _namespaces(pid: int) -> dict[str, str]:
    """Which namespaces differ from ours.  A kernel without one (time) has no such file."""
    kinds = [kind for kind in NAMESPACES if os.path.exists(f"/proc/{pid}/ns/{kind}")]
    own = [k for k in kinds if os.readlink(f"/proc/{pid}/ns/{k}") != os.readlink(f"/proc/self/ns/{k}")]
    shared = [kind for kind in kinds if kind not in own]
    return {"namespaces": " ".join(own) or "none of its own", "  the host's": " ".join(shared) or "none"}


def _capabilities(mask: str) -> str:
    names = [name.removeprefix("CAP_").lower() for name in capabilities.names(int(mask, 16))]
    if len(names) > capabilities.last_known():
        return "all"
    return " ".join(names) or "none"


def _cgroup(pid: int) -> dict[str, str]:
    paths = _cgroup_paths(pid)
    limits = []
    for controller, *files in LIMITS:
        version = hierarchy().version_of(controller)
        if version == 0:
            continue
        path = paths[controller if version == 1 else ""]
        file = Path(f"{hierarchy().mount_of(controller)}{path}") / files[version - 1]
        if file.exists():
            limits.append(f"{file.name} {_limit(file)}")
    return {"cgroup": paths.get("memory") or paths[""], "  limits": ", ".join(limits) or "none readable"}


def _cgroup_paths(pid: int) -> Mapping[str, str]:
    """Controller to cgroup; the unified hierarchy is ""."""
    paths: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _limit(file: Path) -> str:
    text = file.read_text().strip()
    period = file.with_name("cpu.cfs_period_us")
    return f"{text} of {period.read_text().strip()}" if file.name == "cpu.cfs_quota_us" else text


def _lsm(pid: int) -> str:
    """The modules of this kernel and the process's label, as far as there are any."""
    modules = _read("/sys/kernel/security/lsm") or "not told, securityfs is not mounted"
    label = _read(f"/proc/{pid}/attr/current") or "no label"
    return f"{label} (the kernel's modules: {modules})"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip("\n\0")
    except OSError:  # not mounted; or EINVAL, when no module keeps labels
        return ""
