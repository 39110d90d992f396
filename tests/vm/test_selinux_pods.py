"""Pods under an SELinux policy that the kernel enforces, made by the daemon as a kubelet asks for them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..cri.conftest import Client, refused
from ..oci.selinux_policy import load
from .conftest import daemon

pytestmark = pytest.mark.vm(lsm="selinux", memory="1025M")  # the boot of all tests that load the policy

Code = grpc.StatusCode
PROCESS = "system_u:system_r:container_t"
FILES = "system_u:object_r:container_file_t"
OWN = "system_u:system_r:kernel_t:s0"  # the daemon's: of what is not confined


def prepare_host(directory: Path) -> None:
    """What a host with SELinux has: a policy that is enforced, and /etc/selinux, without which libselinux says no."""
    load(directory)
    if os.path.exists("/etc/selinux/config"):
        return
    (directory / "etc").mkdir()
    options = f"lowerdir=/etc,upperdir={directory}/etc,workdir={directory}/work"
    (directory / "work").mkdir()
    (directory / "etc/selinux").mkdir()
    (directory / "etc/selinux/config").write_text("SELINUX=enforcing\nSELINUXTYPE=tests\n")
    contexts = directory / "etc/selinux/tests/contexts"
    contexts.mkdir(parents=True)
    (contexts / "lxc_contexts").write_text(f'process = "{PROCESS}:s0"\nfile = "{FILES}:s0"\n')
    subprocess.run(["mount", "-t", "overlay", "etc", "-o", options, "/etc"], check=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    prepare_host(tmp_path_factory.mktemp("host"))
    with daemon() as client:
        yield client


def configure(cri: Client, lines: str) -> None:
    (cri.daemon.directory / "crio.conf.d/20-test.conf").write_text(f"[crio.runtime]\n{lines}\n")
    cri.restart()


def pod_with(cri: Client, options: Any = None, **fields: Any) -> str:
    config = cri.pod_config(**fields)
    if options is not None:
        config.linux.security_context.selinux_options.CopyFrom(options)
    return cri.pod(config)


def sleeper(cri: Client, pod: str, options: Any = None, **fields: Any) -> str:
    if options is not None:
        fields["security"] = {**fields.get("security", {}), "selinux_options": options}
    return cri.start(pod, "sleep", "1000", **fields)


def info(cri: Client, container: str) -> Any:
    return json.loads(cri.call("ContainerStatus", container_id=container, verbose=True).info["info"])


def label_of(cri: Client, container: str) -> str:
    """What the kernel says of the container's first process."""
    return Path(f"/proc/{info(cri, container)['pid']}/attr/current").read_text().rstrip("\0\n")


def level_of(cri: Client, container: str) -> str:
    return label_of(cri, container).split(":", 3)[3]


def file_label(cri: Client, container: str, path: str) -> str:
    """The label of a file as the container has it."""
    pid = info(cri, container)["pid"]
    return os.getxattr(f"/proc/{pid}/root{path}", "security.selinux").decode().rstrip("\0")


def volume(directory: Path) -> Path:
    (directory / "volume/deep").mkdir(parents=True)
    (directory / "volume/deep/file").write_text("secret\n")
    return directory / "volume"


def test_each_pod_has_categories_of_its_own(cri: Client) -> None:
    pods = [cri.pod(), cri.pod()]
    first, second, other = (sleeper(cri, pod) for pod in (pods[0], pods[0], pods[1]))
    label = label_of(cri, first)
    assert label.startswith(f"{PROCESS}:s0:c") and label.count(",") == 1
    assert label_of(cri, second) == label != label_of(cri, other)
    linux = info(cri, first)["runtimeSpec"]
    assert linux["process"]["selinuxLabel"] == label
    assert linux["linux"]["mountLabel"] == f"{FILES}:{level_of(cri, first)}"


