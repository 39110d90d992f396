"""Annotations of latency-sensitive pods, by what they do to real containers and to the node, and what is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode

SETTINGS = """
[crio.runtime]
shared_cpuset = "0"
irqbalance_config_file = "{directory}/irqbalance"
irqbalance_config_restore_file = "{directory}/banned"
[crio.runtime.runtimes.builtin]
exec_cpu_affinity = "first"
allowed_annotations = ["cpu-", "irq-load-balancing.crio.io"]
[crio.runtime.runtimes.closed]
runtime_type = "builtin"
"""
WHOLE = {"cpu_shares": 1024, "cpu_period": 100000, "cpu_quota": 100000, "cpuset_cpus": "1"}
LATENCY = Path("/sys/devices/system/cpu/cpu1/power/pm_qos_resume_latency_us")
INTERRUPTS = Path("/proc/irq/default_smp_affinity")


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with Client.serving(SETTINGS) as client:
        yield client


def group_file(cri: Client, container: str, controller: str, name: str) -> str:
    parent = Path("/sys/fs/cgroup") / controller / cri.daemon.cgroup_parent.lstrip("/")
    return (parent / (f"crio-{container}" if container else "") / name).read_text().strip()


def interrupts() -> set[int]:
    mask = int(INTERRUPTS.read_text().replace(",", ""), 16)
    return {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}


def test_no_quota_and_no_balancing(cri: Client) -> None:
    """The pod's own quota would count for all its containers."""
    parent = Path("/sys/fs/cgroup/cpu") / cri.daemon.cgroup_parent.lstrip("/")
    parent.mkdir(exist_ok=True)
    (parent / "cpu.cfs_quota_us").write_text("200000")
    pod = cri.pod(annotations={"cpu-quota.crio.io": "disable", "cpu-load-balancing.crio.io/one": "disable"})
    one = cri.start(pod, "sleep", "600", name="one", resources=WHOLE)
    two = cri.start(pod, "sleep", "600", name="two", resources=WHOLE)
    for container, balanced in ((one, "0"), (two, "1")):
        assert group_file(cri, container, "cpu", "cpu.cfs_quota_us") == "-1"
        assert group_file(cri, container, "cpuset", "cpuset.sched_load_balance") == balanced
    assert group_file(cri, "", "cpu", "cpu.cfs_quota_us") == "-1"


@pytest.mark.parametrize(
    ("handler", "resources"), [("", {**WHOLE, "cpu_shares": 1500}), ("", {}), ("closed", WHOLE)], ids=str
)
def test_who_has_no_whole_cpus_or_no_permission_is_passed_over(
    cri: Client, handler: str, resources: dict[str, int]
) -> None:
    annotations = {"cpu-quota.crio.io": "disable", "cpu-c-states.crio.io": "disable", "cpu-freq-governor.crio.io": "x"}
    before = LATENCY.read_text()
    container = cri.start(cri.pod(handler=handler, annotations=annotations), "sleep", "600", resources=resources)
    assert LATENCY.read_text() == before
    assert group_file(cri, container, "cpu", "cpu.cfs_quota_us") == ("100000" if resources else "-1")


@pytest.mark.parametrize("end", ["kill", "remove", "daemon"])
def test_cpus_are_tuned_while_the_container_runs(cri: Client, end: str) -> None:
    """Interrupts and deep sleep come back with the container's end, also when no daemon was there to see it."""
    irqbalance = cri.daemon.directory / "irqbalance"
    irqbalance.write_text('# comment\nIRQBALANCE_BANNED_CPUS=""\nIRQBALANCE_ARGS="--quiet"\n')
    latency, cpus = LATENCY.read_text(), interrupts()
    assert 1 in cpus
    pod = cri.pod(annotations={"cpu-c-states.crio.io": "max_latency:55", "irq-load-balancing.crio.io": "disable"})
    container = cri.create(pod, "sleep", "600", resources=WHOLE)
    assert (LATENCY.read_text(), interrupts()) == (latency, cpus), "nothing runs yet"
    cri.call("StartContainer", container_id=container)
    assert LATENCY.read_text() == "55\n" and interrupts() == cpus - {1}
    assert irqbalance.read_text() == '# comment\nIRQBALANCE_BANNED_CPUS="2"\nIRQBALANCE_ARGS="--quiet"\n'
    if end == "daemon":
        cri.stop_daemon(signal.SIGKILL)
        assert LATENCY.read_text() == "55\n"
        os.kill(int(group_file(cri, container, "pids", "cgroup.procs")), signal.SIGKILL)
        cri.until(lambda: (cri.daemon.directory / "run/containers" / container / "exit").exists())
        cri.start_daemon()
        cri.connect()
    elif end == "kill":
        cri.call("StopContainer", container_id=container, timeout=0)
    else:
        cri.remove_pod(pod)
    cri.until(lambda: list((cri.daemon.directory / "run/tuning").iterdir()) == [])
    assert (LATENCY.read_text(), interrupts()) == (latency, cpus)
    assert 'BANNED_CPUS="0"' in irqbalance.read_text()


