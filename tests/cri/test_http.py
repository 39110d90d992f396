"""HTTP/1.1 on the CRI socket, beside gRPC: what cAdvisor and CRI-O's tools ask, and clients that do not behave."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import ScratchDaemon
from crio_native.linux import syscalls
from crio_native.linux.cgroup import hierarchy
from crio_native.linux.mounts import MNT_DETACH

from .conftest import Client, close, refused, trapping

pytestmark = pytest.mark.root


class UnixHTTP(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self.path))


def get(cri: Client, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
    connection = UnixHTTP(cri.daemon.socket)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def get_json(cri: Client, path: str) -> Any:
    status, body = get(cri, path)
    assert status == 200, body
    return json.loads(body)


def raw(cri: Client) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(cri.daemon.socket))
    return connection


def test_info_and_config(cri: Client) -> None:
    info = get_json(cri, "/info")
    assert info["storage_driver"] == "overlay" and info["cgroup_driver"] == "cgroupfs"
    assert info["storage_root"] == str(cri.daemon.directory / "root")
    assert info["default_id_mappings"]["uids"][0]["size"] == 2**32 - 1
    status, text = get(cri, "/config")
    assert status == 200
    assert tomllib.loads(text.decode())["crio"]["api"]["listen"] == str(cri.daemon.socket)


def test_a_container_as_cadvisor_reads_it(cri: Client) -> None:
    pod = cri.pod(labels={"io.kubernetes.pod.name": "p"})
    container = cri.start(pod, "sleep", "60", labels={"io.kubernetes.container.name": "c"}, annotations={"x": "y"})
    found = get_json(cri, f"/containers/{container}")
    status = cri.status(container)
    assert Path(f"/proc/{found['pid']}/cgroup").read_text().count(container) >= 1
    assert found["created_time"] == status.created_at and found["log_path"] == status.log_path
    assert found["labels"] == {"io.kubernetes.container.name": "c"} and found["annotations"] == {"x": "y"}
    assert found["sandbox"] == pod and found["image"] == status.image.image
    network = cri.call("PodSandboxStatus", pod_sandbox_id=pod).status.network
    assert found["ip_addresses"] == [network.ip, *(more.ip for more in network.additional_ips)]
    assert found["host_network"] is False
    of_pod = get_json(cri, f"/containers/{pod}")
    assert of_pod["pid"] == found["pid"] and of_pod["labels"] == {
        "io.kubernetes.pod.name": "p",
        "io.kubernetes.container.name": "POD",
    }
    assert (Path(found["root"]) / "diff").is_dir()
    cri.call("StopContainer", container_id=container, timeout=0)
    assert get_json(cri, f"/containers/{container}")["pid"] == 0


def test_a_container_is_known_when_its_cgroup_is_there(cri: Client) -> None:
    """cAdvisor watches the cgroups, asks once, and has no figures for what it was not told of."""
    pod, answers, enough = cri.pod(), dict[str, int](), threading.Event()
    cgroups = list(Path("/sys/fs/cgroup").glob(f"*{cri.daemon.cgroup_parent}"))
    cgroups += [Path(f"/sys/fs/cgroup{cri.daemon.cgroup_parent}")]
    watched = next(directory for directory in cgroups if directory.is_dir())

    def watch() -> None:
        known = set(watched.iterdir())
        while not enough.is_set():
            for new in set(watched.iterdir()) - known:
                known.add(new)
                answers[new.name.removeprefix("crio-")] = get(cri, f"/containers/{new.name.removeprefix('crio-')}")[0]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = [cri.start(pod, "sleep", "60") for _ in range(5)]
        cri.until(lambda: set(made) <= set(answers))
    finally:
        enough.set()
        watcher.join()
    assert {answers[container] for container in made} == {200}


def test_pausing(cri: Client) -> None:
    container = cri.start(cri.pod(), "sh", "-c", "while :; do echo x; sleep 0.01; done")
    log = Path(cri.status(container).log_path)
    cri.until(lambda: log.exists() and log.stat().st_size > 0)
    assert get(cri, f"/unpause/{container}")[0] == 409
    assert get(cri, f"/pause/{container}") == (200, b"200 OK")
    assert get(cri, f"/pause/{container}")[0] == 409
    time.sleep(0.2)
    size = log.stat().st_size
    time.sleep(0.3)
    assert log.stat().st_size == size
    assert get(cri, f"/unpause/{container}") == (200, b"200 OK")
    cri.until(lambda: log.stat().st_size > size)


def test_an_unpause_tells_of_a_frozen_group_above(cri: Client) -> None:
    config = cri.pod_config()
    config.linux.cgroup_parent += "/frozen"
    container = cri.start(cri.pod(config), "sleep", "60")
    above = Path(f"{hierarchy().unified or hierarchy().v1_freezer}{config.linux.cgroup_parent}")
    file, stop, go = ("cgroup.freeze", "1", "0") if hierarchy().unified else ("freezer.state", "FROZEN", "THAWED")
    (above / file).write_text(stop)
    try:
        cri.until(lambda: get(cri, f"/pause/{container}")[0] == 409)  # it is paused
        status, body = get(cri, f"/unpause/{container}")
        assert status == 409 and body.decode().endswith(f"stays paused: frozen above it is {above}\n"), body
    finally:
        (above / file).write_text(go)
    cri.until(lambda: get(cri, f"/pause/{container}")[0] == 200)  # it was not
    assert get(cri, f"/unpause/{container}") == (200, b"200 OK")


def test_no_command_starts_in_a_paused_container(cri: Client) -> None:
    """It would be stopped as it is born, and whoever asked would wait."""
    container = cri.start(cri.pod(), "sleep", "60")
    assert cri.call("ExecSync", container_id=container, cmd=["true"]).exit_code == 0
    assert get(cri, f"/pause/{container}")[0] == 200
    began = time.monotonic()
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, "paused", "unpause it first"):
        cri.call("ExecSync", container_id=container, cmd=["true"], timeout=10)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, "paused", "unpause it first"):
        cri.call("Exec", container_id=container, cmd=["true"], stdout=True)
    assert time.monotonic() - began < 5
    assert get(cri, f"/unpause/{container}")[0] == 200
    assert cri.call("ExecSync", container_id=container, cmd=["true"]).exit_code == 0


def test_a_paused_container_can_be_stopped(cri: Client) -> None:
    container = trapping(cri, cri.pod(), "'exit 3' TERM")
    assert get(cri, f"/pause/{container}")[0] == 200
    began = time.monotonic()
    cri.call("StopContainer", container_id=container, timeout=20)
    assert time.monotonic() - began < 10 and cri.status(container).exit_code == 3
    assert get(cri, f"/pause/{container}")[0] == 409
    pod = cri.pod()
    frozen = cri.start(pod, "sleep", "60")
    assert get(cri, f"/pause/{frozen}")[0] == 200
    cri.remove_pod(pod)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/nothing", 404),
        ("/containers/", 400),
        ("/containers/0000", 404),
        ("/containers/a/b", 404),
        ("/containers/..%2f", 404),
        ("/pause/0000", 404),
    ],
)
def test_what_is_not_there(cri: Client, path: str, status: int) -> None:
    assert get(cri, path)[0] == status


def test_only_get(cri: Client) -> None:
    assert get(cri, "/info", "POST")[0] == 405
    assert get(cri, "/info", "PUT", b"x" * 100)[0] == 413
    assert get(cri, "/info", "HEAD") == (200, b"")


def test_many_requests_on_one_connection(cri: Client) -> None:
    connection = UnixHTTP(cri.daemon.socket)
    for _ in range(50):
        connection.request("GET", "/info")
        assert connection.getresponse().read().startswith(b"{")
    connection.close()


@pytest.mark.parametrize(
    "words",
    [
        b"\0\0\0\0\0",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"x" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000,
    ],
)
def test_nonsense_is_refused_and_hurts_nobody(cri: Client, words: bytes) -> None:
    with raw(cri) as connection:
        try:
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            said = b""
    assert not said or said.startswith(b"HTTP/1.1 4")
    cri.call("Version")


def test_silent_and_slow_clients(cri: Client) -> None:
    """A client that says nothing, or its first word in pieces, holds nobody up."""
    silent = [raw(cri) for _ in range(50)]
    with raw(cri) as slow:
        for byte in b"GET /info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
            slow.sendall(bytes([byte]))
            time.sleep(0.005)
        assert b'"storage_root"' in b"".join(iter(lambda: slow.recv(4096), b""))
    cri.call("Version")
    for connection in silent:
        connection.close()


def test_grpc_passes_whatever_its_size(cri: Client) -> None:
    """Both directions at once, messages larger than any buffer."""
    container = cri.start(cri.pod(), "sleep", "60")
    sizes: list[int] = []

    def read() -> None:
        answer = cri.exec(container, "sh", "-c", "head -c 12000000 /dev/zero | tr '\\0' x")
        sizes.append(len(answer.stdout))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    labels = {f"k{n}": "v" * 60_000 for n in range(100)}
    pod = cri.pod(labels=labels, seconds=60)
    assert dict(cri.call("PodSandboxStatus", pod_sandbox_id=pod).status.labels) == labels
    for thread in threads:
        thread.join(60)
    assert sizes == [12_000_000] * 3


def test_connections_come_and_go(cri: Client) -> None:
    pid = cri.daemon.process.pid  # type: ignore[union-attr]
    descriptors = Path(f"/proc/{pid}/fd")
    cri.call("Version")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        cri.channel.close()
        cri.connect()
        cri.call("Version")
        get(cri, "/info")
    cri.until(lambda: len(list(descriptors.iterdir())) <= before + 4)


def test_the_daemon_stops_although_a_client_stays(fresh: Client) -> None:
    idle = raw(fresh)
    idle.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
    idle.recv(4096)
    began = time.monotonic()
    assert fresh.stop_daemon() == 0
    assert time.monotonic() - began < 4 and not fresh.daemon.socket.exists()
    idle.close()
    fresh.start_daemon()
    assert fresh.call("ListPodSandbox") == pb.ListPodSandboxResponse()


@pytest.fixture
def crios_place() -> Iterator[Client]:
    """A daemon at CRI-O's socket, the only one where cAdvisor asks; its directory is the test's own meanwhile."""
    place = Path("/run/crio")
    made = not place.exists()
    place.mkdir(exist_ok=True)
    syscalls.mount("tmpfs", str(place), "tmpfs", 0)
    daemon = ScratchDaemon(settings=f'[crio.api]\nlisten = "{place}/crio.sock"\n')
    daemon.socket.symlink_to(place / "crio.sock")
    try:
        daemon.start()
        client = Client(daemon)
        client.load_image()
        yield client
        close(client)
    finally:
        daemon.close()
        syscalls.umount2(str(place), MNT_DETACH)
        if made:
            place.rmdir()


def groups(cri: Client, pod: str) -> list[Path]:
    """Of a pod, in all hierarchies."""
    return [Path(f"{mount}{cri.daemon.cgroup_parent}/crio-{pod}") for mount in hierarchy().mounts]


def test_a_pod_without_a_pause_process_has_a_group_that_cadvisor_finds(crios_place: Client) -> None:
    """By it cAdvisor asks for the pod, and counts its network by the pid that it is told."""
    pod = crios_place.pod(namespaces={"pid": pb.CONTAINER})
    assert all(group.is_dir() for group in groups(crios_place, pod))
    assert all((group / "cgroup.procs").read_text() == "" for group in groups(crios_place, pod))
    assert get_json(crios_place, f"/containers/{pod}")["pid"] == 0
    container = crios_place.start(pod, "sleep", "60")
    told = get_json(crios_place, f"/containers/{pod}")
    assert told["pid"] == get_json(crios_place, f"/containers/{container}")["pid"] > 0
    assert "eth0:" in Path(f"/proc/{told['pid']}/net/dev").read_text()
    crios_place.restart(signal.SIGKILL)
    assert all(group.is_dir() for group in groups(crios_place, pod))
    crios_place.remove_pod(pod)
    assert not any(group.exists() for group in groups(crios_place, pod))


def test_the_group_of_a_pod_whose_record_is_lost_goes_with_it(crios_place: Client) -> None:
    pod = crios_place.pod(namespaces={"pid": pb.CONTAINER})
    crios_place.stop_daemon(signal.SIGKILL)
    for file in (crios_place.daemon.directory / "root").glob("state.db*"):
        file.unlink()
    crios_place.start_daemon()
    assert crios_place.pods() == [] and not any(group.exists() for group in groups(crios_place, pod))


def test_where_cadvisor_does_not_ask_no_pod_has_a_group_for_it(cri: Client) -> None:
    pod = cri.pod(namespaces={"pid": pb.CONTAINER})
    assert not any(group.exists() for group in groups(cri, pod))
