"""`container_exits_dir`: exit codes for other programs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused

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


SLOW = """#!/bin/sh
touch {directory}/making
until test -e {directory}/go; do sleep 0.01; done
"""


def test_a_container_whose_pod_stops_while_it_is_made_leaves_no_file() -> None:
    """It is undone when it lives and its end is waited for already; that end is nobody's."""
    with Client.serving('[crio.runtime]\nhooks_dir = ["{directory}/hooks"]\n') as client:
        directory = client.daemon.directory
        program = directory / "hook"
        program.write_text(SLOW.format(directory=directory))
        program.chmod(0o755)
        hook = {"version": "1.0.0", "hook": {"path": str(program)}, "when": {"always": True}}
        (directory / "hooks").mkdir()
        (directory / "hooks/slow.json").write_text(json.dumps({**hook, "stages": ["createRuntime"]}))
        pod = client.pod()
        config = client.container_config("sleep", "600")
        create = client.begin("CreateContainer", pod_sandbox_id=pod, config=config)
        client.until((directory / "making").exists)
        stop = client.begin("StopPodSandbox", pod_sandbox_id=pod)
        client.until(lambda: client.pods()[0].state == pb.SANDBOX_NOTREADY)
        (directory / "go").touch()
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "is not-ready"):
            create.result()
        stop.result()
        assert client.containers() == []
        client.until(lambda: not os.listdir(directory / "run/exits"), 3)
