"""Annotations of CRI-O that are about a pod as a whole, and what they do and leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import mounts_below
from crio_native.linux import mounts, syscalls
from crio_native.pods import linked_logs

from .conftest import Client, close, new_client, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode

SETTINGS = """
[crio.runtime]
min_injected_gomaxprocs = 3
[crio.runtime.runtimes.builtin]
allowed_annotations = ["link-logs.crio.io"]
[crio.runtime.runtimes.closed]
runtime_type = "builtin"
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    client = new_client(settings=SETTINGS)
    yield client
    close(client)


@pytest.fixture
def kubelet() -> Iterator[tuple[str, Path]]:
    """A pod's uid, and the directory of its volumes, where the kubelet has them; what is made is removed."""
    uid = str(uuid.uuid4())
    volumes = Path(linked_logs.VOLUMES.format(uid=uid))
    first = next(path for path in reversed([volumes, *volumes.parents]) if not path.exists())
    volumes.mkdir(parents=True)
    yield uid, volumes
    for place in mounts_below(volumes):  # of a test that has failed
        syscalls.umount2(place, mounts.MNT_DETACH)
    shutil.rmtree(first)


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
    assert cri.run("sh", "-c", "rm /part/0.log || echo read only", pod=pod, mounts=part)[1].endswith("read only\n")
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
