"""The daemon is killed at every act on disk and kernel that its calls do: each object is then usable, or gone.

A first life of each kind of pod finds the acts (`kill_server` says what one is); then each has a daemon of its own that
dies there, and its successor is asked: do records, processes, mounts, namespaces, cgroups, leases and directories
agree?  Does what is there work?  Are the names free?  What several kinds of life have in common is died at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.linux.cgroup import Cgroup

from ..cri import external
from ..cri.conftest import Client, close, log_text
from ..images_support import member, picture, tar, write_layout
from ..machine import machine_state
from .kill_server import TELLING_OTHERS

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

CNI = Path("/usr/lib/cni")
FAILURES_MAX = 5
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # what a dead daemon looks like
SETTLE_SECONDS = 5.0


class Server:
    """The forking server, and what it forked as the process that a Client's daemon has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        command = [sys.executable, "-m", "tests.fault.kill_server"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(10) == 0
        self._process.stdout.close()


class Forked:
    """As much of subprocess.Popen as ScratchDaemon uses."""

    def __init__(self, server: Server, pid: int) -> None:
        self.pid, self._server, self._code = pid, server, None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._server.ask(do="poll", pid=self.pid)
        return self._code

    def wait(self, timeout: float = 20) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("daemon", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Mortal(Client):
    """A client whose daemon dies where it is told, while the switch is on."""

    def __init__(self, client: Client, server: Server) -> None:
        super().__init__(client.daemon)
        self.image, self._server = client.image, server
        self.acts, self._switch = self.daemon.directory / "acts", self.daemon.directory / "switch"
        self._switch.write_bytes(b"\0")
        self.layers = names(self.daemon.directory / "root/images/layers")
        layer = tar(member("data", data=os.urandom(2000)))
        self.other = f"oci:{write_layout(self.daemon.directory / 'other', picture(layer))}:latest"

    def start_mortal(self, deadly: str = "", record: str = "") -> None:
        directory = self.daemon.directory
        order = {"config": f"{directory}/crio.conf", "directory": f"{directory}/crio.conf.d"}
        order |= {"log": str(self.daemon.log), "switch": str(self._switch), "deadly": deadly, "record": record}
        self.daemon.process = Forked(self._server, self._server.ask(do="start", **order))  # type: ignore[assignment]
        self.reconnect()

    def switch(self, on: bool) -> None:
        with self._switch.open("r+b") as file:
            file.write(bytes([on]))

    def die(self) -> int:
        """Wait for a daemon that is dying; one that is not gets help.  Its exit code, 0 for the latter."""
        assert self.daemon.process is not None
        try:
            return self.daemon.process.wait(0.3)
        except subprocess.TimeoutExpired:
            self.daemon.process.kill()
            self.daemon.process.wait(10)
            return 0

    def life(self, handler: str, namespaces: dict[str, Any], images: bool) -> None:
        """Every call that changes something, in the order of a pod's life; always by the same names."""
        if images:
            image = self.call("PullImage", image=pb.ImageSpec(image=self.other)).image_ref
            self.call("RemoveImage", image=pb.ImageSpec(image=image))
        ports = [pb.PortMapping(container_port=80, host_port=0)]
        config = self.pod_config("life", namespaces=namespaces, port_mappings=ports)
        pod = self.pod(config, handler=handler)
        container = self.start(pod, "sleep", "600", name="life")
        resources = pb.LinuxContainerResources(cpu_shares=77)
        self.call("UpdateContainerResources", container_id=container, linux=resources)
        self.call("StopContainer", container_id=container, timeout=0)
        self.call("RemoveContainer", container_id=container)
        self.start(pod, "sleep", "600", name="left")  # stopped with its pod
        self.call("StopPodSandbox", pod_sandbox_id=pod)
        self.call("RemovePodSandbox", pod_sandbox_id=pod)

    def assert_agreement(self) -> None:
        """What lives has all that it needs, what is recorded may have it (a removal that was cut short has taken some
        of it already), and nothing else is there."""
        pods = {pod.id: pod for pod in self.pods()}
        containers = {container.id: container for container in self.containers()}
        live = {c.id for c in containers.values() if c.state in (pb.CONTAINER_CREATED, pb.CONTAINER_RUNNING)}
        root, run = self.daemon.directory / "root", self.daemon.directory / "run"
        ready = {pod.id for pod in pods.values() if pod.state == pb.SANDBOX_READY}
        assert ready <= names(root / "sandboxes") <= set(pods)
        assert live <= names(root / "containers") <= set(pods) | set(containers)
        assert live <= names(run / "containers") <= ready | set(containers)
        assert names(run / "sandboxes") == ready
        for kind in ("net", "ipc", "uts", "user"):
            assert names(run / f"{kind}ns") <= ready, kind
        assert names(run / "netns") == ready
        # A start does not wait for plugins, which may hang, to let go of a pod that is undone.
        self.until(lambda: self.attached() <= ready | set(pods), 10)
        for container in containers.values():
            if container.state == pb.CONTAINER_RUNNING:
                info = self.call("ContainerStatus", container_id=container.id, verbose=True).info["info"]
                assert Path(f"/proc/{json.loads(info)['pid']}").exists()
        known = set(pods) | set(containers)
        cgroups = {Path(name).name for name in machine_state(self.daemon.directory.name)["cgroups"]}
        strange = {name for name in cgroups if name.startswith("crio-") and len(name) > 60} - {
            f"crio-{i}" for i in known
        }
        assert not strange, f"cgroups {strange}"

    def attached(self) -> set[str]:
        """Pods by the leases of either kind of network."""
        found = set()
        leases = self.daemon.directory / "leases"
        for file in leases.glob("*/*.*.*.*"):
            with suppress(FileNotFoundError):  # it has just been released
                found.add(file.read_text().split()[0])
        return found

    def assert_usable(self) -> None:
        for container in self.containers():
            if container.state == pb.CONTAINER_CREATED:
                self.call("StartContainer", container_id=container.id)
            if self.status(container.id).state == pb.CONTAINER_RUNNING:
                assert self.exec(container.id, "echo", "usable").stdout == b"usable\n"
                assert log_text(self.status(container.id).log_path) == ""
            self.call("StopContainer", container_id=container.id, timeout=0)
            assert self.status(container.id).state == pb.CONTAINER_EXITED
        for pod in self.pods():
            if pod.state == pb.SANDBOX_READY:
                assert self.run("echo", "usable", pod=pod.id) == (0, "usable\n")
        for image in self.call("ListImages").images:
            if image.id != self.image:
                assert self.call("ImageStatus", image=pb.ImageSpec(image=image.id)).image.size > 0

    def clean(self) -> None:
        """Remove everything; then there is nothing left of it."""
        self.remove_pods()
        for image in self.call("ListImages").images:
            if image.id != self.image:
                self.call("RemoveImage", image=pb.ImageSpec(image=image.id))
        assert self.pods() == [] and self.containers() == []

        def left() -> Any:
            named = machine_state(self.daemon.directory.name)
            root, run = self.daemon.directory / "root", self.daemon.directory / "run"
            found = {what: set(named[what]) for what in ("mounts", "namespace pins")}
            found["cgroups"] = {name for name in named["cgroups"] if len(Path(name).name) > 60}
            for place in (root / "containers", root / "sandboxes", run / "containers", run / "sandboxes"):
                found[str(place)] = names(place)
            found["temporary"] = names(root / "images/tmp")
            found["leases"] = self.attached()
            found["ports"] = names(Path(f"/sys/class/net/{self.daemon.bridge}/brif"))
            found["layers"] = names(root / "images/layers") - self.layers
            return {what: some for what, some in found.items() if some}

        deadline = time.monotonic() + SETTLE_SECONDS
        while (remains := left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not remains, f"left behind: {remains}"
        Cgroup(self.daemon.cgroup_parent).remove()  # every life is to make it anew, as the first did


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory)) if directory.exists() else set()


