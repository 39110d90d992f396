"""A shim's cgroup figures, of either version, as `oci.runtime.Stats`."""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError

from crio_native.api.shim.v1 import metrics1_pb2, metrics2_pb2
from crio_native.errors import Internal
from crio_native.oci.runtime import Stats

_UNLIMITED = 1 << 62  # "no limit" is the largest multiple of a page on v1, and all bits set on v2
_MICROSECOND = 1000


def read(kind: str, message: bytes) -> Stats:
    """kind: the message's full name.  Raises Internal for one that is neither, or cannot be read."""
    try:
        match kind:
            case "io.containerd.cgroups.v1.Metrics":
                return _v1(metrics1_pb2.Metrics.FromString(message))
            case "io.containerd.cgroups.v2.Metrics":
                return _v2(metrics2_pb2.Metrics.FromString(message))
    except DecodeError:
        raise Internal(f"the shim's statistics are no {kind}") from None
    raise Internal(f"the shim's statistics are of type {kind!r}; known are io.containerd.cgroups.v1 and v2 Metrics")


def _v1(metrics: metrics1_pb2.Metrics) -> Stats:
    memory, cpu, throttling = metrics.memory, metrics.cpu.usage, metrics.cpu.throttling
    usage = memory.usage.usage
    return Stats(
        timestamp=time.time_ns(),
        cpu_usage=cpu.total,
        memory_usage=usage,
        memory_working_set=max(usage - memory.total_inactive_file, 0),
        memory_rss=memory.total_rss,
        memory_limit=_limit(memory.usage.limit),
        page_faults=memory.total_pg_fault,
        major_page_faults=memory.total_pg_maj_fault,
        swap_usage=max(memory.swap.usage - usage, 0) if memory.HasField("swap") else None,
        pids=metrics.pids.current,
        extra={
            "cpu": {
                "user": cpu.user,
                "system": cpu.kernel,
                "periods": throttling.periods,
                "throttled_periods": throttling.throttled_periods,
                "throttled_time": throttling.throttled_time,
            },
            "memory": {"total_cache": memory.total_cache, "total_mapped_file": memory.total_mapped_file},
            "memory_peak": memory.usage.max,
            "pids_limit": metrics.pids.limit or None,
        },
    )


def _v2(metrics: metrics2_pb2.Metrics) -> Stats:
    memory, cpu = metrics.memory, metrics.cpu
    return Stats(
        timestamp=time.time_ns(),
        cpu_usage=cpu.usage_usec * _MICROSECOND,
        memory_usage=memory.usage,
        memory_working_set=max(memory.usage - memory.inactive_file, 0),
        memory_rss=memory.anon,
        memory_limit=_limit(memory.usage_limit),
        page_faults=memory.pgfault,
        major_page_faults=memory.pgmajfault,
        swap_usage=memory.swap_usage,
        pids=metrics.pids.current,
        extra={
            "cpu": {
                "user": cpu.user_usec * _MICROSECOND,
                "system": cpu.system_usec * _MICROSECOND,
                "periods": cpu.nr_periods,
                "throttled_periods": cpu.nr_throttled,
                "throttled_time": cpu.throttled_usec * _MICROSECOND,
            },
            "memory": {"file": memory.file, "file_mapped": memory.file_mapped},
            "memory_peak": memory.max_usage,
            "pids_limit": metrics.pids.limit or None,
        },
    )


def _limit(value: int) -> int | None:
    return value if 0 < value < _UNLIMITED else None
