"""A real daemon in a scratch directory, and a client that says in one line what the CRI needs ten for."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.api.runtime.v1 import api_pb2_grpc as rpc
from crio_native.cli import busybox
from crio_native.cli.scratch import MESSAGE_SIZE, ScratchDaemon

from ..waiting import T, wait_for

SECONDS = 30.0
_numbers = itertools.count()


class Client:
    """The CRI of one daemon.  Metadata that a test does not care about is made up."""

    def __init__(self, daemon: ScratchDaemon) -> None:
        self.daemon = daemon
        self.image = ""
        self.connect()

    @classmethod
    def started(cls, settings: str = "", parent: Path = Path("/var/tmp")) -> Self:
        """Of a new daemon with these settings (see `ScratchDaemon`), which has busybox's image; `close` ends it."""
        daemon = ScratchDaemon(parent, settings)
        try:
            daemon.start()
            client = cls(daemon)
            client.load_image()
        except BaseException:
            daemon.close()
            raise
        return client

    @classmethod
    @contextlib.contextmanager
    def serving(cls, settings: str = "", parent: Path = Path("/var/tmp")) -> Iterator[Self]:
        """As `started`; at the end the daemon stops, and must leave nothing."""
        client = cls.started(settings, parent)
        try:
            yield client
        finally:
            close(client)

    def connect(self) -> None:
        options = [("grpc.max_receive_message_length", MESSAGE_SIZE), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"unix://{self.daemon.socket}", options=options)
        self.runtime = rpc.RuntimeServiceStub(self.channel)
        self.images = rpc.ImageServiceStub(self.channel)

    def call(self, method: str, *, seconds: float = SECONDS, **fields: Any) -> Any:
        """Any call by name; its request is made of the fields, `seconds` is the client's deadline."""
        return self._method(method)(getattr(pb, f"{method}Request")(**fields), timeout=seconds)

    def begin(self, method: str, *, seconds: float = SECONDS, **fields: Any) -> Any:
        """The same without waiting for its answer: a future."""
        return self._method(method).future(getattr(pb, f"{method}Request")(**fields), timeout=seconds)

    def _method(self, name: str) -> Any:
        return getattr(self.images if "Image" in name else self.runtime, name)

    def load_image(self) -> None:
        layout = self.daemon.directory / "layout"
        reference = f"oci:{layout}:busybox" if layout.exists() else busybox.build_layout(layout, "busybox")
        self.image = self.call("PullImage", image=pb.ImageSpec(image=reference)).image_ref

    def pod_config(self, name: str = "", *, uid: str = "uid", attempt: int = 0, **fields: Any) -> Any:
        name = name or f"pod{next(_numbers)}"
        namespaces = fields.pop("namespaces", {})
        linux = fields.pop("linux", {})
        security = pb.LinuxSandboxSecurityContext(
            namespace_options=pb.NamespaceOption(**{"pid": pb.CONTAINER, **namespaces}),
            privileged=fields.pop("privileged", False),
        )
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=uid, namespace="default", attempt=attempt),
            log_directory=fields.pop("log_directory", str(self.daemon.directory / "podlogs" / name)),
            linux=pb.LinuxPodSandboxConfig(cgroup_parent=self.daemon.cgroup_parent, security_context=security, **linux),
            **fields,
        )

    def pod(self, config: Any = None, *, handler: str = "", seconds: float = SECONDS, **fields: Any) -> str:
        config = config or self.pod_config(**fields)
        answer = self.call("RunPodSandbox", config=config, runtime_handler=handler, seconds=seconds)
        return str(answer.pod_sandbox_id)

    def container_config(self, *command: str, name: str = "", attempt: int = 0, **fields: Any) -> Any:
        """security and resources: fields of the linux configuration."""
        name = name or f"container{next(_numbers)}"
        linux = pb.LinuxContainerConfig(
            security_context=pb.LinuxContainerSecurityContext(**fields.pop("security", {})),
            resources=pb.LinuxContainerResources(**fields.pop("resources", {})),
        )
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=attempt),
            image=pb.ImageSpec(image=fields.pop("image", self.image)),
            command=list(command),
            log_path=fields.pop("log_path", f"{name}.log"),
            linux=linux,
            **fields,
        )

    def create(self, pod: str, *command: str, config: Any = None, seconds: float = SECONDS, **fields: Any) -> str:
        config = config or self.container_config(*command, **fields)
        answer = self.call("CreateContainer", pod_sandbox_id=pod, config=config, seconds=seconds)
        return str(answer.container_id)

    def start(self, pod: str, *command: str, **fields: Any) -> str:
        container = self.create(pod, *command, **fields)
        self.call("StartContainer", container_id=container)
        return container

    def status(self, container: str) -> Any:
        return self.call("ContainerStatus", container_id=container).status

    def ended(self, container: str, seconds: float = 10) -> Any:
        """The status of a container once it has ended."""
        return self.until(lambda: (s := self.status(container)).state == pb.CONTAINER_EXITED and s, seconds)

    def run(self, *command: str, pod: str = "", **fields: Any) -> tuple[int, str]:
        """(exit code, output) of a container that runs to its end; its pod is removed unless it was given."""
        own = pod or self.pod()
        try:
            container = self.start(own, *command, **fields)
            status = self.ended(container)
            return status.exit_code, log_text(status.log_path)
        finally:
            if not pod:
                self.remove_pod(own)

    def exec(self, container: str, *command: str, timeout: int = 0) -> Any:
        return self.call("ExecSync", container_id=container, cmd=list(command), timeout=timeout)

    def remove_pod(self, pod: str) -> None:
        self.call("StopPodSandbox", pod_sandbox_id=pod)
        self.call("RemovePodSandbox", pod_sandbox_id=pod)

    def remove_pods(self) -> None:
        for pod in self.pods():
            self.remove_pod(pod.id)

    def pods(self) -> list[Any]:
        return list(self.call("ListPodSandbox").items)

    def containers(self, **filter_: Any) -> list[Any]:
        return list(self.call("ListContainers", filter=pb.ContainerFilter(**filter_)).containers)

    @staticmethod
    def until(condition: Callable[[], T | None], seconds: float = 10) -> T:
        return wait_for(condition, seconds=seconds)

    def stop_daemon(self, number: int = signal.SIGTERM) -> int:
        assert self.daemon.process is not None
        self.daemon.process.send_signal(number)
        return self.daemon.process.wait(20)

    def start_daemon(self, env: dict[str, str] | None = None) -> None:
        """Start the daemon again on the same directories."""
        program = Path(sys.executable).with_name("crio-native")
        directory = self.daemon.directory
        command: list[Path | str] = [
            program,
            "--config",
            directory / "crio.conf",
            "--config-dir",
            directory / "crio.conf.d",
        ]
        with self.daemon.log.open("ab") as log:
            self.daemon.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                env={**os.environ, **(env or {})},
            )
        self.reconnect()

    def reconnect(self) -> None:
        """Wait for a daemon that was just started; gRPC's own way of waiting looks only once a second."""
        self.channel.close()
        self.until(lambda: can_connect(self.daemon.socket), 20)
        self.connect()
        self.call("Version")

    def restart(self, number: int = signal.SIGTERM) -> None:
        self.stop_daemon(number)
        self.start_daemon()


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def log_text(path: str) -> str:
    """The text of a CRI log; a partial record is joined with its rest."""
    result = []
    for line in Path(path).read_text().splitlines():
        _, _, tag, text = line.split(" ", 3)
        result.append(text if tag == "P" else f"{text}\n")
    return "".join(result)


