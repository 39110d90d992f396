"""cAdvisor's metrics of pods and containers (KEP-2371): their names, and the figures behind them.

In the groups that `crio.stats.included_pod_metrics` chooses from.  Values are whole numbers, because the CRI's are:
times are in whole seconds.  A figure that this host does not have is left out; nothing is made up as zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crio_native.errors import CrioError
from crio_native.linux.cgroup import Cgroup, cgroup_of, hierarchy, stats
from crio_native.pods.node import Node
from crio_native.pods.stats import ContainerUsage, PodUsage

BASE_LABELS = ("id", "image", "namespace", "pod", "container")
_SECOND = 10**9
_PROCESSES_MAX = 4096  # of one container, whose descriptors are counted
_DESCRIPTORS_MAX = 65536


@dataclass(frozen=True, slots=True)
class Descriptor:
    """labels: those that come after BASE_LABELS.  counter: it only grows; else a gauge."""

    name: str
    help: str
    group: str
    labels: tuple[str, ...] = ()
    counter: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    descriptor: Descriptor
    value: int
    labels: tuple[str, ...] = ()


def _table(group: str, rows: str, *labels: str) -> list[Descriptor]:
    """Rows of ``name: help``; what counts up ends in _total, or is named here."""
    pairs = (row.strip().split(": ", 1) for row in rows.strip().splitlines())
    return [
        Descriptor(f"container_{name}", text, group, labels, name.endswith("_total") or name == "memory_failcnt")
        for name, text in pairs
    ]


DESCRIPTORS: Mapping[str, Descriptor] = {
    descriptor.name.removeprefix("container_"): descriptor
    for descriptor in (
        *_table("", "last_seen: Last time the container was seen, in seconds since the epoch."),
        *_table(
            "cpu",
            """cpu_user_seconds_total: CPU time in user mode, in seconds.
               cpu_system_seconds_total: CPU time in the kernel, in seconds.
               cpu_cfs_periods_total: Enforcement periods of the CPU quota that have passed.
               cpu_cfs_throttled_periods_total: Those of them in which the container was throttled.
               cpu_cfs_throttled_seconds_total: Time that the container was throttled for, in seconds.""",
        ),
        *_table("cpu", "cpu_usage_seconds_total: CPU time, in seconds.", "cpu"),
        *_table(
            "memory",
            """memory_cache: Page cache, in bytes.
               memory_rss: Anonymous memory, in bytes.
               memory_kernel_usage: Kernel memory, in bytes.
               memory_mapped_file: Mapped files, in bytes.
               memory_swap: Swap in use, in bytes.
               memory_failcnt: Times that the memory limit was hit.
               memory_usage_bytes: Memory in use, whenever it was touched last, in bytes.
               memory_max_usage_bytes: The most memory that was in use, in bytes.
               memory_working_set_bytes: Memory in use without what is easily given back, in bytes.""",
        ),
        *_table("memory", "memory_failures_total: Page faults.", "failure_type", "scope"),
        *_table(
            "network",
            """network_receive_bytes_total: Bytes received.
               network_receive_packets_total: Packets received.
               network_receive_packets_dropped_total: Received packets that were dropped.
               network_receive_errors_total: Errors in receiving.
               network_transmit_bytes_total: Bytes sent.
               network_transmit_packets_total: Packets sent.
               network_transmit_packets_dropped_total: Packets that were dropped instead of sent.
               network_transmit_errors_total: Errors in sending.""",
            "interface",
        ),
        *_table(
            "disk",
            """fs_inodes_free: Free inodes of the writable layer's file system.
               fs_inodes_total: Inodes of the writable layer's file system.
               fs_limit_bytes: Size of the writable layer's file system, in bytes.
               fs_usage_bytes: Size of the writable layer, in bytes.""",
        ),
        *_table(
            "diskIO",
            """fs_reads_bytes_total: Bytes read.
               fs_reads_total: Reads completed.
               fs_writes_bytes_total: Bytes written.
               fs_writes_total: Writes completed.""",
            "device",
        ),
        *_table(
            "diskIO",
            "blkio_device_usage_total: Bytes read and written, by device.",
            "device",
            "major",
            "minor",
            "operation",
        ),
        *_table(
            "hugetlb",
            """hugetlb_usage_bytes: Huge pages in use, in bytes.
               hugetlb_max_usage_bytes: The most huge pages that were in use, in bytes.""",
            "pagesize",
        ),
        *_table("oom", "oom_events_total: Processes that were killed for want of memory."),
        *_table(
            "process",
            """processes: Processes.
               threads: Threads.
               threads_max: Threads that the container may have; 0 for no limit.
               sockets: Open sockets.
               file_descriptors: Open file descriptors.""",
        ),
        *_table("process", "ulimits_soft: Soft limits of the container's first process.", "ulimit"),
        *_table(
            "spec",
            """start_time_seconds: When the container was started, in seconds since the epoch.
               spec_cpu_period: Period of the CPU quota, in microseconds.
               spec_cpu_quota: CPU time in each period, in microseconds.
               spec_cpu_shares: Share of the CPU.
               spec_memory_limit_bytes: Memory limit, in bytes; 0 for none.
               spec_memory_reservation_limit_bytes: Memory reserved, in bytes; 0 for none.
               spec_memory_swap_limit_bytes: Limit of memory and swap together, in bytes; 0 for none.""",
        ),
        *_table(
            "pressure",
            """pressure_cpu_stalled_seconds_total: Time that nothing could run for want of CPU, in seconds.
               pressure_cpu_waiting_seconds_total: Time that something waited for the CPU, in seconds.
               pressure_memory_stalled_seconds_total: Time that nothing could run for want of memory, in seconds.
               pressure_memory_waiting_seconds_total: Time that something waited for memory, in seconds.
               pressure_io_stalled_seconds_total: Time that nothing could run for want of I/O, in seconds.
               pressure_io_waiting_seconds_total: Time that something waited for I/O, in seconds.""",
        ),
    )
}


def descriptors(groups: Collection[str]) -> list[Descriptor]:
    """Those of the groups ("all" for every one), and those that are always there."""
    return [each for each in DESCRIPTORS.values() if not each.group or "all" in groups or each.group in groups]


class MetricsReader:
    """Thread-safe; its calls block.  groups: `crio.stats.included_pod_metrics`."""

    def __init__(self, node: Node, groups: Collection[str]) -> None:
        self._node = node
        self._groups = {each.group for each in descriptors(groups)}

    def pod(self, usage: PodUsage) -> list[Sample]:
        return list(_network(usage)) if "network" in self._groups else []

    def container(self, usage: ContainerUsage, at: int) -> list[Sample]:
        """at: now, in ns."""
        samples = [_sample("last_seen", at // _SECOND)]
        for group, read in _GROUPS.items():
            if group in self._groups:
                samples += read(self._node, usage)
        return samples


def _sample(name: str, value: int, *labels: str) -> Sample:
    return Sample(DESCRIPTORS[name], value, labels)


def _known(rows: Iterable[tuple[str, int | None]], *labels: str) -> Iterator[Sample]:
    return (_sample(name, max(value, 0), *labels) for name, value in rows if value is not None)


def _seconds(nanoseconds: int | None) -> int | None:
    return None if nanoseconds is None else nanoseconds // _SECOND


def _extra(usage: ContainerUsage) -> Mapping[str, Any]:
    return usage.reading.extra if usage.reading else {}


def _cgroup(node: Node, usage: ContainerUsage) -> Cgroup:
    return cgroup_of(usage.container.cgroup, node.settings.cgroup_manager)


def _cpu(_: Node, usage: ContainerUsage) -> Iterator[Sample]:
    cpu = _extra(usage).get("cpu") or {}
    yield from _known(
        (
            ("cpu_user_seconds_total", _seconds(cpu.get("user"))),
            ("cpu_system_seconds_total", _seconds(cpu.get("system"))),
            ("cpu_cfs_periods_total", cpu.get("periods")),
            ("cpu_cfs_throttled_periods_total", cpu.get("throttled_periods")),
            ("cpu_cfs_throttled_seconds_total", _seconds(cpu.get("throttled_time"))),
        )
    )
    yield from _known(
        [("cpu_usage_seconds_total", _seconds(usage.reading.cpu_usage if usage.reading else None))], "total"
    )


def _memory(node: Node, usage: ContainerUsage) -> Iterator[Sample]:
    reading = usage.reading
    if reading is None:
        return
    table = _extra(usage).get("memory") or {}
    counts = stats.memory_counts(hierarchy(), _cgroup(node, usage).path)
    yield from _known(
        (
            ("memory_cache", table.get("total_cache", table.get("file"))),
            ("memory_rss", reading.memory_rss),
            ("memory_kernel_usage", counts.get("kernel", table.get("kernel"))),
            ("memory_mapped_file", table.get("total_mapped_file", table.get("file_mapped"))),
            ("memory_swap", reading.swap_usage),
            ("memory_failcnt", counts.get("failcnt")),
            ("memory_usage_bytes", reading.memory_usage),
            ("memory_max_usage_bytes", reading.extra.get("memory_peak")),
            ("memory_working_set_bytes", reading.memory_working_set),
        )
    )
    for kind, faults in (("pgfault", reading.page_faults), ("pgmajfault", reading.major_page_faults)):
        for scope in ("container", "hierarchy"):
            yield from _known([("memory_failures_total", faults)], kind, scope)


def _network(usage: PodUsage) -> Iterator[Sample]:
    for one in usage.interfaces:
        yield from _known(
            (
                ("network_receive_bytes_total", one.rx_bytes),
                ("network_receive_packets_total", one.rx_packets),
                ("network_receive_packets_dropped_total", one.rx_dropped),
                ("network_receive_errors_total", one.rx_errors),
                ("network_transmit_bytes_total", one.tx_bytes),
                ("network_transmit_packets_total", one.tx_packets),
                ("network_transmit_packets_dropped_total", one.tx_dropped),
                ("network_transmit_errors_total", one.tx_errors),
            ),
            one.name,
        )


def _disk(node: Node, usage: ContainerUsage) -> Iterator[Sample]:
    if usage.layer is None:
        return
    try:
        room = os.statvfs(node.layout.root / "containers")
    except OSError:
        return
    yield from _known(
        (
            ("fs_inodes_free", room.f_ffree),
            ("fs_inodes_total", room.f_files),
            ("fs_limit_bytes", room.f_blocks * room.f_frsize),
            ("fs_usage_bytes", usage.layer.used),
        )
    )


def _disk_io(_: Node, usage: ContainerUsage) -> Iterator[Sample]:
    for counts in _extra(usage).get("io") or ():
        device = counts["device"]
        major, _, minor = device.partition(":")
        yield from _known(
            (
                ("fs_reads_bytes_total", counts.get("rbytes")),
                ("fs_reads_total", counts.get("rios")),
                ("fs_writes_bytes_total", counts.get("wbytes")),
                ("fs_writes_total", counts.get("wios")),
            ),
            device,
        )
        for operation, value in (("read", counts.get("rbytes")), ("write", counts.get("wbytes"))):
            yield from _known([("blkio_device_usage_total", value)], device, major, minor, operation)


def _hugetlb(_: Node, usage: ContainerUsage) -> Iterator[Sample]:
    for name, key in (("hugetlb_usage_bytes", "hugetlb"), ("hugetlb_max_usage_bytes", "hugetlb_peak")):
        for size, value in (_extra(usage).get(key) or {}).items():
            yield _sample(name, value, size)


def _oom(node: Node, usage: ContainerUsage) -> Iterator[Sample]:
    yield from _known([("oom_events_total", _cgroup(node, usage).events().get("oom_kill"))])


def _process(node: Node, usage: ContainerUsage) -> Iterator[Sample]:
    reading, process = usage.reading, usage.container.process
    if reading is None or process is None:
        return
    try:
        pids = _cgroup(node, usage).processes()
    except (CrioError, OSError):
        return
    files, sockets = _open_files(pids)
    yield from _known(
        (
            ("processes", len(pids)),
            ("threads", reading.pids),
            ("threads_max", reading.extra.get("pids_limit") or 0),
            ("sockets", sockets),
            ("file_descriptors", files),
        )
    )
    limit = _soft_limit(process.pid, "Max open files")
    yield from _known([("ulimits_soft", limit)], "max_open_files")


def _open_files(pids: Iterable[int]) -> tuple[int, int]:
    """(descriptors, sockets among them) of processes, some of which may be ending."""
    files = sockets = 0
    for pid in list(pids)[:_PROCESSES_MAX]:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        files += len(names)
        for name in names[: max(_DESCRIPTORS_MAX - files, 0)]:
            try:
                sockets += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
            except OSError:
                continue
    return files, sockets


def _soft_limit(pid: int, title: str) -> int | None:
    try:
        with open(f"/proc/{pid}/limits", encoding="ascii") as file:
            line = next((line for line in file if line.startswith(title)), "")
    except OSError:
        return None
    word = line.removeprefix(title).split()[0] if line else ""
    return int(word) if word.isdigit() else None


def _spec(_: Node, usage: ContainerUsage) -> Iterator[Sample]:
    limits = usage.container.resources
    yield from _known(
        (
            ("start_time_seconds", _seconds(usage.container.started_at)),
            ("spec_cpu_period", limits.cpu_period or None),
            ("spec_cpu_quota", limits.cpu_quota if limits.cpu_quota > 0 else None),
            ("spec_cpu_shares", limits.cpu_shares or None),
            ("spec_memory_limit_bytes", limits.memory_limit_in_bytes),
            ("spec_memory_reservation_limit_bytes", _bytes(limits.unified.get("memory.low"))),
            ("spec_memory_swap_limit_bytes", limits.memory_swap_limit_in_bytes),
        )
    )


def _bytes(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _pressure(_: Node, usage: ContainerUsage) -> Iterator[Sample]:
    for resource, kinds in (_extra(usage).get("pressure") or {}).items():
        for kind, word in (("full", "stalled"), ("some", "waiting")):
            if kind in kinds:
                yield _sample(f"pressure_{resource}_{word}_seconds_total", int(kinds[kind]["total"]) // 10**6)


_GROUPS: Mapping[str, Callable[[Node, ContainerUsage], Iterable[Sample]]] = {
    "cpu": _cpu,
    "memory": _memory,
    "disk": _disk,
    "diskIO": _disk_io,
    "hugetlb": _hugetlb,
    "oom": _oom,
    "process": _process,
    "spec": _spec,
    "pressure": _pressure,
}
