"""That the look for left-overs finds them, names them, and is not disturbed by what goes in time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .. import machine
from ..apart import MARK
from ..machine import assert_machine_unchanged, machine_state


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SETTLE_SECONDS", 0.3)


def test_a_descriptor_left_open_is_found(tmp_path: Path) -> None:
    before = machine_state("no-such-name")
    with (tmp_path / "left-open").open("w"):
        with pytest.raises(AssertionError, match=r"descriptors: \d+ -> .*/left-open"):
            assert_machine_unchanged(before, "no-such-name")
    assert_machine_unchanged(before, "no-such-name")


def test_a_process_left_running_is_found_even_without_its_parent() -> None:
    before = machine_state("no-such-name")
    subprocess.run(["sh", "-c", "sleep 60 & exit"], check=True)
    with pytest.raises(AssertionError, match=r"processes: sleep \(pid (\d+)") as caught:
        assert_machine_unchanged(before, "no-such-name")
    os.kill(int(str(caught.value).split("(pid ")[1].split(",")[0]), 9)
    assert_machine_unchanged(before, "no-such-name")


def test_what_ends_in_time_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SETTLE_SECONDS", 60)
    before = machine_state("no-such-name")
    subprocess.run(["sh", "-c", "sleep 0.1 & exit"], check=True)
    assert_machine_unchanged(before, "no-such-name")


@pytest.mark.root
def test_a_cgroup_left_behind_is_found_by_its_name() -> None:
    from crio_native.linux.cgroup import Cgroup

    group = Cgroup(f"/{MARK}left")
    before = machine_state(group.path)
    group.create()
    try:
        with pytest.raises(AssertionError, match=f"cgroups: .*{group.path}"):
            assert_machine_unchanged(before, group.path)
    finally:
        group.remove()
    assert_machine_unchanged(before, group.path)
