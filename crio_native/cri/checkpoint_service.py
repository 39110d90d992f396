"""The RuntimeService's calls about checkpoints, of containers and of whole pods.

A pod's checkpoint is a directory: the files of its running containers, by their names, and what the pod and they were
asked to be (`pods.checkpoint.ABOUT`: the request's messages as JSON).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import json_format

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri import lookup
from crio_native.cri.jobs import Jobs
from crio_native.cri.server import Call
from crio_native.cri.translate import from_message, to_message
from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.pods import checkpoint, names, saved_configuration
from crio_native.pods.containers import Containers
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState, Pod, PodState
from crio_native.pods.sandboxes import Sandboxes
from crio_native.pods.values import ContainerConfig, PodConfig

Stage = Callable[[str], None]


class CheckpointService:
    """See `pods.checkpoint` and `pods.restoring`."""

    def __init__(self, node: Node, sandboxes: Sandboxes, containers: Containers, jobs: Jobs) -> None:
        self._node, self._sandboxes, self._containers, self._jobs = node, sandboxes, containers, jobs

    async def CheckpointContainer(self, request: Any, call: Call) -> Any:
        container = lookup.find(self._node.store, Container, request.container_id, "container_id")
        _check_path("location", request.location)
        if request.timeout < 0:
            raise InvalidArgument("timeout", request.timeout, "must be 0 (no limit) or more seconds")
        await self._check(call, f"a checkpoint of container {container.id}")
        await call.thread(checkpoint.write, self._node, container.id, request.location, request.timeout or None)
        return pb.CheckpointContainerResponse()

    async def CheckpointPod(self, request: Any, call: Call) -> Any:
        pod = lookup.find(self._node.store, Pod, request.pod_sandbox_id, "pod_sandbox_id")
        _check_path("output_path", request.output_path)
        _check_options(request.options)
        chosen = self._chosen(pod, list(request.container_ids))
        await self._check(call, f"a checkpoint of pod {pod.id}")
        about = {
            "config": json_format.MessageToDict(to_message(pb.PodSandboxConfig(), pod.config)),
            "handler": pod.handler,
            "containers": [
                json_format.MessageToDict(to_message(pb.ContainerConfig(), container.config)) for container in chosen
            ],
        }
        await call.thread(checkpoint.write_pod, self._node, chosen, request.output_path, about, call.seconds())
        return pb.CheckpointPodResponse()

    def _chosen(self, pod: Pod, wanted: list[str]) -> list[Container]:
        """Those that are asked for, else all that run."""
        mine = {container.id: container for container in self._node.store.of_pod(pod.id)}
        for index, container_id in enumerate(wanted):
            if container_id not in mine:
                raise InvalidArgument(f"container_ids[{index}]", container_id, "is no container of the pod")
        if pod.state != PodState.READY:
            raise FailedPrecondition(f"pod {pod.id} is {pod.state}; a checkpoint is of a ready one")
        running = [container for container in mine.values() if container.state == ContainerState.RUNNING]
        return [mine[container_id] for container_id in dict.fromkeys(wanted)] if wanted else running

    async def RestorePod(self, request: Any, call: Call) -> Any:
        """What the request does not say is as the checkpoint has it, as far as that gives nothing of the host's."""
        path = request.checkpoint_path
        _check_path("checkpoint_path", path)
        _check_options(request.options)
        await self._check(call, f"a restore from {path}", restore=True)
        about = await call.thread(checkpoint.about_pod, path)
        config = self._pod_config(request, about)
        handler = request.runtime_handler or self._saved_handler(about, path)
        wanted = [_from_file(each, path) for each in self._container_configs(request, about)]
        name = names.pod_name(config.metadata)
        return await self._jobs.run(
            self._node.workers,
            ("restore", name),
            f"restoring pod {name}",
            lambda stage: self._restore(config, handler, wanted, stage),
            seconds=call.seconds(),
            subject=(config, handler, wanted),
        )

    @staticmethod
    def _pod_config(request: Any, about: Mapping[str, Any]) -> PodConfig:
        path = request.checkpoint_path
        if request.HasField("config"):
            return from_message(PodConfig, request.config, "config")
        config = from_message(PodConfig, _message(pb.PodSandboxConfig(), about.get("config"), path), "config")
        saved_configuration.check_pod(config, f"{path}/{checkpoint.ABOUT}: config")
        return config

    @staticmethod
    def _container_configs(request: Any, about: Mapping[str, Any]) -> list[ContainerConfig]:
        path = request.checkpoint_path
        if request.container_configs:
            return [
                from_message(ContainerConfig, each, f"container_configs[{index}]")
                for index, each in enumerate(request.container_configs)
            ]
        saved = about.get("containers")
        wanted = []
        for index, each in enumerate(saved if isinstance(saved, list) else ()):
            message = _message(pb.ContainerConfig(), each, path)
            wanted.append(from_message(ContainerConfig, message, f"containers[{index}]"))
            saved_configuration.check_container(wanted[-1], f"{path}/{checkpoint.ABOUT}: containers[{index}]")
        return wanted

    def _saved_handler(self, about: Mapping[str, Any], path: str) -> str:
        """Handlers differ in what pods may ask of them."""
        handler = str(about.get("handler", ""))
        if handler not in ("", self._node.settings.default_runtime):
            why = f"the pod was of the handler {handler!r}, which is not given by a checkpoint: name one"
            raise InvalidArgument("runtime_handler", "", f"{path}: {why}")
        return handler

    def _restore(self, config: PodConfig, handler: str, wanted: list[ContainerConfig], stage: Stage) -> Any:
        """All of the pod, or nothing."""
        pod_id = self._sandboxes.run(config, handler, stage)
        try:
            made = {each.metadata.name: self._containers.create(pod_id, each, stage) for each in wanted}
            for container_id in made.values():
                stage("starting the containers")
                self._containers.start(container_id)
                self._containers.claim(container_id)
            self._sandboxes.claim(pod_id)
        except BaseException:
            self._sandboxes.remove(pod_id)
            raise
        restored = [pb.RestoredContainer(name=name, container_id=container_id) for name, container_id in made.items()]
        return pb.RestorePodResponse(pod_sandbox_id=pod_id, restored_containers=restored)

    async def _check(self, call: Call, act: str, *, restore: bool = False) -> None:
        level = self._node.config.checkpoint_restore.container_level_enabled
        checkpoint.check_allowed(level, act, restore=restore)
        await call.thread(checkpoint.check_criu, act)


def _message(message: Any, saved: object, path: str) -> Any:
    try:
        return json_format.ParseDict(saved, message)
    except (json_format.ParseError, TypeError, AttributeError) as error:
        raise InvalidArgument("checkpoint_path", path, f"its {checkpoint.ABOUT} is damaged: {error}") from None


def _from_file(config: ContainerConfig, directory: str) -> ContainerConfig:
    image = dataclasses.replace(config.image, image=checkpoint.file_of(directory, config.metadata.name))
    return dataclasses.replace(config, image=image)


def _check_path(field: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise InvalidArgument(field, path, "must be an absolute path without '..'")


def _check_options(options: Mapping[str, str]) -> None:
    for name in options:
        raise InvalidArgument(f"options[{name!r}]", options[name], "is an option that this runtime does not know")
