"""The RuntimeService's calls about checkpoints: what is asked is checked as if it could be done, then refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crio_native.cri import lookup
from crio_native.cri.server import Call
from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.pods import checkpoint
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState, Pod, PodState


class CheckpointService:
    """See `pods.checkpoint`."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def CheckpointContainer(self, request: Any, call: Call) -> Any:
        container = lookup.find(self._node.store, Container, request.container_id, "container_id")
        _check_path("location", request.location)
        if request.timeout < 0:
            raise InvalidArgument("timeout", request.timeout, "must be 0 (no limit) or more seconds")
        if container.state != ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container.id} is {container.state}; a checkpoint is of a running one")
        await self._refuse(call, f"a checkpoint of container {container.id}")

    async def CheckpointPod(self, request: Any, call: Call) -> Any:
        pod = lookup.find(self._node.store, Pod, request.pod_sandbox_id, "pod_sandbox_id")
        _check_path("output_path", request.output_path)
        _check_options(request.options)
        mine = {container.id for container in self._node.store.of_pod(pod.id)}
        for index, container_id in enumerate(request.container_ids):
            if container_id not in mine:
                raise InvalidArgument(f"container_ids[{index}]", container_id, "is no container of the pod")
        if pod.state != PodState.READY:
            raise FailedPrecondition(f"pod {pod.id} is {pod.state}; a checkpoint is of a ready one")
        await self._refuse(call, f"a checkpoint of pod {pod.id}")

    async def RestorePod(self, request: Any, call: Call) -> Any:
        _check_path("checkpoint_path", request.checkpoint_path)
        _check_options(request.options)
        await self._refuse(call, f"a restore from {request.checkpoint_path}", restore=True)

    async def _refuse(self, call: Call, act: str, *, restore: bool = False) -> None:
        level = self._node.config.checkpoint_restore.container_level_enabled
        checkpoint.check_allowed(level, act, restore=restore)
        await call.thread(checkpoint.refuse, act)


def _check_path(field: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise InvalidArgument(field, path, "must be an absolute path without '..'")


def _check_options(options: Mapping[str, str]) -> None:
    for name in options:
        raise InvalidArgument(f"options[{name!r}]", options[name], "is an option that this runtime does not know")
