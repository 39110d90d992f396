"""Freezing a container and letting it go on: the kernel remembers which it is, no record does."""

from __future__ import annotations

import contextlib

from crio_native.errors import CrioError, FailedPrecondition, NotFound
from crio_native.oci.runtime import Freezer, check_not_paused
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState


def pause(node: Node, container_id: str) -> None:
    """Stop all its processes.  Raises FailedPrecondition when it does not run or is paused, StepFailed."""
    with node.locks.hold(container_id):
        container = node.store.get(Container, container_id)
        group = _group(node, container)
        if container.state != ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container_id} is {container.state}; only a running one can be paused")
        if group.frozen():
            raise FailedPrecondition(f"container {container_id} is paused already")
        group.freeze()


def unpause(node: Node, container_id: str) -> None:
    """Let them go on.  Raises FailedPrecondition when it is not paused, or a group above keeps it so."""
    with node.locks.hold(container_id):
        container = node.store.get(Container, container_id)
        if not thaw(node, container):
            raise FailedPrecondition(f"container {container_id} is not paused")
        if above := _group(node, container).frozen_ancestors():
            raise FailedPrecondition(f"container {container_id} stays paused: frozen above it is {', '.join(above)}")


def thaw(node: Node, container: Container) -> bool:
    """Let a paused container go on, if it is one: a frozen process heeds no signal."""
    group = _group(node, container)
    try:
        if not group.frozen():
            return False
        group.thaw()
    except CrioError:
        return False  # its group has gone
    return True


def check_runs(node: Node, container: Container) -> None:
    """Raises FailedPrecondition for a paused container, and what asking a shim raises."""
    with contextlib.suppress(NotFound):  # it has ended, as the command will find out
        check_not_paused(container.id, _group(node, container))


def _group(node: Node, container: Container) -> Freezer:
    return node.executor_of(container).freezer(container.id, container.cgroup)
