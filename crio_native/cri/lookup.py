"""Finding what a request names: by id, by the beginning of an id, by a filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from crio_native.cri import messages
from crio_native.cri.translate import selects
from crio_native.errors import InvalidArgument, NotFound
from crio_native.pods.records import Container, ContainerState, Pod, PodState
from crio_native.pods.store import Store

R = TypeVar("R", Pod, Container)
Accept = Callable[[R], bool] | None
"""What a filter lets through; None for everything, which is what the kubelet asks each second."""


def find(store: Store, kind: type[R], object_id: str, field: str) -> R:
    """The record by its id or an unambiguous beginning of it.  Raises InvalidArgument, NotFound."""
    found = find_or_none(store, kind, object_id, field)
    if found is None:
        raise NotFound("pod" if kind is Pod else "container", object_id)
    return found


def find_or_none(store: Store, kind: type[R], object_id: str, field: str) -> R | None:
    """As `find`; None for an object that does not exist (any more)."""
    table: Any = store.pods if kind is Pod else store.containers
    if not object_id:
        raise InvalidArgument(field, object_id, "is empty")
    if object_id in table:
        found = [table.get(object_id)]
    else:
        found = [record for key, record in list(table.items()) if key.startswith(object_id)]
    found = [r for r in found if r is not None and r.state not in (PodState.CREATING, ContainerState.CREATING)]
    if len(found) > 1:
        raise InvalidArgument(field, object_id, f"is the beginning of {len(found)} ids; give more digits")
    return found[0] if found else None


def pod_filter(wanted: Any) -> Accept[Pod]:
    """A PodSandboxFilter, or a PodSandboxStatsFilter, which has no state."""
    if not wanted.ByteSize():
        return None
    state = wanted.state.state if "state" in wanted.DESCRIPTOR.fields_by_name and wanted.HasField("state") else None
    labels = dict(wanted.label_selector)

    def accept(pod: Pod) -> bool:
        return (
            pod.id.startswith(wanted.id)
            and (state is None or messages.pod_state(pod) == state)
            and selects(labels, pod.config.labels)
        )

    return accept


def container_filter(wanted: Any) -> Accept[Container]:
    """A ContainerFilter, or a ContainerStatsFilter, which has no state."""
    if not wanted.ByteSize():
        return None
    state = wanted.state.state if "state" in wanted.DESCRIPTOR.fields_by_name and wanted.HasField("state") else None
    labels = dict(wanted.label_selector)

    def accept(container: Container) -> bool:
        return (
            container.id.startswith(wanted.id)
            and container.pod_id.startswith(wanted.pod_sandbox_id)
            and (state is None or messages.container_state(container) == state)
            and selects(labels, container.config.labels)
        )

    return accept
