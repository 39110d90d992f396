"""What tools ask by HTTP on the CRI socket, in CRI-O's words: cAdvisor `/info` and `/containers/ID`, people the rest.

The answers' fields and paths are CRI-O's, so that its clients find what they know.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from crio_native.config.render import to_toml
from crio_native.cri import lookup
from crio_native.cri.background import in_thread
from crio_native.cri.http import Answer, as_json
from crio_native.errors import NotFound
from crio_native.pods import pausing
from crio_native.pods.node import Node
from crio_native.pods.records import Container, Pod
from crio_native.pods.values import NamespaceMode

_ALL_IDS = [{"container_id": 0, "host_id": 0, "size": 4294967295}]


class Inspection:
    """`route` is what `http.serve` asks."""

    def __init__(self, node: Node, executor: Executor) -> None:
        self._node = node
        self._executor = executor
        self._plain: Mapping[str, Callable[[], Awaitable[Answer]]] = {"/info": self._info, "/config": self._toml}
        self._of_container: Mapping[str, Callable[[str], Awaitable[Answer]]] = {
            "containers": self._container,
            "pause": self._pause,
            "unpause": self._unpause,
        }

    async def route(self, path: str) -> Answer:
        if path in self._plain:
            return await self._plain[path]()
        _, what, *rest = path.split("/")
        if what in self._of_container and len(rest) == 1:
            return await self._of_container[what](rest[0])
        known = [*self._plain, *(f"/{name}/ID" for name in self._of_container)]
        raise NotFound("path", path, f"there are {', '.join(known)}")

    async def _info(self) -> Answer:
        crio = self._node.config.crio
        return as_json(
            {
                "storage_driver": crio.storage_driver,
                "storage_root": crio.root,
                "storage_image": crio.imagestore,
                "cgroup_driver": self._node.config.runtime.cgroup_manager,
                "default_id_mappings": {"uids": _ALL_IDS, "gids": _ALL_IDS},
            }
        )

    async def _toml(self) -> Answer:
        text: str = await in_thread(self._executor, to_toml, self._node.config)
        return Answer(text.encode(), "application/toml")

    async def _container(self, object_id: str) -> Answer:
        """A container's, or a pod's: to CRI-O, and so to cAdvisor, the pod is a container too."""
        store = self._node.store
        # Also while it is being made: cAdvisor asks when it sees the cgroup, once and never again.
        container = store.containers.get(object_id) or lookup.find_or_none(store, Container, object_id, "ID")
        if container is not None:
            return as_json(self._about_container(container))
        pod = store.pods.get(object_id) or lookup.find_or_none(store, Pod, object_id, "ID")
        if pod is None:
            raise NotFound("container or pod", object_id)
        return as_json(self._about_pod(pod))

    def _about_container(self, container: Container) -> dict[str, Any]:
        """root: cAdvisor counts what is in `diff` below it."""
        pod = self._node.store.pods.get(container.pod_id)
        config = container.config
        return {
            "name": container.name,
            "pid": container.process.pid if container.process and container.live else 0,
            "image": config.image.user_specified_image or config.image.image,
            "image_ref": container.image_ref,
            "created_time": container.created_at,
            "labels": dict(config.labels),
            "annotations": dict(config.annotations),
            "crio_annotations": {},
            "log_path": container.log_path,
            "root": str(self._node.layout.bundle(container.id)),
            "sandbox": container.pod_id,
            "ip_addresses": list(pod.ips) if pod else [],
            "host_network": pod is not None and pod.config.namespaces.network is NamespaceMode.NODE,
        }

    def _about_pod(self, pod: Pod) -> dict[str, Any]:
        """cAdvisor counts a pod's network by this pid, so where no pause process runs it is a container's.

        It knows by the name POD that these figures are the pod's, not one of its containers'.
        """
        processes = [pod.infra, *(c.process for c in self._node.store.of_pod(pod.id) if c.live)]
        return {
            "name": f"k8s_POD_{pod.name}",
            "pid": next((process.pid for process in processes if process is not None), 0),
            "image": "",
            "image_ref": "",
            "created_time": pod.created_at,
            "labels": {**pod.config.labels, "io.kubernetes.container.name": "POD"},
            "annotations": dict(pod.config.annotations),
            "crio_annotations": {},
            "log_path": "",
            "root": str(self._node.layout.bundle(pod.id)),
            "sandbox": pod.id,
            "ip_addresses": list(pod.ips),
            "host_network": pod.config.namespaces.network is NamespaceMode.NODE,
        }

    async def _pause(self, object_id: str) -> Answer:
        container = lookup.find(self._node.store, Container, object_id, "ID")
        await in_thread(self._executor, pausing.pause, self._node, container.id)
        return Answer(b"200 OK")

    async def _unpause(self, object_id: str) -> Answer:
        container = lookup.find(self._node.store, Container, object_id, "ID")
        await in_thread(self._executor, pausing.unpause, self._node, container.id)
        return Answer(b"200 OK")
