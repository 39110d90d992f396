"""Reading a group's accounts.  A list of all containers' statistics comes here for each: a file less is noticed."""

from __future__ import annotations

import os
import time
from _collections_abc import Mapping  # without the package around it

from .. import scheduling
from . import files
from .hierarchy import Hierarchy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_V1_UNLIMITED = 1 << 62  # v1 says "no limit" as the largest multiple of a page


class Details(Mapping):  # type: ignore[type-arg]
    """What few ask for, each read when it is looked at: a list of all containers' statistics needs none of it.

    The keys are there when the host has them: cpu (ns, and counts of throttling), memory_peak, pids_limit, io (a list
    with one entry a device), hugetlb and hugetlb_peak (page size -> bytes), pressure (cpu, memory and io; stall times
    in microseconds).  Besides, what `read` came by anyway: memory (the kernel's own names), swap_limit.
    """

    def __init__(self, host: Hierarchy, path: str, known: dict[str, Any]) -> None:
        self._known = known
        self._readers = _readers(host, path)

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = self._readers[name]()
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **self._readers})

    def __len__(self) -> int:
        return len({**self._known, **self._readers})


def _readers(host: Hierarchy, path: str) -> dict[str, Callable[[], Any]]:
    memory, pids, io = (host.mount_of(name) for name in ("memory", "pids", "io"))
    readers: dict[str, Callable[[], Any]] = {"cpu": lambda: _cpu(host, path)}
    if memory:
        peak = "memory.peak" if host.version_of("memory") == 2 else "memory.max_usage_in_bytes"
        readers["memory_peak"] = lambda: _number(f"{memory}{path}/{peak}")
    if pids:
        readers["pids_limit"] = lambda: _number(f"{pids}{path}/pids.max")
    if "blkio" in host.v1:
        readers["io"] = lambda: _io_v1(f"{host.v1['blkio']}{path}/")
    elif io:
        readers["io"] = lambda: _io_v2(f"{io}{path}/io.stat")
    if version := host.version_of("hugetlb"):
        current = ".current" if version == 2 else ".usage_in_bytes"
        readers["hugetlb"] = lambda: _hugetlb(host, path, current)
        readers["hugetlb_peak"] = lambda: _hugetlb(host, path, ".max_usage_in_bytes")  # which only v1 remembers
    if host.unified:
        readers["pressure"] = lambda: _pressure(f"{host.unified}{path}/")
    return readers


def read(host: Hierarchy, path: str) -> dict[str, Any]:
    """The fields of `oci.runtime.Stats`, those that this host can tell; times in ns, sizes in bytes.

    ``extra`` is `Details`.
    """
    known: dict[str, Any] = {}
    reading: dict[str, Any] = {"timestamp": time.time_ns(), "extra": Details(host, path, known)}
    memory, pids = host.mount_of("memory"), host.mount_of("pids")
    if (usage := _cpu_usage(host, path)) is not None:
        reading["cpu_usage"] = usage
    if host.version_of("memory") == 2:
        _memory_v2(f"{memory}{path}/", reading, known)
    elif memory:
        _memory_v1(f"{memory}{path}/", reading, known)
    if pids:
        reading["pids"] = _number(f"{pids}{path}/pids.current")
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


# What runc's `events` has of each counter, and the file's name after the counter's.
_COUNTER_V1 = {"limit": "limit_in_bytes", "usage": "usage_in_bytes", "max": "max_usage_in_bytes", "failcnt": "failcnt"}
_COUNTERS_V1 = {"usage": "", "swap": "memsw.", "kernel": "kmem.", "kernelTCP": "kmem.tcp."}
_UNLIMITED_V2 = 2**64 - 1  # the number that runc has for "max"


def memory_counters(host: Hierarchy, path: str) -> dict[str, dict[str, int]]:
    """limit, usage, max and failcnt of each counter that the host has, in bytes: usage, swap (which counts memory too,
    as v1 does), on v1 also kernel and kernelTCP."""
    directory = f"{host.mount_of('memory')}{path}/memory."
    if not host.version_of("memory"):
        return {}
    if host.version_of("memory") == 2:
        return _memory_counters_v2(directory)
    found = {}
    for counter, prefix in _COUNTERS_V1.items():
        read = {name: _number(f"{directory}{prefix}{file}") for name, file in _COUNTER_V1.items()}
        if read["limit"] is not None:  # else this kernel does not count swap, say
            found[counter] = {name: value or 0 for name, value in read.items()}
    return found


def _memory_counters_v2(directory: str) -> dict[str, dict[str, int]]:
    found = {}
    for counter, prefix in {"usage": "", "swap": "swap."}.items():
        usage = _number(f"{directory}{prefix}current")
        if usage is None:
            continue
        limit, peak = (_number(f"{directory}{prefix}{file}") for file in ("max", "peak"))
        refused = files.table(files.read_or_empty(f"{directory}{prefix}events")).get("max", 0)
        limit = _UNLIMITED_V2 if limit is None else limit
        found[counter] = {"limit": limit, "usage": usage, "max": peak or 0, "failcnt": refused}
    if "swap" in found:
        memory, swap = found["usage"], found["swap"]
        unlimited = _UNLIMITED_V2 in (memory["limit"], swap["limit"])
        swap["limit"] = _UNLIMITED_V2 if unlimited else memory["limit"] + swap["limit"]
        swap["usage"] += memory["usage"]
        del swap["max"]  # two peaks have no sum: they were at different times
    return found


