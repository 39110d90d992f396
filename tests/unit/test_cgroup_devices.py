"""Device rules: the BPF program, run by a small model of the machine, against what the rules say; and v1's lines."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.errors import InvalidArgument
from crio_native.linux import bpf
from crio_native.linux.cgroup import devices

RULES = st.lists(
    st.builds(
        bpf.Rule,
        allow=st.booleans(),
        type=st.sampled_from((bpf.ANY, bpf.BLOCK, bpf.CHAR)),
        major=st.sampled_from((bpf.ANY, 0, 1, 5)),
        minor=st.sampled_from((bpf.ANY, 0, 3)),
        access=st.integers(1, 7),
    ),
    max_size=8,
)


def run(program: bytes, kind: int, major: int, minor: int, access: int) -> int:
    """The program's answer, by the meaning that the BPF documentation gives to these opcodes."""
    context = struct.pack("<III", access << 16 | kind, major, minor)
    registers = {1: 0}
    counter = 0
    while True:
        opcode, both, offset, immediate = struct.unpack_from("<BBhi", program, counter * 8)
        destination, source = both & 15, both >> 4
        counter += 1
        match opcode:
            case 0xB7:
                registers[destination] = immediate
            case 0xBF:
                registers[destination] = registers[source]
            case 0x57:
                registers[destination] &= immediate
            case 0x77:
                registers[destination] >>= immediate
            case 0x61:
                (registers[destination],) = struct.unpack_from("<I", context, offset)
            case 0x05:
                counter += offset
            case 0x55:
                counter += offset if registers[destination] != immediate else 0
            case 0x45:
                counter += offset if registers[destination] & immediate else 0
            case 0x95:
                return registers[0]
            case _:
                raise AssertionError(f"opcode {opcode:#x}")


def allowed(rules: list[bpf.Rule], kind: int, major: int, minor: int, access: int) -> bool:
    """The definition: for each kind of access, the last rule that matches decides; without one it is denied."""

    def bit_allowed(bit: int) -> bool:
        for rule in reversed(rules):
            pairs = ((rule.type, kind), (rule.major, major), (rule.minor, minor))
            if rule.access & bit and all(wanted in (bpf.ANY, given) for wanted, given in pairs):
                return rule.allow
        return False

    return all(bit_allowed(bit) for bit in (1, 2, 4) if access & bit)


@given(RULES, st.sampled_from((1, 2)), st.sampled_from((0, 1, 5, 7)), st.sampled_from((0, 3, 9)), st.integers(1, 7))
def test_the_program_does_what_the_rules_say(
    rules: list[bpf.Rule], kind: int, major: int, minor: int, access: int
) -> None:
    answer = run(bpf.device_program(rules), kind, major, minor, access)
    assert answer == allowed(rules, kind, major, minor, access)


DENY_ALL = {"allow": False, "access": "rwm"}
NULL = {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}


def test_rules_before_one_for_all_devices_are_dropped() -> None:
    assert devices.parse([NULL, DENY_ALL, NULL]) == devices.parse([DENY_ALL, NULL])
    assert len(devices.parse([NULL] * 3 + [DENY_ALL])) == 1


@pytest.mark.parametrize(
    ("rules", "lines"),
    [
        ([DENY_ALL, NULL], [("devices.deny", "a"), ("devices.allow", "c 1:3 rw")]),
        ([NULL], [("devices.deny", "a"), ("devices.allow", "c 1:3 rw")]),
        ([{"allow": True}], [("devices.allow", "a")]),
        ([{"allow": True}, NULL | {"allow": False}], [("devices.allow", "a"), ("devices.deny", "c 1:3 rw")]),
        (
            [DENY_ALL, {"allow": True, "access": "m"}],
            [("devices.deny", "a"), ("devices.allow", "b *:* m"), ("devices.allow", "c *:* m")],
        ),
    ],
)
def test_v1_lines(rules: list[dict[str, Any]], lines: list[tuple[str, str]]) -> None:
    assert list(devices.v1_lines(devices.parse(rules))) == lines


def test_v1_refuses_what_it_cannot_express() -> None:
    rules = devices.parse([DENY_ALL, NULL | {"minor": -1}, NULL | {"allow": False}])
    with pytest.raises(InvalidArgument, match="cannot take back a part"):
        devices.v1_lines(rules)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"allow": "yes"}, "allow"),
        ({"allow": True, "type": "p"}, "type"),
        ({"allow": True, "type": "c", "access": "x"}, "access"),
        ({"allow": True, "type": "c", "major": 4096}, "major"),
        ({"allow": True, "type": "c", "minor": "3"}, "minor"),
        ({"allow": True, "type": "a", "major": 1}, "type"),
    ],
)
def test_bad_rules_are_named(rule: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        devices.parse([DENY_ALL, rule])
    assert caught.value.field == f"linux.resources.devices[1].{field}"


def test_the_number_of_rules_has_a_bound() -> None:
    with pytest.raises(InvalidArgument, match="at most 512"):
        devices.parse([NULL] * 513)
