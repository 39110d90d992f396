"""The calls about the node, checkpoints, and what verbose answers hold."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..conftest import criu_trouble
from .conftest import Client, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode


def test_verbose_status(cri: Client) -> None:
    cri.start(cri.pod(), "sleep", "60")
    info = cri.call("Status", verbose=True).info
    config, state = json.loads(info["config"]), json.loads(info["state"])
    assert config["sandboxImage"].startswith("registry.k8s.io/pause")  # what kubeadm looks for
    assert config["crio"]["api"]["listen"] == str(cri.daemon.socket)
    assert state["pods"] == {"ready": 1} and state["containers"] == {"running": 1}
    assert state["pid"] == cri.daemon.process.pid  # type: ignore[union-attr]
    assert state["handlers"]["builtin"]["problem"] == ""
    assert all(Path(f"/proc/{pid}").exists() for pid in state["launchers"]) and state["launchers"]
    assert not cri.call("Status").info


def test_a_network_that_is_not_there(fresh: Client) -> None:
    (fresh.daemon.directory / "net.d/10-scratch.conflist").write_text("{")
    fresh.restart()
    [runtime, network] = fresh.call("Status").status.conditions
    assert runtime.status and not network.status
    assert network.reason == "NetworkPluginNotReady" and str(fresh.daemon.directory) in network.message


def test_signals_of_support(cri: Client) -> None:
    """SIGUSR1 and SIGUSR2 are harmless, also to monitors: `systemctl kill` sends them to all."""
    container = cri.start(cri.pod(), "sleep", "600")
    info = json.loads(cri.call("ContainerStatus", container_id=container, verbose=True).info["info"])
    assert cri.daemon.process is not None
    for pid in (cri.daemon.process.pid, info["state"]["monitorPid"]):
        for number in (signal.SIGUSR2, signal.SIGUSR1):
            os.kill(pid, number)
    cri.until(lambda: "Task-1 (most recent call last)" in cri.daemon.log.read_text())
    log = cri.daemon.log.read_text()
    assert "Thread 0x" in log and "in _loop" in log and "await stopping.wait()" in log
    assert cri.exec(container, "echo", "here").stdout == b"here\n"


def test_update_runtime_config(cri: Client) -> None:
    def update(cidr: str) -> None:
        network = pb.NetworkConfig(pod_cidr=cidr)
        cri.call("UpdateRuntimeConfig", runtime_config=pb.RuntimeConfig(network_config=network))

    update("10.244.1.0/24,fd00:1::/64")
    assert json.loads(cri.call("Status", verbose=True).info["state"])["podCIDR"] == "10.244.1.0/24,fd00:1::/64"
    update("")
    with refused(Code.INVALID_ARGUMENT, "runtime_config.network_config.pod_cidr", "10.244.1.0/99"):
        update("10.244.1.0/99")


def test_a_containers_verbose_status(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sleep", "60", resources={"memory_limit_in_bytes": 64 << 20})
    info = json.loads(cri.call("ContainerStatus", container_id=container, verbose=True).info["info"])
    assert info["sandboxID"] == pod and info["runtimeSpec"]["process"]["args"] == ["sleep", "60"]
    assert container in Path(f"/proc/{info['pid']}/cgroup").read_text()
    assert Path(info["rootfs"]["upper"]).is_dir() and info["privileged"] is False
    assert info["resources"]["memory_limit_in_bytes"] == 64 << 20
    steps = {step["step"]: step for step in info["plan"]["steps"]}
    assert "pivot_root" in " ".join(call for step in steps.values() for call in step["calls"])
    process = info["state"]["process"]
    assert process["NoNewPrivs"] in "01" and process["ns/pid"] != str(Path("/proc/self/ns/pid").readlink())
    cri.call("StopContainer", container_id=container, timeout=0)
    info = json.loads(cri.call("ContainerStatus", container_id=container, verbose=True).info["info"])
    assert info["pid"] == 0 and info["state"]["exit"]["code"] == 137 and "process" not in info["state"]


def test_a_pods_verbose_status(cri: Client) -> None:
    pod = cri.pod(namespaces={"pid": pb.POD})
    container = cri.start(pod, "sleep", "60", name="c")
    info = json.loads(cri.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"])
    assert info["containers"] == {"c": container} and info["runtimeSpec"]["linux"]
    assert Path(f"/proc/{info['pid']}/ns/net").stat().st_ino == Path(info["namespaces"]["net"]).stat().st_ino
    assert info["state"]["process"]["ns/net"] == str(Path(f"/proc/{info['pid']}/ns/net").readlink())


def test_statuses_of_containers_for_a_kubelet_that_lives_by_events(fresh: Client) -> None:
    pod = fresh.pod()
    container = fresh.start(pod, "sleep", "60")
    plain = fresh.call("PodSandboxStatus", pod_sandbox_id=pod)
    assert not plain.containers_statuses and not plain.timestamp
    (fresh.daemon.directory / "crio.conf.d/10-events.conf").write_text("[crio.runtime]\nenable_pod_events = true\n")
    fresh.restart()
    told = fresh.call("PodSandboxStatus", pod_sandbox_id=pod)
    assert [(s.id, s.state) for s in told.containers_statuses] == [(container, pb.CONTAINER_RUNNING)]
    assert told.timestamp > told.status.created_at


def test_checkpoints_say_what_they_need(cri: Client, tmp_path: Path) -> None:
    """CRIU is missing here, or does not fit the kernel; where it works, see test_checkpoint."""
    pod = cri.pod()
    container = cri.start(pod, "sleep", "60")
    why = criu_trouble()
    if why:
        with refused(Code.FAILED_PRECONDITION, why):
            cri.call("CheckpointContainer", container_id=container, location=str(tmp_path / "x.tar"))
        with refused(Code.FAILED_PRECONDITION, why):
            cri.call("CheckpointPod", pod_sandbox_id=pod, output_path=str(tmp_path / "pod"))
    with refused(Code.FAILED_PRECONDITION if why else Code.NOT_FOUND, why or "pod.json"):
        cri.call("RestorePod", checkpoint_path=str(tmp_path / "pod"))
    assert list(tmp_path.iterdir()) == []
    assert cri.status(container).state == pb.CONTAINER_RUNNING


def test_checkpoints_check_what_is_asked(cri: Client) -> None:
    pod = cri.pod()
    container = cri.create(pod, "sleep", "60")
    with refused(Code.NOT_FOUND, "nobody"):
        cri.call("CheckpointContainer", container_id="nobody", location="/x")
    with refused(Code.INVALID_ARGUMENT, "location"):
        cri.call("CheckpointContainer", container_id=container, location="x/../y")
    with refused(Code.FAILED_PRECONDITION, criu_trouble() or "created"):
        cri.call("CheckpointContainer", container_id=container, location="/x")
    with refused(Code.INVALID_ARGUMENT, "container_ids[0]"):
        cri.call("CheckpointPod", pod_sandbox_id=pod, output_path="/x", container_ids=["other"])
    with refused(Code.INVALID_ARGUMENT, "options['fast']"):
        cri.call("CheckpointPod", pod_sandbox_id=pod, output_path="/x", options={"fast": "yes"})
    with refused(Code.INVALID_ARGUMENT, "options['fast']"):
        cri.call("RestorePod", checkpoint_path="/x", options={"fast": "yes"})
