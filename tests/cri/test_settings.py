"""Options of crio.conf that decide how the node itself runs pods, each by what it does to real ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import mounts_below
from crio_native.errors import Unavailable

from .conftest import Client, refused
from .images import variant

pytestmark = pytest.mark.root
Code = grpc.StatusCode

SETTINGS = """
[crio.runtime]
drop_infra_ctr = false
log_to_journald = true
infra_ctr_cpuset = "1"
[crio.runtime.runtimes.runc]
runtime_path = "/usr/sbin/runc"
runtime_root = "{directory}/run/runc"
[crio.runtime.runtimes.conmon]
runtime_path = "/usr/sbin/runc"
runtime_root = "{directory}/run/conmon"
monitor_path = "/usr/bin/conmon"
[crio.image]
pause_command = "/other"
image_volumes = "{image_volumes}"
[crio.checkpoint_restore]
container_level_enabled = "checkpoint_only"
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with Client.serving(SETTINGS.replace("{image_volumes}", "mkdir")) as client:
        yield client


def info(cri: Client, pod: str) -> dict[str, Any]:
    return dict(json.loads(cri.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"]))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pid_of(cri: Client, container: str) -> int:
    answer = cri.call("ContainerStatus", container_id=container, verbose=True)
    return int(json.loads(answer.info["info"])["pid"])


def test_what_has_no_effect_is_said_at_the_start(cri: Client) -> None:
    file = cri.daemon.directory / "crio.conf.d/10-settings.conf"
    assert f"warning: {file}: crio.image.pause_command: '/other' has no effect: a pod's first" in cri.daemon.log_tail(
        99
    )


def test_every_pod_has_a_pause_process_on_the_cpus_of_the_node(cri: Client) -> None:
    pod = cri.pod()
    pause = info(cri, pod)["pid"]
    assert Path(f"/proc/{pause}/cmdline").read_bytes() == b"pause\0pause\0"
    container = cri.start(pod, "sleep", "600")
    pid = pid_of(cri, container)
    assert os.readlink(f"/proc/{pid}/ns/pid") != os.readlink(f"/proc/{pause}/ns/pid")
    assert [os.sched_getaffinity(each) for each in (pause, parent_of(pause), parent_of(pid))] == [{1}] * 3
    assert os.sched_getaffinity(pid) == os.sched_getaffinity(0), "the container is not bound"


def test_a_pause_process_goes_with_its_pod_under_another_configuration(fresh: Client) -> None:
    drop_in = fresh.daemon.directory / "crio.conf.d/20-infra.conf"
    drop_in.write_text("[crio.runtime]\ndrop_infra_ctr = false\n")
    fresh.restart()
    pod = fresh.pod()
    pause = info(fresh, pod)["pid"]
    drop_in.unlink()
    fresh.restart()
    assert info(fresh, pod)["pid"] == pause
    assert info(fresh, fresh.pod())["pid"] == 0
    fresh.remove_pod(pod)
    assert not Path(f"/proc/{pause}").exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*{fresh.daemon.cgroup_parent}/crio-{pod}"))


@pytest.mark.parametrize("handler", ["builtin", "runc", "conmon"])
def test_monitors_send_to_the_journal(cri: Client, handler: str) -> None:
    """What they send is their own tests' matter; a node without a journal runs containers all the same."""
    container = cri.start(cri.pod(handler=handler), "sh", "-c", "echo out; sleep 600")
    monitor = Path("/proc", str(parent_of(pid_of(cri, container))))
    if handler == "conmon":
        assert b"-l\0journald:\0" in (monitor / "cmdline").read_bytes()
    else:
        kinds = {f"socket:[{line.split()[6]}]": line.split()[4] for line in (monitor / "net/unix").open()}
        assert "0002" in [kinds.get(os.readlink(fd)) for fd in (monitor / "fd").iterdir()], "no datagram socket"
    cri.until(lambda: "out" in Path(cri.status(container).log_path).read_text())


def test_restores_are_switched_off(cri: Client) -> None:
    words = ("switched off", "crio.checkpoint_restore.container_level_enabled", "checkpoint_only")
    with refused(Code.FAILED_PRECONDITION, *words):
        cri.call("RestorePod", checkpoint_path="/tmp/none")


PLACES = ("/data/inner", "/etc", "//tmp/../link/made/", "/mounted", "/outer")
LOOK = "stat -c '%u %a %F' /data /data/inner /link/made; [ -e /etc/passwd ] && echo image; ls /mounted /outer/in"


@pytest.mark.parametrize("handler", ["builtin", "runc"])
def test_declared_volumes_are_made(cri: Client, handler: str) -> None:
    """In the root file system, owned by the command's user, where the image has none and the caller mounts nothing."""
    image = variant(cri, f"declaring-{handler}", Volumes={path: {} for path in PLACES}, User="nobody")
    source = cri.daemon.directory / "source"
    source.mkdir(exist_ok=True)
    (source / "file").touch()
    asked = [pb.Mount(host_path=str(source), container_path=path) for path in ("/mounted", "/outer/in")]
    pod = cri.pod(handler=handler)
    code, output = cri.run("sh", "-c", f"{LOOK}; touch /data/inner/x", pod=pod, image=image, mounts=asked)
    lines = output.splitlines()
    assert code == 0, output
    assert lines[:4] == ["65534 755 directory", "65534 755 directory", "65534 755 directory", "image"]
    assert lines.count("file") == 2
    cri.remove_pod(pod)
    assert [m for m in mounts_below(cri.daemon.directory) if m.endswith(("/rootfs", "/volumes/declared"))] == []


def test_declared_volumes_in_a_user_namespace(cri: Client) -> None:
    """What is made, and what is copied up on the way to it, has owners of the namespace."""
    image = variant(cri, "deep", Volumes={"/var/lib/deep": {}}, User="nobody")
    mapping = pb.IDMapping(host_id=100000, container_id=0, length=65536)
    options = pb.UserNamespace(mode=pb.POD, uids=[mapping], gids=[mapping])
    pod = cri.pod(namespaces={"userns_options": options})
    code, output = cri.run("stat", "-c", "%u:%g", "/var", "/var/lib", "/var/lib/deep", pod=pod, image=image)
    assert (code, output.split()) == (0, ["0:0", "65534:65534", "65534:65534"])


@pytest.mark.parametrize(
    ("volumes", "words"),
    [
        ({"/etc/passwd": {}}, ("image_volume", "/etc/passwd", "ENOTDIR")),
        ({"/dev": {}, "/etc/passwd/deeper": {}}, ("image_volume", "/etc/passwd/deeper", "ENOTDIR")),
        ({f"/{number}": {} for number in range(257)}, ("config.Volumes", "at most 256")),
        ({"/data/..": {}}, ("config.Volumes", "must be below /")),
    ],
)
def test_declared_volumes_that_cannot_be_made(cri: Client, volumes: dict[str, Any], words: tuple[str, ...]) -> None:
    image = variant(cri, f"bad{len(str(volumes))}", Volumes=volumes)
    pod = cri.pod()
    with refused(Code.INVALID_ARGUMENT, "config.image.image", *words):
        cri.create(pod, "true", image=image)
    assert cri.containers() == []
    assert [m for m in mounts_below(cri.daemon.directory) if m.endswith(("/rootfs", "/volumes/declared"))] == []


def test_declared_volumes_are_bound_or_ignored(fresh: Client) -> None:
    """Under `no_pivot`, which moves the root: the container's own mounts are all that its mount table has."""
    drop_in = fresh.daemon.directory / "crio.conf.d/20-volumes.conf"
    text = '[crio.runtime]\nno_pivot = true\n[crio.image]\nimage_volumes = "{}"\n'
    drop_in.write_text(text.format("bind"))
    fresh.restart()
    image = variant(fresh, "declaring", Volumes={"/etc": {}, "/data": {}})
    script = "ls -A /etc; cut -d' ' -f5 /proc/self/mountinfo; touch /data/x; ls /data"
    code, output = fresh.run("sh", "-c", script, image=image)
    names = output.split()
    assert code == 0 and "passwd" not in names and {"/data", "/etc"} < set(names) and names[-1] == "x", output
    assert str(fresh.daemon.directory) not in output
    assert list((fresh.daemon.directory / "root/containers").iterdir()) == []
    hiding = variant(fresh, "hiding", Volumes={"/etc/passwd": {}})
    pod = fresh.pod()
    with refused(Code.INVALID_ARGUMENT, "config.image.image", "/etc/passwd"):
        fresh.create(pod, "true", image=hiding)
    fresh.remove_pod(pod)
    drop_in.write_text(text.format("ignore"))
    fresh.restart()
    assert fresh.run("sh", "-c", "ls -d /data || ls /etc", image=image)[1].count("passwd") == 1


CLASSES = """
Classes:
  slow:
  - Devices: ["{device}", "/dev/none*", "/dev/null"]
    ThrottleReadBps: 1M
    ThrottleWriteIOPS: 10
  - devices: ["{device}"]
    throttleReadBps: 2Mi
  idle: []
"""


def test_classes_of_block_io(fresh: Client) -> None:
    """The container's annotation before the pod's for it, and that before the pod's for all."""
    name = min(path.name for path in Path("/sys/block").iterdir() if Path("/dev", path.name).is_block_device())
    file = fresh.daemon.directory / "blockio.yaml"
    file.write_text(CLASSES.format(device=f"/dev/{name}"))
    drop_in = fresh.daemon.directory / "crio.conf.d/20-blockio.conf"
    drop_in.write_text(f'[crio.runtime]\nblockio_config_file = "{file}"\nblockio_reload = true\n')
    fresh.restart()
    prefix = "blockio.resources.beta.kubernetes.io"
    pod = fresh.pod(annotations={f"{prefix}/pod": "slow", f"{prefix}/container.one": "idle"})
    own = {"io.kubernetes.cri.blockio-class": "slow"}
    numbers = Path(f"/sys/block/{name}/dev").read_text().strip()
    for container, named, limited in (("one", {}, False), ("one", own, True), ("two", {}, True)):
        made = fresh.create(pod, "true", name=container, attempt=len(named), annotations=named)
        group = Path(f"/sys/fs/cgroup/blkio{fresh.daemon.cgroup_parent}/crio-{made}")
        read, write = ((group / f"blkio.throttle.{what}_device").read_text() for what in ("read_bps", "write_iops"))
        assert (read, write) == ((f"{numbers} {2 << 20}\n", f"{numbers} 10\n") if limited else ("", ""))
    with refused(Code.INVALID_ARGUMENT, "io.kubernetes.cri.blockio-class", "'other'", "idle, slow"):
        fresh.create(pod, "true", annotations={"io.kubernetes.cri.blockio-class": "other"})
    file.write_text("Classes: {other: [{Weight: 5}]}\n")
    with refused(Code.FAILED_PRECONDITION, "blockio_config_file", "weight 5 is not within"):
        fresh.create(pod, "true", annotations={"io.kubernetes.cri.blockio-class": "other"})


def test_a_file_of_classes_that_cannot_be_used_stops_the_start() -> None:
    with pytest.raises(Unavailable, match=r"blockio_config_file: /none/blockio.yaml cannot be read: No such"):
        Client.started('[crio.runtime]\nblockio_config_file = "/none/blockio.yaml"\n')


def test_a_group_of_rdt_is_joined_where_the_annotation_is_allowed(fresh: Client) -> None:
    """On a machine without RDT the refusal shows that the runtime was told."""
    drop_in = fresh.daemon.directory / "crio.conf.d/20-rdt.conf"
    drop_in.write_text('[crio.runtime.runtimes.builtin]\nallowed_annotations = ["io.kubernetes.cri.rdt-class"]\n')
    annotations = {"rdt.resources.beta.kubernetes.io/pod": "gold"}
    fresh.create(fresh.pod(annotations=annotations), "true")
    fresh.restart()
    pod = fresh.pod(annotations=annotations)
    with refused(Code.FAILED_PRECONDITION, "linux.intelRdt"):
        fresh.create(pod, "true")
    with refused(Code.INVALID_ARGUMENT, "io.kubernetes.cri.rdt-class", "../x"):
        fresh.create(pod, "true", annotations={"io.kubernetes.cri.rdt-class": "../x"})
