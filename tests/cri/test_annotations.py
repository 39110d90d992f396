"""Annotations of CRI-O that are about a pod as a whole, and what they do and leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import mounts_below
from crio_native.linux import mounts, syscalls
from crio_native.pods import linked_logs

from .conftest import Client, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode

SETTINGS = """
[crio.runtime]
min_injected_gomaxprocs = 3
[crio.runtime.runtimes.builtin]
allowed_annotations = ["link-logs.crio.io", "seccomp-notifier-action.crio.io"]
[crio.runtime.runtimes.closed]
runtime_type = "builtin"
[crio.runtime.runtimes.runc]
runtime_path = "/usr/sbin/runc"
runtime_root = "{directory}/run/runc"
allowed_annotations = ["seccomp-notifier-action.crio.io"]
[crio.metrics]
enable_metrics = true
metrics_port = 0
metrics_socket = "{directory}/metrics.sock"
metrics_collectors = ["containers_seccomp_notifier_count_total"]
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with Client.serving(SETTINGS) as client:
        yield client


@pytest.fixture
def kubelet() -> Iterator[tuple[str, Path]]:
    """A pod's uid, and the directory of its volumes, where the kubelet has them; what is made is removed."""
    uid = str(uuid.uuid4())
    volumes = Path(linked_logs.VOLUMES.format(uid=uid))
    made = [path for path in volumes.parents[2:] if not path.exists()]
    volumes.mkdir(parents=True)
    yield uid, volumes
    for place in mounts_below(volumes):  # of a test that has failed
        syscalls.umount2(place, mounts.MNT_DETACH)
    shutil.rmtree(volumes.parents[1])
    for directory in made:
        with contextlib.suppress(OSError):  # another test has come to use it
            directory.rmdir()


def test_as_many_annotations_as_kubernetes_allows(cri: Client) -> None:
    """256 KiB in all (ValidateAnnotationsSize); every byte of these is two in JSON."""
    annotations = {f"example.com/{number}": '"' * ((64 << 10) - 20) for number in range(4)}
    assert (255 << 10) < sum(len(name) + len(value) for name, value in annotations.items()) <= 256 << 10
    container = cri.start(cri.pod(annotations=annotations), "sleep", "600", annotations=annotations)
    assert dict(cri.status(container).annotations) == annotations


def mounted_on(place: Path) -> bool:
    return f" {place} " in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("name", ["link-logs.crio.io", "io.kubernetes.cri-o.LinkLogs"])
def test_a_pod_reads_its_own_logs(cri: Client, kubelet: tuple[str, Path], name: str) -> None:
    uid, volumes = kubelet
    volume = volumes / "logs"
    volume.mkdir()
    pod = cri.pod(uid=uid, annotations={name: "logs"})
    first = cri.start(pod, "sh", "-c", "echo from the first; sleep 600", name="first", log_path="first/0.log")
    whole = [pb.Mount(host_path=str(volume), container_path="/logs", readonly=False)]
    script = f"cat /logs/first/0.log /logs/{first}.log; touch /logs/x || echo read only"
    _, output = cri.run("sh", "-c", script, pod=pod, mounts=whole)
    assert output.count("from the first") == 2 and "read only" in output
    part = [pb.Mount(host_path=f"{volume}/first", container_path="/part", readonly=False)]
    assert cri.run("sh", "-c", "rm /part/0.log 2>&1 || echo read only", pod=pod, mounts=part)[1].endswith("read only\n")
    cri.restart()
    assert mounted_on(volume)
    logs = Path(cri.status(first).log_path).parent.parent
    cri.call("StopContainer", container_id=first, timeout=0)
    cri.call("RemoveContainer", container_id=first)
    assert not os.path.lexists(logs / f"{first}.log") and (logs / "first/0.log").exists()
    cri.remove_pod(pod)
    assert not mounted_on(volume) and list(volume.iterdir()) == []


