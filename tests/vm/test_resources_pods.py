"""Limits, accounts and devices of containers on cgroup v2, as a kubelet asks the daemon for them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..cri.conftest import Client, refused
from .conftest import daemon

pytestmark = pytest.mark.vm

Code = grpc.StatusCode
MIB = 1 << 20
DISK = Path("/dev/ubda")
SETTINGS = '[crio.runtime]\ncdi_spec_dirs = ["{directory}/cdi"]\n'
EATEN = 40_000_000
EAT = ("dd", "if=/dev/zero", "of=/dev/null", f"bs={EATEN}", "count=1")
HOLD = ("sh", "-c", f"dd if=/dev/zero bs={EATEN} count=1 | sleep 1000")  # dd waits for a reader, with its buffer full


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with daemon(SETTINGS) as client:
        yield client


@pytest.fixture
def swap() -> Iterator[None]:
    subprocess.run(["mkswap", DISK], check=True, capture_output=True)
    subprocess.run(["swapon", DISK], check=True)
    yield
    subprocess.run(["swapoff", DISK], check=True)


def group(cri: Client, container: str) -> Path:
    return Path(f"/sys/fs/cgroup{cri.daemon.cgroup_parent}/crio-{container}")


def files(cri: Client, container: str, *names: str) -> list[str]:
    return [(group(cri, container) / name).read_text().strip() for name in names]


def sleeper(cri: Client, pod: str = "", **fields: Any) -> str:
    return cri.start(pod or cri.pod(), "sleep", "1000", **fields)


def resize(cri: Client, container: str, **limits: Any) -> None:
    cri.call("UpdateContainerResources", container_id=container, linux=pb.LinuxContainerResources(**limits))


def log_of(cri: Client, container: str) -> str:
    return Path(cri.status(container).log_path).read_text()


def test_limits_are_in_the_kernel_and_change_in_place(cri: Client) -> None:
    names = ("memory.max", "memory.high", "cpu.max", "cpu.max.burst", "cpu.weight", "pids.max")
    asked = {
        "memory_limit_in_bytes": 64 * MIB,
        "cpu_quota": 20_000,
        "cpu_period": 100_000,
        "cpu_shares": 1024,
        "unified": {"memory.high": str(48 * MIB), "cpu.max.burst": "10000", "pids.max": "20"},
    }
    container = sleeper(cri, resources=asked)
    assert files(cri, container, *names) == [
        *(str(64 * MIB), str(48 * MIB), "20000 100000", "10000"),
        *("100", "20"),
    ]
    processes = files(cri, container, "cgroup.procs")
    resize(
        cri,
        container,
        memory_limit_in_bytes=96 * MIB,
        cpu_quota=50_000,
        cpu_shares=2048,
        unified={"memory.high": "max", "pids.max": "30"},
    )
    changed = files(cri, container, *names)
    assert changed[:4] == [str(96 * MIB), "max", "50000 100000", "10000"]
    assert int(changed[4]) > 100 and changed[5] == "30"
    assert files(cri, container, "cgroup.procs") == processes  # the same process
    linux = cri.status(container).resources.linux
    assert (linux.memory_limit_in_bytes, linux.cpu_quota, linux.cpu_shares) == (96 * MIB, 50_000, 2048)
    assert dict(linux.unified) == {"memory.high": "max", "cpu.max.burst": "10000", "pids.max": "30"}


def test_an_idle_container(cri: Client) -> None:
    container = sleeper(cri, resources={"unified": {"cpu.idle": "1"}})
    assert files(cri, container, "cpu.idle", "cpu.weight") == ["1", "0"]


def test_what_the_kernel_refuses_is_named_and_taken_back(cri: Client) -> None:
    pod = cri.pod()
    container = sleeper(cri, pod, resources={"memory_limit_in_bytes": 64 * MIB})
    for file, value in (("rdma.max", "1"), ("cpuset.cpus", "0"), ("memory.high", "much")):
        with refused(Code.INVALID_ARGUMENT, "linux.unified", file):
            resize(cri, container, memory_limit_in_bytes=96 * MIB, unified={file: value})
        assert files(cri, container, "memory.max") == [str(64 * MIB)]
    with refused(Code.INVALID_ARGUMENT, "config.linux.resources.unified", "memory.nothing"):
        sleeper(cri, pod, resources={"unified": {"memory.nothing": "1"}})
    assert [each.id for each in cri.containers()] == [container]
    assert [child.name for child in group(cri, container).parent.iterdir() if child.is_dir()] == [f"crio-{container}"]


def test_what_is_in_use_cannot_be_taken_away(cri: Client) -> None:
    container = cri.start(cri.pod(), *HOLD, resources={"memory_limit_in_bytes": 256 * MIB})

    def stats() -> pb.ContainerStats:
        found: pb.ContainerStats = cri.call("ContainerStats", container_id=container).stats
        return found

    cri.until(lambda: stats().memory.rss_bytes.value > EATEN, 30)
    with refused(Code.INTERNAL, "memory"):
        resize(cri, container, memory_limit_in_bytes=16 * MIB, cpu_shares=300)
    assert files(cri, container, "memory.max", "cpu.weight") == [str(256 * MIB), "100"]
    assert cri.status(container).state == pb.CONTAINER_RUNNING
    told = stats()
    assert EATEN < told.memory.working_set_bytes.value < 256 * MIB
    assert told.memory.available_bytes.value == 256 * MIB - told.memory.working_set_bytes.value
    assert told.memory.rss_bytes.value > EATEN and told.cpu.usage_core_nano_seconds.value > 0


def test_out_of_memory_is_the_reason(cri: Client) -> None:
    limit = {"memory_limit_in_bytes": 24 * MIB, "memory_swap_limit_in_bytes": 24 * MIB}
    container = cri.start(cri.pod(), *EAT, resources=limit)
    status = cri.ended(container, 30)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def test_a_child_that_runs_out_of_memory_does_not_end_its_container(cri: Client) -> None:
    script = f"{' '.join(EAT)}; echo went on; sleep 1000"
    limit = {"memory_limit_in_bytes": 24 * MIB, "memory_swap_limit_in_bytes": 24 * MIB}
    container = cri.start(cri.pod(), "sh", "-c", script, resources=limit)
    cri.until(lambda: "went on" in log_of(cri, container), 30)
    assert "oom_kill 1" in files(cri, container, "memory.events")[0].splitlines()
    assert cri.status(container).state == pb.CONTAINER_RUNNING


@pytest.mark.usefixtures("swap")
def test_swap_holds_what_memory_cannot(cri: Client) -> None:
    limits = {"memory_limit_in_bytes": 24 * MIB, "memory_swap_limit_in_bytes": 80 * MIB}
    container = cri.start(cri.pod(), *HOLD, resources=limits)
    assert files(cri, container, "memory.swap.max") == [str(56 * MIB)]
    cri.until(lambda: int(files(cri, container, "memory.swap.current")[0]) > 8 * MIB, 30)
    swap = cri.call("ContainerStats", container_id=container).stats.swap
    assert swap.swap_usage_bytes.value > 8 * MIB
    assert swap.swap_available_bytes.value == pytest.approx(56 * MIB - swap.swap_usage_bytes.value, abs=4 * MIB)
    assert "oom_kill 0" in files(cri, container, "memory.events")[0].splitlines()


def test_processes_end_at_their_limit(cri: Client) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; wait"
    container = cri.start(cri.pod(), "sh", "-c", script, resources={"unified": {"pids.max": "4"}})
    cri.ended(container, 20)
    assert "can't fork" in log_of(cri, container)


def test_a_disk_is_given_and_slowed_down(cri: Client) -> None:
    number = os.stat(DISK).st_rdev
    device = f"{os.major(number)}:{os.minor(number)}"
    container = sleeper(
        cri,
        devices=[pb.Device(host_path=str(DISK), container_path="/dev/disk", permissions="rw")],
        resources={"unified": {"io.max": f"{device} wbps={MIB}"}},
    )
    assert files(cri, container, "io.max") == [f"{device} rbps=max wbps={MIB} riops=max wiops=max"]
    began = time.monotonic()
    done = cri.exec(container, "dd", "if=/dev/zero", "of=/dev/disk", "bs=512k", "count=4", "oflag=direct")
    assert done.exit_code == 0, done.stderr
    assert 0.8 < time.monotonic() - began < 20
    resize(cri, container, unified={"io.max": f"{device} wbps=max"})
    assert files(cri, container, "io.max") == [""]


def cdi_device(cri: Client, permissions: str) -> Any:
    document = {
        "cdiVersion": "0.6.0",
        "kind": "example.com/zero",
        "devices": [
            {
                "name": permissions,
                "containerEdits": {
                    "deviceNodes": [{"path": "/dev/given", "hostPath": "/dev/kmsg", "permissions": permissions}]
                },
            }
        ],
    }
    directory = cri.daemon.directory / "cdi"
    directory.mkdir(exist_ok=True)
    (directory / "zero.json").write_text(json.dumps(document))
    return pb.CDIDevice(name=f"example.com/zero={permissions}")


@pytest.mark.parametrize(("permissions", "refusals"), [("r", ["writing"]), ("w", ["reading"]), ("rw", [])])
def test_a_cdi_device_is_open_as_far_as_its_permissions_go(cri: Client, permissions: str, refusals: list[str]) -> None:
    """Root in the container may not do more: the kernel asks a program of ours (eBPF) at each open."""
    container = sleeper(cri, CDI_devices=[cdi_device(cri, permissions)])
    script = "head -c 1 /dev/given > /tmp/x || echo no reading; (echo x > /dev/given) || echo no writing"
    answer = cri.exec(container, "sh", "-c", script)
    assert answer.stdout.decode().splitlines() == [f"no {what}" for what in refusals], answer.stderr
    assert answer.stderr.decode().count("Operation not permitted") == len(refusals), answer.stderr


def test_a_device_that_was_not_given_cannot_be_opened(cri: Client) -> None:
    """Also not by who can make its node."""
    able = {"capabilities": pb.Capability(add_capabilities=["MKNOD"])}
    script = "mknod /tmp/kmsg c 1 11 && (cat /tmp/kmsg || echo refused); mknod /tmp/null c 1 3 && cat /tmp/null"
    answer = cri.exec(sleeper(cri, security=able), "sh", "-c", script)
    assert answer.stdout == b"refused\n" and b"Operation not permitted" in answer.stderr


def test_a_kernel_without_huge_pages_and_cpusets_starts_what_asks_for_them(cri: Client) -> None:
    """As a kubelet does: it names every page size, with a limit of 0 for what a pod does not want."""
    limits = [pb.HugepageLimit(page_size="2MB", limit=0)]
    container = sleeper(cri, resources={"hugepage_limits": limits, "cpuset_cpus": "0"})
    assert cri.status(container).state == pb.CONTAINER_RUNNING
    assert cri.status(container).resources.linux.hugepage_limits == limits


def test_the_accounts_of_a_pod(cri: Client) -> None:
    config = cri.pod_config("accounts")
    config.linux.cgroup_parent = f"{cri.daemon.cgroup_parent}/accounts"
    pod = cri.pod(config)
    busy = cri.start(pod, "sh", "-c", "while :; do :; done")
    sleeper(cri, pod)
    cri.until(lambda: cri.call("ContainerStats", container_id=busy).stats.cpu.usage_core_nano_seconds.value > 2 * 10**8)
    linux = cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux
    assert linux.cpu.usage_core_nano_seconds.value > 2 * 10**8
    assert linux.process.process_count.value == 2 == len(linux.containers)
    kernels = Path(f"/sys/fs/cgroup{config.linux.cgroup_parent}/memory.current").read_text()
    assert linux.memory.usage_bytes.value == pytest.approx(int(kernels), rel=0.2)
    assert not linux.cpu.HasField("psi") and not linux.HasField("io")  # a kernel without PSI: not told, rather than 0
