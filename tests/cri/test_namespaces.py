"""Which namespaces a container shares with whom, in every mode; who it runs as; how its mounts propagate."""

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

from .conftest import Client, refused

pytestmark = pytest.mark.root


def pid_of(cri: Client, container: str) -> int:
    info = cri.call("ContainerStatus", container_id=container, verbose=True).info["info"]
    return int(json.loads(info)["pid"])


def same(cri: Client, kind: str, container: str, other: str | None = None) -> bool:
    """Whether two containers, or a container and the host, share a namespace."""
    theirs = f"/proc/{pid_of(cri, other)}" if other else "/proc/self"
    return os.path.samestat(os.stat(f"/proc/{pid_of(cri, container)}/ns/{kind}"), os.stat(f"{theirs}/ns/{kind}"))


def limits(cri: Client, container: str, *names: str) -> list[str]:
    """What the files of these names in the container's group say, where this host has them."""
    top = Path("/sys/fs/cgroup")
    groups = [place / cri.daemon.cgroup_parent.lstrip("/") / f"crio-{container}" for place in (top, *top.iterdir())]
    return [(group / name).read_text().strip() for group in groups for name in names if (group / name).exists()]


def options(**modes: Any) -> dict[str, Any]:
    return {"security": {"namespace_options": pb.NamespaceOption(**modes)}}


@pytest.mark.parametrize(("field", "kind"), [("network", "net"), ("ipc", "ipc")])
@pytest.mark.parametrize("mode", [pb.POD, pb.NODE])
def test_network_and_ipc(cri: Client, field: str, kind: str, mode: int) -> None:
    pod = cri.pod(namespaces={field: mode})
    first, second = (cri.start(pod, "sleep", "60", **options(pid=pb.CONTAINER, **{field: mode})) for _ in range(2))
    assert same(cri, kind, first, second)
    assert same(cri, kind, first) == (mode == pb.NODE)


def test_pid_of_the_container(cri: Client) -> None:
    pod = cri.pod()
    first, second = (cri.start(pod, "sleep", "60", **options(pid=pb.CONTAINER)) for _ in range(2))
    assert not same(cri, "pid", first, second) and not same(cri, "pid", first)
    assert cri.exec(first, "cat", "/proc/1/cmdline").stdout == b"sleep\x0060\0"


def test_pid_of_the_pod(cri: Client) -> None:
    pod = cri.pod(namespaces={"pid": pb.POD})
    first, second = (cri.start(pod, "sleep", number, **options(pid=pb.POD)) for number in ("61", "62"))
    assert same(cri, "pid", first, second) and not same(cri, "pid", first)
    assert b"sleep 62" in cri.exec(first, "ps", "-o", "args").stdout


def test_pid_of_the_node(cri: Client) -> None:
    pod = cri.pod(namespaces={"pid": pb.NODE})
    container = cri.start(pod, "sleep", "60", **options(pid=pb.NODE))
    assert same(cri, "pid", container)
    name = f"/proc/{os.getpid()}/comm"
    assert cri.exec(container, "cat", name).stdout.decode() == Path(name).read_text()


def test_pid_of_a_target(cri: Client) -> None:
    pod, other = cri.pod(), cri.pod()
    target = cri.start(pod, "sleep", "61")
    debug = cri.start(pod, "sleep", "62", **options(pid=pb.TARGET, target_id=target))
    assert same(cri, "pid", debug, target)
    assert cri.exec(debug, "cat", "/proc/1/cmdline").stdout == b"sleep\x0061\0"
    cri.call("StopContainer", container_id=debug)
    assert cri.status(target).state == pb.CONTAINER_RUNNING
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "target_id", "running container of the pod"):
        cri.create(other, "true", **options(pid=pb.TARGET, target_id=target))
    cri.call("StopContainer", container_id=target)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "target_id"):
        cri.create(pod, "true", **options(pid=pb.TARGET, target_id=target))


@pytest.mark.parametrize(
    ("modes", "words"),
    [
        ({"network": pb.CONTAINER}, ["namespace_options.network"]),
        ({"ipc": pb.TARGET}, ["namespace_options.ipc"]),
        ({"pid": pb.TARGET}, ["target_id"]),
        ({"pid": pb.CONTAINER, "target_id": "x"}, ["target_id"]),
        ({"pid": pb.POD}, ["namespace_options.pid", "without a PID namespace"]),
    ],
)
def test_modes_that_there_are_not(cri: Client, modes: dict[str, Any], words: list[str]) -> None:
    pod = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        cri.create(pod, "true", **options(**modes))


