"""Records as the CRI's messages: status, list entries, statistics."""

from __future__ import annotations

import signal
import time
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri.translate import to_message
from crio_native.pods.events import Event
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
    images = {volume.index: volume.image_id for volume in container.image_volumes}
    for index, mount in enumerate(container.config.mounts):
        message = to_message(status.mounts.add(), mount)
        if index in images:
            message.image.image_ref = images[index]
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


def event(happened: Event) -> Any:
    """A ContainerEventResponse, as CRI-O fills it: with the pod's status and those of all its containers."""
    return pb.ContainerEventResponse(
        container_id=happened.subject,
        container_event_type=pb.ContainerEventType.Name(happened.kind),
        created_at=happened.at,
        pod_sandbox_status=pod_status(happened.pod),
        containers_statuses=[container_status(c) for c in happened.containers if c.state != ContainerState.CREATING],
    )


def filesystem_usage(timestamp: int, mountpoint: str, used: int, inodes: int) -> Any:
    usage = pb.FilesystemUsage(timestamp=timestamp or time.time_ns())
    usage.fs_id.mountpoint = mountpoint
    usage.used_bytes.value, usage.inodes_used.value = used, inodes
    return usage
