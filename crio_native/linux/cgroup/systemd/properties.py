"""Limits in systemd's words: a pure translation of `resources.Write`s and device rules; nothing is asked or set here.

A property is (name, (signature, value)), as D-Bus carries it.  What systemd has no property for is not here; it is only
written to the group's file, which systemd then leaves alone.
"""

from __future__ import annotations

from ... import bpf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from ..resources import Write

    Property = tuple[str, tuple[str, Any]]

_NONE = (1 << 64) - 1  # systemd's word for no limit
_CPU_GRAIN = 10_000  # microseconds a second: systemd keeps whole percents of a CPU
_DEFAULT_PERIOD = 100_000
_MAX_CPU = 8191
# Not DevicePolicy=auto: systemd leaves the program of a stricter policy where it is when that goes.
_EVERYTHING = [("char-*", "rwm"), ("block-*", "rwm")]

# The files whose value is one number, in either hierarchy's names.
_NUMBERS = {
    "cpu.weight": "CPUWeight",
    "cpu.shares": "CPUShares",
    "memory.max": "MemoryMax",
    "memory.high": "MemoryHigh",
    "memory.low": "MemoryLow",
    "memory.min": "MemoryMin",
    "memory.swap.max": "MemorySwapMax",
    "memory.limit_in_bytes": "MemoryLimit",
    "pids.max": "TasksMax",
    "io.weight": "IOWeight",
    "blkio.weight": "BlockIOWeight",
}
_LISTS = {"cpuset.cpus": "AllowedCPUs", "cpuset.mems": "AllowedMemoryNodes"}


def of_writes(writes: Iterable[Write]) -> list[Property]:
    """The properties of those writes that systemd has words for."""
    found: dict[str, tuple[str, Any]] = {}
    values = {write.file: write.value for write in writes}
    for file, value in values.items():
        if file in _NUMBERS and _is_number(value):
            found[_NUMBERS[file]] = ("t", _NONE if value in ("max", "-1") else int(value))
        elif file in _LISTS and (mask := _mask(value)):
            found[_LISTS[file]] = ("ay", mask)
    found |= _quota(values)
    return list(found.items())


def _is_number(value: str) -> bool:
    return value in ("max", "-1") or value.isdecimal()  # a weight may also be of one device


def _quota(values: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    quota, _, period = values.get("cpu.max", "").partition(" ")
    quota = quota or values.get("cpu.cfs_quota_us", "")
    period = period or values.get("cpu.cfs_period_us", "")
    found: dict[str, tuple[str, Any]] = {}
    if period.isdecimal() and int(period):
        found["CPUQuotaPeriodUSec"] = ("t", int(period))
    if quota in ("max", "-1"):
        found["CPUQuotaPerSecUSec"] = ("t", _NONE)
    elif quota.isdecimal():
        per_second = int(quota) * 1_000_000 // (int(period or 0) or _DEFAULT_PERIOD)
        found["CPUQuotaPerSecUSec"] = ("t", max(-(-per_second // _CPU_GRAIN), 1) * _CPU_GRAIN)
    return found


def _mask(numbers: str) -> bytes:
    """``0-2,8`` as bits, the lowest first; b"" for an empty list, or one that names more than any machine has."""
    bits = 0
    for part in numbers.strip().split(",") if numbers.strip() else ():
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) > _MAX_CPU:
            return b""
        for number in range(int(first), int(last or first) + 1):
            bits |= 1 << number
    return bits.to_bytes(-(-bits.bit_length() // 8), "little")


def of_devices(rules: Sequence[bpf.Rule], majors: str) -> list[Property]:
    """The rules as DevicePolicy and DeviceAllow, or what is nearest to them and no stricter.

    systemd knows allowed devices only, and both its word and our own program must agree to let one through: so rules
    that deny a part of what others allow are left to the program.  majors: ``/proc/devices``, as systemd knows a whole
    major number only by the driver's name.  Where it has none, systemd is told to allow all.
    """
    if rules and rules[0].allow and (rules[0].type, rules[0].major) == (bpf.ANY, bpf.ANY):
        return _policy(_EVERYTHING)
    allowed: list[tuple[str, str]] = []
    for rule in rules:
        names = _names(rule, majors) if rule.allow else []
        if names is None:
            return _policy(_EVERYTHING)
        allowed += [(name, _letters(rule.access)) for name in names]
    return _policy(allowed)


def _policy(allowed: list[tuple[str, str]]) -> list[Property]:
    # an empty list takes back what was allowed before; else a list is added to the old one
    allow: list[Property] = [("DeviceAllow", ("a(ss)", []))]
    if allowed:
        allow.append(("DeviceAllow", ("a(ss)", allowed)))
    return [("DevicePolicy", ("s", "strict")), *allow]


def _names(rule: bpf.Rule, majors: str) -> list[str] | None:
    kinds = {bpf.CHAR: ["char"], bpf.BLOCK: ["block"]}.get(rule.type, ["char", "block"])
    if rule.major == bpf.ANY:
        return [f"{kind}-*" for kind in kinds] if rule.minor == bpf.ANY else None
    if rule.minor != bpf.ANY:
        return [f"/dev/{kind}/{rule.major}:{rule.minor}" for kind in kinds]
    drivers = [(kind, _driver(kind, rule.major, majors)) for kind in kinds]
    return [f"{kind}-{driver}" for kind, driver in drivers] if all(driver for _, driver in drivers) else None


def _driver(kind: str, major: int, majors: str) -> str:
    section = {"char": "Character", "block": "Block"}[kind]
    _, _, lines = majors.partition(f"{section} devices:\n")
    for line in lines.partition("\n\n")[0].splitlines():
        number, _, driver = line.strip().partition(" ")
        if number == str(major):
            return driver
    return ""


def _letters(access: int) -> str:
    return "".join(letter for letter, bit in (("r", bpf.READ), ("w", bpf.WRITE), ("m", bpf.MKNOD)) if access & bit)
