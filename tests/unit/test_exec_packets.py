"""Packed requests for execs are kept for those who ask for the same again, and for nobody else."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from crio_native.oci.builtin.execs import ExecPackets, stdio_of
from crio_native.oci.runtime import ExecSpec

ASKED = ("container", 7, 1234, "/pod/container", 0)
SECCOMP = {"defaultAction": "SCMP_ACT_ALLOW"}
REQUEST = ExecSpec({"args": ["true"], "env": ["A=1"]}, seccomp=SECCOMP, stdout=5, stderr=6)


@pytest.fixture
def ask() -> Any:
    packets, numbers = ExecPackets(), count()
    return lambda asked, request: packets.packet(asked, request, lambda: b"packet %d" % next(numbers))


def test_the_same_request_is_packed_once(ask: Any) -> None:
    equal = ExecSpec({"args": ["true"], "env": ["A=1"]}, seccomp=SECCOMP, stdout=8, stderr=9)
    assert ask(ASKED, REQUEST) == ask(ASKED, equal) == b"packet 0"


@pytest.mark.parametrize(
    "change",
    [
        {"process": {"args": ["false"], "env": ["A=1"]}},
        {"process": {"args": ["true"], "env": ["A=2"]}},
        {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
        {"seccomp": dict(SECCOMP)},  # another object may be changed by whoever has it
        {"seccomp": None},
        {"linux": {"personality": {"domain": "LINUX32"}}},
        {"stderr": -1},
    ],
)
def test_another_request_is_another_packet(ask: Any, change: dict[str, Any]) -> None:
    assert ask(ASKED, REQUEST) != ask(ASKED, replace(REQUEST, **change))


@pytest.mark.parametrize("place", range(len(ASKED)))
def test_another_container_or_process_is_another_packet(ask: Any, place: int) -> None:
    other = (*ASKED[:place], "other", *ASKED[place + 1 :])
    assert ask(ASKED, REQUEST) != ask(other, REQUEST)


def test_streams_are_numbered_among_those_that_are_given() -> None:
    assert stdio_of(replace(REQUEST, stdin=-1)) == [-1, 0, 1]
    assert stdio_of(replace(REQUEST, stdin=4, stdout=-1)) == [0, -1, 1]