LIVES: dict[str, dict[str, Any]] = {
    "builtin": {"handler": "", "namespaces": {"pid": pb.POD}, "images": True},
    "user namespace": {
        "handler": "",
        "namespaces": {
            "pid": pb.POD,
            "userns_options": pb.UserNamespace(
                mode=pb.POD,
                uids=[pb.IDMapping(host_id=300000, length=65536)],
                gids=[pb.IDMapping(host_id=300000, length=65536)],
            ),
        },
        "images": False,
    },
    "runc": {"handler": "runc", "namespaces": {"pid": pb.CONTAINER}, "images": False},
    "CNI plugins": {"handler": "", "namespaces": {"pid": pb.CONTAINER}, "images": False},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def mortals(server: Server, request: pytest.FixtureRequest) -> Iterator[list[Mortal]]:
    """Two, as a life mostly waits for the disk."""
    settings = external.settings("runc").replace('default_runtime = "runc"', "")
    made: list[Mortal] = []
    try:
        for number in range(2):
            client = Client.started(settings)
            made.append(Mortal(client, server))
            client.stop_daemon()
            if request.param == "CNI plugins":
                use_plugins(client.daemon.directory, 2 * (os.getpid() % 64) + number)
        yield made
    finally:
        for mortal in made:
            if mortal.daemon.process is None or mortal.daemon.process.poll() is not None:
                mortal.start_mortal()
            close(mortal)


def use_plugins(directory: Path, number: int) -> None:
    """A chain of plugin programs in place of the native network; links of the host that lead nowhere else."""
    ranges = [[{"subnet": f"10.198.{number}.0/24"}]]
    ipam = {"type": "host-local", "dataDir": f"{directory}/leases", "ranges": ranges}
    chain = [{"type": "ptp", "ipam": ipam}, {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}]
    conflist = {"cniVersion": "1.0.0", "name": "plugins", "plugins": chain}
    (directory / "net.d/05-plugins.conflist").write_text(json.dumps(conflist))
    (directory / "crio.conf.d/60-plugins.conf").write_text(f'[crio.network]\nplugin_dirs = ["{CNI}"]\n')


_died_at: set[str] = set()


@pytest.mark.parametrize(
    ("kind", "mortals"),
    [pytest.param(kind, kind, id=kind.replace(" ", "-")) for kind in LIVES],
    indirect=["mortals"],
)
def test_the_daemon_dies_at_every_act(kind: str, mortals: list[Mortal], capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "runc" and shutil.which("runc") is None:
        pytest.skip("needs the Debian package runc")
    if kind == "CNI plugins" and not CNI.is_dir():
        pytest.skip("needs the Debian package containernetworking-plugins")
    began = time.monotonic()
    points = find_points(mortals[0], LIVES[kind])
    missed: list[str] = []
    failures: list[str] = []
    with reaping(), ThreadPoolExecutor(len(mortals)) as pool:
        for number, mortal in enumerate(mortals):
            pool.submit(die_at, mortal, points[number :: len(mortals)], LIVES[kind], missed, failures)
    with capfd.disabled():
        seconds = time.monotonic() - began
        print(f" [{kind}: killed at {len(points) - len(missed)} of {len(points)} points in {seconds:.0f} s] ", end="")
    assert not failures, "\n".join(failures)
    # Acts of threads that come late (a clean-up, a write that nobody waits for) are not in every life.
    assert len(missed) <= len(points) // 10, missed


@contextmanager
def reaping() -> Iterator[None]:
    """Be what the first process of a machine is to the orphans of a daemon that was killed: a PID namespace ends only
    when all of its dead have been waited for."""
    done = threading.Event()

    def reap() -> None:
        while not done.wait(0.02):
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def die_at(mortal: Mortal, points: list[str], life: dict[str, Any], missed: list[str], failures: list[str]) -> None:
    mortal.start_mortal(points[0])
    for point, following in zip(points, [*points[1:], ""], strict=True):
        try:
            mortal.switch(True)
            try:
                mortal.life(**life)
            except grpc.RpcError as error:
                assert error.code() in GONE, error.details()
            mortal.switch(False)
            if mortal.die() != -signal.SIGKILL:
                missed.append(point)
            mortal.start_mortal(following)
            mortal.assert_agreement()
            mortal.assert_usable()
            mortal.clean()
        except Exception as error:
            failures.append(f"{point}\n  {error}\n{mortal.daemon.log_tail(8)}")
            if len(failures) >= FAILURES_MAX:
                return
            with suppress(AssertionError, grpc.RpcError):
                mortal.clean()  # so that the next one tells of itself


def find_points(mortal: Mortal, life: dict[str, Any]) -> list[str]:
    """The acts of one life that no life before has had; with those that others do for us, also a moment later."""
    mortal.start_mortal(record=str(mortal.acts))
    mortal.switch(True)
    mortal.life(**life)
    mortal.switch(False)
    mortal.clean()
    mortal.die()
    points = [name for name in mortal.acts.read_text().splitlines() if name not in _died_at]
    assert points, "nothing was seen"
    _died_at.update(points)
    later = [f"{name} | a moment later" for name in points if name.partition(": ")[2].split()[0] in TELLING_OTHERS]
    return points + later
