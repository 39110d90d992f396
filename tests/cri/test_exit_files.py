"""`container_exits_dir`: exit codes for other programs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .conftest import Client

pytestmark = pytest.mark.root


def test_exit_codes_for_other_programs(fresh: Client) -> None:
    """In container_exits_dir, also of what ended without a daemon; the file goes with the container."""
    exits = fresh.daemon.directory / "run/exits"
    pod = fresh.pod()
    three, killed = fresh.start(pod, "sh", "-c", "exit 3"), fresh.start(pod, "sleep", "600")
    fresh.ended(three)
    fresh.until((exits / three).exists)
    assert (exits / three).read_text() == "3"
    fresh.stop_daemon()
    for cgroup in Path("/sys/fs/cgroup").glob(f"*{fresh.daemon.cgroup_parent}/crio-{killed}/cgroup.procs"):
        for pid in cgroup.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    fresh.start_daemon()
    fresh.ended(killed)
    fresh.until((exits / killed).exists)
    assert (exits / killed).read_text() == "137"
    fresh.call("RemoveContainer", container_id=three)
    assert os.listdir(exits) == [killed]
