"""`make bench` when it is ended early: it leaves no container and no cgroup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crio_native.cli.scratch import wait_for

from ..machine import assert_machine_unchanged, machine_state

SECONDS = 60

pytestmark = pytest.mark.root


def groups(pid: int) -> list[Path]:
    """Of all hierarchies that this mount namespace sees."""
    return [
        *Path("/sys/fs/cgroup").glob(f"crio-native-bench-{pid}*"),
        *Path("/sys/fs/cgroup").glob(f"*/*-bench-{pid}*"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(number: signal.Signals) -> None:
    """Twice: the second must not cut the removal short."""
    before = machine_state("crio-native-benchmark")
    command = [sys.executable, "-m", "tests.perf", "--rounds", "100000", "run"]
    bench = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
    )
    try:
        wait_for(lambda: bool(groups(bench.pid)), SECONDS, "the first measurement")
        for _ in range(2):
            os.killpg(bench.pid, number)
        text, _ = bench.communicate(timeout=SECONDS)
    finally:
        bench.kill()
        bench.wait()
    assert bench.returncode == 1, text
    assert b"Aborted" in text
    assert groups(bench.pid) == []
    assert_machine_unchanged(before, "crio-native-benchmark")
