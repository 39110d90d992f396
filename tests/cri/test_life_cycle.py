"""A pod and its containers through their life, by the CRI alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.linux.cgroup import hierarchy

from .conftest import Client, log_text, refused, trapping

pytestmark = pytest.mark.root
Code = grpc.StatusCode


def test_version_and_status(cri: Client) -> None:
    version = cri.call("Version")
    assert (version.runtime_name, version.runtime_api_version) == ("crio-native", "v1")
    status = cri.call("Status", verbose=True)
    assert {c.type: c.status for c in status.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    handlers = {h.name: h.features.recursive_read_only_mounts for h in status.runtime_handlers}
    assert handlers == {"": True, "builtin": True}
    assert status.features.supplemental_groups_policy
    assert cri.daemon.directory.name in status.info["config"]
    assert cri.call("RuntimeConfig").linux.cgroup_driver == pb.CGROUPFS


def test_every_state_of_a_container(cri: Client) -> None:
    pod = cri.pod(labels={"app": "demo"}, annotations={"note": "x"})
    container = cri.create(pod, "sh", "-c", "echo out; echo err >&2; sleep 60", labels={"part": "web"})
    created = cri.status(container)
    assert (created.state, created.started_at, created.exit_code) == (pb.CONTAINER_CREATED, 0, 0)
    cri.call("StartContainer", container_id=container)
    running = cri.status(container)
    assert running.state == pb.CONTAINER_RUNNING
    assert running.created_at < running.started_at <= time.time_ns()
    assert dict(running.labels) == {"part": "web"}
    assert running.image_id == cri.image and running.image.image == cri.image
    assert (running.user.linux.uid, running.user.linux.gid) == (0, 0)
    cri.until(lambda: "err" in log_text(running.log_path))
    cri.call("StopContainer", container_id=container, timeout=0)
    ended = cri.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (pb.CONTAINER_EXITED, 137, "Error")
    assert ended.finished_at >= ended.started_at
    cri.call("RemoveContainer", container_id=container)
    with refused(Code.NOT_FOUND, container):
        cri.status(container)
    assert cri.containers() == []


@pytest.mark.parametrize(("command", "code", "reason"), [("exit 0", 0, "Completed"), ("exit 7", 7, "Error")])
def test_exit_codes(cri: Client, command: str, code: int, reason: str) -> None:
    pod = cri.pod()
    status = cri.ended(cri.start(pod, "sh", "-c", command))
    assert (status.exit_code, status.reason) == (code, reason)


def test_output_and_log(cri: Client) -> None:
    pod = cri.pod()
    status = cri.ended(cri.start(pod, "sh", "-c", "echo one; printf two; echo three >&2"))
    lines = Path(status.log_path).read_text().splitlines()
    assert {tuple(line.split(" ", 3)[1:]) for line in lines} >= {("stdout", "F", "one"), ("stderr", "F", "three")}
    assert "two" in log_text(status.log_path)


def test_logs_of_a_pod_without_a_directory(cri: Client) -> None:
    """They go to the daemon's own directory, and only there are they removed with the container."""
    pod = cri.pod(log_directory="")
    container = cri.start(pod, "echo", "mine")
    path = Path(cri.ended(container).log_path)
    assert path.is_relative_to(cri.daemon.directory / "logs") and log_text(str(path)) == "mine\n"
    cri.call("RemoveContainer", container_id=container)
    assert not path.parent.exists()
    kubelets = cri.daemon.directory / "logs" / "pod"  # below ours, but named by the caller
    pod = cri.pod(log_directory=str(kubelets))
    container = cri.start(pod, "echo", "theirs")
    path = Path(cri.ended(container).log_path)
    cri.call("RemoveContainer", container_id=container)
    assert log_text(str(path)) == "theirs\n"


def test_reopen_log(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done")
    path = Path(cri.status(container).log_path)
    cri.until(lambda: path.stat().st_size > 200)
    path.rename(f"{path}.1")
    cri.call("ReopenContainerLog", container_id=container)
    cri.until(lambda: path.exists() and path.stat().st_size > 200)
    old, new = (log_text(str(p)).split() for p in (Path(f"{path}.1"), path))
    assert int(new[0]) == int(old[-1]) + 1, "a line was lost or came twice"


def test_pod_status_and_addresses(cri: Client) -> None:
    config = cri.pod_config("named", uid="u-1", hostname="web")
    pod = cri.pod(config)
    status = cri.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True)
    assert status.status.state == pb.SANDBOX_READY
    assert status.status.metadata == config.metadata
    assert status.status.network.ip.startswith("10.")
    assert status.status.network.additional_ips[0].ip.startswith("fd00:")
    assert status.status.linux.namespaces.options.pid == pb.CONTAINER
    code, output = cri.run("sh", "-c", "hostname; cat /etc/hosts /etc/hostname; ip -4 addr show eth0", pod=pod)
    assert code == 0 and output.count("web") >= 3
    assert output.count(status.status.network.ip) == 2


