"""An OCI ``linux.resources`` object as an ordered list of cgroup file writes; nothing is written here.

`plan` is a pure function of the object and of what the host answers about its controllers, so limits can be printed
and tested without a kernel.  Fields that this host cannot do come back as warnings; values that no host could do raise
InvalidArgument with the field's path.  Device rules are in `devices`.
"""

from __future__ import annotations

import math
from _collections_abc import Mapping, Sequence  # without the package around it

from crio_native.errors import InvalidArgument, StepFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol
else:
    Protocol = object

_I64_MAX = 2**63 - 1
_U64_MAX = 2**64 - 1
_U32_MAX = 2**32 - 1
_ENTRIES_MAX = 256  # of any list or map in the object
_TEXT_MAX = 4096
# Below this a process is killed before it reaches its own first instruction, with an error that names nothing.
MEMORY_MIN = 512 * 1024

_PREFIX = "linux.resources."
_CPU_LIST = r"(\d+(-\d+)?(,\d+(-\d+)?)*)?\n?"
_PAGE_SIZE = r"[1-9]\d{0,9}[KMG]B"
_UNIFIED_FILE = r"[a-z0-9_]+(\.[a-zA-Z0-9_-]+)+"


class Host(Protocol):
    """What `plan` may ask: the group's own files, as they are."""

    def version(self, controller: str) -> int:
        """1 or 2, whose file names the controller has; 0 when there is none."""

    def read(self, controller: str, file: str) -> str | None:
        """The file's text; None when the kernel has no such file.  (A few answer "" where reading is refused.)"""


class Write:
    """One write(2) to one file of one controller.  field: the OCI field that it comes from, without the prefix."""

    __slots__ = ("controller", "field", "file", "value")

    def __init__(self, controller: str, file: str, value: str, field: str) -> None:
        self.controller, self.file, self.value, self.field = controller, file, value, field


def plan(resources: Mapping[str, Any], host: Host) -> tuple[list[Write], list[str]]:
    """The writes, in order, and a warning for each field that this host cannot do.

    Only fields that are present are written.  Raises InvalidArgument; StepFailed where ``checkBeforeUpdate`` forbids a
    limit that is below what is in use.
    """
    planner = _Planner(resources, host)
    for section in (
        planner.memory,
        planner.cpu,
        planner.cpuset,
        planner.pids,
        planner.block_io,
        planner.hugepages,
        planner.rdma,
        planner.network,
        planner.unified,
    ):
        section()
    return planner.writes, planner.warnings


def weight_of_shares(shares: int) -> int:
    """The v2 cpu.weight (1..10000) of v1 cpu.shares (2..262144).

    The curve that Kubernetes and runc use since 2025: it maps each scale's least, default (1024 to 100) and greatest
    values to each other, which the straight line before it did not.
    """
    exponent = math.log2(min(max(shares, 2), 262144))
    return math.ceil(10 ** ((exponent * exponent + 125 * exponent) / 612 - 7 / 34))