_CPUSET_NUMBERS = (
    "cpu_exclusive mem_hardwall mem_exclusive memory_migrate memory_spread_page memory_spread_slab memory_pressure "
    "sched_load_balance sched_relax_domain_level"
).split()


def cpuset(host: Hierarchy, path: str) -> dict[str, Any]:
    """cpus and mems, as lists of numbers, and v1's switches; {} without the controller."""
    directory = f"{host.mount_of('cpuset')}{path}/cpuset."
    if not host.version_of("cpuset"):
        return {}
    suffix = ".effective" if host.version_of("cpuset") == 2 else ""
    found: dict[str, Any] = {
        name: scheduling.parse_list(files.read_or_empty(f"{directory}{name}{suffix}").strip(), most)
        for name, most in (("cpus", scheduling.MAX_CPU), ("mems", scheduling.MAX_NODE))
    }
    for name in _CPUSET_NUMBERS:
        text = files.read_or_empty(directory + name).strip()  # a level may be -1
        if text:
            found[name] = int(text)
    return found


def huge_pages(host: Hierarchy, path: str) -> dict[str, dict[str, int]]:
    """Page size -> usage, max (where the host remembers it) and failcnt."""
    if not host.version_of("hugetlb"):
        return {}
    details = Details(host, path, {})
    found = {size: {"usage": usage} for size, usage in details["hugetlb"].items()}
    for size, peak in details["hugetlb_peak"].items():
        found[size]["max"] = peak
    for size, counts in found.items():
        start = f"{host.mount_of('hugetlb')}{path}/hugetlb.{size}."
        refused = files.table(files.read_or_empty(start + "events")).get("max")  # v2
        counts["failcnt"] = _number(start + "failcnt") or 0 if refused is None else refused
    return found


def _number(path: str) -> int | None:
    """The file's only number; None for "max", or when there is no such file."""
    text = files.read_or_empty(path).strip()
    return int(text) if text.isdigit() else None


def _cpu_usage(host: Hierarchy, path: str) -> int | None:
    """Every unified group counts its time, with or without a controller."""
    if host.unified:
        usage = files.table(files.read_or_empty(f"{host.unified}{path}/cpu.stat")).get("usage_usec")
        return None if usage is None else usage * 1000
    return _number(f"{host.v1['cpuacct']}{path}/cpuacct.usage") if "cpuacct" in host.v1 else None


def _cpu(host: Hierarchy, path: str) -> dict[str, int]:
    """Throttling is the cpu controller's, times are not."""
    found: dict[str, int] = {}
    table: dict[str, int] = {}
    if host.unified:
        table = files.table(files.read_or_empty(f"{host.unified}{path}/cpu.stat"))
        if "user_usec" in table:
            found |= {"user": table["user_usec"] * 1000, "system": table["system_usec"] * 1000}
    elif "cpuacct" in host.v1:
        account = f"{host.v1['cpuacct']}{path}/cpuacct.usage"
        found |= {"user": _number(account + "_user") or 0, "system": _number(account + "_sys") or 0}
    if "cpu" in host.v1:
        table = files.table(files.read_or_empty(f"{host.v1['cpu']}{path}/cpu.stat"))
    if "nr_periods" in table:
        found |= {"periods": table["nr_periods"], "throttled_periods": table["nr_throttled"]}
        found["throttled_time"] = table.get("throttled_time", table.get("throttled_usec", 0) * 1000)
    return found


def _memory_v2(directory: str, reading: dict[str, Any], known: dict[str, Any]) -> None:
    table = files.table(files.read_or_empty(directory + "memory.stat"))
    usage = _number(directory + "memory.current")
    reading["memory_usage"] = usage
    if usage is not None:
        reading["memory_working_set"] = max(0, usage - table.get("inactive_file", 0))
    reading["memory_rss"] = table.get("anon")
    reading["memory_limit"] = _number(directory + "memory.max")
    reading["page_faults"], reading["major_page_faults"] = table.get("pgfault"), table.get("pgmajfault")
    reading["swap_usage"] = _number(directory + "memory.swap.current")
    known["memory"] = table
    known["swap_limit"] = _number(directory + "memory.swap.max")


def _memory_v1(directory: str, reading: dict[str, Any], known: dict[str, Any]) -> None:
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
    known["memory"] = table
    both = table.get("hierarchical_memsw_limit", _V1_UNLIMITED)
    if limit is not None and limit <= both < _V1_UNLIMITED:
        known["swap_limit"] = both - limit


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


def _hugetlb(host: Hierarchy, path: str, suffix: str) -> dict[str, int]:
    directory = f"{host.mount_of('hugetlb')}{path}/hugetlb."
    return {size: value for size in _huge_page_sizes() if (value := _number(directory + size + suffix)) is not None}


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