def test_pods_reach_each_other(cri: Client) -> None:
    one, two = cri.pod(), cri.pod()
    ip = cri.call("PodSandboxStatus", pod_sandbox_id=one).status.network.ip
    cri.start(one, "sh", "-c", "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp")
    command = f"for i in 1 2 3 4 5 6 7 8 9; do wget -q -O - http://{ip}/ && exit 0; sleep 0.1; done; exit 1"
    assert cri.run("sh", "-c", command, pod=two) == (0, "hello\n")


def test_filters(cri: Client) -> None:
    one, two = cri.pod(labels={"app": "a"}), cri.pod(labels={"app": "b"})
    first = cri.start(one, "sleep", "60", labels={"tier": "x"})
    second = cri.create(two, "sleep", "60")

    def pods(**fields: Any) -> set[str]:
        return {p.id for p in cri.call("ListPodSandbox", filter=pb.PodSandboxFilter(**fields)).items}

    assert pods() == {one, two}
    assert pods(label_selector={"app": "a"}) == {one}
    assert pods(id=two[:20]) == {two}
    assert pods(state=pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)) == set()
    running = pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)
    assert [c.id for c in cri.containers(state=running)] == [first]
    assert [c.id for c in cri.containers(pod_sandbox_id=two)] == [second]
    assert [c.id for c in cri.containers(label_selector={"tier": "x"})] == [first]
    item = cri.containers(id=second)[0]
    assert (item.pod_sandbox_id, item.state) == (two, pb.CONTAINER_CREATED)


def test_stop_signal_and_grace(cri: Client) -> None:
    pod = cri.pod()
    polite = trapping(cri, pod, "'exit 3' TERM")
    cri.call("StopContainer", container_id=polite, timeout=10)
    assert cri.status(polite).exit_code == 3
    other = trapping(cri, pod, "'exit 4' USR1", stop_signal=pb.SIGNAL_SIGUSR1)
    cri.call("StopContainer", container_id=other, timeout=10)
    assert cri.status(other).exit_code == 4
    assert cri.status(other).stop_signal == pb.SIGNAL_SIGUSR1
    deaf = trapping(cri, pod, "'' TERM")
    start = time.monotonic()
    cri.call("StopContainer", container_id=deaf, timeout=1)
    assert 0.9 < time.monotonic() - start < 5
    assert cri.status(deaf).exit_code == 137


def test_a_pod_that_ignores_signals_goes_within_the_deadline_of_kubeadm(cri: Client) -> None:
    """`kubeadm reset` gives each call two seconds."""
    pod = cri.pod()
    for _ in range(3):
        trapping(cri, pod, "'' TERM")
    cri.call("StopPodSandbox", pod_sandbox_id=pod, seconds=2)
    cri.call("RemovePodSandbox", pod_sandbox_id=pod, seconds=2)
    assert pod not in {each.id for each in cri.pods()}


def test_a_long_grace_can_be_cut_short(cri: Client) -> None:
    pod = cri.pod()
    deaf = trapping(cri, pod, "'' TERM")
    slow = cri.runtime.StopContainer.future(pb.StopContainerRequest(container_id=deaf, timeout=86400), timeout=30)
    time.sleep(0.3)
    assert cri.status(deaf).state == pb.CONTAINER_RUNNING, "a status must not wait for a stop"
    cri.call("StopContainer", container_id=deaf, timeout=0)
    slow.result(timeout=5)


