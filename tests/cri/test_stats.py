"""Statistics and metrics: every figure against what the test made a container use, or against the kernel's own file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.linux.cgroup import hierarchy

from .conftest import Client, refused

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    """A daemon that has all of cAdvisor's metrics."""
    with Client.serving() as client:
        set_stats(client, 'included_pod_metrics = ["all"]')
        yield client


def set_stats(client: Client, lines: str) -> None:
    (client.daemon.directory / "crio.conf.d/10-stats.conf").write_text(f"[crio.stats]\n{lines}\n")
    client.restart()


def cgroup_parent(cri: Client, name: str) -> dict[str, Any]:
    """The configuration of a pod with a cgroup of its own, as the kubelet gives each pod one."""
    config = cri.pod_config(name)
    config.linux.cgroup_parent = f"{cri.daemon.cgroup_parent}/{name}"
    return {"config": config}


def metric(metrics: Any, name: str) -> list[Any]:
    return [m for m in metrics if m.name == f"container_{name}"]


def value(metrics: Any, name: str) -> int:
    [found] = metric(metrics, name)
    return int(found.value.value)


def test_a_pods_figures_are_its_cgroups(cri: Client) -> None:
    pod = cri.pod(**cgroup_parent(cri, "figures"))
    busy = "head -c 20m /dev/zero > /tmp/data; while :; do :; done"
    containers = [cri.start(pod, "sh", "-c", busy), cri.start(pod, "sleep", "60")]
    cri.until(lambda: cri.call("ContainerStats", container_id=containers[0]).stats.memory.usage_bytes.value > 20 * MIB)
    first = cri.call("PodSandboxStats", pod_sandbox_id=pod).stats
    time.sleep(0.5)
    stats = cri.call("PodSandboxStats", pod_sandbox_id=pod).stats
    assert (stats.attributes.id, stats.attributes.metadata.name) == (pod, "figures")
    linux = stats.linux
    used = linux.cpu.usage_core_nano_seconds.value - first.linux.cpu.usage_core_nano_seconds.value
    passed = linux.cpu.timestamp - first.linux.cpu.timestamp
    assert 0.1 < used / passed < 1.5
    assert linux.cpu.usage_nano_cores.value == pytest.approx(used / passed * 1e9, rel=0.01)
    assert linux.memory.usage_bytes.value > 20 * MIB
    assert linux.process.process_count.value == 2
    assert {c.attributes.id for c in linux.containers} == set(containers)
    of_busy = next(c for c in linux.containers if c.attributes.id == containers[0])
    assert of_busy.writable_layer.used_bytes.value >= 20 * MIB or linux.memory.usage_bytes.value > 20 * MIB
    assert linux.memory.usage_bytes.value >= of_busy.memory.usage_bytes.value
    [listed] = cri.call("ListPodSandboxStats", filter=pb.PodSandboxStatsFilter(id=pod)).stats
    assert listed.attributes.id == pod
    assert not cri.call("ListPodSandboxStats", filter=pb.PodSandboxStatsFilter(label_selector={"a": "b"})).stats


def test_pods_that_share_a_cgroup_are_told_apart(cri: Client) -> None:
    """Whoever names no cgroup for a pod gets the sum of its containers, not of all pods."""
    config = cri.pod_config()
    config.linux.cgroup_parent = ""
    pod = cri.pod(config)
    assert not cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux.HasField("cpu")
    mine = [cri.start(pod, "sleep", "60") for _ in range(2)]
    other = cri.start(cri.pod(), "sleep", "60")
    linux = cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux
    assert linux.process.process_count.value == 2 == len(linux.containers)
    parts = [c.memory.usage_bytes.value for c in linux.containers]
    assert linux.memory.usage_bytes.value == sum(parts) > 0
    assert other not in mine


def test_network_counts_every_byte(cri: Client) -> None:
    pod = cri.pod()
    raw = pb.Capability(add_capabilities=["NET_RAW"])
    container = cri.start(pod, "sleep", "60", security={"capabilities": raw})
    before = cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux.network
    assert before.default_interface.name == "eth0" and not before.interfaces
    gateway = cri.exec(container, "ip", "route").stdout.decode().split("default via ")[1].split()[0]
    ping = cri.exec(container, "ping", "-c", "5", "-s", "1000", gateway)
    assert ping.exit_code == 0, ping.stderr
    after = cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux.network
    for field in ("rx_bytes", "tx_bytes"):
        grown = getattr(after.default_interface, field).value - getattr(before.default_interface, field).value
        assert 5000 < grown < 10000, field
    assert after.timestamp > before.timestamp