def test_the_labels_of_what_a_container_finds(cri: Client, tmp_path: Path) -> None:
    memory = pb.Mount(container_path="/memory", host_path=str(tmp_path), selinux_relabel=True)
    container = sleeper(cri, cri.pod(), mounts=[memory])
    wanted = f"{FILES}:{level_of(cri, container)}"
    for path in (
        *("/", "/bin/busybox", "/tmp", "/dev", "/dev/null", "/dev/shm", "/memory"),
        *("/etc/hosts", "/etc/resolv.conf", "/etc/hostname"),
    ):
        assert file_label(cri, container, path) == wanted, path
    script = "cat /etc/hosts /etc/resolv.conf /etc/hostname && echo x > /dev/shm/x && echo y > /tmp/y && cat /dev/shm/x"
    assert cri.exec(container, "sh", "-c", script).exit_code == 0


def test_a_pod_cannot_read_or_write_another_pods_files(cri: Client, tmp_path: Path) -> None:
    path = str(volume(tmp_path))
    owner = sleeper(cri, cri.pod(), mounts=[pb.Mount(container_path="/v", host_path=path, selinux_relabel=True)])
    assert cri.exec(owner, "sh", "-c", "cat /v/deep/file && echo more > /v/made").stdout == b"secret\n"
    wanted = f"{FILES}:{level_of(cri, owner)}"
    for name in ("", "/deep", "/deep/file"):
        assert os.getxattr(path + name, "security.selinux").decode().rstrip("\0") == wanted
    thief = sleeper(cri, cri.pod(), mounts=[pb.Mount(container_path="/v", host_path=path)])
    for command in ("cat /v/deep/file", "echo new > /v/made", "ls /v"):
        answer = cri.exec(thief, "sh", "-c", command)
        assert answer.exit_code != 0 and b"Permission denied" in answer.stderr, command
    code, _ = cri.run("cat", "/v/deep/file", mounts=[pb.Mount(container_path="/v", host_path=path)])
    assert code == 1  # not by its first process either


def test_an_exec_has_the_containers_label(cri: Client) -> None:
    container = sleeper(cri, cri.pod())
    assert cri.exec(container, "cat", "/proc/self/attr/current").stdout.decode().rstrip("\0\n") == label_of(
        cri, container
    )


