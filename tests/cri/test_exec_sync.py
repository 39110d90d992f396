"""ExecSync: output, exit codes, limits, and what a hostile command tries."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode


@pytest.fixture
def container(cri: Client) -> Iterator[str]:
    security = {
        "capabilities": pb.Capability(drop_capabilities=["ALL"], add_capabilities=["CHOWN"]),
        "seccomp": pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
    }
    config = cri.container_config("sleep", "600", security=security)
    config.envs.append(pb.KeyValue(key="GREETING", value=b"hello"))
    yield cri.start(cri.pod(), config=config)


def test_output_and_exit_code(cri: Client, container: str) -> None:
    answer = cri.exec(container, "sh", "-c", "echo $GREETING; printf err >&2; exit 9")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"hello\n", b"err", 9)


def test_it_runs_as_the_container_does(cri: Client, container: str) -> None:
    status = cri.exec(container, "cat", "/proc/self/status", "/proc/self/cgroup").stdout.decode()
    assert "CapEff:\t0000000000000001" in status and "Seccomp:\t2" in status
    assert cri.exec(container, "ps").stdout.decode().count("sleep 600") == 1


def test_the_user_of_the_container(cri: Client) -> None:
    security = {"run_as_username": "nobody", "supplemental_groups": [7]}
    container = cri.start(cri.pod(), "sleep", "600", security=security)
    assert cri.exec(container, "id", "-un").stdout == b"nobody\n"
    assert cri.exec(container, "id", "-G").stdout.split() == [b"65534", b"7"]


def test_a_command_that_does_not_exist(cri: Client, container: str) -> None:
    with refused(Code.INTERNAL, "/no/such", "ENOENT"):
        cri.exec(container, "/no/such")
    with refused(Code.INVALID_ARGUMENT, "cmd"):
        cri.exec(container)
    with refused(Code.INVALID_ARGUMENT, "cmd"):
        cri.exec(container, "a\0b")


def test_a_time_limit_kills_the_whole_group(cri: Client, container: str) -> None:
    start = time.monotonic()
    with refused(Code.DEADLINE_EXCEEDED, "did not end within 1 s"):
        cri.exec(container, "sh", "-c", "sleep 301 & sleep 302", timeout=1)
    assert time.monotonic() - start < 3
    cri.until(lambda: b"sleep 30" not in cri.exec(container, "ps").stdout)


def test_a_client_that_gives_up_ends_the_command(cri: Client, container: str) -> None:
    with refused(Code.DEADLINE_EXCEEDED):
        cri.call("ExecSync", container_id=container, cmd=["sleep", "303"], seconds=0.5)
    cri.until(lambda: b"sleep 303" not in cri.exec(container, "ps").stdout)


def test_a_grandchild_that_keeps_the_pipes(cri: Client, container: str) -> None:
    start = time.monotonic()
    answer = cri.exec(container, "sh", "-c", "echo done; sleep 304 &")
    assert answer.stdout == b"done\n" and time.monotonic() - start < 5


def test_endless_output_is_bounded(cri: Client, container: str) -> None:
    answer = cri.exec(container, "sh", "-c", "head -c 30000000 /dev/zero; head -c 20000000 /dev/zero >&2")
    assert (len(answer.stdout), len(answer.stderr), answer.exit_code) == (16 << 20, 16 << 20, 0)


def test_many_at_once(cri: Client, container: str) -> None:
    request = pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", "sleep 0.1; echo $$"])
    calls = [cri.runtime.ExecSync.future(request, timeout=20) for _ in range(40)]
    assert len({call.result().stdout for call in calls}) == 40


def test_none_is_left(cri: Client, container: str) -> None:
    assert cri.daemon.process is not None
    descriptors = Path(f"/proc/{cri.daemon.process.pid}/fd")
    for _ in range(3):
        cri.exec(container, "true")
    before = len(list(descriptors.iterdir()))
    for _ in range(15):
        cri.exec(container, "true")
    assert len(list(descriptors.iterdir())) <= before + 1


def test_the_container_ends_meanwhile(cri: Client, container: str) -> None:
    call = cri.runtime.ExecSync.future(pb.ExecSyncRequest(container_id=container, cmd=["sleep", "305"]), timeout=20)
    time.sleep(0.3)
    cri.call("StopContainer", container_id=container, timeout=0)
    assert call.result(timeout=10).exit_code == 137
    with refused(Code.FAILED_PRECONDITION, "exited"):
        cri.exec(container, "true")


def test_a_child_that_goes_on_writing_does_not_hold_the_call(cri: Client, container: str) -> None:
    """CVE-2026-53495: the command ends, a child of it keeps the pipe and fills it."""
    start = time.monotonic()
    answer = cri.exec(container, "sh", "-c", "echo first; yes & exit 5")
    assert answer.exit_code == 5 and answer.stdout.startswith(b"first\n") and time.monotonic() - start < 5
    assert len(answer.stdout) <= 16 << 20
    cri.until(lambda: not re.search(rb"[RSD]\s+yes", cri.exec(container, "ps", "-o", "stat,args").stdout))  # SIGPIPE


def test_a_child_outside_the_process_group_does_not_hold_the_call(cri: Client, container: str) -> None:
    start = time.monotonic()
    with refused(Code.DEADLINE_EXCEEDED, "did not end within 1 s"):
        cri.exec(container, "sh", "-c", "setsid sleep 306 & sleep 307", timeout=1)
    assert time.monotonic() - start < 4
    cri.until(lambda: b"sleep 307" not in cri.exec(container, "ps").stdout)


def test_children_that_keep_pipes_cost_the_daemon_nothing(cri: Client, container: str) -> None:
    assert cri.daemon.process is not None
    descriptors = Path(f"/proc/{cri.daemon.process.pid}/fd")
    cri.exec(container, "true")
    before = len(list(descriptors.iterdir()))
    request = pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", "sleep 308 & echo"])
    for call in [cri.runtime.ExecSync.future(request, timeout=20) for _ in range(30)]:
        assert call.result().stdout == b"\n"
    assert len(list(descriptors.iterdir())) <= before + 1


def test_output_at_its_bound_does_not_stay_in_the_daemon(cri: Client, container: str) -> None:
    assert cri.daemon.process is not None
    status = Path(f"/proc/{cri.daemon.process.pid}/status")
    sizes = []
    for _ in range(8):
        assert len(cri.exec(container, "head", "-c", "20000000", "/dev/zero").stdout) == 16 << 20
        sizes.append(int(status.read_text().split("VmRSS:")[1].split()[0]))
    assert min(sizes[4:]) < min(sizes[:4]) + 16 * 1024, sizes  # the last output may still be on its way out