@pytest.mark.parametrize("name", ["network", "ipc"])
@pytest.mark.parametrize(("own", "asked"), [("POD", "NODE"), ("NODE", "POD")])
def test_modes_that_are_not_the_pods(cri: Client, name: str, own: str, asked: str) -> None:
    pod = cri.pod(namespaces={name: own})
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"namespace_options.{name}", repr(own), repr(asked)):
        cri.create(pod, "true", **options(pid=pb.CONTAINER, **{name: asked}))
    assert cri.run("true", pod=pod)[0] == 0, "who says nothing has what the pod has"


def test_pid_of_the_node_in_a_pod_with_processes_of_its_own(cri: Client) -> None:
    """As in CRI-O: the pod's network and queues, but the host's processes."""
    container = cri.start(cri.pod(namespaces={"pid": pb.POD}), "sleep", "60", **options(pid=pb.NODE))
    assert same(cri, "pid", container) and not same(cri, "net", container)


@pytest.fixture
def accounts(tmp_path: Path) -> list[Any]:
    """A user who is in two groups of the image's own."""
    tmp_path.chmod(0o755)
    (tmp_path / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/srv:/bin/sh\n")
    (tmp_path / "group").write_text("root:x:0:\nweb:x:1001:\nstaff:x:2000:web\nothers:x:3000:root,web\n")
    return [
        pb.Mount(host_path=str(tmp_path / name), container_path=f"/etc/{name}", readonly=True)
        for name in ("passwd", "group")
    ]


@pytest.mark.parametrize(
    ("policy", "expected"), [(pb.Merge, [1001, 2000, 3000, 4000]), (pb.Strict, [1001, 4000])], ids=["merge", "strict"]
)
def test_supplemental_groups(cri: Client, accounts: list[Any], policy: int, expected: list[int]) -> None:
    security = {
        "run_as_user": pb.Int64Value(value=1000),
        "supplemental_groups": [4000],
        "supplemental_groups_policy": policy,
    }
    pod = cri.pod()
    container = cri.start(pod, "sleep", "60", mounts=accounts, security=security)
    inside = sorted(int(number) for number in cri.exec(container, "id", "-G").stdout.split())
    user = cri.status(container).user.linux
    assert inside == expected == sorted(user.supplemental_groups)
    assert (user.uid, user.gid) == (1000, 1001)


@pytest.fixture
def shared_mount(tmp_path: Path) -> Iterator[Path]:
    """A directory on a shared mount of its own."""
    tmp_path.chmod(0o755)
    place = tmp_path / "volume"
    place.mkdir()
    subprocess.run(["mount", "--bind", place, place], check=True)
    subprocess.run(["mount", "--make-shared", place], check=True)
    yield place
    subprocess.run(["umount", "--recursive", "--lazy", place], check=True)


@pytest.mark.parametrize(
    ("propagation", "in_", "out"),
    [
        (pb.PROPAGATION_PRIVATE, False, False),
        (pb.PROPAGATION_HOST_TO_CONTAINER, True, False),
        (pb.PROPAGATION_BIDIRECTIONAL, True, True),
    ],
    ids=["private", "host-to-container", "bidirectional"],
)
def test_mount_propagation(
    cri: Client, shared_mount: Path, propagation: pb.MountPropagation, in_: bool, out: bool
) -> None:
    pod = cri.pod(privileged=True)
    mount = pb.Mount(host_path=str(shared_mount), container_path="/volume", propagation=propagation)
    container = cri.start(pod, "sleep", "60", mounts=[mount], security={"privileged": True})
    for name in ("host", "inside"):
        (shared_mount / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", shared_mount / "host"], check=True)
    (shared_mount / "host/file").touch()
    assert (cri.exec(container, "test", "-e", "/volume/host/file").exit_code == 0) == in_
    assert cri.exec(container, "mount", "-t", "tmpfs", "none", "/volume/inside").exit_code == 0
    assert os.path.ismount(shared_mount / "inside") == out
    cri.remove_pod(pod)


def test_a_private_mount_cannot_propagate(cri: Client, shared_mount: Path) -> None:
    subprocess.run(["mount", "--make-private", shared_mount], check=True)
    pod = cri.pod()
    for propagation in (pb.PROPAGATION_HOST_TO_CONTAINER, pb.PROPAGATION_BIDIRECTIONAL):
        mount = pb.Mount(host_path=str(shared_mount), container_path="/volume", propagation=propagation)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].host_path", "mount"):
            cri.create(pod, "true", mounts=[mount])


def test_recursive_read_only_and_not(cri: Client, shared_mount: Path) -> None:
    below = shared_mount / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True)
    script = "touch /volume/x || echo refused; touch /volume/below/x && echo below"

    def run(**fields: Any) -> str:
        mount = pb.Mount(host_path=str(shared_mount), container_path="/volume", readonly=True, **fields)
        return cri.run("sh", "-c", f"exec 2>/dev/null; {script}; true", mounts=[mount])[1]

    assert run() == "refused\nbelow\n"
    assert run(recursive_read_only=True) == "refused\n"
    pod = cri.pod()
    for fields in ({"readonly": False}, {"readonly": True, "propagation": pb.PROPAGATION_HOST_TO_CONTAINER}):
        mount = pb.Mount(host_path=str(shared_mount), container_path="/volume", recursive_read_only=True, **fields)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].recursive_read_only"):
            cri.create(pod, "true", mounts=[mount])


