"""Records as the CRI's messages: status, list entries, statistics."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri.translate import to_message
from crio_native.oci.runtime import Stats
from crio_native.pods.records import Container, ContainerState, Pod, PodState

_STATES = {
    ContainerState.CREATING: pb.CONTAINER_UNKNOWN,
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_EXITED,
    ContainerState.REMOVING: pb.CONTAINER_EXITED,
}
_SIGNALS: dict[str, int] = {name.removeprefix("SIGNAL_"): number for name, number in pb.Signal.items()}
_PLAIN = {"SIGRTMINPLUS0": "SIGRTMIN", "SIGRTMAXMINUS0": "SIGRTMAX"}


def pod_state(pod: Pod) -> int:
    return pb.SANDBOX_READY if pod.state == PodState.READY else pb.SANDBOX_NOTREADY


def container_state(container: Container) -> int:
    return _STATES[ContainerState(container.state)]


def pod_item(item: Any, pod: Pod) -> Any:
    """Fill a PodSandbox, or the part of a PodSandboxStatus that is the same."""
    item.id, item.state, item.created_at = pod.id, pod_state(pod), pod.created_at
    item.runtime_handler = pod.handler
    to_message(item.metadata, pod.config.metadata)
    item.labels.update(pod.config.labels)
    item.annotations.update(pod.config.annotations)
    return item


def container_item(item: Any, container: Container) -> Any:
    """Fill a Container, or the part of a ContainerStatus that is the same."""
    config = container.config
    item.id, item.state, item.created_at = container.id, container_state(container), container.created_at
    item.image_ref, item.image_id = container.image_ref, container.image_id
    if "pod_sandbox_id" in item.DESCRIPTOR.fields_by_name:
        item.pod_sandbox_id = container.pod_id
    to_message(item.metadata, config.metadata)
    to_message(item.image, config.image)
    item.labels.update(config.labels)
    item.annotations.update(config.annotations)
    return item


def pod_status(pod: Pod) -> Any:
    status = pod_item(pb.PodSandboxStatus(), pod)
    to_message(status.linux.namespaces.options, pod.config.namespaces)
    if pod.ips and pod.state == PodState.READY:
        status.network.ip = pod.ips[0]
        for ip in pod.ips[1:]:
            status.network.additional_ips.add(ip=ip)
    return status


def container_status(container: Container) -> Any:
    status = container_item(pb.ContainerStatus(), container)
    status.started_at, status.finished_at = container.started_at, container.finished_at
    status.exit_code, status.reason, status.message = container.exit_code, container.reason, container.message
    status.log_path = container.log_path
    status.stop_signal = _signal(container.stop_signal)
    to_message(status.resources.linux, container.resources)
    for mount in container.config.mounts:
        to_message(status.mounts.add(), mount)
    user = container.process.user if container.process else None
    if user is not None:
        status.user.linux.uid, status.user.linux.gid = user.uid, user.gid
        status.user.linux.supplemental_groups.extend(user.groups)
    return status


def _signal(number: int) -> int:
    if number >= 34:
        low, high = number - 34, 64 - number
        name = f"SIGRTMINPLUS{low}" if low <= 15 else f"SIGRTMAXMINUS{high}"
        return _SIGNALS.get(_PLAIN.get(name, name), 0)
    return _SIGNALS.get(signal.Signals(number).name, 0) if number in signal.valid_signals() else 0


def info(values: Mapping[str, Any]) -> dict[str, str]:
    """The `info` map of a verbose answer: one JSON document under one key, as crictl and tools expect it."""
    return {"info": json.dumps(values)}


def container_stats(
    container: Container,
    stats: Stats | None,
    nano_cores: int | None,
    layer: tuple[int, int, int] | None,
    mountpoint: str,
) -> Any:
    """A ContainerStats.  layer: (time in ns, bytes, inodes) of the writable layer.  What is unknown is left out."""
    result = pb.ContainerStats()
    result.attributes.id = container.id
    to_message(result.attributes.metadata, container.config.metadata)
    result.attributes.labels.update(container.config.labels)
    result.attributes.annotations.update(container.config.annotations)
    if stats is not None:
        _cpu_and_memory(result, stats, nano_cores)
    if layer is not None:
        result.writable_layer.timestamp = layer[0]
        result.writable_layer.fs_id.mountpoint = mountpoint
        result.writable_layer.used_bytes.value = layer[1]
        result.writable_layer.inodes_used.value = layer[2]
    return result


def _cpu_and_memory(result: Any, stats: Stats, nano_cores: int | None) -> None:
    result.cpu.timestamp = result.memory.timestamp = stats.timestamp
    _wrap(result.cpu.usage_core_nano_seconds, stats.cpu_usage)
    _wrap(result.cpu.usage_nano_cores, nano_cores)
    memory = result.memory
    _wrap(memory.usage_bytes, stats.memory_usage)
    _wrap(memory.working_set_bytes, stats.memory_working_set)
    _wrap(memory.rss_bytes, stats.memory_rss)
    _wrap(memory.page_faults, stats.page_faults)
    _wrap(memory.major_page_faults, stats.major_page_faults)
    if stats.memory_limit and stats.memory_working_set is not None:
        _wrap(memory.available_bytes, max(stats.memory_limit - stats.memory_working_set, 0))
    if stats.swap_usage is not None:
        result.swap.timestamp = stats.timestamp
        _wrap(result.swap.swap_usage_bytes, stats.swap_usage)


def _wrap(wrapper: Any, number: int | None) -> None:
    if number is not None:
        wrapper.value = number


def filesystem_usage(timestamp: int, mountpoint: str, used: int, inodes: int) -> Any:
    usage = pb.FilesystemUsage(timestamp=timestamp or time.time_ns())
    usage.fs_id.mountpoint = mountpoint
    usage.used_bytes.value, usage.inodes_used.value = used, inodes
    return usage
