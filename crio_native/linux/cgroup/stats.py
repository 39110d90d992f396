"""Reading a group's accounts.  A list of all containers' statistics reads every file here, so each is read once."""

from __future__ import annotations

import os
import time

from . import files
from .hierarchy import Hierarchy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_V1_UNLIMITED = 1 << 62  # v1 says "no limit" as the largest multiple of a page


def read(host: Hierarchy, path: str) -> dict[str, Any]:
    """The fields of `oci.runtime.Stats`, those that this host can tell; times in ns, sizes in bytes.

    Beside them ``extra``, whose keys are there when the host has them: cpu (ns, and counts of throttling), memory (the
    kernel's own names), memory_peak, swap_limit, pids_limit, io (a list with one entry a device), hugetlb and
    hugetlb_peak (page size -> bytes), pressure (cpu, memory and io; stall times in microseconds).
    """
    reading: dict[str, Any] = {"timestamp": time.time_ns(), "extra": {}}
    extra = reading["extra"]
    memory, pids, io = (host.mount_of(name) for name in ("memory", "pids", "io"))
    _cpu(host, path, reading)
    if host.version_of("memory") == 2:
        _memory_v2(f"{memory}{path}/", reading)
    elif memory:
        _memory_v1(f"{memory}{path}/", reading)
    if pids:
        reading["pids"] = _number(f"{pids}{path}/pids.current")
        extra["pids_limit"] = _number(f"{pids}{path}/pids.max")
    if "blkio" in host.v1:
        extra["io"] = _io_v1(f"{host.v1['blkio']}{path}/")
    elif io:
        extra["io"] = _io_v2(f"{io}{path}/io.stat")
    if host.version_of("hugetlb"):
        extra["hugetlb"], extra["hugetlb_peak"] = _hugetlb(host, path)
    if host.unified:
        extra["pressure"] = _pressure(f"{host.unified}{path}/")
    return reading


def memory_counts(host: Hierarchy, path: str) -> dict[str, int]:
    """``failcnt``, how often the limit was hit, and ``kernel``, bytes of the kernel's own; those that the host tells.

    Apart from `read`: only who asks for metrics wants them.
    """
    memory = host.mount_of("memory")
    if host.version_of("memory") == 2:
        events = files.table(files.read_or_empty(f"{memory}{path}/memory.events"))
        found = {"failcnt": events.get("max"), "kernel": None}
    else:
        found = {
            "failcnt": _number(f"{memory}{path}/memory.failcnt"),
            "kernel": _number(f"{memory}{path}/memory.kmem.usage_in_bytes"),
        }
    return {name: value for name, value in found.items() if value is not None}


def _number(path: str) -> int | None:
    """The file's only number; None for "max", or when there is no such file."""
    text = files.read_or_empty(path).strip()
    return int(text) if text.isdigit() else None


def _cpu(host: Hierarchy, path: str, reading: dict[str, Any]) -> None:
    """Every unified group counts its time, with or without a controller; throttling is the cpu controller's."""
    extra: dict[str, int] = {}
    table: dict[str, int] = {}
    if host.unified:
        table = files.table(files.read_or_empty(f"{host.unified}{path}/cpu.stat"))
        if "usage_usec" in table:
            reading["cpu_usage"] = table["usage_usec"] * 1000
            extra |= {"user": table["user_usec"] * 1000, "system": table["system_usec"] * 1000}
    elif "cpuacct" in host.v1:
        account = f"{host.v1['cpuacct']}{path}/cpuacct.usage"
        reading["cpu_usage"] = _number(account)
        extra |= {"user": _number(account + "_user") or 0, "system": _number(account + "_sys") or 0}
    if "cpu" in host.v1:
        table = files.table(files.read_or_empty(f"{host.v1['cpu']}{path}/cpu.stat"))
    if "nr_periods" in table:
        extra["periods"], extra["throttled_periods"] = table["nr_periods"], table["nr_throttled"]
        extra["throttled_time"] = table.get("throttled_time", table.get("throttled_usec", 0) * 1000)
    reading["extra"]["cpu"] = extra