def test_an_oom_score_and_limits(cri: Client) -> None:
    resources = {"oom_score_adj": 500, "memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 96 << 20}
    container = cri.start(cri.pod(), "sleep", "60", resources=resources)
    assert cri.exec(container, "cat", "/proc/1/oom_score_adj").stdout == b"500\n"
    assert limits(cri, container, "memory.limit_in_bytes", "memory.max") == [str(64 << 20)]
    assert set(limits(cri, container, "memory.memsw.limit_in_bytes")) <= {str(96 << 20)}  # not every kernel counts swap
    status = cri.status(container).resources.linux
    assert (status.oom_score_adj, status.memory_swap_limit_in_bytes) == (500, 96 << 20)


def test_huge_pages(cri: Client) -> None:
    limit = pb.HugepageLimit(page_size="2MB", limit=4 << 20)
    container = cri.start(cri.pod(), "sleep", "60", resources={"hugepage_limits": [limit]})
    set_ = limits(cri, container, "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max")
    assert set(set_) <= {str(4 << 20)}  # not every kernel has huge pages
    bad = pb.HugepageLimit(page_size="lots", limit=1)
    pod = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.linux.resources.hugepage_limits[0].page_size"):
        cri.create(pod, "true", resources={"hugepage_limits": [bad]})


def test_apparmor_where_there_is_none(cri: Client) -> None:
    if Path("/sys/module/apparmor/parameters/enabled").exists():
        return  # the guest with AppArmor shows it there
    pod = cri.pod()
    local = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="mine")
    for security in ({"apparmor": local}, {"apparmor_profile": "localhost/mine"}):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "AppArmor"):
            cri.create(pod, "true", security=security)
    free = pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    for security in ({"apparmor": free}, {"apparmor": default}, {"apparmor_profile": "runtime/default"}):
        cri.create(pod, "true", security=security)


def test_a_privileged_container_and_the_hosts_devices(cri: Client) -> None:
    pod = cri.pod(privileged=True)
    code, output = cri.run(
        "sh",
        "-c",
        "test -e /dev/kmsg && echo kmsg; cat /proc/keys > /dev/null && echo keys; grep NoNewPrivs /proc/self/status",
        pod=pod,
        security={"privileged": True},
    )
    assert code == 0 and output.splitlines()[:2] == ["kmsg", "keys"]


def test_mount_options(cri: Client, shared_mount: Path) -> None:
    (shared_mount / "program").write_text("#!/bin/sh\necho ran\n")
    (shared_mount / "program").chmod(0o755)
    mount = pb.Mount(host_path=str(shared_mount), container_path="/volume", mount_options=["noexec", "nosuid"])
    script = "/volume/program 2>/dev/null || echo refused; grep ' /volume ' /proc/mounts"
    output = cri.run("sh", "-c", script, mounts=[mount])[1]
    assert output.startswith("refused\n") and {"noexec", "nosuid"} <= set(output.split()[4].split(","))
    pod = cri.pod()
    for option in ("rw", "suid", "shared", "context=x"):
        mount = pb.Mount(host_path=str(shared_mount), container_path="/volume", mount_options=["noexec", option])
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].mount_options[1]", option):
            cri.create(pod, "true", mounts=[mount])
    assert cri.call("Status").features.mount_options
