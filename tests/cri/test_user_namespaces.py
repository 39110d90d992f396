"""Pods with a user namespace of their own (KEP-127), as seen from inside and from the host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused

pytestmark = pytest.mark.root

FIRST = 200000
LENGTH = 65536


def mapping(first: int = FIRST, length: int = LENGTH, inside: int = 0) -> Any:
    return pb.IDMapping(host_id=first, container_id=inside, length=length)


def options(**changes: Any) -> dict[str, Any]:
    fields = {"mode": pb.POD, "uids": [mapping()], "gids": [mapping()], **changes}
    return {"userns_options": pb.UserNamespace(**fields)}


def user_pod(cri: Client, **changes: Any) -> str:
    namespaces = options(**changes.pop("userns", {})) | changes.pop("namespaces", {})
    return cri.pod(namespaces=namespaces, **changes)


def shell(cri: Client, script: str, pod: str = "", **fields: Any) -> str:
    own = pod or user_pod(cri)
    code, output = cri.run("sh", "-c", script, pod=own, **fields)
    if not pod:
        cri.remove_pod(own)
    assert code == 0, output
    return output


def test_root_inside_is_nobody_outside(cri: Client) -> None:
    pod = user_pod(cri)
    container = cri.start(pod, "sleep", "60")
    assert cri.exec(container, "cat", "/proc/self/uid_map").stdout.split() == [b"0", b"200000", b"65536"]
    assert cri.exec(container, "id", "-u").stdout == b"0\n"
    info = cri.call("ContainerStatus", container_id=container, verbose=True).info["info"]
    pid = json.loads(info)["pid"]
    assert os.stat(f"/proc/{pid}").st_uid == FIRST
    assert not os.path.samestat(os.stat(f"/proc/{pid}/ns/user"), os.stat("/proc/self/ns/user"))
    user = cri.status(container).user.linux
    assert (user.uid, user.gid) == (0, 0)


def test_the_images_files_have_their_owners_and_no_layer_was_changed(cri: Client) -> None:
    script = "stat -c '%u:%g' / /bin/busybox /etc/passwd; touch /made; chown 5:6 /made; stat -c '%u:%g' /made"
    output = shell(cri, script)
    assert output == "0:0\n0:0\n0:0\n5:6\n"
    plain = cri.run("stat", "-c", "%u:%g", "/bin/busybox")
    assert plain == (0, "0:0\n")


def test_what_a_container_writes_belongs_to_its_own_ids(cri: Client) -> None:
    pod = user_pod(cri)
    container = cri.start(pod, "sh", "-c", "echo x > /made; chown 7:8 /made; echo >> /etc/passwd; sleep 60")
    upper = cri.daemon.directory / "root/containers" / container / "diff"
    cri.until(lambda: (upper / "etc/passwd").exists() and (upper / "made").stat().st_uid == FIRST + 7)
    assert ((upper / "made").stat().st_gid, (upper / "etc/passwd").stat().st_uid) == (FIRST + 8, FIRST)


def test_the_pods_files_are_its_own(cri: Client) -> None:
    files = "/etc/hosts /etc/hostname /etc/resolv.conf /dev/shm"
    output = shell(cri, f"stat -c %u:%g {files}; echo '1.2.3.4 x' >> /etc/hosts; touch /dev/shm/f && cat /etc/hosts")
    assert output.startswith("0:0\n" * 4) and "1.2.3.4 x" in output


def test_the_namespaces_belong_to_it(cri: Client) -> None:
    """Root in there may change its own network and queues, which takes the namespace's privileges."""
    security = {"capabilities": pb.Capability(add_capabilities=["NET_ADMIN", "SYS_ADMIN"])}
    script = (
        "ip link add dummy0 type dummy 2>&1 || ip addr add 10.9.8.7/32 dev lo; ip addr show dev eth0 | grep -c 'inet ';"
        "hostname other && hostname; ls /sys/class/net | head -1; mount -t tmpfs none /tmp && echo mounted"
    )
    seccomp = pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
    lines = shell(cri, script, security={**security, "seccomp": seccomp}).splitlines()
    assert lines[-4:] in (["1", "other", "eth0", "mounted"], ["1", "other", "dummy0", "mounted"])


def test_sysctls_of_the_pod(cri: Client) -> None:
    pod = user_pod(cri, linux={"sysctls": {"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shm_rmid_forced": "1"}})
    paths = "/proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"
    assert shell(cri, f"cat {paths}", pod) == "81\n1\n"