def _memory_v2(directory: str, reading: dict[str, Any]) -> None:
    table = files.table(files.read_or_empty(directory + "memory.stat"))
    usage = _number(directory + "memory.current")
    reading["memory_usage"] = usage
    if usage is not None:
        reading["memory_working_set"] = max(0, usage - table.get("inactive_file", 0))
    reading["memory_rss"] = table.get("anon")
    reading["memory_limit"] = _number(directory + "memory.max")
    reading["page_faults"], reading["major_page_faults"] = table.get("pgfault"), table.get("pgmajfault")
    reading["swap_usage"] = _number(directory + "memory.swap.current")
    reading["extra"]["memory"] = table
    reading["extra"]["memory_peak"] = _number(directory + "memory.peak")
    reading["extra"]["swap_limit"] = _number(directory + "memory.swap.max")


def _memory_v1(directory: str, reading: dict[str, Any]) -> None:
    table = files.table(files.read_or_empty(directory + "memory.stat"))
    usage = _number(directory + "memory.usage_in_bytes")
    reading["memory_usage"] = usage
    if usage is not None:
        reading["memory_working_set"] = max(0, usage - table.get("total_inactive_file", 0))
    reading["memory_rss"] = table.get("total_rss")
    limit = _number(directory + "memory.limit_in_bytes")
    reading["memory_limit"] = None if limit is None or limit >= _V1_UNLIMITED else limit
    reading["page_faults"], reading["major_page_faults"] = table.get("total_pgfault"), table.get("total_pgmajfault")
    reading["swap_usage"] = table.get("total_swap")
    reading["extra"]["memory"] = table
    reading["extra"]["memory_peak"] = _number(directory + "memory.max_usage_in_bytes")
    both = table.get("hierarchical_memsw_limit", _V1_UNLIMITED)
    if limit is not None and limit <= both < _V1_UNLIMITED:
        reading["extra"]["swap_limit"] = both - limit


def _io_v2(path: str) -> list[dict[str, Any]]:
    """Lines ``major:minor rbytes=N wbytes=N rios=N wios=N ...``."""
    devices = []
    for line in files.read_or_empty(path).splitlines():
        device, *pairs = line.split()
        counts = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        devices.append({"device": device} | {key: int(value) for key, value in counts.items() if value.isdigit()})
    return devices


def _io_v1(directory: str) -> list[dict[str, Any]]:
    """Lines ``major:minor Read N``; the same names as v2's."""
    devices: dict[str, dict[str, Any]] = {}
    for file, names in (
        ("blkio.throttle.io_service_bytes_recursive", {"Read": "rbytes", "Write": "wbytes"}),
        ("blkio.throttle.io_serviced_recursive", {"Read": "rios", "Write": "wios"}),
    ):
        for line in files.read_or_empty(directory + file).splitlines():
            fields = line.split()
            if len(fields) == 3 and fields[1] in names:
                devices.setdefault(fields[0], {"device": fields[0]})[names[fields[1]]] = int(fields[2])
    return list(devices.values())


def _hugetlb(host: Hierarchy, path: str) -> tuple[dict[str, int], dict[str, int]]:
    """What is in use, and the most that was (which only v1 remembers), by page size."""
    current = ".current" if host.version_of("hugetlb") == 2 else ".usage_in_bytes"
    directory = f"{host.mount_of('hugetlb')}{path}/hugetlb."
    readings = [
        {size: value for size in _huge_page_sizes() if (value := _number(directory + size + suffix)) is not None}
        for suffix in (current, ".max_usage_in_bytes")
    ]
    return readings[0], readings[1]


def _huge_page_sizes() -> list[str]:
    """As the cgroup files name them: ``2MB``, ``1GB``."""
    try:
        kib = [int(name.split("-")[1][:-2]) for name in os.listdir("/sys/kernel/mm/hugepages")]
    except FileNotFoundError:
        return []
    return [
        f"{size >> 20}GB" if size >= 1 << 20 else f"{size >> 10}MB" if size >= 1 << 10 else f"{size}KB" for size in kib
    ]


def _pressure(directory: str) -> dict[str, dict[str, dict[str, float]]]:
    """Lines ``some avg10=0.00 avg60=0.00 avg300=0.00 total=0``; {} for a kernel without PSI."""
    found = {}
    for resource in ("cpu", "memory", "io"):
        lines = files.read_or_empty(f"{directory}{resource}.pressure").splitlines()
        if lines:
            found[resource] = {
                kind: {key: float(value) for key, value in (pair.split("=") for pair in pairs)}
                for kind, *pairs in (line.split() for line in lines)
            }
    return found
