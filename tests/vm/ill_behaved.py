"""Tests that go wrong in every way that the rig must report well; `test_rig` runs them, a normal session does not."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.vm


def test_fails() -> None:
    print("words from the guest")
    assert os.getpid() == 0


def test_skips() -> None:
    pytest.skip("a reason from the guest")


def test_panics() -> None:
    with open("/proc/sysrq-trigger", "w") as trigger:
        trigger.write("c")


def test_after_the_panic() -> None:
    pass


def test_ends_its_session() -> None:
    pytest.exit("no more")


def test_is_told_where_it_runs() -> None:
    assert os.uname().nodename == "vm"