class _Planner:
    """Collects writes and warnings, one method a section of the object."""

    def __init__(self, resources: Mapping[str, Any], host: Host) -> None:
        self._resources = resources
        self._host = host
        self.writes: list[Write] = []
        self.warnings: list[str] = []

    # What the sections are written in

    def _section(self, name: str) -> Mapping[str, Any]:
        section = self._resources.get(name)
        if section is None:
            return {}
        if not isinstance(section, Mapping):
            raise InvalidArgument(_PREFIX + name, section, "must be an object")
        return section

    def _entries(self, section: Mapping[str, Any], name: str, field: str) -> Sequence[Mapping[str, Any]]:
        entries = section.get(name)
        if entries is None:
            return ()
        if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) > _ENTRIES_MAX:
            raise InvalidArgument(_PREFIX + field, entries, f"must be a list of at most {_ENTRIES_MAX} objects")
        for index, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                raise InvalidArgument(f"{_PREFIX}{field}[{index}]", entry, "must be an object")
        return entries

    def _write(self, controller: str, file: str, value: object, field: str, *, optional: bool = False) -> None:
        """optional: some kernels are built without the file."""
        if optional and self._host.read(controller, file) is None:
            self._warn(field, f"this kernel has no {file}")
        else:
            self.writes.append(Write(controller, file, str(value), field))

    def _warn(self, field: str, why: str) -> None:
        self.warnings.append(f"{_PREFIX}{field} is not applied: {why}")

    def _without(self, controller: str, section: Mapping[str, Any], name: str) -> bool:
        """Whether the host lacks the controller; if so each field that is there is warned about."""
        if self._host.version(controller):
            return False
        for field in section:
            self._warn(f"{name}.{field}", f"this host has no {controller} cgroup controller")
        return True

    # The sections

    def memory(self) -> None:
        memory = self._section("memory")
        if not memory or self._without("memory", memory, "memory"):
            return
        limit = _number(memory, "limit", "memory.limit", -1, _I64_MAX) or None
        swap = _number(memory, "swap", "memory.swap", -1, _I64_MAX) or None
        reservation = _number(memory, "reservation", "memory.reservation", -1, _I64_MAX) or None
        if limit is not None and 0 < limit < MEMORY_MIN:
            raise InvalidArgument(
                _PREFIX + "memory.limit", limit, f"too small to start a process: at least {MEMORY_MIN} bytes are needed"
            )
        if limit == -1 and swap is None:
            swap = -1
        if swap is not None and swap != -1 and (limit is None or not 0 < limit <= swap):
            raise InvalidArgument(
                _PREFIX + "memory.swap", swap, f"is memory and swap together, at least memory.limit ({limit})"
            )
        if self._host.version("memory") == 2:
            self._memory_v2(memory, limit, swap, reservation)
        else:
            self._memory_v1(memory, limit, swap, reservation)

    def _memory_v2(self, memory: Mapping[str, Any], limit: int | None, swap: int | None, low: int | None) -> None:
        if swap is not None:
            extra = "max" if swap == -1 else swap - (limit or 0)
            self._write("memory", "memory.swap.max", extra, "memory.swap", optional=True)
        if low is not None:
            self._write("memory", "memory.low", _or_max(low), "memory.reservation")
        if limit is not None:
            if memory.get("checkBeforeUpdate") and limit > 0:
                self._refuse_less_than_in_use(limit)
            self._write("memory", "memory.max", _or_max(limit), "memory.limit")
        for name in ("kernel", "kernelTCP", "swappiness", "disableOOMKiller"):
            if memory.get(name):
                self._warn(f"memory.{name}", "cgroup v2 has no such setting")

    def _memory_v1(self, memory: Mapping[str, Any], limit: int | None, swap: int | None, low: int | None) -> None:
        if limit is not None:
            self._write("memory", "memory.limit_in_bytes", limit, "memory.limit")
        if swap is not None:
            self._write("memory", "memory.memsw.limit_in_bytes", swap, "memory.swap", optional=True)
        if low is not None:
            self._write("memory", "memory.soft_limit_in_bytes", low, "memory.reservation")
        tcp = _number(memory, "kernelTCP", "memory.kernelTCP", -1, _I64_MAX)
        if tcp:
            self._write("memory", "memory.kmem.tcp.limit_in_bytes", tcp, "memory.kernelTCP", optional=True)
        swappiness = _number(memory, "swappiness", "memory.swappiness", 0, 100)
        if swappiness is not None:
            self._write("memory", "memory.swappiness", swappiness, "memory.swappiness", optional=True)
        if memory.get("disableOOMKiller"):
            self._write("memory", "memory.oom_control", 1, "memory.disableOOMKiller")
        if memory.get("kernel"):
            self._warn("memory.kernel", "kernels since 5.11 account kernel memory as memory")

    def _refuse_less_than_in_use(self, limit: int) -> None:
        used = int(self._host.read("memory", "memory.current") or 0)
        if used > limit:
            raise StepFailed("cgroup", 0, "memory.current", f"{_PREFIX}memory.limit {limit} is below the {used} in use")

    def cpu(self) -> None:
        cpu = {name: value for name, value in self._section("cpu").items() if name not in ("cpus", "mems")}
        if not cpu or self._without("cpu", cpu, "cpu"):
            return
        shares = _number(cpu, "shares", "cpu.shares", 0, _U64_MAX)
        quota = _number(cpu, "quota", "cpu.quota", -1, _I64_MAX)
        period = _number(cpu, "period", "cpu.period", 0, _U64_MAX)
        burst = _number(cpu, "burst", "cpu.burst", 0, _U64_MAX)
        idle = _number(cpu, "idle", "cpu.idle", 0, 1)
        if self._host.version("cpu") == 2:
            self._cpu_v2(cpu, shares, quota, period, burst)
        else:
            self._cpu_v1(cpu, shares, quota, period, burst)
        if idle is not None:
            self._write("cpu", "cpu.idle", idle, "cpu.idle", optional=True)

    def _cpu_v2(
        self, cpu: Mapping[str, Any], shares: int | None, quota: int | None, period: int | None, burst: int | None
    ) -> None:
        if shares:
            self._write("cpu", "cpu.weight", weight_of_shares(shares), "cpu.shares")
        if quota or period:
            # the file holds both, quota first: one that is not given stays as it is
            old = (self._host.read("cpu", "cpu.max") or "max 100000").split()
            new_quota = old[0] if not quota else _or_max(quota)
            self._write("cpu", "cpu.max", f"{new_quota} {period or old[1]}", "cpu.quota" if quota else "cpu.period")
        if burst is not None:
            self._write("cpu", "cpu.max.burst", burst, "cpu.burst", optional=True)
        for name in ("realtimeRuntime", "realtimePeriod"):
            if cpu.get(name):
                self._warn(f"cpu.{name}", "cgroup v2 has no such setting")

    def _cpu_v1(
        self, cpu: Mapping[str, Any], shares: int | None, quota: int | None, period: int | None, burst: int | None
    ) -> None:
        if shares:
            self._write("cpu", "cpu.shares", shares, "cpu.shares")
        if period:
            self._write("cpu", "cpu.cfs_period_us", period, "cpu.period")
        if quota:
            self._write("cpu", "cpu.cfs_quota_us", quota, "cpu.quota")
        if burst is not None:
            self._write("cpu", "cpu.cfs_burst_us", burst, "cpu.burst", optional=True)
        for name, file in (("realtimePeriod", "cpu.rt_period_us"), ("realtimeRuntime", "cpu.rt_runtime_us")):
            value = _number(cpu, name, f"cpu.{name}", 0, _I64_MAX)
            if value:
                self._write("cpu", file, value, f"cpu.{name}", optional=True)

    def cpuset(self) -> None:
        cpu = self._section("cpu")
        wanted = {name: cpu[name] for name in ("cpus", "mems") if cpu.get(name)}
        if not wanted or self._without("cpuset", wanted, "cpu"):
            return
        for name, value in wanted.items():
            if not isinstance(value, str) or len(value) > _TEXT_MAX or not _matches(_CPU_LIST, value):
                raise InvalidArgument(f"{_PREFIX}cpu.{name}", value, "must be a list like '0-3,7'")
            self._write("cpuset", f"cpuset.{name}", value.strip(), f"cpu.{name}")

    def pids(self) -> None:
        pids = self._section("pids")
        limit = _number(pids, "limit", "pids.limit", -_I64_MAX, _I64_MAX)
        if limit is None or self._without("pids", {"limit": limit}, "pids"):
            return
        self._write("pids", "pids.max", limit if limit > 0 else "max", "pids.limit")

    def block_io(self) -> None:
        block = self._section("blockIO")
        if not block:
            return
        version = self._host.version("blkio") or self._host.version("io")
        if not version and self._without("io", block, "blockIO"):
            return
        for name in ("leafWeight", "leafWeightDevice"):
            if block.get(name):
                self._warn(f"blockIO.{name}", "kernels since 5.0 have no such setting")
        self._block_weights(block, version)
        for name, v1_file, v2_key in (
            ("throttleReadBpsDevice", "blkio.throttle.read_bps_device", "rbps"),
            ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device", "wbps"),
            ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device", "riops"),
            ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device", "wiops"),
        ):
            for index, entry in enumerate(self._entries(block, name, f"blockIO.{name}")):
                field = f"blockIO.{name}[{index}]"
                rate = _required(entry, "rate", f"{field}.rate", _U64_MAX)
                if version == 1:
                    self._write("blkio", v1_file, f"{_device(entry, field)} {rate}", field, optional=True)
                else:  # a rate of 0 takes the limit away, as it does on v1
                    self._write("io", "io.max", f"{_device(entry, field)} {v2_key}={rate or 'max'}", field)

    def _block_weights(self, block: Mapping[str, Any], version: int) -> None:
        weights = []
        weight = _number(block, "weight", "blockIO.weight", 0, 1000)
        if weight:
            weights.append(("", weight, "blockIO.weight"))
        for index, entry in enumerate(self._entries(block, "weightDevice", "blockIO.weightDevice")):
            field = f"blockIO.weightDevice[{index}]"
            device_weight = _number(entry, "weight", f"{field}.weight", 0, 1000)
            if device_weight:
                weights.append((_device(entry, field) + " ", device_weight, field))
        if not weights:
            return
        controller, files = (
            ("blkio", ("blkio.bfq.weight", "blkio.weight"))
            if version == 1
            else (
                "io",
                ("io.bfq.weight", "io.weight"),
            )
        )
        file = next((name for name in files if self._host.read(controller, name) is not None), None)
        for device, value, field in weights:
            if value < 10:
                raise InvalidArgument(_PREFIX + field, value, "must be between 10 and 1000")
            if file is None:
                self._warn(field, f"this kernel has no {' or '.join(files)}")
            elif file == "io.weight":  # 1..10000, default 100; OCI's scale is 10..1000
                self._write(controller, file, f"{device}{1 + (value - 10) * 9999 // 990}", field)
            else:
                self._write(controller, file, f"{device}{value}", field)

    def hugepages(self) -> None:
        entries = self._entries(self._resources, "hugepageLimits", "hugepageLimits")
        if not entries or self._without("hugetlb", {"limit": entries}, "hugepageLimits"):
            return
        for index, entry in enumerate(entries):
            field = f"hugepageLimits[{index}]"
            size = entry.get("pageSize")
            if not isinstance(size, str) or not _matches(_PAGE_SIZE, size):
                raise InvalidArgument(f"{_PREFIX}{field}.pageSize", size, "must be a size like '2MB'")
            limit = _required(entry, "limit", f"{field}.limit", _U64_MAX)
            suffix = "max" if self._host.version("hugetlb") == 2 else "limit_in_bytes"
            if self._host.read("hugetlb", f"hugetlb.{size}.{suffix}") is None:
                raise InvalidArgument(f"{_PREFIX}{field}.pageSize", size, "this machine has no huge pages of that size")
            self._write("hugetlb", f"hugetlb.{size}.{suffix}", limit, field)
            # reservations, too, or a mapping that is never touched escapes the limit (kernels since 5.7)
            if self._host.read("hugetlb", f"hugetlb.{size}.rsvd.{suffix}") is not None:
                self._write("hugetlb", f"hugetlb.{size}.rsvd.{suffix}", limit, field)

    def rdma(self) -> None:
        rdma = self._section("rdma")
        if not rdma or self._without("rdma", rdma, "rdma"):
            return
        for device, limits in _bounded(rdma, "rdma").items():
            field = f"rdma.{device}"
            if not _matches(r"[A-Za-z0-9_.-]{1,64}", device) or not isinstance(limits, Mapping):
                raise InvalidArgument(_PREFIX + field, limits, "must be an object named by an RDMA device")
            parts = [device]
            for name, key in (("hcaHandles", "hca_handle"), ("hcaObjects", "hca_object")):
                value = _number(limits, name, f"{field}.{name}", 0, _U32_MAX)
                if value is not None:
                    parts.append(f"{key}={value}")
            if len(parts) > 1:
                self._write("rdma", "rdma.max", " ".join(parts), field)

    def network(self) -> None:
        network = self._section("network")
        class_id = _number(network, "classID", "network.classID", 0, _U32_MAX)
        if class_id and not self._without("net_cls", {"classID": class_id}, "network"):
            self._write("net_cls", "net_cls.classid", class_id, "network.classID")
        priorities = self._entries(network, "priorities", "network.priorities")
        if not priorities or self._without("net_prio", {"priorities": priorities}, "network"):
            return
        for index, entry in enumerate(priorities):
            field = f"network.priorities[{index}]"
            name = entry.get("name")
            if not isinstance(name, str) or not _matches(r"[^\s/]{1,15}", name):
                raise InvalidArgument(f"{_PREFIX}{field}.name", name, "must be the name of a network interface")
            priority = _required(entry, "priority", f"{field}.priority", _U32_MAX)
            self._write("net_prio", "net_prio.ifpriomap", f"{name} {priority}", field)

    def unified(self) -> None:
        """Raw v2 files.  A name that is not a plain ``controller.file`` could leave the group's directory."""
        for file, value in _bounded(self._section("unified"), "unified").items():
            field = f"unified.{file}"
            if not _matches(_UNIFIED_FILE, file) or len(file) > 255:
                raise InvalidArgument(
                    _PREFIX + "unified", file, f"the specified key has not the form CONTROLLER.VALUE `{file[:80]}`"
                )
            if not isinstance(value, str) or len(value) > _TEXT_MAX:
                raise InvalidArgument(_PREFIX + field, value, f"must be a string of at most {_TEXT_MAX} characters")
            controller = file.split(".")[0]
            if controller == "cgroup":
                raise InvalidArgument(_PREFIX + field, value, "files of the group itself are not resources")
            if self._host.version(controller) != 2:
                reason = f"the requested cgroup controller `{controller}` is not available in a cgroup v2 hierarchy"
                raise InvalidArgument(_PREFIX + field, value, reason)
            for line in value.splitlines() or [value]:  # one write a line, as the kernel takes them
                self._write(controller, file, line, field)


def _matches(pattern: str, text: str) -> bool:
    """Whether all of the text fits.  The import is as dear as all else here, and few containers need it."""
    import re

    return re.fullmatch(pattern, text, re.ASCII) is not None


def _number(section: Mapping[str, Any], name: str, field: str, low: int, high: int) -> int | None:
    value = section.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(_PREFIX + field, value, f"must be an integer between {low} and {high}")
    return value


def _required(section: Mapping[str, Any], name: str, field: str, high: int) -> int:
    value = _number(section, name, field, 0, high)
    if value is None:
        raise InvalidArgument(_PREFIX + field, value, f"must be an integer between 0 and {high}")
    return value


def _device(entry: Mapping[str, Any], field: str) -> str:
    major = _required(entry, "major", f"{field}.major", 4095)
    return f"{major}:{_required(entry, 'minor', f'{field}.minor', (1 << 20) - 1)}"


def _bounded(section: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if len(section) > _ENTRIES_MAX:
        raise InvalidArgument(_PREFIX + name, len(section), f"may have at most {_ENTRIES_MAX} entries")
    return section


def _or_max(value: int) -> str:
    return "max" if value < 0 else str(value)
