"""The RuntimeService's calls about pods and containers: what each asks of `pods/`, and the answer.

A method's name is the call's.  Lists and statuses read records and never wait for a change that is under way.
Statistics are in `stats_service`, what concerns the node in `node_service`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri import exec_sync, lookup, messages, verbose
from crio_native.cri.jobs import Jobs
from crio_native.cri.listing import Listing
from crio_native.cri.server import Call
from crio_native.cri.translate import check_known, from_message
from crio_native.errors import DeadlineExceeded, InvalidArgument, NotFound
from crio_native.pods import names, resize
from crio_native.pods.containers import Containers
from crio_native.pods.node import Node
from crio_native.pods.records import Container, Pod
from crio_native.pods.sandboxes import Sandboxes
from crio_native.pods.values import ContainerConfig, PodConfig, Resources

log = logging.getLogger(__name__)

R = TypeVar("R", Pod, Container)


class RuntimeService:
    """The CRI's pods and containers."""

    def __init__(
        self,
        node: Node,
        sandboxes: Sandboxes,
        containers: Containers,
        jobs: Jobs,
        changes: Executor,
        pod_changes: Executor,
    ) -> None:
        self._node = node
        self._sandboxes = sandboxes
        self._containers = containers
        self._jobs = jobs
        self._changes = changes
        self._pod_changes = pod_changes
        self._listing = Listing(node.store)

    async def RunPodSandbox(self, request: Any, call: Call) -> Any:
        config = from_message(PodConfig, request.config, "config")
        name = names.pod_name(config.metadata)
        pod_id = await self._change_pod(
            call,
            ("run", name),
            f"making pod {name}",
            partial(self._sandboxes.run, config, request.runtime_handler),
            subject=(config, request.runtime_handler),
        )
        self._sandboxes.claim(pod_id)
        return pb.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def StopPodSandbox(self, request: Any, call: Call) -> Any:
        pod = self._find_or_none(Pod, request.pod_sandbox_id, "pod_sandbox_id")
        if pod is not None:
            work = partial(self._ignore_missing, partial(self._sandboxes.stop, pod.id))
            await self._change_pod(call, ("stop", pod.id), f"stopping pod {pod.id}", work)
        return pb.StopPodSandboxResponse()

    async def RemovePodSandbox(self, request: Any, call: Call) -> Any:
        pod = self._find_or_none(Pod, request.pod_sandbox_id, "pod_sandbox_id")
        if pod is not None:
            work = partial(self._ignore_missing, partial(self._sandboxes.remove, pod.id))
            await self._change_pod(call, ("remove", pod.id), f"removing pod {pod.id}", work)
        return pb.RemovePodSandboxResponse()

    async def PodSandboxStatus(self, request: Any, call: Call) -> Any:
        pod = self._find(Pod, request.pod_sandbox_id, "pod_sandbox_id")
        response = pb.PodSandboxStatusResponse(status=messages.pod_status(pod))
        if self._node.settings.enable_pod_events:
            # A kubelet that lives by events takes these for the truth as of the time beside them.
            response.timestamp = time.time_ns()
            mine = self._node.store.of_pod(pod.id)
            response.containers_statuses.extend(messages.container_status(container) for container in mine)
        if request.verbose:
            response.info.update(await call.thread(verbose.pod_info, self._node, pod))
        return response

    async def ListPodSandbox(self, request: Any, call: Call) -> bytes:
        return self._listing.pods(lookup.pod_filter(request.filter))

    async def StreamPodSandboxes(self, request: Any, call: Call) -> AsyncIterator[bytes]:
        for page in self._listing.pod_pages(lookup.pod_filter(request.filter)):
            yield page

    async def CreateContainer(self, request: Any, call: Call) -> Any:
        pod = self._find(Pod, request.pod_sandbox_id, "pod_sandbox_id")
        config = from_message(ContainerConfig, request.config, "config")
        name = names.container_name(config.metadata, pod.config.metadata)
        container_id = await self._change(
            call,
            ("create", name),
            f"making container {name}",
            partial(self._containers.create, pod.id, config),
            subject=(pod.id, config),
        )
        self._containers.claim(container_id)
        return pb.CreateContainerResponse(container_id=container_id)

    async def StartContainer(self, request: Any, call: Call) -> Any:
        container = self._find(Container, request.container_id, "container_id")
        await self._change(
            call,
            ("start", container.id),
            f"starting container {container.id}",
            lambda stage: self._containers.start(container.id),
        )
        return pb.StartContainerResponse()

    async def StopContainer(self, request: Any, call: Call) -> Any:
        if request.timeout < 0:
            raise InvalidArgument("timeout", request.timeout, "must be 0 or more seconds")
        container = self._find_or_none(Container, request.container_id, "container_id")
        if container is not None and container.live:
            await self._stop(container.id, request.timeout, call)
        return pb.StopContainerResponse()

    async def _stop(self, container_id: str, grace: int, call: Call) -> None:
        """Signal, wait, kill, wait.  No thread waits and no lock is held, so a later stop with less grace may pass
        this one; a client that gives up ends the waiting, not the signal."""
        if grace > 0:
            try:
                end = await call.thread(self._containers.signal_stop, container_id)
            except DeadlineExceeded as error:  # by a shim that hangs: no time is left to heed it
                log.warning("container %s is killed at once: %s", container_id, error)
            else:
                if await _ends_within(end, grace):
                    return
        await call.thread(self._containers.kill, container_id)
        seconds = self._containers.ends.kill_seconds
        if not await _ends_within(self._containers.ends.of(container_id), seconds):
            raise DeadlineExceeded(f"container {container_id} still lives {seconds} s after SIGKILL")

    async def RemoveContainer(self, request: Any, call: Call) -> Any:
        container = self._find_or_none(Container, request.container_id, "container_id")
        if container is not None:
            await self._change(
                call,
                ("remove", container.id),
                f"removing container {container.id}",
                lambda stage: self._containers.remove(container.id),
            )
        return pb.RemoveContainerResponse()

    async def ContainerStatus(self, request: Any, call: Call) -> Any:
        container = self._find(Container, request.container_id, "container_id")
        response = pb.ContainerStatusResponse(status=messages.container_status(container))
        if request.verbose:
            response.info.update(await call.thread(verbose.container_info, self._node, container))
        return response

    async def ListContainers(self, request: Any, call: Call) -> bytes:
        return self._listing.containers(lookup.container_filter(request.filter))

    async def StreamContainers(self, request: Any, call: Call) -> AsyncIterator[bytes]:
        for page in self._listing.container_pages(lookup.container_filter(request.filter)):
            yield page

    async def ExecSync(self, request: Any, call: Call) -> Any:
        container = self._find(Container, request.container_id, "container_id")
        command = exec_sync.check_command(request.cmd)
        if request.timeout < 0:
            raise InvalidArgument("timeout", request.timeout, "must be 0 (no limit) or more seconds")

        async def start(stdout: int, stderr: int) -> Any:
            begin = functools.partial(self._containers.exec, waits=False)
            return await exec_sync.started(call, begin, container.id, command, stdout, stderr)

        stdout, stderr, code = await exec_sync.run(start, request.timeout or None)
        return pb.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=code)

    async def ReopenContainerLog(self, request: Any, call: Call) -> Any:
        container = self._find(Container, request.container_id, "container_id")
        await call.thread(self._containers.reopen_log, container.id)
        return pb.ReopenContainerLogResponse()

    async def UpdateContainerResources(self, request: Any, call: Call) -> Any:
        check_known(request, ("container_id", "linux", "annotations"))
        container = self._find(Container, request.container_id, "container_id")
        wanted = from_message(Resources, request.linux, "linux")
        await call.thread(resize.resize, self._node, container.id, wanted)
        return pb.UpdateContainerResourcesResponse()

    async def UpdatePodSandboxResources(self, request: Any, call: Call) -> Any:
        pod = self._find(Pod, request.pod_sandbox_id, "pod_sandbox_id")
        overhead, resources = (
            from_message(Resources, getattr(request, field), field) if request.HasField(field) else None
            for field in ("overhead", "resources")
        )
        await call.thread(resize.resize_pod, self._node, pod.id, overhead, resources)
        return pb.UpdatePodSandboxResourcesResponse()

    async def _change_pod(
        self, call: Call, key: tuple[str, str], what: str, work: Any, *, subject: object = None
    ) -> Any:
        """A network plugin that hangs keeps these for minutes; nothing else may wait for a worker because of that."""
        return await self._jobs.run(self._pod_changes, key, what, work, seconds=call.seconds(), subject=subject)

    async def _change(self, call: Call, key: tuple[str, str], what: str, work: Any, *, subject: object = None) -> Any:
        return await self._jobs.run(self._changes, key, what, work, seconds=call.seconds(), subject=subject)

    @staticmethod
    def _ignore_missing(work: Callable[[Any], None], stage: Any) -> None:
        try:
            work(stage)
        except NotFound:
            pass  # somebody else removed it meanwhile: what was wanted

    def _find(self, kind: type[R], object_id: str, field: str) -> R:
        return lookup.find(self._node.store, kind, object_id, field)

    def _find_or_none(self, kind: type[R], object_id: str, field: str) -> R | None:
        return lookup.find_or_none(self._node.store, kind, object_id, field)


async def _ends_within(end: Future[None], seconds: float) -> bool:
    """Whether a container ends in time; a caller that is cancelled does not cancel the others' future."""
    done, _ = await asyncio.wait([asyncio.shield(asyncio.wrap_future(end))], timeout=seconds)
    return bool(done)
