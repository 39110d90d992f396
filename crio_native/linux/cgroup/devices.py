"""OCI device rules in the words of the kernel: lines for v1's devices.allow and devices.deny, a BPF program for v2.

The rules' meaning is the same on both: they apply in order, the last that matches a device decides for each kind of
access, and what no rule allows is denied.
"""

from __future__ import annotations

import _thread
import os

from crio_native.errors import InvalidArgument

from .. import bpf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_RULES_MAX = 512
_PREFIX = "linux.resources.devices"
_TYPES = {"a": bpf.ANY, "b": bpf.BLOCK, "c": bpf.CHAR}
_LETTERS = {bpf.BLOCK: "b", bpf.CHAR: "c"}
_ACCESS = {"r": bpf.READ, "w": bpf.WRITE, "m": bpf.MKNOD}
_ALL_ACCESS = bpf.READ | bpf.WRITE | bpf.MKNOD


def parse(rules: Sequence[Mapping[str, Any]]) -> tuple[bpf.Rule, ...]:
    """The rules, checked, without those that a later rule for all devices makes void.  Raises InvalidArgument."""
    if not isinstance(rules, (list, tuple)) or not all(isinstance(rule, dict) for rule in rules):
        raise InvalidArgument(_PREFIX, rules, "must be a list of objects")
    if len(rules) > _RULES_MAX:
        raise InvalidArgument(_PREFIX, len(rules), f"may have at most {_RULES_MAX} rules")
    parsed: list[bpf.Rule] = []
    for index, rule in enumerate(rules):
        parsed.append(_parsed(rule, f"{_PREFIX}[{index}]"))
        if _matches_all(parsed[-1]):
            del parsed[:-1]
    return tuple(parsed)


def _parsed(rule: Mapping[str, Any], field: str) -> bpf.Rule:
    allow, kind, access = rule.get("allow"), rule.get("type") or "a", rule.get("access") or "rwm"
    if not isinstance(allow, bool):
        raise InvalidArgument(f"{field}.allow", allow, "must be true or false")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise InvalidArgument(f"{field}.type", kind, "must be a, b or c")
    if not isinstance(access, str) or not set(access) <= set(_ACCESS):
        raise InvalidArgument(f"{field}.access", access, "must be made of the letters r, w and m")
    major, minor = _device_number(rule, "major", field), _device_number(rule, "minor", field)
    if kind == "a" and (major, minor) != (bpf.ANY, bpf.ANY):
        raise InvalidArgument(f"{field}.type", kind, "must be b or c where major or minor is given")
    return bpf.Rule(allow, _TYPES[kind], major, minor, sum(_ACCESS[letter] for letter in set(access)))


def _device_number(rule: Mapping[str, Any], name: str, field: str) -> int:
    value = rule.get(name)
    if value is None or value == -1:
        return bpf.ANY
    bound = {"major": 4095, "minor": (1 << 20) - 1}[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= bound:
        raise InvalidArgument(f"{field}.{name}", value, f"must be between 0 and {bound}, or -1 for all")
    return value


def _matches_all(rule: bpf.Rule) -> bool:
    return rule.type == bpf.ANY and rule.access == _ALL_ACCESS


def v1_lines(rules: tuple[bpf.Rule, ...]) -> tuple[tuple[str, str], ...]:
    """(file, line) writes that bring a v1 group from any state to these rules.

    The v1 controller keeps one answer for all devices and a list of exceptions to it, so a rule against a part of what
    an earlier one allowed cannot be said there: InvalidArgument.
    """
    everything = bool(rules) and _matches_all(rules[0]) and rules[0].allow
    lines = [("devices.allow" if everything else "devices.deny", "a")]
    exceptions: list[bpf.Rule] = []
    for rule in rules:
        if rule.allow != everything:
            exceptions.append(rule)
            lines += [("devices.allow" if rule.allow else "devices.deny", line) for line in _v1_names(rule)]
        elif any(_overlap(rule, earlier) for earlier in exceptions):
            raise InvalidArgument(
                _PREFIX, "; ".join(_v1_names(rule)), "cgroup v1 cannot take back a part of an earlier rule"
            )
    return tuple(lines)


def _v1_names(rule: bpf.Rule) -> list[str]:
    letters = "".join(letter for letter, bit in _ACCESS.items() if rule.access & bit)
    kinds = [_LETTERS[rule.type]] if rule.type != bpf.ANY else ["b", "c"]
    major, minor = ("*" if number == bpf.ANY else number for number in (rule.major, rule.minor))
    return [f"{kind} {major}:{minor} {letters}" for kind in kinds]


def _overlap(one: bpf.Rule, other: bpf.Rule) -> bool:
    pairs = ((one.type, other.type), (one.major, other.major), (one.minor, other.minor))
    return bool(one.access & other.access) and all(bpf.ANY in pair or pair[0] == pair[1] for pair in pairs)


class _Programs:
    """Loaded programs by their rules.  The verifier takes half a millisecond, and containers share few rule sets."""

    _MAX = 32

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._loaded: dict[tuple[bpf.Rule, ...], int] = {}

    def attach(self, group: int, rules: tuple[bpf.Rule, ...]) -> None:
        with self._lock:  # until it is attached: nobody may close the program meanwhile
            program = self._loaded.pop(rules, None)
            if program is None:
                program = bpf.load_device_program(bpf.device_program(rules))
            self._loaded[rules] = program  # now the last that will be evicted
            while len(self._loaded) > self._MAX:
                os.close(self._loaded.pop(next(iter(self._loaded))))
            bpf.replace_device_program(group, program)


_programs = _Programs()


def attach_v2(directory: str, rules: tuple[bpf.Rule, ...]) -> None:
    """Put the rules' program in the place of the group's old one.  Raises OSError."""
    group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _programs.attach(group, rules)
    finally:
        os.close(group)
