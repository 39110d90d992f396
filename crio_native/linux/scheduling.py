"""Scheduling, I/O priority, NUMA policy and CPU lists: their names in config.json and the kernel's numbers.

Pure data and parsing (linux/sched.h, ioprio.h, mempolicy.h); the calls themselves are in `syscalls`.
"""

from __future__ import annotations

POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,  # reserved: no kernel has it, and refuses it
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
REALTIME = ("SCHED_FIFO", "SCHED_RR")
SCHED_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
MEMORY_MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
MEMORY_FLAGS = {
    "MPOL_F_STATIC_NODES": 1 << 15,
    "MPOL_F_RELATIVE_NODES": 1 << 14,
    "MPOL_F_NUMA_BALANCING": 1 << 13,
}
PERSONALITIES = {"LINUX": 0, "LINUX32": 0x0008}
MAX_NODE = 1023  # MAX_NUMNODES
MAX_CPU = 8191  # NR_CPUS


def parse_list(text: str, most: int) -> list[int]:
    """The numbers of "0-3,7"; blanks count for nothing.  ValueError says what is wrong."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        for number in (first, last) if dash else (first,):
            if not (number.isascii() and number.isdigit() and len(number) <= 5 and int(number) <= most):
                raise ValueError(f"{part!r} is not a number or range within 0..{most}")
        if dash and int(last) < int(first):
            raise ValueError(f"{part!r} runs backwards")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)