def test_a_volume_in_memory_stays(cri: Client, kubelet: tuple[str, Path]) -> None:
    """The annotation of a pod whose handler does not allow it does nothing, also when the pod goes."""
    uid, volumes = kubelet
    volume = volumes / "logs"
    volume.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "memory", volume], check=True)
    try:
        cri.remove_pod(cri.pod(uid=uid, handler="closed", annotations={"link-logs.crio.io": "logs"}))
        assert mounted_on(volume)
        cri.remove_pod(cri.pod(uid=uid, annotations={"link-logs.crio.io": "logs"}))
        assert Path("/proc/self/mountinfo").read_text().count(f" {volume} ") == 1
    finally:
        subprocess.run(["umount", volume], check=True)


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        ("../../other", ("link-logs.crio.io", "no name of a volume")),
        ("a/b", ("link-logs.crio.io", "no name of a volume")),
        ("none", ("link-logs.crio.io", "is no emptyDir of the pod", "no such file")),
        ("link", ("link-logs.crio.io", "is no emptyDir of the pod")),
        ("file", ("link-logs.crio.io", "is no emptyDir of the pod", "not a directory")),
    ],
)
def test_what_is_no_volume_of_the_pod_is_refused(
    cri: Client, kubelet: tuple[str, Path], volume: str, words: tuple[str, ...]
) -> None:
    uid, volumes = kubelet
    (volumes / "link").symlink_to("/etc")
    (volumes / "file").touch()
    with refused(Code.INVALID_ARGUMENT, *words):
        cri.pod(uid=uid, annotations={"link-logs.crio.io": volume})
    with refused(Code.INVALID_ARGUMENT, "config.metadata.uid"):
        cri.pod(uid="../../etc", annotations={"link-logs.crio.io": "logs"})
    assert cri.pods() == []


def test_gomaxprocs_is_left_alone_where_a_pod_wants_that(cri: Client) -> None:
    assert cri.run("sh", "-c", "echo -$GOMAXPROCS-")[1] == "-3-\n"
    pod = cri.pod(annotations={"skip-gomaxprocs.crio.io": "true"})
    assert cri.run("sh", "-c", "echo -$GOMAXPROCS-", pod=pod)[1] == "--\n"


def test_the_pause_process_is_told_of_the_pods_size(cri: Client) -> None:
    sizes = {
        "overhead": pb.LinuxContainerResources(cpu_shares=20, memory_limit_in_bytes=1 << 20),
        "resources": pb.LinuxContainerResources(cpu_quota=50000, unified={"memory.high": "1"}),
    }
    pod = cri.pod(namespaces={"pid": pb.POD}, linux=sizes)
    answer = cri.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True)
    annotations = json.loads(answer.info["info"])["runtimeSpec"]["annotations"]
    assert json.loads(annotations["pod-linux-overhead.crio.io"]) == {"cpu_shares": 20, "memory_limit_in_bytes": 1 << 20}
    resources = {"cpu_quota": 50000, "unified": {"memory.high": "1"}}
    assert json.loads(annotations["pod-linux-resources.crio.io"]) == resources