def test_a_pod_on_the_hosts_network_has_no_figures_of_it(cri: Client) -> None:
    pod = cri.pod(namespaces={"network": pb.NODE})
    cri.start(pod, "sleep", "60")
    assert not cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux.HasField("network")


def test_pressure_is_the_kernels(cri: Client) -> None:
    """As in the group's files; Total in nanoseconds, which the kernel counts in microseconds."""
    if not Path("/proc/pressure/cpu").exists() or not hierarchy().unified:
        pytest.skip("this kernel counts no pressure")
    pod = cri.pod(**cgroup_parent(cri, "pressed"))
    busy = "while :; do :; done & while :; do :; done & while :; do :; done & while :; do :; done"
    container = cri.start(pod, "sh", "-c", busy)

    def total() -> int:
        return int(cri.call("ContainerStats", container_id=container).stats.cpu.psi.Some.Total)

    cri.until(lambda: total() > 100_000_000)
    file = Path(f"{hierarchy().unified}{cri.daemon.cgroup_parent}/pressed/crio-{container}/cpu.pressure")
    kernel = int(file.read_text().split("total=")[1].split()[0]) * 1000
    assert total() == pytest.approx(kernel, rel=0.5)  # what waits goes on waiting
    stats = cri.call("ContainerStats", container_id=container).stats
    assert stats.io.HasField("psi") and stats.memory.HasField("psi")
    assert cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux.cpu.psi.Some.Total > 50_000_000  # may lag behind


def test_pods_that_have_ended(cri: Client) -> None:
    pod = cri.pod()
    cri.start(pod, "sleep", "60")
    cri.call("StopPodSandbox", pod_sandbox_id=pod)
    assert not cri.call("ListPodSandboxStats").stats
    assert not cri.call("ListPodSandboxMetrics").pod_metrics
    assert not cri.call("PodSandboxStats", pod_sandbox_id=pod).stats.linux.containers
    with refused(grpc.StatusCode.NOT_FOUND, "no-such-pod"):
        cri.call("PodSandboxStats", pod_sandbox_id="no-such-pod")


def test_streams_tell_what_lists_tell(cri: Client) -> None:
    pods = [cri.pod(labels={"n": str(n)}) for n in range(3)]
    containers = [cri.start(pod, "sleep", "60", labels={"n": "x"}) for pod in pods for _ in range(2)]

    def streamed(call: str, field: str, **fields: Any) -> list[Any]:
        answers = getattr(cri.runtime, call)(getattr(pb, f"{call}Request")(**fields), timeout=20)
        return [item for answer in answers for item in getattr(answer, field)]

    assert [p.id for p in streamed("StreamPodSandboxes", "pod_sandboxes")] == [p.id for p in cri.pods()]
    assert streamed("StreamContainers", "containers") == cri.containers()
    one = pb.PodSandboxFilter(label_selector={"n": "1"})
    assert [p.id for p in streamed("StreamPodSandboxes", "pod_sandboxes", filter=one)] == [pods[1]]
    running = pb.ContainerFilter(pod_sandbox_id=pods[2])
    assert {c.id for c in streamed("StreamContainers", "containers", filter=running)} == set(containers[4:])
    assert {s.attributes.id for s in streamed("StreamContainerStats", "container_stats")} == set(containers)
    assert {s.attributes.id for s in streamed("StreamPodSandboxStats", "pod_sandbox_stats")} == set(pods)
    metrics = streamed("StreamPodSandboxMetrics", "pod_sandbox_metrics")
    assert {m.pod_sandbox_id: len(m.container_metrics) for m in metrics} == dict.fromkeys(pods, 2)
    [image] = [i for a in cri.images.StreamImages(pb.StreamImagesRequest(), timeout=20) for i in a.images]
    assert image == cri.call("ListImages").images[0]


