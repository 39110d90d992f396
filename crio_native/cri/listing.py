"""The answers of ListPodSandbox and ListContainers, ready before they are asked for.

The kubelet lists every second.  Each record is serialised once, when it changes; an answer is the concatenation of the
entries that its filter lets through (in protobuf, a repeated field is that), and takes no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri import messages
from crio_native.pods.records import Container, ContainerState, Pod, PodState, Record
from crio_native.pods.store import Store

R = TypeVar("R", Pod, Container)

_ITEMS = b"\x0a"  # field 1, length-delimited: the list's field in both responses


class Listing:
    """The ready entries of all pods and containers."""

    def __init__(self, store: Store) -> None:
        self._pods: dict[str, tuple[Pod, bytes]] = {}
        self._containers: dict[str, tuple[Container, bytes]] = {}
        store.listen(self._changed)

    def pods(self, accept: Callable[[Pod], bool]) -> bytes:
        """A serialised ListPodSandboxResponse."""
        return _join(list(self._pods.values()), accept)

    def containers(self, accept: Callable[[Container], bool]) -> bytes:
        """A serialised ListContainersResponse."""
        return _join(list(self._containers.values()), accept)

    def _changed(self, kind: type, object_id: str, record: Record | None) -> None:
        if isinstance(record, Pod) and record.state != PodState.CREATING:
            self._pods[object_id] = record, _framed(messages.pod_item(pb.PodSandbox(), record))
        elif isinstance(record, Container) and record.state != ContainerState.CREATING:
            self._containers[object_id] = record, _framed(messages.container_item(pb.Container(), record))
        elif kind is Pod:
            self._pods.pop(object_id, None)
        else:
            self._containers.pop(object_id, None)


def _join(entries: Iterable[tuple[R, bytes]], accept: Callable[[R], bool]) -> bytes:
    return b"".join(data for record, data in entries if accept(record))


def _framed(message: object) -> bytes:
    data: bytes = message.SerializeToString()  # type: ignore[attr-defined]
    return _ITEMS + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    result.append(number)
    return bytes(result)
