"""The CRI's resources as the specification's `linux.resources`, and the pod's sysctls; checked, by the CRI's paths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from crio_native.config.values import Sysctl
from crio_native.errors import InvalidArgument
from crio_native.linux import scheduling
from crio_native.pods.values import NamespaceMode, NamespaceOption, Resources

_PAGE_SIZE = re.compile(r"\d{1,7}[KMG]i?B", re.ASCII)
_UNIFIED = re.compile(r"[a-z_0-9]+(\.[A-Za-z_0-9]+)+", re.ASCII)
_SYSCTL = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)+", re.ASCII)
_SYSCTL_VALUE = re.compile(r"[\x20-\x7e\t]{0,4096}", re.ASCII)
_IPC = re.compile(r"kernel\.(sem|shm[a-z_]+|msg[a-z_]+)|fs\.mqueue\.[a-z_]+", re.ASCII)


def linux_resources(asked: Resources, *, min_memory: int, pids_limit: int = -1, field: str) -> dict[str, Any]:
    """An OCI `linux.resources` object (without devices) of only what is asked for.

    field: the resources' own path in the request.  Raises InvalidArgument.
    """
    if not -1000 <= asked.oom_score_adj <= 1000:
        raise InvalidArgument(f"{field}.oom_score_adj", asked.oom_score_adj, "must be -1000 to 1000")
    result: dict[str, Any] = {}
    if cpu := _cpu(asked, field):
        result["cpu"] = cpu
    if memory := _memory(asked, min_memory, field):
        result["memory"] = memory
    if pids_limit > 0:
        result["pids"] = {"limit": pids_limit}
    if asked.hugepage_limits:
        result["hugepageLimits"] = [
            _hugepages(h, f"{field}.hugepage_limits[{i}]") for i, h in enumerate(asked.hugepage_limits)
        ]
    for key in asked.unified:
        if not _UNIFIED.fullmatch(key):
            raise InvalidArgument(f"{field}.unified", key, "must be a cgroup v2 file name such as memory.high")
    if asked.unified:
        result["unified"] = dict(asked.unified)
    return result


def check_pod(asked: Resources, field: str) -> None:
    """What a pod as a whole may use, which is the kubelet's to apply.  Raises InvalidArgument."""
    linux_resources(without_signs(asked, field), min_memory=0, field=field)


def without_signs(asked: Resources, field: str) -> Resources:
    """Without the sign by which some callers say that memory has no limit.  Raises InvalidArgument."""
    limit = asked.memory_limit_in_bytes
    if limit < -1:
        raise InvalidArgument(f"{field}.memory_limit_in_bytes", limit, "must be -1 (no limit), 0 or bytes")
    return dataclasses.replace(asked, memory_limit_in_bytes=max(limit, 0))


def _cpu(asked: Resources, field: str) -> dict[str, Any]:
    cpu: dict[str, Any] = {}
    if asked.cpu_period:
        if not 1000 <= asked.cpu_period <= 1_000_000:
            raise InvalidArgument(f"{field}.cpu_period", asked.cpu_period, "must be 1000 to 1000000 microseconds")
        cpu["period"] = asked.cpu_period
    if asked.cpu_quota:
        if asked.cpu_quota < 1000 and asked.cpu_quota != -1:
            raise InvalidArgument(f"{field}.cpu_quota", asked.cpu_quota, "must be at least 1000 microseconds, or -1")
        cpu["quota"] = asked.cpu_quota
    if asked.cpu_shares:
        if asked.cpu_shares < 0:
            raise InvalidArgument(f"{field}.cpu_shares", asked.cpu_shares, "must be 2 to 262144")
        cpu["shares"] = min(max(asked.cpu_shares, 2), 262144)  # the kernel's bounds, which the kubelet may exceed
    check_cpusets(asked, field)
    for name, value in (("cpus", asked.cpuset_cpus), ("mems", asked.cpuset_mems)):
        if value:
            cpu[name] = value
    return cpu


def check_cpusets(asked: Resources, field: str) -> None:
    """field: as in `linux_resources`.  Raises InvalidArgument for what `scheduling.parse_list` does not take."""
    for name, most in (("cpuset_cpus", scheduling.MAX_CPU), ("cpuset_mems", scheduling.MAX_NODE)):
        try:
            scheduling.parse_list(getattr(asked, name), most)
        except ValueError as error:
            raise InvalidArgument(
                f"{field}.{name}", getattr(asked, name), f"must be a list such as 0-3,7: {error}"
            ) from None


def _memory(asked: Resources, least: int, field: str) -> dict[str, Any]:
    limit, swap = asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes
    if limit < 0 or 0 < limit < least:
        raise InvalidArgument(
            f"{field}.memory_limit_in_bytes", limit, f"must be 0 (no limit) or at least {least} bytes"
        )
    if swap and swap != -1 and swap < limit:
        raise InvalidArgument(
            f"{field}.memory_swap_limit_in_bytes", swap, f"counts memory too, so it cannot be below the limit {limit}"
        )
    memory: dict[str, Any] = {}
    if limit:
        memory["limit"] = limit
    if swap:
        memory["swap"] = swap
    return memory


def _hugepages(asked: Any, field: str) -> dict[str, Any]:
    if not _PAGE_SIZE.fullmatch(asked.page_size):
        raise InvalidArgument(f"{field}.page_size", asked.page_size, "must be a size such as 2MB or 1GB")
    return {"pageSize": asked.page_size, "limit": asked.limit}


def oom_score(asked: int, least: int) -> tuple[int, list[str]]:
    """The score that the container gets, and a warning where this host cannot go as low as asked."""
    if asked >= least:
        return asked, []
    return least, [f"oom_score_adj {asked} needs CAP_SYS_RESOURCE, which the daemon lacks; it is set to {least}"]


def pod_sysctls(asked: Mapping[str, str], defaults: Iterable[Sysctl], namespaces: NamespaceOption) -> dict[str, str]:
    """A pod's sysctls.  Only those of a namespace of the pod's own: any other would change the node (CVE-2022-0532).

    Defaults that do not fit the pod's namespaces are left out; what the caller names is refused.
    """
    field = "config.linux.sysctls"
    result = {d.key: d.value for d in defaults if not _refusal(d.key, namespaces)}
    for key, value in asked.items():
        if not _SYSCTL.fullmatch(key):
            raise InvalidArgument(f"{field}[{key!r}]", key, "is no sysctl name")
        if not _SYSCTL_VALUE.fullmatch(value):
            raise InvalidArgument(f"{field}[{key!r}]", value, "may hold only printable ASCII characters")
        dotted = key.replace("/", ".")
        if reason := _refusal(dotted, namespaces):
            raise InvalidArgument(f"{field}[{key!r}]", value, reason)
        result[dotted] = value
    return result


def _refusal(key: str, namespaces: NamespaceOption) -> str:
    if key.startswith("net."):
        return "cannot be set in a pod on the host's network" if namespaces.network is NamespaceMode.NODE else ""
    if _IPC.fullmatch(key):
        return (
            "cannot be set in a pod that shares the host's IPC namespace"
            if namespaces.ipc is NamespaceMode.NODE
            else ""
        )
    return "is not in any namespace: setting it would change the node"