def test_a_volume_shows_its_own_ids_or_nobodys(cri: Client, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name in ("mapped", "plain"):
        (tmp_path / name).mkdir()
    os.chown(tmp_path / "mapped", 1000, 1001)
    mapped, plain = str(tmp_path / "mapped"), str(tmp_path / "plain")
    mounts = [
        pb.Mount(host_path=mapped, container_path="/mapped", uidMappings=[mapping()], gidMappings=[mapping()]),
        pb.Mount(host_path=plain, container_path="/plain"),
    ]
    script = "stat -c %u:%g /mapped /plain; touch /mapped/new; chown 3:4 /mapped/new; touch /plain/x || echo refused"
    script = f"exec 2>/dev/null; {script}"
    assert shell(cri, script, mounts=mounts) == "1000:1001\n65534:65534\nrefused\n"
    made = (tmp_path / "mapped/new").stat()
    assert (made.st_uid, made.st_gid) == (3, 4)


def test_devices(cri: Client) -> None:
    device = pb.Device(host_path="/dev/null", container_path="/dev/mine", permissions="rw")
    output = shell(cri, "echo x > /dev/null; echo x > /dev/mine && stat -c %t:%T /dev/mine", devices=[device])
    assert output == "1:3\n"


def test_a_shared_pid_namespace(cri: Client) -> None:
    pod = user_pod(cri, namespaces={"pid": pb.POD})
    container = cri.start(pod, "sleep", "60")
    listing = cri.exec(container, "sh", "-c", "cat /proc/1/comm; echo $$").stdout.decode().split()
    assert listing[0] == "crio-pause" and int(listing[1]) > 1


def test_an_ephemeral_container_in_anothers_pid_namespace(cri: Client) -> None:
    pod = user_pod(cri)
    target = cri.start(pod, "sleep", "61")
    security = {"namespace_options": pb.NamespaceOption(pid=pb.TARGET, target_id=target, **options())}
    debug = cri.start(pod, "sleep", "62", security=security)
    assert cri.exec(debug, "cat", "/proc/1/cmdline").stdout == b"sleep\x0061\0"


def test_the_hosts_network(cri: Client) -> None:
    pod = user_pod(cri, namespaces={"network": pb.NODE})
    assert "lo" in shell(cri, "ls /sys/class/net; id -u; cat /proc/self/uid_map", pod)


def test_statistics_and_a_restart_of_the_daemon(fresh: Client) -> None:
    pod = user_pod(fresh)
    container = fresh.start(pod, "sleep", "60")
    assert fresh.call("ContainerStats", container_id=container).stats.cpu.usage_core_nano_seconds.value > 0
    fresh.restart(9)
    assert fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_READY
    assert fresh.exec(container, "id", "-u").stdout == b"0\n"
    second = fresh.start(pod, "sleep", "60")
    assert fresh.exec(second, "cat", "/proc/self/uid_map").stdout.split()[1] == b"200000"
    fresh.remove_pod(pod)
    assert not list((fresh.daemon.directory / "run/userns").iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"userns": {"uids": []}}, ["userns_options.uids", "container_id 0"]),
        ({"userns": {"gids": [mapping(inside=5)]}}, ["userns_options.gids"]),
        ({"userns": {"uids": [mapping(length=0)]}}, ["userns_options.uids[0]"]),
        ({"userns": {"uids": [mapping(2**32 - 5)]}}, ["userns_options.uids[0]"]),
        ({"userns": {"uids": [mapping(), mapping(inside=LENGTH)]}}, ["overlap"]),
        ({"userns": {"mode": pb.CONTAINER}}, ["userns_options.mode"]),
        ({"userns": {"mode": pb.NODE}}, ["takes no mappings"]),
        ({"namespaces": {"pid": pb.NODE}}, ["pid namespace"]),
        ({"namespaces": {"ipc": pb.NODE}}, ["ipc namespace"]),
    ],
)
def test_bad_mappings_are_refused(cri: Client, changes: dict[str, Any], words: list[str]) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        user_pod(cri, **changes)


FIELD = "config.linux.security_context.namespace_options"


def test_a_container_cannot_leave_for_the_hosts_processes(cri: Client) -> None:
    pod = user_pod(cri)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{FIELD}.pid", "NODE", "user namespace"):
        cri.create(pod, "true", security={"namespace_options": pb.NamespaceOption(pid=pb.NODE, **options())})
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{FIELD}.pid"):
        cri.create(pod, "true", security={"namespace_options": pb.NamespaceOption(pid=pb.NODE)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"uids": [mapping(500000)]}, ["userns_options.uids", "0 200000 65536", "0 500000 65536"]),
        ({"gids": [mapping(length=LENGTH - 1)]}, ["userns_options.gids", "0 200000 65535"]),
        ({"mode": pb.NODE, "uids": [], "gids": []}, ["userns_options.mode", "'NODE'", "'POD'"]),
    ],
)
def test_a_container_has_its_pods_mappings(cri: Client, changes: dict[str, Any], words: list[str]) -> None:
    def asking(userns: dict[str, Any]) -> dict[str, Any]:
        return {"security": {"namespace_options": pb.NamespaceOption(pid=pb.CONTAINER, **userns)}}

    pod = user_pod(cri)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        cri.create(pod, "true", **asking(options(**changes)))
    for accepted in (options(), {}):
        assert cri.run("sed", "s/ *//", "/proc/self/uid_map", pod=pod, **asking(accepted))[1].split()[1] == "200000"
    of_the_host = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{FIELD}.userns_options.mode", "'NODE'"):
        cri.create(of_the_host, "true", **asking(options()))
    assert cri.run("true", pod=of_the_host, **asking(options(mode=pb.NODE, uids=[], gids=[])))[0] == 0


def test_namespaces_that_cannot_be_made_leave_nothing(fresh: Client) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.linux.sysctls['net.ipv4.no_such_setting']"):
        user_pod(fresh, linux={"sysctls": {"net.ipv4.no_such_setting": "1"}})
    run = fresh.daemon.directory / "run"
    assert not [pin for kind in ("user", "net", "ipc", "uts") for pin in (run / f"{kind}ns").iterdir()]
    assert not fresh.pods() and user_pod(fresh)


def test_a_file_system_without_mapped_mounts_is_named(cri: Client) -> None:
    """procfs has none, on any kernel."""
    mount = pb.Mount(
        host_path="/proc/tty", container_path="/data", uidMappings=[mapping()], gidMappings=[mapping()], readonly=True
    )
    pod = user_pod(cri)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].host_path", "/proc/tty", "no id-mapped mounts"):
        cri.create(pod, "true", mounts=[mount])
