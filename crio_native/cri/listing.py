"""The answers of the list calls, ready before they are asked for.

The kubelet lists every second.  Each record is serialised once, when it changes; an answer is the concatenation of the
entries that its filter lets through (in protobuf, a repeated field is that), and takes no lock.  A page of a stream is
the same, of fewer entries: field 1 of every list's and every stream's message is the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri import messages
from crio_native.pods.records import Container, ContainerState, Pod, PodState, Record
from crio_native.pods.store import Store

R = TypeVar("R", Pod, Container)

PAGE_BYTES = 256 << 10  # of a stream's message; one entry may be larger
_ITEMS = b"\x0a"  # field 1, length-delimited


class Listing:
    """The ready entries of all pods and containers.  A filter of None lets everything through."""

    def __init__(self, store: Store) -> None:
        self._pods: dict[str, tuple[Pod, bytes]] = {}
        self._containers: dict[str, tuple[Container, bytes]] = {}
        store.listen(self._changed)

    def pods(self, accept: Callable[[Pod], bool] | None) -> bytes:
        """A serialised ListPodSandboxResponse."""
        return _join(self._pods, accept)

    def containers(self, accept: Callable[[Container], bool] | None) -> bytes:
        """A serialised ListContainersResponse."""
        return _join(self._containers, accept)

    def pod_pages(self, accept: Callable[[Pod], bool] | None) -> Iterator[bytes]:
        """Serialised StreamPodSandboxesResponses; each holds its pods as they are when it is asked for."""
        return _pages(self._pods, accept)

    def container_pages(self, accept: Callable[[Container], bool] | None) -> Iterator[bytes]:
        """Serialised StreamContainersResponses."""
        return _pages(self._containers, accept)

    def _changed(self, kind: type, object_id: str, record: Record | None) -> None:
        if isinstance(record, Pod) and record.state != PodState.CREATING:
            self._pods[object_id] = record, framed(messages.pod_item(pb.PodSandbox(), record))
        elif isinstance(record, Container) and record.state != ContainerState.CREATING:
            self._containers[object_id] = record, framed(messages.container_item(pb.Container(), record))
        elif kind is Pod:
            self._pods.pop(object_id, None)
        else:
            self._containers.pop(object_id, None)


def _join(table: Mapping[str, tuple[R, bytes]], accept: Callable[[R], bool] | None) -> bytes:
    entries = list(table.values())
    if accept is None:
        return b"".join([data for _, data in entries])
    return b"".join([data for record, data in entries if accept(record)])


def _pages(table: Mapping[str, tuple[R, bytes]], accept: Callable[[R], bool] | None) -> Iterator[bytes]:
    def current() -> Iterator[bytes]:
        for key in list(table):
            record, data = table.get(key, (None, b""))
            if record is not None and (accept is None or accept(record)):
                yield data  # and not what was removed meanwhile

    return pages(current())


def pages(entries: Iterable[bytes]) -> Iterator[bytes]:
    """Framed entries as messages of at most PAGE_BYTES, or of one entry."""
    page: list[bytes] = []
    size = 0
    for data in entries:
        if page and size + len(data) > PAGE_BYTES:
            yield b"".join(page)
            page, size = [], 0
        page.append(data)
        size += len(data)
    if page:
        yield b"".join(page)


def framed(message: object) -> bytes:
    """A message as an entry of its list."""
    data: bytes = message.SerializeToString()  # type: ignore[attr-defined]
    return _ITEMS + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    result.append(number)
    return bytes(result)