def test_stop_and_remove_are_idempotent(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sleep", "60")
    created = cri.create(pod, "sleep", "60")
    for _ in range(2):
        cri.call("StopContainer", container_id=container, timeout=1)
        cri.call("StopContainer", container_id=created, timeout=1)
    assert cri.status(created).state == pb.CONTAINER_EXITED
    for _ in range(2):
        cri.call("RemoveContainer", container_id=container)
    for _ in range(2):
        cri.call("StopPodSandbox", pod_sandbox_id=pod)
    assert cri.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_NOTREADY
    for _ in range(2):
        cri.call("RemovePodSandbox", pod_sandbox_id=pod)
    unknown = "0" * 64
    cri.call("StopContainer", container_id=unknown)
    cri.call("StopPodSandbox", pod_sandbox_id=unknown)


def test_remove_kills_what_lives(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sleep", "600")
    cri.call("RemoveContainer", container_id=container)
    other = cri.start(pod, "sleep", "600")
    cri.call("RemovePodSandbox", pod_sandbox_id=pod)
    assert cri.pods() == [] and cri.containers() == []
    with refused(Code.NOT_FOUND):
        cri.status(other)


def test_what_cannot_be_put_back_does_not_keep_the_rest(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "600")
    record = cri.daemon.directory / f"run/tuning/{container}.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text("nonsense")
    cri.call("StopContainer", container_id=container, timeout=0)
    cri.until(lambda: not hierarchy().find(frozenset({f"crio-{container}"})))
    record.unlink()


def test_a_stopped_pod_takes_no_containers(cri: Client) -> None:
    pod = cri.pod()
    created = cri.create(pod, "true")
    cri.call("StopPodSandbox", pod_sandbox_id=pod)
    with refused(Code.FAILED_PRECONDITION, "not-ready"):
        cri.create(pod, "true")
    with refused(Code.FAILED_PRECONDITION, "exited"):
        cri.call("StartContainer", container_id=created)


def test_ids_may_be_shortened(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sleep", "60")
    assert cri.status(container[:12]).id == container
    assert cri.call("PodSandboxStatus", pod_sandbox_id=pod[:12]).status.id == pod
    with refused(Code.INVALID_ARGUMENT, "container_id"):
        cri.status("")


def test_the_pods_processes_share_what_they_ask_for(cri: Client) -> None:
    pod = cri.pod(namespaces={"pid": pb.POD})
    first = cri.start(pod, "sh", "-c", "echo shared > /dev/shm/file; exec sleep 61")
    code, output = cri.run("sh", "-c", "ps; cat /dev/shm/file; echo $$", pod=pod)
    assert code == 0 and "sleep 61" in output and "shared" in output
    assert cri.status(first).state == pb.CONTAINER_RUNNING
    second = cri.start(pod, "sh", "-c", "sleep 600 & exit 0")
    cri.ended(second)
    cri.until(lambda: "sleep 600" not in cri.exec(first, "ps").stdout.decode())


def test_the_namespaces_of_another_container(cri: Client) -> None:
    pod = cri.pod()
    target = cri.start(pod, "sleep", "62")
    options = pb.NamespaceOption(pid=pb.TARGET, target_id=target)
    assert "sleep 62" in cri.run("ps", pod=pod, security={"namespace_options": options})[1]


def test_host_network_and_pid(cri: Client) -> None:
    pod = cri.pod(namespaces={"network": pb.NODE, "pid": pb.NODE, "ipc": pb.NODE})
    assert cri.call("PodSandboxStatus", pod_sandbox_id=pod).status.network.ip == ""
    options = pb.NamespaceOption(network=pb.NODE, pid=pb.NODE, ipc=pb.NODE)
    script = "for n in net pid ipc uts; do readlink /proc/self/ns/$n; done; sleep 300 & exit 0"
    _, output = cri.run("sh", "-c", script, pod=pod, security={"namespace_options": options})
    kinds = ("net", "pid", "ipc", "uts")
    assert output.split() == [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in kinds]


def test_images_by_the_cri(cri: Client) -> None:
    [image] = [i for i in cri.call("ListImages").images if i.id == cri.image]
    assert image.size > 100_000
    assert cri.call("ImageStatus", image=pb.ImageSpec(image=cri.image)).image.id == cri.image
    assert not cri.call("ImageStatus", image=pb.ImageSpec(image="no/such:image")).HasField("image")
    usage = cri.call("ImageFsInfo").image_filesystems[0]
    assert usage.used_bytes.value > 100_000 and usage.fs_id.mountpoint
    pod = cri.pod()
    cri.create(pod, "true")
    with refused(Code.FAILED_PRECONDITION):
        cri.call("RemoveImage", image=pb.ImageSpec(image=cri.image))
    cri.call("RemoveImage", image=pb.ImageSpec(image="no/such:image"))


def test_statistics(cri: Client) -> None:
    pod = cri.pod()
    script = "dd if=/dev/zero of=/big bs=1M count=3 2>/dev/null; while :; do :; done"
    container = cri.start(pod, "sh", "-c", script, resources={"memory_limit_in_bytes": 64 << 20})
    idle = cri.create(pod, "true")
    time.sleep(0.3)
    first = cri.call("ContainerStats", container_id=container).stats
    assert first.cpu.usage_core_nano_seconds.value > 0
    assert 0 < first.memory.working_set_bytes.value < 64 << 20
    assert first.memory.available_bytes.value > 0
    assert first.writable_layer.used_bytes.value >= 3 << 20
    time.sleep(0.2)
    [second] = cri.call("ListContainerStats").stats
    assert second.cpu.usage_core_nano_seconds.value > first.cpu.usage_core_nano_seconds.value
    assert 10**8 < second.cpu.usage_nano_cores.value < 3 * 10**9
    assert not cri.call("ContainerStats", container_id=idle).stats.HasField("cpu")


def test_out_of_memory_is_told(cri: Client) -> None:
    pod = cri.pod()
    hog = "x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo survived"
    status = cri.ended(cri.start(pod, "sh", "-c", hog, resources={"memory_limit_in_bytes": 32 << 20}), 20)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
