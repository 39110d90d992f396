"""The RuntimeService's calls about what is used: statistics, and cAdvisor's metrics.

All of them read records and the kernel in a worker thread, a page at a time, and wait for no change.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.config import Config
from crio_native.cri import lookup, stats_messages
from crio_native.cri.server import Call
from crio_native.pods.metrics import BASE_LABELS, MetricsReader, descriptors
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState, Pod, PodState
from crio_native.pods.stats import StatsReader

PAGE = 32  # readings in one message of a stream
_POD = "POD"  # the container label of a pod's own metrics, as cAdvisor has it
T = TypeVar("T")


class StatsService:
    """A full list reads hundreds of files; nothing of it is kept but what `StatsReader` keeps."""

    def __init__(self, config: Config, node: Node) -> None:
        self._node = node
        self._groups = config.stats.included_pod_metrics
        self._stats = StatsReader(node, config.stats.collection_period)
        self._metrics = MetricsReader(node, self._groups)
        self._mountpoint = str(node.layout.root / "containers")

    async def ContainerStats(self, request: Any, call: Call) -> Any:
        container = lookup.find(self._node.store, Container, request.container_id, "container_id")
        return pb.ContainerStatsResponse(stats=await call.thread(self._of_container, container))

    async def ListContainerStats(self, request: Any, call: Call) -> Any:
        chosen = self._running(request.filter)
        return pb.ListContainerStatsResponse(stats=await call.thread(_all, self._of_container, chosen))

    async def StreamContainerStats(self, request: Any, call: Call) -> AsyncIterator[Any]:
        for page in _pages(self._running(request.filter)):
            stats = await call.thread(_all, self._of_container, page)
            yield pb.StreamContainerStatsResponse(container_stats=stats)

    async def PodSandboxStats(self, request: Any, call: Call) -> Any:
        pod = lookup.find(self._node.store, Pod, request.pod_sandbox_id, "pod_sandbox_id")
        return pb.PodSandboxStatsResponse(stats=await call.thread(self._of_pod, pod))

    async def ListPodSandboxStats(self, request: Any, call: Call) -> Any:
        chosen = self._ready(request.filter)
        return pb.ListPodSandboxStatsResponse(stats=await call.thread(_all, self._of_pod, chosen))

    async def StreamPodSandboxStats(self, request: Any, call: Call) -> AsyncIterator[Any]:
        for page in _pages(self._ready(request.filter)):
            stats = await call.thread(_all, self._of_pod, page)
            yield pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=stats)

    async def ListMetricDescriptors(self, request: Any, call: Call) -> Any:
        response = pb.ListMetricDescriptorsResponse()
        for each in descriptors(self._groups):
            response.descriptors.add(name=each.name, help=each.help, label_keys=(*BASE_LABELS, *each.labels))
        return response

    async def ListPodSandboxMetrics(self, request: Any, call: Call) -> Any:
        metrics = await call.thread(_all, self._metrics_of, self._ready(None))
        return pb.ListPodSandboxMetricsResponse(pod_metrics=metrics)

    async def StreamPodSandboxMetrics(self, request: Any, call: Call) -> AsyncIterator[Any]:
        for page in _pages(self._ready(None)):
            metrics = await call.thread(_all, self._metrics_of, page)
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=metrics)

    def _running(self, wanted: Any) -> list[Container]:
        accept = lookup.container_filter(wanted)
        containers = list(self._node.store.containers.values())
        return [c for c in containers if c.state == ContainerState.RUNNING and (accept is None or accept(c))]

    def _ready(self, wanted: Any) -> list[Pod]:
        accept = lookup.pod_filter(wanted) if wanted is not None else None
        pods = list(self._node.store.pods.values())
        return [pod for pod in pods if pod.state == PodState.READY and (accept is None or accept(pod))]

    def _of_container(self, container: Container) -> Any:
        return stats_messages.container_stats(self._stats.container(container), self._mountpoint)

    def _of_pod(self, pod: Pod) -> Any:
        return stats_messages.pod_stats(self._stats.pod(pod), self._mountpoint)

    def _metrics_of(self, pod: Pod) -> Any:
        usage, at, meta = self._stats.pod(pod), time.time_ns(), pod.config.metadata
        result = pb.PodSandboxMetrics(pod_sandbox_id=pod.id)
        stats_messages.metrics(
            result.metrics, self._metrics.pod(usage), (pod.id, "", meta.namespace, meta.name, _POD), at
        )
        for each in usage.containers:
            container = each.container
            message = result.container_metrics.add(container_id=container.id)
            image = container.config.image.user_specified_image or container.config.image.image
            labels = container.id, image, meta.namespace, meta.name, container.config.metadata.name
            stats_messages.metrics(message.metrics, self._metrics.container(each, at), labels, at)
        return result


def _all(read: Callable[[T], Any], chosen: Iterable[T]) -> list[Any]:
    return [read(each) for each in chosen]


def _pages(chosen: Sequence[T]) -> Iterator[list[T]]:
    rest = iter(chosen)
    while page := list(islice(rest, PAGE)):
        yield page
