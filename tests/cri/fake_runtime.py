"""A small CRI runtime for the client's tests: pods are entries, containers are processes of the host with a CRI log.

It keeps the CRI's promises that the client relies on (states, idempotence, error codes) and nothing else.
"""

from __future__ import annotations

import subprocess
import threading
import time
import uuid
from concurrent import futures
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from grpc import ServicerContext as Context

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.api.runtime.v1 import api_pb2_grpc

BUSYBOX = "sha256:" + "b" * 64


def now_text() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


class Container:
    def __init__(self, id_: str, request: api.CreateContainerRequest) -> None:
        self.id, self.pod_id, self.config = id_, request.pod_sandbox_id, request.config
        self.log = str(Path(request.sandbox_config.log_directory) / request.config.log_path)
        self.state, self.created = api.CONTAINER_CREATED, time.time_ns()
        self.exit_code = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.waiter = threading.Thread(target=self._wait)
        self.lock = threading.Lock()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self.config.command, *self.config.args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.state = api.CONTAINER_RUNNING
        self.waiter.start()

    def _wait(self) -> None:
        assert self.process and self.process.stdout and self.process.stderr
        pumps = [
            threading.Thread(target=self._pump, args=("stdout", self.process.stdout)),
            threading.Thread(target=self._pump, args=("stderr", self.process.stderr)),
        ]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        code = self.process.wait()
        self.exit_code = code if code >= 0 else 128 - code
        self.state = api.CONTAINER_EXITED

    def _pump(self, stream: str, pipe: Any) -> None:
        for line in pipe:
            tag = "F" if line.endswith(b"\n") else "P"
            with self.lock, open(self.log, "ab") as log:
                log.write(f"{now_text()} {stream} {tag} ".encode() + line.rstrip(b"\n") + b"\n")

    def kill(self, number: int = 9) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def end(self, grace: float) -> None:
        if self.process:
            self.kill(15 if grace else 9)
            try:
                self.process.wait(grace or None)
            except subprocess.TimeoutExpired:
                self.kill()
            self.waiter.join()