def test_metrics_have_descriptors_and_labels(cri: Client) -> None:
    descriptors = {d.name: d for d in cri.call("ListMetricDescriptors").descriptors}
    assert len(descriptors) == 56 and all(d.help for d in descriptors.values())
    pod = cri.pod(name="measured")
    container = cri.start(pod, "sleep", "60", name="app", resources={"memory_limit_in_bytes": 64 * MIB})
    [metrics] = cri.call("ListPodSandboxMetrics").pod_metrics
    [of_container] = metrics.container_metrics
    base = ("id", "image", "namespace", "pod", "container")
    for one in [*metrics.metrics, *of_container.metrics]:
        labels = dict(zip(descriptors[one.name].label_keys, one.label_values, strict=True))
        assert tuple(labels)[:5] == base
        assert (labels["namespace"], labels["pod"]) == ("default", "measured")
        assert one.metric_type == (pb.COUNTER if one.name.endswith(("_total", "failcnt")) else pb.GAUGE)
        assert abs(one.timestamp - time.time_ns()) < 60e9
    assert {m.label_values[4] for m in of_container.metrics} == {"app"}
    assert {m.label_values[0] for m in of_container.metrics} == {container}
    assert {m.label_values[4] for m in metrics.metrics} == {"POD"}
    seen = {m.name for m in [*metrics.metrics, *of_container.metrics]}
    optional = {"blkio", "fs_reads", "fs_writes", "hugetlb", "pressure", "spec_cpu", "memory_max", "memory_kernel"}
    assert {n for n in descriptors if not any(o in n for o in optional)} <= seen


def test_metrics_tell_what_a_container_does(cri: Client) -> None:
    pod = cri.pod()
    script = "exec 5</dev/null 6</dev/null; nc -l -p 8080 & while :; do :; done"
    limits = {"cpu_quota": 20_000, "cpu_period": 100_000, "cpu_shares": 512, "memory_limit_in_bytes": 64 * MIB}
    container = cri.start(pod, "sh", "-c", script, resources=limits)

    def read() -> Any:
        [metrics] = cri.call("ListPodSandboxMetrics").pod_metrics
        return metrics.container_metrics[0].metrics

    cri.until(lambda: value(read(), "cpu_usage_seconds_total") >= 1, 60)
    cri.until(lambda: value(read(), "cpu_cfs_throttled_periods_total") > 0, 60)
    found = read()
    assert value(found, "cpu_usage_seconds_total") >= value(found, "cpu_user_seconds_total")
    assert value(found, "cpu_cfs_periods_total") >= value(found, "cpu_cfs_throttled_periods_total")
    assert (value(found, "processes"), value(found, "threads"), value(found, "sockets")) == (2, 2, 1)
    assert value(found, "file_descriptors") >= 2 * 5
    assert value(found, "spec_cpu_quota") == 20_000 and value(found, "spec_cpu_shares") == 512
    assert value(found, "spec_memory_limit_bytes") == 64 * MIB
    assert value(found, "start_time_seconds") == cri.status(container).started_at // 10**9
    [limit] = metric(found, "ulimits_soft")
    assert limit.label_values[-1] == "max_open_files"
    assert limit.value.value == int(cri.exec(container, "sh", "-c", "ulimit -n").stdout)
    assert value(found, "fs_limit_bytes") > value(found, "fs_usage_bytes")
    assert {m.label_values[-2] for m in metric(found, "memory_failures_total")} == {"pgfault", "pgmajfault"}


def test_out_of_memory_is_counted(cri: Client) -> None:
    pod = cri.pod()
    script = "(x=x; while :; do x=$x$x; done); sleep 60"
    cri.start(pod, "sh", "-c", script, resources={"memory_limit_in_bytes": 32 * MIB})

    def count() -> int:
        [metrics] = cri.call("ListPodSandboxMetrics").pod_metrics
        return value(metrics.container_metrics[0].metrics, "oom_events_total")

    assert cri.until(count, 20) == 1


def test_only_the_chosen_groups(fresh: Client) -> None:
    fresh.start(fresh.pod(), "sleep", "60")
    assert [d.name for d in fresh.call("ListMetricDescriptors").descriptors] == ["container_last_seen"]
    [metrics] = fresh.call("ListPodSandboxMetrics").pod_metrics
    assert {m.name for m in metrics.container_metrics[0].metrics} == {"container_last_seen"}
    set_stats(fresh, 'included_pod_metrics = ["oom", "network"]')
    names = {d.name for d in fresh.call("ListMetricDescriptors").descriptors}
    assert len(names) == 10 and "container_oom_events_total" in names
    [metrics] = fresh.call("ListPodSandboxMetrics").pod_metrics
    assert {m.name for m in [*metrics.metrics, *metrics.container_metrics[0].metrics]} == names


def test_a_reading_serves_for_the_collection_period(fresh: Client) -> None:
    set_stats(fresh, "collection_period = 2")
    container = fresh.start(fresh.pod(), "sh", "-c", "while :; do :; done")

    def moment() -> int:
        return int(fresh.call("ContainerStats", container_id=container).stats.cpu.timestamp)

    first = moment()
    assert moment() == first
    assert fresh.until(lambda: moment() != first and moment(), 10) - first >= 2e9
