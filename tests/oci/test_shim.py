"""Handlers of runtime_type "vm", by the CRI alone, with containerd's own shim over runc: real containers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.linux import process
from crio_native.monitor import client as monitor
from tests.cri.conftest import Client, cri, log_text, refused, trapping
from tests.cri.streams import Spdy, exec_url, exit_code
from tests.cri.test_http import get
from tests.machine import assert_machine_unchanged, machine_state

from .shim_support import HANDLERS, RUNC_SHIM, shim_processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.access(RUNC_SHIM, os.X_OK), reason="needs containerd-shim-runc-v2 (Debian's containerd)"),
]
Code = grpc.StatusCode
__all__ = ["cri"]


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with Client.serving(HANDLERS) as client:
        yield client


@pytest.fixture
def fresh() -> Iterator[Client]:
    with Client.serving(HANDLERS) as client:
        yield client


def start(cri: Client, *command: str, **fields: Any) -> tuple[str, str]:
    pod = cri.pod(handler="shim")
    return pod, cri.start(pod, *command, **fields)


def inspect(cri: Client, container: str) -> dict[str, Any]:
    answer = cri.call("ContainerStatus", container_id=container, verbose=True)
    return dict(json.loads(answer.info["info"]))


def monitor_of(container: str) -> int:
    """The pid of the monitor that serves a container."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"remote" in words and container.encode() in words:
                return int(path.parent.name)
    raise AssertionError("no monitor serves it")


def run_dir(cri: Client, container: str) -> Path:
    return cri.daemon.directory / "run" / "containers" / container


def test_a_whole_life(fresh: Client) -> None:
    fresh.remove_pod(fresh.pod(handler="shim"))  # makes the pods' parent cgroup, which is the kubelet's
    before = machine_state(fresh.daemon.directory.name)
    pod = fresh.pod(handler="shim")
    container = fresh.create(pod, "sh", "-c", "echo out; echo err >&2; sleep 1000")
    assert fresh.status(container).state == pb.CONTAINER_CREATED
    assert len(shim_processes(fresh)) == 1
    fresh.call("StartContainer", container_id=container)
    second = fresh.start(pod, "sh", "-c", "echo $HOSTNAME; exit 7")
    assert fresh.ended(second).exit_code == 7
    assert len(shim_processes(fresh)) == 1, "one shim serves a whole pod"
    log = fresh.status(container).log_path
    fresh.until(lambda: "err" in log_text(log))
    lines = Path(log).read_text().splitlines()
    assert {tuple(line.split(" ", 3)[1:]) for line in lines} == {("stdout", "F", "out"), ("stderr", "F", "err")}
    fresh.call("StopContainer", container_id=container, timeout=0)
    ended = fresh.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (pb.CONTAINER_EXITED, 137, "Error")
    assert ended.started_at <= ended.finished_at
    fresh.call("RemoveContainer", container_id=container)
    fresh.remove_pod(pod)
    assert shim_processes(fresh) == []
    assert not list((fresh.daemon.directory / "run" / "containers").iterdir())
    assert_machine_unchanged(before, fresh.daemon.directory.name)
    assert "shim of pod" not in fresh.daemon.log.read_text(), "it had nothing to complain of"


def test_term_ends_what_heeds_it(cri: Client) -> None:
    container = trapping(cri, cri.pod(handler="shim"), "'exit 9' TERM")
    cri.call("StopContainer", container_id=container, timeout=20)
    assert cri.status(container).exit_code == 9