REFUSING = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [
        {"names": ["sethostname", "swapoff", "umask"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
        {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
    ],
}


def profile(cri: Client) -> dict[str, Any]:
    file = cri.daemon.directory / "refusing.json"
    file.write_text(json.dumps(REFUSING))
    return {"seccomp": pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=str(file))}


def counted(cri: Client) -> dict[str, float]:
    """By system call, of all containers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(cri.daemon.directory / "metrics.sock"))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r'notifier_count_total\{name="[^"]+",syscall="(\w+)"\} ([\d.]+)', text):
        found[name] = found.get(name, 0) + float(value)
    return found


@pytest.mark.parametrize("handler", ["builtin", "runc"])
def test_forbidden_calls_are_noticed_and_answered_as_they_were(cri: Client, handler: str) -> None:
    """Of the first process, of an exec, and of an exec under the next daemon; what tells of a missing call is not."""
    before = counted(cri)
    pod = cri.pod(handler=handler, annotations={"seccomp-notifier-action.crio.io": "log"})
    script = "hostname x; chroot / true; sleep 600"
    container = cri.start(pod, "sh", "-c", f"({script}) 2>&1", security=profile(cri))
    log = Path(cri.status(container).log_path)
    cri.until(lambda: log.read_text().count("\n") >= 2)
    assert "sethostname: No space left on device" in log.read_text() and "not implemented" in log.read_text()
    told = cri.exec(container, "sh", "-c", "hostname x; swapoff /x")
    assert told.stderr.count(b"No space left on device") == 2
    after = counted(cri)
    grown = {call: after[call] - before.get(call, 0) for call in ("sethostname", "swapoff", "chroot") if call in after}
    assert grown == {"sethostname": 2, "swapoff": 1}
    cri.restart()
    told = cri.exec(container, "sh", "-c", "hostname x")
    assert b"Operation not permitted" in told.stderr, "the next daemon knows no more than that it was refused"
    assert counted(cri)["sethostname"] == 1
    cri.remove_pod(pod)
    assert list((cri.daemon.directory / "run/seccomp").iterdir()) == []


def test_the_default_profile_refuses_what_it_does_not_allow(cri: Client) -> None:
    pod = cri.pod(annotations={"seccomp-notifier-action.crio.io": "log"})
    default = {"seccomp": pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)}
    before = counted(cri).get("swapoff", 0)
    _, output = cri.run("sh", "-c", "swapoff /x 2>&1; echo $?", pod=pod, security=default)
    assert "Operation not permitted" in output and counted(cri)["swapoff"] == before + 1


def test_a_container_is_stopped_for_what_it_called(cri: Client) -> None:
    pod = cri.pod(annotations={"seccomp-notifier-action.crio.io": "stop"})
    container = cri.start(pod, "sh", "-c", "hostname x; hostname y; sleep 600", security=profile(cri))
    status = cri.ended(container, 20)
    assert (status.exit_code, status.reason) == (137, "seccomp killed")
    assert status.message == "used forbidden syscalls: sethostname (2x)"


ENDLESSLY = "i=0; while [ $i -lt 10500 ]; do umask 0; i=$((i+1)); done; echo done; sleep 600"


def test_who_calls_without_end_is_left_to_the_kernel(cri: Client) -> None:
    """And what is run in it is neither kept out nor heard."""
    pod = cri.pod(annotations={"seccomp-notifier-action.crio.io": "log"})
    container = cri.start(pod, "sh", "-c", ENDLESSLY, security=profile(cri))
    cri.until(lambda: "done" in Path(cri.status(container).log_path).read_text(), 30)
    assert b"not implemented" in cri.exec(container, "sh", "-c", "hostname x").stderr
    assert counted(cri)["umask"] == 10_000


def test_the_end_of_who_has_called_without_end_reaches_nobody_else(cri: Client) -> None:
    """Its notifier's descriptors have other owners by then."""
    pod = cri.pod(annotations={"seccomp-notifier-action.crio.io": "log"})
    container = cri.start(pod, "sh", "-c", ENDLESSLY, security=profile(cri))
    cri.until(lambda: "done" in Path(cri.status(container).log_path).read_text(), 30)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(16)]
        for client in clients:
            client.connect(str(cri.daemon.socket))
        cri.remove_pod(pod)
        for client in clients:
            with pytest.raises(BlockingIOError):
                client.recv(8, socket.MSG_DONTWAIT)


def test_who_calls_without_end_is_stopped_all_the_same(cri: Client) -> None:
    pod = cri.pod(annotations={"seccomp-notifier-action.crio.io": "stop"})
    container = cri.start(pod, "sh", "-c", ENDLESSLY, security=profile(cri))
    status = cri.ended(container, 30)
    assert (status.exit_code, status.reason) == (137, "seccomp killed")
    assert status.message == "used forbidden syscalls: umask (10000x)"


def test_an_action_that_is_none_is_refused(cri: Client) -> None:
    pod = cri.pod(annotations={"seccomp-notifier-action.crio.io": "explode"})
    with refused(Code.INVALID_ARGUMENT, "seccomp-notifier-action.crio.io", "explode", "stop"):
        cri.create(pod, "true", security=profile(cri))
    assert cri.containers() == []