def test_shared_cpus_and_the_first_of_them_for_execs(cri: Client) -> None:
    pod = cri.pod(annotations={"cpu-shared.crio.io/both": "enable"})
    script = "echo $OPENSHIFT_ISOLATED_CPUS $OPENSHIFT_SHARED_CPUS; sleep 600"
    both = cri.start(pod, "sh", "-c", script, name="both", resources=WHOLE)
    own = cri.start(pod, "sleep", "600", name="own", resources=WHOLE)
    assert group_file(cri, both, "cpuset", "cpuset.cpus") == "0-1"
    assert group_file(cri, own, "cpuset", "cpuset.cpus") == "1"
    cri.call("UpdateContainerResources", container_id=both, linux={"cpuset_cpus": "1"})
    assert group_file(cri, both, "cpuset", "cpuset.cpus") == "0-1", "as a kubelet's CPU manager says it again"
    cri.until(lambda: Path(cri.status(both).log_path).read_text().endswith("F 1 0\n"))
    for container, cpu in ((both, "0"), (own, "1")):
        assert cri.exec(container, "grep", "Cpus_allowed_list", "/proc/self/status").stdout.split()[1].decode() == cpu


def test_one_core_keeps_its_interrupts(cri: Client) -> None:
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").read_text().strip()
    cpus = interrupts()
    pod = cri.pod(annotations={"irq-load-balancing.crio.io": "housekeeping"})
    everything = {**WHOLE, "cpuset_cpus": "0-1", "cpu_shares": 2048}
    container = cri.start(pod, "sh", "-c", "echo $OPENSHIFT_HOUSEKEEPING_CPUS; sleep 600", resources=everything)
    kept = {"0": {0}}.get(siblings, {0, 1})
    assert interrupts() == cpus - ({0, 1} - kept)
    words = ",".join(map(str, sorted(kept)))
    cri.until(lambda: Path(cri.status(container).log_path).read_text().endswith(f"F {words}\n"))
    cri.remove_pod(pod)
    assert interrupts() == cpus


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        ("cpu-c-states.crio.io", "max_latency:-1", ("cpu-c-states.crio.io", "max_latency:MICROSECONDS")),
        ("cpu-c-states.crio.io", "sometimes", ("cpu-c-states.crio.io", "'sometimes'")),
        ("cpu-quota.crio.io", "no", ("cpu-quota.crio.io", "'no'")),
        ("irq-load-balancing.crio.io", "sometimes", ("irq-load-balancing.crio.io", "sometimes")),
        ("cpu-freq-governor.crio.io", "../../x", ("cpu-freq-governor.crio.io", "no name of a governor")),
    ],
)
def test_bad_values_are_refused(cri: Client, annotation: str, value: str, words: tuple[str, ...]) -> None:
    pod = cri.pod(annotations={annotation: value})
    with refused(Code.INVALID_ARGUMENT, *words):
        cri.create(pod, "true", resources=WHOLE)
    assert cri.containers() == []


def test_cpus_that_are_not_named_are_refused(cri: Client) -> None:
    pod = cri.pod(annotations={"cpu-c-states.crio.io": "disable"})
    with refused(Code.INVALID_ARGUMENT, "config.linux.resources.cpuset_cpus"):
        cri.create(pod, "true", resources={"cpu_shares": 1024})


def test_what_the_node_lacks_leaves_all_as_it_was(cri: Client) -> None:
    """No CPU would be left for interrupts, and there are no governors: the start fails, and the container stays."""
    latency, cpus = LATENCY.read_text(), interrupts()
    everything = {**WHOLE, "cpuset_cpus": "0-1", "cpu_shares": 2048}
    annotations = {"cpu-c-states.crio.io": "disable", "irq-load-balancing.crio.io": "disable"}
    container = cri.create(cri.pod(annotations=annotations), "sleep", "600", resources=everything)
    with refused(Code.FAILED_PRECONDITION, "no CPU would be left"):
        cri.call("StartContainer", container_id=container)
    assert (LATENCY.read_text(), interrupts()) == (latency, cpus)
    assert cri.status(container).state == pb.CONTAINER_CREATED
    if not Path("/sys/devices/system/cpu/cpu1/cpufreq").exists():
        pod = cri.pod(annotations={"cpu-freq-governor.crio.io": "performance", **annotations})
        container = cri.create(pod, "sleep", "600", resources=WHOLE)
        with refused(Code.FAILED_PRECONDITION, "cpu-freq-governor.crio.io", "cpufreq/scaling_governor"):
            cri.call("StartContainer", container_id=container)
        assert (LATENCY.read_text(), interrupts()) == (latency, cpus)


def test_after_a_reboot_irqbalance_bans_what_it_did_at_first(cri: Client) -> None:
    irqbalance, saved = (cri.daemon.directory / name for name in ("irqbalance", "banned"))
    irqbalance.write_text('IRQBALANCE_BANNED_CPUS="0"\n')
    saved.unlink(missing_ok=True)
    cri.restart()
    assert saved.read_text() == "0\n"
    irqbalance.write_text('IRQBALANCE_BANNED_CPUS="2"\n')  # of a container that the reboot ended
    cri.restart()
    assert irqbalance.read_text() == 'IRQBALANCE_BANNED_CPUS="0"\n'
