"""The daemon ends, by SIGTERM or SIGKILL, while containers run; the next one knows them all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, log_text, refused

pytestmark = pytest.mark.root
COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_containers_go_on(fresh: Client, number: int) -> None:
    pod = fresh.pod(namespaces={"pid": pb.POD}, labels={"a": "b"})
    counter = fresh.start(pod, "sh", "-c", COUNT)
    ending = fresh.start(pod, "sh", "-c", "while [ ! -e /dev/shm/end ]; do sleep 0.02; done; exit 42")
    created = fresh.create(pod, "sh", "-c", "echo late")
    ended = fresh.start(pod, "sh", "-c", "exit 5")
    fresh.ended(ended)
    before = {c: fresh.status(c) for c in (counter, created, ended)}
    before_pod = fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status
    log = Path(before[counter].log_path)
    code = fresh.stop_daemon(number)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    size = log.stat().st_size
    fresh.until(lambda: log.stat().st_size > size + 50)
    shm = fresh.daemon.directory / "run" / "sandboxes" / pod / "shm" / "end"
    shm.touch()
    exit_file = fresh.daemon.directory / "run" / "containers" / ending / "exit"
    fresh.until(exit_file.exists)

    fresh.start_daemon()
    assert fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status == before_pod
    for container, status in before.items():
        assert fresh.status(container) == status
    assert fresh.ended(ending).exit_code == 42
    assert fresh.exec(counter, "echo", "alive").stdout == b"alive\n"
    fresh.call("StartContainer", container_id=created)
    assert log_text(fresh.ended(created).log_path) == "late\n"
    numbers = [int(line) for line in log_text(str(log)).split()]
    assert numbers == list(range(len(numbers))), "a line was lost"
    fresh.call("StopContainer", container_id=counter, timeout=0)
    assert fresh.status(counter).exit_code == 137


def test_the_end_of_the_pause_process_is_noticed_after_a_restart(fresh: Client) -> None:
    import json

    pod = fresh.pod(namespaces={"pid": pb.POD})
    fresh.restart()
    info = fresh.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"]
    os.kill(json.loads(info)["pid"], signal.SIGKILL)

    def state() -> bool:
        return bool(fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_NOTREADY)

    fresh.until(state)


def test_a_monitor_that_was_killed(fresh: Client) -> None:
    """While the daemon runs, and while it does not: the container is not left running unwatched."""
    import json

    pod = fresh.pod()
    one, two = fresh.start(pod, "sleep", "600"), fresh.start(pod, "sleep", "600")

    def info(container: str) -> dict[str, int]:
        answer = fresh.call("ContainerStatus", container_id=container, verbose=True)
        return dict(json.loads(answer.info["info"])["state"])

    first, second = info(one), info(two)
    os.kill(first["monitorPid"], signal.SIGKILL)
    status = fresh.ended(one)
    assert (status.exit_code, status.reason) == (137, "ContainerStatusUnknown")
    fresh.stop_daemon(signal.SIGKILL)
    os.kill(second["monitorPid"], signal.SIGKILL)
    fresh.start_daemon()
    status = fresh.ended(two)
    assert status.exit_code == 137 and "monitor" in status.message
    for pid in (first["pid"], second["pid"]):
        assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_after_a_reboot(fresh: Client) -> None:
    """What a reboot leaves: the root directory without the run directory, and no process, mount or namespace."""
    import shutil

    from crio_native.cli.scratch import mounts_below
    from crio_native.linux import mounts, syscalls
    from crio_native.linux.cgroup import Cgroup

    pod = fresh.pod()
    container = fresh.start(pod, "sleep", "600")
    fresh.stop_daemon()
    Cgroup(fresh.daemon.cgroup_parent).kill()
    fresh.until((fresh.daemon.directory / "run" / "containers" / container / "exit").exists)
    run = fresh.daemon.directory / "run"
    for target in reversed(mounts_below(run)):
        syscalls.umount2(target, mounts.MNT_DETACH)
    for entry in run.iterdir():
        if entry.name != "network":
            shutil.rmtree(entry)
    fresh.start_daemon()
    assert fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_NOTREADY
    status = fresh.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 137, "ContainerStatusUnknown")
    fresh.remove_pod(pod)
    assert fresh.pods() == []


def test_a_damaged_database_is_told(fresh: Client) -> None:
    fresh.stop_daemon()
    database = fresh.daemon.directory / "root" / "state.db"
    database.write_bytes(b"not a database, but a text of some length" * 100)
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    import subprocess
    import sys

    directory = fresh.daemon.directory
    program = Path(sys.executable).with_name("crio-native")
    command = [str(program), "--config", f"{directory}/crio.conf", "--config-dir", f"{directory}/crio.conf.d"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "state.db" in done.stderr and "Traceback" not in done.stderr


def test_a_lost_database_leaves_no_containers(fresh: Client) -> None:
    pod = fresh.pod()
    container = fresh.start(pod, "sleep", "600")
    fresh.stop_daemon()
    for path in (fresh.daemon.directory / "root").glob("state.db*"):
        path.unlink()
    fresh.start_daemon()
    assert fresh.pods() == []
    run, root = fresh.daemon.directory / "run", fresh.daemon.directory / "root"
    assert not (run / "containers" / container).exists() and not (root / "containers" / container).exists()
    assert not (run / "netns" / pod).exists()
    with refused(grpc.StatusCode.NOT_FOUND):
        fresh.status(container)