class Runtime(api_pb2_grpc.RuntimeServiceServicer):
    """Calls that are not defined here answer UNIMPLEMENTED, as the generated base class does."""

    def __init__(self) -> None:
        self.pods: dict[str, api.PodSandbox] = {}
        self.containers: dict[str, Container] = {}
        self.requests: list[Any] = []
        self.fail: dict[str, tuple[grpc.StatusCode, str]] = {}
        self.delays: dict[str, float] = {}
        self.reason = ""  # why containers end

    def check(self, request: Any, context: Context) -> None:
        self.requests.append(request)
        name = type(request).__name__.removesuffix("Request")
        time.sleep(self.delays.get(name, 0))
        if failure := self.fail.get(name):
            context.abort(*failure)

    def asked(self, kind: type) -> list[Any]:
        return [request for request in self.requests if isinstance(request, kind)]

    def container(self, id_: str, context: Context) -> Container:
        if id_ not in self.containers:
            context.abort(grpc.StatusCode.NOT_FOUND, f"container {id_!r} not found")
        return self.containers[id_]

    def Version(self, request: api.VersionRequest, context: Context) -> api.VersionResponse:
        self.check(request, context)
        return api.VersionResponse(
            version="0.1.0", runtime_name="fake", runtime_version="9.8.7", runtime_api_version="v1"
        )

    def Status(self, request: api.StatusRequest, context: Context) -> api.StatusResponse:
        self.check(request, context)
        return api.StatusResponse(
            status=api.RuntimeStatus(
                conditions=[
                    api.RuntimeCondition(type="RuntimeReady", status=True),
                    api.RuntimeCondition(type="NetworkReady", reason="NoNetwork", message="no \x1b[31mnetwork"),
                ]
            ),
            runtime_handlers=[api.RuntimeHandler(features=api.RuntimeHandlerFeatures(recursive_read_only_mounts=True))],
            info={"config": '{"root": "/var/lib"}', "broken": "{"},
        )

    def RuntimeConfig(self, request: api.RuntimeConfigRequest, context: Context) -> api.RuntimeConfigResponse:
        self.check(request, context)
        return api.RuntimeConfigResponse(linux=api.LinuxRuntimeConfiguration(cgroup_driver=api.CGROUPFS))

    def RunPodSandbox(self, request: api.RunPodSandboxRequest, context: Context) -> api.RunPodSandboxResponse:
        self.check(request, context)
        id_ = uuid.uuid4().hex * 2
        self.pods[id_] = api.PodSandbox(
            id=id_,
            metadata=request.config.metadata,
            created_at=time.time_ns(),
            labels=request.config.labels,
            runtime_handler=request.runtime_handler,
        )
        return api.RunPodSandboxResponse(pod_sandbox_id=id_)

    def StopPodSandbox(self, request: api.StopPodSandboxRequest, context: Context) -> api.StopPodSandboxResponse:
        self.check(request, context)
        for container in list(self.containers.values()):
            if container.pod_id == request.pod_sandbox_id:
                container.end(0)
        if request.pod_sandbox_id in self.pods:
            self.pods[request.pod_sandbox_id].state = api.SANDBOX_NOTREADY
        return api.StopPodSandboxResponse()

    def RemovePodSandbox(self, request: api.RemovePodSandboxRequest, context: Context) -> api.RemovePodSandboxResponse:
        self.check(request, context)
        self.pods.pop(request.pod_sandbox_id, None)
        for container in list(self.containers.values()):
            if container.pod_id == request.pod_sandbox_id:
                del self.containers[container.id]
        return api.RemovePodSandboxResponse()

    def PodSandboxStatus(self, request: api.PodSandboxStatusRequest, context: Context) -> api.PodSandboxStatusResponse:
        self.check(request, context)
        if request.pod_sandbox_id not in self.pods:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such pod")
        pod = self.pods[request.pod_sandbox_id]
        network = api.PodSandboxNetworkStatus(ip="10.9.8.7", additional_ips=[api.PodIP(ip="fd00::7")])
        return api.PodSandboxStatusResponse(
            status=api.PodSandboxStatus(id=pod.id, metadata=pod.metadata, state=pod.state, network=network)
        )

    def ListPodSandbox(self, request: api.ListPodSandboxRequest, context: Context) -> api.ListPodSandboxResponse:
        self.check(request, context)
        wanted = request.filter.label_selector.items()
        return api.ListPodSandboxResponse(
            items=[pod for pod in self.pods.values() if wanted <= dict(pod.labels).items()]
        )

    def CreateContainer(self, request: api.CreateContainerRequest, context: Context) -> api.CreateContainerResponse:
        self.check(request, context)
        id_ = uuid.uuid4().hex * 2
        self.containers[id_] = Container(id_, request)
        return api.CreateContainerResponse(container_id=id_)

    def StartContainer(self, request: api.StartContainerRequest, context: Context) -> api.StartContainerResponse:
        self.check(request, context)
        container = self.container(request.container_id, context)
        try:
            container.start()
        except OSError as error:
            context.abort(grpc.StatusCode.UNKNOWN, f"step 'exec' failed\non {error.filename}")
        return api.StartContainerResponse()

    def StopContainer(self, request: api.StopContainerRequest, context: Context) -> api.StopContainerResponse:
        self.check(request, context)
        self.container(request.container_id, context).end(request.timeout)
        return api.StopContainerResponse()

    def RemoveContainer(self, request: api.RemoveContainerRequest, context: Context) -> api.RemoveContainerResponse:
        self.check(request, context)
        self.containers.pop(request.container_id, None)
        return api.RemoveContainerResponse()

    def ListContainers(self, request: api.ListContainersRequest, context: Context) -> api.ListContainersResponse:
        self.check(request, context)
        return api.ListContainersResponse(
            containers=[
                api.Container(
                    id=item.id,
                    pod_sandbox_id=item.pod_id,
                    metadata=item.config.metadata,
                    image=item.config.image,
                    state=item.state,
                    created_at=item.created,
                )
                for item in self.containers.values()
                if request.filter.pod_sandbox_id in ("", item.pod_id)
            ]
        )

    def ContainerStatus(self, request: api.ContainerStatusRequest, context: Context) -> api.ContainerStatusResponse:
        self.check(request, context)
        item = self.container(request.container_id, context)
        status = api.ContainerStatus(
            id=item.id,
            metadata=item.config.metadata,
            state=item.state,
            exit_code=item.exit_code,
            reason=self.reason,
            log_path=item.log,
        )
        return api.ContainerStatusResponse(status=status, info={"info": '{"pid": 12}'} if request.verbose else {})

    def ExecSync(self, request: api.ExecSyncRequest, context: Context) -> api.ExecSyncResponse:
        self.check(request, context)
        done = subprocess.run(list(request.cmd), capture_output=True, timeout=30, check=False)
        return api.ExecSyncResponse(stdout=done.stdout, stderr=done.stderr, exit_code=done.returncode)

    def ListContainerStats(
        self, request: api.ListContainerStatsRequest, context: Context
    ) -> api.ListContainerStatsResponse:
        self.check(request, context)
        return api.ListContainerStatsResponse(
            stats=[
                api.ContainerStats(
                    attributes=api.ContainerAttributes(id=item.id, metadata=item.config.metadata),
                    cpu=api.CpuUsage(
                        timestamp=time.time_ns(),
                        usage_core_nano_seconds=api.UInt64Value(value=time.time_ns() // 2),
                    ),
                    memory=api.MemoryUsage(usage_bytes=api.UInt64Value(value=3 * 2**20)),
                )
                for item in self.containers.values()
                if item.state == api.CONTAINER_RUNNING
            ]
        )


class Images(api_pb2_grpc.ImageServiceServicer):
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.images = {
            "busybox": api.Image(
                id=BUSYBOX, repo_tags=["docker.io/library/busybox:latest", "busybox:\x1b[2Jevil"], size=4_500_000
            )
        }

    def find(self, name: str) -> api.Image | None:
        return next((image for key, image in self.images.items() if name in (key, image.id)), None)

    def ListImages(self, request: api.ListImagesRequest, context: Context) -> api.ListImagesResponse:
        self.runtime.check(request, context)
        wanted = request.filter.image.image
        return api.ListImagesResponse(
            images=[image for key, image in self.images.items() if wanted in ("", key, image.id)]
        )

    def ImageStatus(self, request: api.ImageStatusRequest, context: Context) -> api.ImageStatusResponse:
        self.runtime.check(request, context)
        return api.ImageStatusResponse(image=self.find(request.image.image))

    def PullImage(self, request: api.PullImageRequest, context: Context) -> api.PullImageResponse:
        self.runtime.check(request, context)
        self.images[request.image.image] = api.Image(id="sha256:" + "c" * 64, size=1)
        return api.PullImageResponse(image_ref="sha256:" + "c" * 64)

    def RemoveImage(self, request: api.RemoveImageRequest, context: Context) -> api.RemoveImageResponse:
        self.runtime.check(request, context)
        self.images = {key: image for key, image in self.images.items() if request.image.image not in (key, image.id)}
        return api.RemoveImageResponse()

    def ImageFsInfo(self, request: api.ImageFsInfoRequest, context: Context) -> api.ImageFsInfoResponse:
        usage = api.FilesystemUsage(
            fs_id=api.FilesystemIdentifier(mountpoint="/var/lib/images"), used_bytes=api.UInt64Value(value=5 * 2**30)
        )
        return api.ImageFsInfoResponse(image_filesystems=[usage])


class FakeRuntime:
    """The two services on a unix socket; a context manager.  `stop` and `start` act a daemon's restart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runtime = Runtime()
        self.images = Images(self.runtime)

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(16))
        api_pb2_grpc.add_RuntimeServiceServicer_to_server(self.runtime, self.server)
        api_pb2_grpc.add_ImageServiceServicer_to_server(self.images, self.server)
        self.server.add_insecure_port(f"unix://{self.path}")
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()

    def __enter__(self) -> FakeRuntime:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for container in self.runtime.containers.values():
            container.end(0)
