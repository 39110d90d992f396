"""What crio.conf, its drop-ins and the annotations that it allows do to a container, seen from inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused
from .images import variant
from .test_namespaces import limits

pytestmark = pytest.mark.root

CONFIG = """
[crio.runtime]
default_capabilities = ["CHOWN", "KILL"]
add_inheritable_capabilities = true
default_sysctls = ["net.ipv4.ip_unprivileged_port_start=77"]
default_ulimits = ["nofile=100:200"]
default_env = ["FROM_NODE=1"]
default_mounts_file = "{directory}/mounts.conf"
additional_devices = ["/dev/null:/dev/extra:rw"]
allowed_devices = ["/dev/zero"]
device_ownership_from_security_context = true
cdi_spec_dirs = ["{directory}/cdi", "{directory}/cdi2"]
hooks_dir = ["{directory}/hooks"]
absent_mount_sources_to_reject = ["{directory}/absent"]
bind_mount_prefix = "{directory}/host"
timezone = "Etc/GMT-7"
min_injected_gomaxprocs = 2
log_size_max = 4096
pids_limit = 40
read_only = true
[crio.runtime.runtimes.builtin]
runtime_type = "builtin"
allowed_annotations = ["devices.crio.io", "io.kubernetes.cri-o.ShmSize", "umask.crio.io", "unified-cgroup.crio.io"]
default_annotations = {{ "example.com/default" = "yes" }}
[crio.runtime.workloads.management]
activation_annotation = "target.workload.example.com/management"
annotation_prefix = "resources.workload.example.com"
[crio.runtime.workloads.management.resources]
cpushares = 300
cpulimit = 250
"""
HOOK = """#!/bin/sh
cat > {directory}/hooked-"$1"
"""


@pytest.fixture(scope="module")
def configured() -> Iterator[Client]:
    with Client.serving() as client:
        directory = client.daemon.directory
        for name in ("cdi", "cdi2", "hooks", "host"):
            (directory / name).mkdir()
        (directory / "mounted").write_text("from the node\n")
        (directory / "mounts.conf").write_text(f"# comment\n\n{directory}/mounted:/etc/from-node\n")
        program = directory / "hook"
        program.write_text(HOOK.format(directory=directory))
        program.chmod(0o755)
        (directory / "crio.conf.d/10-test.conf").write_text(CONFIG.format(directory=directory))
        client.restart()
        yield client


@pytest.fixture
def cri(configured: Client) -> Iterator[Client]:
    yield configured
    configured.remove_pods()
    for place in ("cdi", "cdi2", "hooks"):
        for file in (configured.daemon.directory / place).iterdir():
            file.unlink()


def shell(cri: Client, script: str, pod: str = "", **fields: Any) -> str:
    code, output = cri.run("sh", "-c", script, pod=pod, **fields)
    assert code == 0, output
    return output


def test_what_every_container_gets(cri: Client) -> None:
    script = (
        "grep -E 'Cap(Inh|Eff)' /proc/self/status | tr -s '\\t\\n' ' '; echo; ulimit -Sn; ulimit -Hn; echo $FROM_NODE;"
        "cat /etc/from-node /proc/sys/net/ipv4/ip_unprivileged_port_start; date +%z; echo $GOMAXPROCS;"
        "touch /x 2>/dev/null || echo ro; touch /run/x /tmp/x /var/tmp/x && echo scratch; ls -l /dev/extra | cut -c1"
    )
    assert shell(cri, script, resources={"cpu_shares": 3000}).splitlines() == [
        "CapInh: 0000000000000021 CapEff: 0000000000000021 ",
        *("100", "200", "1", "from the node", "77", "+0700", "3", "ro", "scratch", "c"),
    ]
    assert shell(cri, "echo $GOMAXPROCS") == "2\n"
    assert shell(cri, "echo $GOMAXPROCS", envs=[pb.KeyValue(key="GOMAXPROCS", value=b"1")]) == "1\n"


def test_a_limit_of_processes(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "60")
    assert limits(cri, container, "pids.max") == ["40"]


def test_the_log_is_bounded(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sh", "-c", "for i in $(seq 500); do echo 0123456789012345678901234567890; done")
    assert Path(cri.ended(container).log_path).stat().st_size <= 4096


def test_the_prefix_of_mounts(cri: Client) -> None:
    host = cri.daemon.directory / "host"
    (host / "data").mkdir(exist_ok=True)
    (host / "data/file").write_text("prefixed\n")
    assert shell(cri, "cat /d/file", mounts=[pb.Mount(host_path="/data", container_path="/d")]) == "prefixed\n"


def test_a_source_that_must_exist(cri: Client) -> None:
    path = str(cri.daemon.directory / "absent")
    pod = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].host_path", "absent_mount_sources_to_reject"):
        cri.create(pod, "true", mounts=[pb.Mount(host_path=path, container_path="/d")])


def test_devices_belong_to_the_user(cri: Client) -> None:
    device = pb.Device(host_path="/dev/zero", container_path="/dev/mine", permissions="r")
    security = {"run_as_user": pb.Int64Value(value=1000), "run_as_group": pb.Int64Value(value=2000)}
    output = shell(cri, "stat -c %u:%g /dev/mine; head -c 2 /dev/mine | wc -c", devices=[device], security=security)
    assert output == "1000:2000\n2\n"


def test_a_directory_of_devices(cri: Client) -> None:
    device = pb.Device(host_path="/dev/net", container_path="/dev/links", permissions="rwm")
    assert shell(cri, "stat -c %t:%T /dev/links/tun", devices=[device]) == "a:c8\n"
    nothing = pb.Device(host_path="/etc", container_path="/dev/x")
    pod = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.devices[0].host_path"):
        cri.create(pod, "true", devices=[nothing])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.devices[0].permissions"):
        cri.create(pod, "true", devices=[pb.Device(host_path="/dev/null", container_path="/dev/x", permissions="rwx")])


def test_annotations_that_are_allowed(cri: Client) -> None:
    annotations = {
        "devices.crio.io": "/dev/zero:/dev/noted:r",
        "io.kubernetes.cri-o.ShmSize": "8Mi",
        "umask.crio.io": "0077",
        "cgroup2-mount-hierarchy-rw.crio.io": "true",  # not allowed, so without effect
    }
    pod = cri.pod(annotations=annotations)
    script = "umask; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; test -c /dev/noted && echo device"
    script += "; mkdir /sys/fs/cgroup/x 2>/dev/null || echo ro"
    assert shell(cri, script, pod) == "0077\n8192\ndevice\nro\n"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("devices.crio.io", "/dev/kmsg", "allowed_devices"),
        ("devices.crio.io", "/etc/passwd", "is no device"),
        ("umask.crio.io", "9", "is no umask"),
    ],
)
def test_annotations_that_ask_too_much(cri: Client, name: str, value: str, words: str) -> None:
    pod = cri.pod(annotations={name: value})
    with refused(grpc.StatusCode.INVALID_ARGUMENT, name, words):
        cri.create(pod, "true")


def test_a_shared_memory_that_is_no_size(cri: Client) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "ShmSize", "is no size"):
        cri.pod(annotations={"io.kubernetes.cri-o.ShmSize": "much"})


def test_a_workload(cri: Client) -> None:
    activation = {"target.workload.example.com/management": ""}
    pod = cri.pod(annotations={**activation, "resources.workload.example.com/other": '{"cpushares": 999}'})
    resources = cri.status(cri.create(pod, "true")).resources.linux
    assert (resources.cpu_shares, resources.cpu_quota, resources.cpu_period) == (300, 25000, 100000)
    config = cri.container_config("true", name="other")
    assert cri.status(cri.create(pod, config=config)).resources.linux.cpu_shares == 999
    assert cri.status(cri.create(cri.pod(), "true")).resources.linux.cpu_shares == 0


def cdi(cri: Client, place: str, name: str, document: Any) -> None:
    (cri.daemon.directory / place / name).write_text(document if isinstance(document, str) else json.dumps(document))


def gpu(value: str = "0") -> dict[str, Any]:
    return {
        "cdiVersion": "0.6.0",
        "kind": "example.com/gpu",
        "containerEdits": {"env": ["GPU_COMMON=1"], "additionalGids": [4242]},
        "devices": [
            {
                "name": value,
                "containerEdits": {
                    "env": [f"GPU={value}"],
                    "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/zero", "permissions": "r"}],
                    "mounts": [{"hostPath": "/etc/hostname", "containerPath": "/etc/gpu"}],
                },
            }
        ],
    }


def test_a_cdi_device_by_field_and_by_annotation(cri: Client) -> None:
    cdi(cri, "cdi", "gpu.json", gpu())
    script = "echo $GPU $GPU_COMMON; test -s /etc/gpu && head -c 3 /dev/gpu0 | wc -c; id -G"
    assert shell(cri, script, CDI_devices=[pb.CDIDevice(name="example.com/gpu=0")]) == "0 1\n3\n0 4242\n"
    assert shell(cri, script, annotations={"cdi.k8s.io/plugin": "example.com/gpu=0"}) == "0 1\n3\n0 4242\n"


def test_a_cdi_file_in_yaml_and_a_later_directory_that_wins(cri: Client) -> None:
    cdi(cri, "cdi", "gpu.json", gpu("0"))
    text = "cdiVersion: 0.6.0\nkind: example.com/gpu\ndevices:\n- name: '0'\n  containerEdits:\n    env: [GPU=later]\n"
    cdi(cri, "cdi2", "other.yaml", text)
    asked = [pb.CDIDevice(name="example.com/gpu=0")]
    assert shell(cri, "echo $GPU", CDI_devices=asked) == "later\n"


def test_a_cdi_hook_runs(cri: Client) -> None:
    document = gpu()
    program = str(cri.daemon.directory / "hook")
    edits = document["devices"][0]["containerEdits"]
    edits["hooks"] = [{"hookName": "createRuntime", "path": program, "args": ["hook", "cdi"]}]
    cdi(cri, "cdi", "gpu.json", document)
    pod = cri.pod()
    container = cri.create(pod, "true", CDI_devices=[pb.CDIDevice(name="example.com/gpu=0")])
    assert json.loads((cri.daemon.directory / "hooked-cdi").read_text())["id"] == container


def test_cdi_devices_that_are_not_there(cri: Client) -> None:
    cdi(cri, "cdi", "gpu.json", gpu())
    cdi(cri, "cdi", "broken.json", "{")
    cdi(cri, "cdi", "deep.json", "[" * 100_000)  # which libyaml and json would follow to the daemon's death
    cdi(cri, "cdi", "deep.yaml", "- " * 100_000)
    pod = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "CDI_devices[0].name", "gpu there are 0", "broken.json"):
        cri.create(pod, "true", CDI_devices=[pb.CDIDevice(name="example.com/gpu=7")])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "is no CDI device"):
        cri.create(pod, "true", CDI_devices=[pb.CDIDevice(name="gpu")])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "cdi.k8s.io/x"):
        cri.create(pod, "true", annotations={"cdi.k8s.io/x": "example.com/none=1"})
    cdi(cri, "cdi", "again.json", gpu())
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "described twice", "again.json"):
        cri.create(pod, "true", CDI_devices=[pb.CDIDevice(name="example.com/gpu=0")])


def test_an_image_cannot_ask_for_a_device(cri: Client) -> None:
    cdi(cri, "cdi", "gpu.json", gpu())
    image = variant(cri, "asking", Labels={"cdi.k8s.io/x": "example.com/gpu=0"})
    assert shell(cri, "echo ${GPU:-none}", image=image) == "none\n"


def hook(cri: Client, name: str, when: Any, stages: list[str]) -> None:
    program = str(cri.daemon.directory / "hook")
    document = {"version": "1.0.0", "hook": {"path": program, "args": ["hook", name]}, "when": when, "stages": stages}
    (cri.daemon.directory / "hooks" / f"{name}.json").write_text(json.dumps(document))


def test_hooks_run_where_their_conditions_hold(cri: Client) -> None:
    hook(cri, "always", {"always": True}, ["createRuntime", "poststop"])
    hook(cri, "command", {"commands": ["^/no", "^sh$"]}, ["createRuntime"])
    hook(cri, "noted", {"annotations": {"^example.com/hook$": "^y"}, "always": True}, ["createRuntime"])
    hook(cri, "mounts", {"hasBindMounts": True}, ["createRuntime"])
    place = cri.daemon.directory

    def ran() -> set[str]:
        names = {path.name.removeprefix("hooked-") for path in place.glob("hooked-*")}
        for path in place.glob("hooked-*"):
            path.unlink()
        return names

    ran()
    shell(cri, "true")
    assert ran() == {"always", "command"}
    noted = cri.pod(annotations={"example.com/hook": "yes"})
    cri.create(noted, "true", mounts=[pb.Mount(host_path="/data", container_path="/d")])
    assert ran() == {"always", "noted", "mounts"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"version": "0.1.0"}',
        '{"version": "1.0.0", "hook": {"path": "/no/such"}, "when": {"always": true}, "stages": ["prestart"]}',
        '{"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"always": true}, "stages": ["never"]}',
        '{"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"commands": ["("]}, "stages": ["prestart"]}',
    ],
)
def test_a_hook_file_that_cannot_be_used_stops_containers(cri: Client, text: str) -> None:
    (cri.daemon.directory / "hooks/bad.json").write_text(text)
    pod = cri.pod()
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "bad.json"):
        cri.create(pod, "true")
    assert not cri.containers()


def test_a_stop_signal_of_the_image_and_of_the_request(cri: Client) -> None:
    image = variant(cri, "signal", StopSignal="SIGUSR1")
    script = "trap 'echo USR1; exit 7' USR1; trap 'echo USR2; exit 8' USR2; echo ready; while :; do sleep 0.05; done"
    pod = cri.pod()
    for asked, expected, code in ((0, pb.SIGNAL_SIGUSR1, 7), (pb.SIGNAL_SIGUSR2, pb.SIGNAL_SIGUSR2, 8)):
        container = cri.start(pod, "sh", "-c", script, image=image, stop_signal=asked)
        log = Path(cri.status(container).log_path)
        cri.until(lambda: log.exists() and "ready" in log.read_text())  # noqa: B023 - it is called at once
        cri.call("StopContainer", container_id=container, timeout=10)
        status = cri.status(container)
        assert (status.exit_code, status.stop_signal) == (code, expected)