@pytest.mark.parametrize("privileged", [False, True])
def test_the_pods_first_process_shows_the_label_of_its_files(cri: Client, privileged: bool) -> None:
    pod = pod_with(cri, privileged=privileged, namespaces={"pid": pb.POD})
    level = "s0:c1022,c1023" if privileged else level_of(cri, sleeper(cri, pod))
    told = json.loads(cri.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"])
    mounts = Path(f"/proc/{told['pid']}/mountinfo").read_text()
    assert f',context="{FILES}:{level}",' in mounts


def test_the_pause_process_is_confined_as_its_pod_is(cri: Client) -> None:
    """By a program with the pod's own label: a host's policy lets no container begin with a program of the host."""
    pod = pod_with(cri, namespaces={"pid": pb.POD})
    pid = json.loads(cri.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"])["pid"]
    container = sleeper(cri, pod)
    level = level_of(cri, container)
    assert Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n") == f"{PROCESS}:{level}"
    assert os.getxattr(f"/proc/{pid}/exe", "security.selinux").rstrip(b"\0").decode() == f"{FILES}:{level}"
    told = cri.call("ExecSync", container_id=container, cmd=["/bin/cat", "/proc/1/attr/current"])
    assert told.stdout.rstrip(b"\0\n").decode() == f"{PROCESS}:{level}", told.stderr
    unconfined = pod_with(cri, privileged=True, namespaces={"pid": pb.POD})
    pid = json.loads(cri.call("PodSandboxStatus", pod_sandbox_id=unconfined, verbose=True).info["info"])["pid"]
    assert Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n") == OWN


def test_labels_of_the_request(cri: Client) -> None:
    pod = pod_with(cri, pb.SELinuxOption(level="s0:c5,c9"))
    assert label_of(cri, sleeper(cri, pod)) == f"{PROCESS}:s0:c5,c9"
    own = sleeper(cri, pod, pb.SELinuxOption(level="s0:c1,c2"))
    assert label_of(cri, own) == f"{PROCESS}:s0:c1,c2"
    assert file_label(cri, own, "/") == f"{FILES}:s0:c1,c2"
    mighty = sleeper(cri, pod, pb.SELinuxOption(type="kernel_t"))
    assert label_of(cri, mighty) == "system_u:system_r:kernel_t:s0:c5,c9"


def test_a_label_that_the_policy_does_not_know(cri: Client) -> None:
    unknown = pb.SELinuxOption(type="no_such_t")
    with refused(Code.INVALID_ARGUMENT, "selinux_options", "no_such_t", "policy"):
        pod_with(cri, unknown)
    assert not cri.pods()
    pod = cri.pod()
    for options in (unknown, pb.SELinuxOption(level="s7:c1,c2"), pb.SELinuxOption(level="s0:c5000")):
        with refused(Code.INVALID_ARGUMENT, "selinux_options"):
            sleeper(cri, pod, options)
    assert not cri.containers()


def test_the_hosts_own_directories_are_not_relabelled(cri: Client) -> None:
    mount = pb.Mount(container_path="/v", host_path="/etc/selinux", selinux_relabel=True)
    with refused(Code.INVALID_ARGUMENT, "selinux_relabel", "/etc/selinux"):
        sleeper(cri, cri.pod(), mounts=[mount])


@pytest.mark.parametrize(
    "fields",
    [{"privileged": True}, {"namespaces": {"pid": pb.NODE}}, {"namespaces": {"network": pb.NODE}}],
    ids=["privileged", "host-pid", "host-network"],
)
def test_who_shares_the_host_is_not_confined(cri: Client, fields: Any) -> None:
    security: dict[str, Any] = {}
    if "namespaces" in fields:
        modes = {"pid": pb.CONTAINER, **fields["namespaces"]}
        security["namespace_options"] = pb.NamespaceOption(**modes)
    else:
        security["privileged"] = True
    container = sleeper(cri, pod_with(cri, **fields), security=security)
    assert label_of(cri, container) == OWN
    assert info(cri, container)["runtimeSpec"]["linux"].get("mountLabel", "") == ""


def test_an_image_as_a_volume_can_be_read(cri: Client) -> None:
    mount = pb.Mount(container_path="/image", image=pb.ImageSpec(image=cri.image), readonly=True)
    container = sleeper(cri, cri.pod(), mounts=[mount])
    assert file_label(cri, container, "/image/bin/busybox") == f"{FILES}:{level_of(cri, container)}"
    assert cri.exec(container, "/image/bin/busybox", "true").exit_code == 0


def test_the_daemon_asks_the_distributions_libselinux(cri: Client) -> None:
    assert cri.daemon.process is not None
    maps = Path(f"/proc/{cri.daemon.process.pid}/maps").read_text()
    assert "libselinux.so" in maps and "_selinux." in maps


def test_what_the_configuration_says_of_labels(cri: Client) -> None:
    """Last here: it leaves the daemon with labels switched off."""
    pod = cri.pod()
    before = label_of(cri, sleeper(cri, pod))
    configure(cri, "hostnetwork_disable_selinux = false")
    assert label_of(cri, sleeper(cri, pod)) == before  # levels outlive the daemon
    shared_network = cri.pod(namespaces={"network": pb.NODE})
    options = {"namespace_options": pb.NamespaceOption(pid=pb.CONTAINER, network=pb.NODE)}
    confined = label_of(cri, sleeper(cri, shared_network, security=options))
    assert confined.startswith(f"{PROCESS}:s0:c") and confined != before
    configure(cri, "selinux = false")
    assert label_of(cri, sleeper(cri, pod_with(cri, pb.SELinuxOption(level="s0:c1,c2")))) == OWN