def trapping(cri: Client, pod: str, action: str, **fields: Any) -> str:
    """A container whose shell has set a trap: a first process without one gets no signal at all,
    and one that runc has started may still be runc's own, which TERM ends with code 2."""
    script = f"trap {action}; echo ready; while :; do sleep 0.05; done"
    container = cri.start(pod, "sh", "-c", script, **fields)
    path = cri.status(container).log_path
    cri.until(lambda: "ready" in log_text(path))
    return container


def refused(code: grpc.StatusCode, *words: str) -> Any:
    """`with refused(code, "words that the message must hold"):`"""

    class Refused:
        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            assert isinstance(error, grpc.RpcError), f"not refused ({error!r})"
            assert error.code() is code, f"{error.code()}: {error.details()}"
            for word in words:
                assert word in error.details(), f"{word!r} is not in: {error.details()}"
            return True

    return Refused()


def close(client: Client) -> None:
    client.channel.close()
    problems = client.daemon.close()
    assert not problems, problems
    assert not Path("/sys/class/net", client.daemon.bridge).exists(), "the daemon's bridge is left"


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with Client.serving() as client:
        yield client


@pytest.fixture
def cri(shared: Client) -> Iterator[Client]:
    """One daemon for a module's tests; no pod of a test's stays in it."""
    yield shared
    shared.remove_pods()


@pytest.fixture
def fresh() -> Iterator[Client]:
    """A daemon of the test's own, to be stopped, killed and broken."""
    with Client.serving() as client:
        yield client
