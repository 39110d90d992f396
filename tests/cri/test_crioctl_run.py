"""crioctl run against a small CRI runtime over a real gRPC socket: what it asks, shows and leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as api

from ..waiting import wait_for
from .crioctl_support import COMMAND, Crioctl, ctl, fake, leftovers
from .fake_runtime import BUSYBOX, FakeRuntime

__all__ = ["ctl", "fake"]


def test_run_passes_output_and_exit_code_on_and_leaves_nothing(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    result = ctl("run", "--rm", "busybox", "sh", "-c", "echo one; printf two; echo three >&2; exit 7")
    assert (result.code, result.out, result.err) == (7, "one\ntwo", "three\n")
    assert fake.runtime.pods == {} and fake.runtime.containers == {}
    assert leftovers(tmp_path) == []


def test_run_without_rm_keeps_container_and_logs_but_stops_the_pod(
    ctl: Crioctl, fake: FakeRuntime, tmp_path: Path
) -> None:
    assert ctl("run", "--name", "web", "busybox", "echo", "hello").code == 0
    (pod,) = fake.runtime.pods.values()
    assert pod.state == api.SANDBOX_NOTREADY
    assert ctl("logs", "web").out == "hello\n"
    assert ctl("rm", "web").code == 0
    assert fake.runtime.pods == {}
    assert leftovers(tmp_path) == []


def test_a_container_that_a_signal_ended_gives_128_plus_its_number(ctl: Crioctl, fake: FakeRuntime) -> None:
    assert ctl("run", "--rm", "busybox", "sh", "-c", "kill -9 $$").code == 137


def test_run_translates_options(ctl: Crioctl, fake: FakeRuntime) -> None:
    result = ctl(
        "run", "-d", "--name", "all", "--handler", "kata", "-e", "A=b=c", "-v", "/etc:/c:ro", "--cap-add", "net_admin",
        "--memory", "64m", "--cpus", "0.5", "--pids", "10", "--user", "1000:1001", "--workdir", "/w", "--host-pid",
        "--host-ipc", "--read-only", "--no-new-privs", "--seccomp", "localhost//p.json", "--sysctl", "net.a=1",
        "--label", "k=v", "--annotation", "x=y", "-p", "8080:80/udp", "-t", "-i",
        "--entrypoint", "echo", "busybox", "-n",
    )  # fmt: skip
    assert result.code == 0
    pod = fake.runtime.asked(api.RunPodSandboxRequest)[0]
    container = fake.runtime.asked(api.CreateContainerRequest)[0].config
    assert (pod.runtime_handler, pod.config.hostname, pod.config.labels["k"]) == ("kata", "all", "v")
    assert pod.config.linux.sysctls["net.a"] == "1"
    assert pod.config.port_mappings[0] == api.PortMapping(protocol=api.UDP, container_port=80, host_port=8080)
    assert (list(container.command), list(container.args)) == (["echo"], ["-n"])
    assert (container.tty, container.stdin, container.working_dir) == (True, True, "/w")
    assert container.image.image == BUSYBOX
    assert container.annotations["x"] == "y"
    assert container.envs[0] == api.KeyValue(key="A", value=b"b=c")
    assert container.mounts[0] == api.Mount(host_path="/etc", container_path="/c", readonly=True)
    limits = container.linux.resources
    assert (limits.memory_limit_in_bytes, limits.cpu_quota, limits.cpu_period) == (64 * 2**20, 50_000, 100_000)
    assert (limits.cpu_shares, limits.unified["pids.max"]) == (512, "10")
    security = container.linux.security_context
    assert (security.run_as_user.value, security.run_as_group.value) == (1000, 1001)
    assert (security.readonly_rootfs, security.no_new_privs) == (True, True)
    assert security.capabilities.add_capabilities == ["NET_ADMIN"]
    assert security.seccomp.localhost_ref == "/p.json"
    assert security.namespace_options == pod.config.linux.security_context.namespace_options
    assert security.namespace_options == api.NamespaceOption(network=api.POD, pid=api.NODE, ipc=api.NODE)


def test_an_empty_entrypoint_sets_the_images_aside(ctl: Crioctl, fake: FakeRuntime) -> None:
    assert ctl("run", "--rm", "--entrypoint", "", "busybox", "echo", "-n").code == 0
    container = fake.runtime.asked(api.CreateContainerRequest)[0].config
    assert (list(container.command), list(container.args)) == (["echo", "-n"], [])
    result = ctl("run", "--rm", "--entrypoint", "", "busybox")
    assert result.code == 2 and "needs a COMMAND" in result.err
    assert len(fake.runtime.asked(api.RunPodSandboxRequest)) == 1


def test_the_default_container_is_confined(ctl: Crioctl, fake: FakeRuntime) -> None:
    assert ctl("run", "--rm", "busybox", "true").code == 0
    security = fake.runtime.asked(api.CreateContainerRequest)[0].config.linux.security_context
    assert security.seccomp.profile_type == api.SecurityProfile.RuntimeDefault
    assert security.HasField("seccomp")
    assert security.namespace_options.pid == api.CONTAINER
    assert not security.privileged


def test_pull_policies(ctl: Crioctl, fake: FakeRuntime) -> None:
    assert ctl("run", "--rm", "--pull", "never", "busybox", "true").code == 0
    refused = ctl("run", "--pull", "never", "other", "true")
    assert (refused.code, fake.runtime.asked(api.PullImageRequest)) == (1, [])
    assert "pull it first" in refused.err
    assert ctl("run", "--rm", "other", "true").code == 0
    assert ctl("run", "--rm", "other", "true").code == 0
    assert len(fake.runtime.asked(api.PullImageRequest)) == 1
    assert ctl("run", "--rm", "--pull", "always", "other", "true").code == 0
    assert len(fake.runtime.asked(api.PullImageRequest)) == 2


@pytest.mark.parametrize("failing", ["RunPodSandbox", "CreateContainer", "StartContainer"])
def test_a_run_that_fails_leaves_nothing(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path, failing: str) -> None:
    fake.runtime.fail[failing] = (grpc.StatusCode.INTERNAL, "step 'mount' failed\non /proc")
    result = ctl("run", "busybox", "true")
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1] == f"crioctl: {failing}: step 'mount' failed on /proc"
    assert fake.runtime.pods == {} and leftovers(tmp_path) == []


def test_a_volume_whose_source_is_missing_is_refused(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    """The runtime would make it as a directory, as the CRI has it, and leave it there."""
    source = tmp_path / "missing"
    result = ctl("run", "-v", f"{source}:/m", "busybox", "true")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"crioctl: volume source {str(source)!r} not found: make it first\n"
    assert fake.runtime.pods == {} and not source.exists() and leftovers(tmp_path) == []


def test_a_command_that_does_not_exist_is_one_line(ctl: Crioctl, fake: FakeRuntime) -> None:
    result = ctl("run", "busybox", "/no/such/program")
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert "/no/such/program" in result.err


def test_a_cleanup_that_fails_does_not_hide_the_cause(ctl: Crioctl, fake: FakeRuntime) -> None:
    fake.runtime.fail["CreateContainer"] = (grpc.StatusCode.INVALID_ARGUMENT, "config.image: no such image")
    fake.runtime.fail["RemovePodSandbox"] = (grpc.StatusCode.INTERNAL, "device or resource busy")
    left, cause = ctl("run", "--name", "web", "busybox", "true").err.splitlines()
    assert left == "crioctl: pod web may be left: RemovePodSandbox: device or resource busy"
    assert cause == "crioctl: CreateContainer: config.image: no such image"


def test_a_container_that_the_runtime_lost_does_not_hang_the_client(fake: FakeRuntime) -> None:
    arguments = [*COMMAND, "run", "busybox", "sh", "-c", "echo a; exec sleep 60"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"a\n"
        (item,) = fake.runtime.containers.values()
        item.state = api.CONTAINER_UNKNOWN
        assert process.wait(15) == 1
        assert process.stderr and b"lost track" in process.stderr.read()


def test_a_taken_name_is_refused(ctl: Crioctl, fake: FakeRuntime) -> None:
    assert ctl("run", "-d", "--name", "web", "busybox", "sleep", "60").code == 0
    result = ctl("run", "--name", "web", "busybox", "true")
    assert result.code == 1 and "crioctl rm web" in result.err
    assert len(fake.runtime.pods) == 1


def test_out_of_memory_is_said(ctl: Crioctl, fake: FakeRuntime) -> None:
    fake.runtime.reason = "OOMKilled"
    assert "--memory" in ctl("run", "--rm", "busybox", "true").err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_stops_and_removes(fake: FakeRuntime, tmp_path: Path, number: signal.Signals) -> None:
    script = "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([*COMMAND, "run", "--rm", "busybox", "sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.read() == b"bye\n"
        assert process.wait(15) == 9
    assert fake.runtime.pods == {} and leftovers(tmp_path) == []


def test_a_pod_that_appears_after_the_client_gave_up_is_removed(
    ctl: Crioctl, fake: FakeRuntime, tmp_path: Path
) -> None:
    fake.runtime.delays["RunPodSandbox"] = 1
    with subprocess.Popen([*COMMAND, "run", "busybox", "true"], stderr=subprocess.PIPE) as process:
        wait_for(lambda: fake.runtime.asked(api.RunPodSandboxRequest))
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 130
    wait_for(lambda: fake.runtime.asked(api.RemovePodSandboxRequest))
    assert fake.runtime.pods == {} and leftovers(tmp_path) == []


def test_run_outlasts_a_restart_of_the_daemon(fake: FakeRuntime) -> None:
    arguments = [*COMMAND, "run", "--rm", "busybox", "sh", "-c", "echo a; sleep 1.5; echo b; exit 4"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"a\n"
        fake.stop()
        time.sleep(0.3)
        fake.start()
        assert (process.stdout.read(), process.wait(20)) == (b"b\n", 4)


def test_a_log_root_that_others_can_write_to_is_refused(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    root = tmp_path / f"crioctl-{os.geteuid()}"
    root.mkdir()
    root.chmod(0o777)
    result = ctl("run", "busybox", "true")
    assert result.code == 1 and str(root) in result.err
    assert fake.runtime.pods == {}