def test_exec(cri: Client) -> None:
    _, container = start(cri, "sleep", "1000")
    answer = cri.exec(container, "sh", "-c", "echo out; echo err >&2; exit 5")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 5)
    big = cri.exec(container, "sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x")
    assert big.stdout == b"x" * 300_000
    with refused(Code.INTERNAL, "/no/such", "ENOENT"):
        cri.exec(container, "/no/such")
    with refused(Code.DEADLINE_EXCEEDED, "did not end within 1 s"):
        cri.exec(container, "sh", "-c", "sleep 301 & sleep 302", timeout=1)
    cri.until(lambda: b"sleep 30" not in cri.exec(container, "ps").stdout)
    threads = [threading.Thread(target=cri.exec, args=(container, "true")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_user_and_groups_are_the_image_s(cri: Client) -> None:
    security = {"run_as_username": "nobody", "supplemental_groups": [77]}
    _, container = start(cri, "sleep", "1000", security=security)
    status = cri.status(container)
    ids = cri.exec(container, "id").stdout.decode()
    assert f"uid={status.user.linux.uid}(nobody)" in ids and "77" in ids
    assert status.user.linux.uid > 0


def test_a_command_that_does_not_exist(cri: Client) -> None:
    pod = cri.pod(handler="shim")
    with refused(Code.INTERNAL, "/no/such"):
        cri.start(pod, "/no/such")
    cri.remove_pod(pod)


def test_a_user_that_does_not_exist(cri: Client) -> None:
    pod = cri.pod(handler="shim")
    with refused(Code.INVALID_ARGUMENT, "run_as_username", "/etc/passwd", "missing"):
        cri.create(pod, "true", security={"run_as_username": "missing"})
    cri.remove_pod(pod)


def test_statistics_and_limits(cri: Client) -> None:
    _, container = start(cri, "sh", "-c", "while :; do :; done", resources={"memory_limit_in_bytes": 64 << 20})
    first = cri.call("ContainerStats", container_id=container).stats
    assert first.cpu.usage_core_nano_seconds.value > 0
    assert 0 < first.memory.working_set_bytes.value < 64 << 20
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=48 << 20, cpu_shares=512)
    cri.call("UpdateContainerResources", container_id=container, linux=limits)
    later = cri.call("ContainerStats", container_id=container).stats
    assert later.memory.usage_bytes.value + later.memory.available_bytes.value <= 48 << 20
    shares = list(Path("/sys/fs/cgroup").glob(f"cpu*{cri.daemon.cgroup_parent}/**/crio-{container}/cpu.shares"))
    assert {path.read_text() for path in shares} == {"512\n"} or not shares  # v2 has other files


def test_running_out_of_memory(cri: Client) -> None:
    command = ("sh", "-c", "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}")
    _, container = start(cri, *command, resources={"memory_limit_in_bytes": 16 << 20})
    ended = cri.ended(container, 30)
    assert (ended.exit_code != 0, ended.reason) == (True, "OOMKilled")


def test_a_terminal(cri: Client) -> None:
    _, container = start(cri, "sh", "-c", "tty; read line; echo got $line; stty size; sleep 1000", tty=True, stdin=True)
    with monitor.attach(run_dir(cri, container)) as sock:
        sock.settimeout(10)
        cri.until(lambda: "/dev/" in log_text(cri.status(container).log_path))
        sock.send(b"hello\n")
        text = b""
        while b"got hello" not in text:
            packet = sock.recv(monitor.OUTPUT_PACKET_MAX)
            assert packet[0] == 2, "a terminal has one output"
            text += packet[1:]


@pytest.mark.parametrize("once", [False, True])
def test_standard_input(cri: Client, once: bool) -> None:
    _, container = start(cri, "sh", "-c", "cat; echo end", stdin=True, stdin_once=once)
    with monitor.attach(run_dir(cri, container)) as sock:
        sock.send(b"one\n")
        cri.until(lambda: "one" in log_text(cri.status(container).log_path))
        if once:
            sock.shutdown(socket.SHUT_WR)
    if not once:  # the next client finds it open, until somebody closes it
        with monitor.attach(run_dir(cri, container)) as sock:
            sock.send(b"two\n")
            cri.until(lambda: "two" in log_text(cri.status(container).log_path))
        with monitor.Connection.connect(run_dir(cri, container)) as connection:
            connection.close_stdin()
    assert log_text(cri.ended(container).log_path) == ("one\nend\n" if once else "one\ntwo\nend\n")


def test_the_log_is_reopened(cri: Client) -> None:
    _, container = start(cri, "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done")
    log = Path(cri.status(container).log_path)
    cri.until(lambda: log.exists() and log.read_text())
    log.rename(log.with_suffix(".old"))
    cri.call("ReopenContainerLog", container_id=container)
    cri.until(lambda: log.exists() and log.read_text())


@pytest.mark.parametrize("pid", [pb.POD, pb.CONTAINER, pb.NODE], ids=["pod", "container", "node"])
def test_pid_namespaces(cri: Client, pid: pb.NamespaceMode) -> None:
    pod = cri.pod(cri.pod_config(namespaces={"pid": pid}), handler="shim")
    security = {"namespace_options": pb.NamespaceOption(pid=pid)}
    container = cri.start(pod, "sleep", "1000", security=security)
    first = cri.exec(container, "cat", "/proc/1/comm").stdout.decode().strip()
    assert first == {pb.POD: "crio-pause", pb.CONTAINER: "sleep"}.get(pid, Path("/proc/1/comm").read_text().strip())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_the_daemon_comes_back(fresh: Client, number: int) -> None:
    pod = fresh.pod(handler="shim")
    counter = fresh.start(pod, "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done")
    ending = fresh.start(pod, "sh", "-c", "while [ ! -e /dev/shm/end ]; do sleep 0.02; done; exit 42")
    created = fresh.create(pod, "sh", "-c", "echo late")
    log = Path(fresh.status(counter).log_path)
    fresh.until(lambda: log.exists() and log.stat().st_size > 50)
    fresh.stop_daemon(number)
    size = log.stat().st_size
    fresh.until(lambda: log.stat().st_size > size + 50)
    (fresh.daemon.directory / "run" / "sandboxes" / pod / "shm" / "end").touch()
    fresh.start_daemon()
    assert fresh.ended(ending).exit_code == 42, "the shim kept it meanwhile"
    assert fresh.exec(counter, "echo", "alive").stdout == b"alive\n"
    fresh.call("StartContainer", container_id=created)
    assert log_text(fresh.ended(created).log_path) == "late\n"
    fresh.call("StopContainer", container_id=counter, timeout=0)
    assert fresh.status(counter).exit_code == 137
    numbers = [int(line) for line in log_text(str(log)).split()]
    assert numbers == list(range(len(numbers))), "a line was lost"
    fresh.remove_pod(pod)
    assert shim_processes(fresh) == []


def test_a_shim_that_is_killed(fresh: Client) -> None:
    """Its containers are lost with a reason, their processes killed, and the pod is not ready; another pod goes on."""
    pod, other = fresh.pod(handler="shim"), fresh.pod(handler="shim")
    containers = [fresh.start(pod, "sleep", "1000") for _ in range(2)]
    unharmed = fresh.start(other, "sleep", "1000")
    pids = [inspect(fresh, container)["pid"] for container in containers]
    for pid in shim_processes(fresh, pod):
        os.kill(pid, signal.SIGKILL)
    for container in containers:
        ended = fresh.ended(container)
        assert (ended.exit_code, ended.reason) == (137, "ContainerStatusUnknown")
        assert "shim" in ended.message
    fresh.until(lambda: fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_NOTREADY)
    fresh.until(lambda: not any(process.start_time(pid) for pid in pids))
    assert fresh.exec(unharmed, "echo", "fine").stdout == b"fine\n"
    fresh.remove_pod(pod)
    fresh.remove_pod(other)


def test_a_shim_that_dies_while_no_daemon_runs(fresh: Client) -> None:
    pod = fresh.pod(handler="shim")
    container = fresh.start(pod, "sleep", "1000")
    fresh.stop_daemon(signal.SIGKILL)
    for pid in shim_processes(fresh):
        os.kill(pid, signal.SIGKILL)
    fresh.start_daemon()
    ended = fresh.ended(container)
    assert (ended.exit_code, ended.reason) == (137, "ContainerStatusUnknown")
    fresh.until(lambda: fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_NOTREADY)
    fresh.remove_pod(pod)


def test_a_monitor_that_is_killed(fresh: Client) -> None:
    pod = fresh.pod(handler="shim")
    container = fresh.start(pod, "sleep", "1000")
    os.kill(monitor_of(container), signal.SIGKILL)
    ended = fresh.ended(container)
    assert (ended.exit_code, ended.reason) == (137, "ContainerStatusUnknown")
    fresh.remove_pod(pod)


def test_a_lost_database_leaves_nothing(fresh: Client) -> None:
    pod = fresh.pod(handler="shim")
    fresh.start(pod, "sleep", "1000")
    fresh.stop_daemon(signal.SIGKILL)
    for path in (fresh.daemon.directory / "root").glob("state.db*"):
        path.unlink()
    fresh.start_daemon()
    assert fresh.pods() == []
    assert shim_processes(fresh) == []
    assert not list((fresh.daemon.directory / "run" / "containers").iterdir())


def test_an_exec_with_a_terminal(cri: Client) -> None:
    _, container = start(cri, "sleep", "1000")
    command = ("sh", "-c", "tty; read line; echo got $line; read line; stty size; exit 4")
    session = Spdy(exec_url(cri, container, *command, tty=True, stdin=True), "stdin", "stdout", "resize")
    session.send("stdin", b"hello\n")
    session.until(lambda: b"got hello" in session.output["stdout"])
    session.send("resize", b'{"Width":123,"Height":45}')
    time.sleep(0.3)
    session.send("stdin", b"\n")
    assert exit_code(session.rest()) == 4
    assert b"/dev/pts/" in session.output["stdout"] and b"45 123" in session.output["stdout"]


def test_annotations_reach_the_shim_when_they_are_allowed(cri: Client) -> None:
    given = {"org.example.allowed/x": "1", "io.kubernetes.cri.sandbox-id": "somebody's else", "other": "2"}
    pod = cri.pod(handler="shim", annotations=given)
    config = json.loads((cri.daemon.directory / "root" / "containers" / pod / "config.json").read_text())
    annotations = config["annotations"]
    assert annotations["org.example.allowed/x"] == "1" and "other" not in annotations
    assert annotations["io.kubernetes.cri.sandbox-id"] == annotations["io.kubernetes.cri-o.SandboxID"] == pod
    assert annotations["io.kubernetes.cri.container-type"] == "sandbox"


def test_the_handler_is_in_the_status(cri: Client) -> None:
    handlers = {handler.name for handler in cri.call("Status").runtime_handlers}
    assert handlers == {"", "builtin", "shim"}


def test_user_namespaces_are_refused(cri: Client) -> None:
    mappings = [pb.IDMapping(container_id=0, host_id=100_000, length=65536)]
    userns = pb.UserNamespace(mode=pb.POD, uids=mappings, gids=mappings)
    config = cri.pod_config(namespaces={"userns_options": userns})
    with refused(Code.FAILED_PRECONDITION, "userns_options", "shim"):
        cri.pod(config, handler="shim")
    assert cri.pods() == []


def test_pausing(cri: Client) -> None:
    _, container = start(cri, "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done")
    log = Path(cri.status(container).log_path)
    cri.until(lambda: log.exists() and log.stat().st_size > 100)
    assert get(cri, f"/pause/{container}")[0] == 200
    assert get(cri, f"/pause/{container}")[0] == 409
    time.sleep(0.2)
    size = log.stat().st_size
    time.sleep(0.3)
    assert log.stat().st_size == size
    assert get(cri, f"/unpause/{container}")[0] == 200
    cri.until(lambda: log.stat().st_size > size)
    assert get(cri, f"/pause/{container}")[0] == 200
    cri.call("StopContainer", container_id=container, timeout=0)
    assert cri.status(container).exit_code == 137
