"""From what people type to one container or pod: ids, beginnings of ids, names.

A container and the pod that `run` made for it alone are one thing to people; `collapse` is where that is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl.client import Client
from crio_native.errors import InvalidArgument, NotFound

RUN_NAMESPACE = "crioctl"
"""The namespace of pods that `run` made."""

SHORT = 13
"""Characters of an id that tables show."""


@dataclass(frozen=True, slots=True)
class Pod:
    message: api.PodSandbox

    @property
    def id(self) -> str:
        return self.message.id

    @property
    def names(self) -> tuple[str, ...]:
        metadata = self.message.metadata
        return metadata.name, f"{metadata.namespace}/{metadata.name}"

    @property
    def made_by_run(self) -> bool:
        return self.message.metadata.namespace == RUN_NAMESPACE

    def __str__(self) -> str:
        return f"pod {self.names[1]} ({self.id[:SHORT]})"


@dataclass(frozen=True, slots=True)
class Container:
    message: api.Container
    pod: Pod | None

    @property
    def id(self) -> str:
        return self.message.id

    @property
    def names(self) -> tuple[str, ...]:
        name = self.message.metadata.name
        return (name, f"{self.pod.names[0]}/{name}") if self.pod else (name,)

    @property
    def running(self) -> bool:
        return self.message.state == api.CONTAINER_RUNNING

    def __str__(self) -> str:
        return f"container {self.names[-1]} ({self.id[:SHORT]})"


Thing = TypeVar("Thing", Pod, Container, Pod | Container)


@dataclass(frozen=True, slots=True)
class Node:
    """All pods and containers of the socket, read once."""

    pods: Sequence[Pod]
    containers: Sequence[Container]

    @classmethod
    def read(cls, client: Client) -> Node:
        pods = {pod.id: Pod(pod) for pod in client.call(api.ListPodSandboxRequest()).items}
        listed = client.call(api.ListContainersRequest()).containers
        return cls(tuple(pods.values()), [Container(item, pods.get(item.pod_sandbox_id)) for item in listed])

    def inside(self, pod: Pod) -> list[Container]:
        return [container for container in self.containers if container.message.pod_sandbox_id == pod.id]

    def container(self, reference: str) -> Container:
        """The container that `reference` names; a pod with one container stands for it.

        Raises NotFound, and InvalidArgument when the reference fits several.
        """
        found: dict[str, Container] = {}
        for thing in self._matches(reference):
            for container in [thing] if isinstance(thing, Container) else self.inside(thing):
                found[container.id] = container
        return _single("container", reference, found.values())

    def target(self, reference: str) -> Pod | Container:
        """What `stop` and `rm` act on: a container in a pod of `run`'s stands for that pod."""
        found = {thing.id: thing for thing in map(collapse, self._matches(reference))}
        return _single("container or pod", reference, found.values())

    def pod(self, reference: str) -> Pod:
        """The pod that `reference` names.  Raises NotFound, and InvalidArgument when it fits several."""
        return _single("pod", reference, match(reference, self.pods))

    def _matches(self, reference: str) -> list[Pod | Container]:
        return match(reference, [*self.pods, *self.containers])


def collapse(thing: Pod | Container) -> Pod | Container:
    """The thing itself, or for a container that `run` made, its pod."""
    return thing.pod if isinstance(thing, Container) and thing.pod and thing.pod.made_by_run else thing


def match(reference: str, things: Sequence[Thing]) -> list[Thing]:
    """The things with exactly this id, else those with this name, else those whose id begins so."""
    for fits in (
        lambda thing: thing.id == reference,
        lambda thing: reference in thing.names,
        lambda thing: reference != "" and thing.id.startswith(reference),
    ):
        if found := [thing for thing in things if fits(thing)]:
            return found
    return []


def _single(kind: str, reference: str, found: Iterable[Thing]) -> Thing:
    choices = list(found)
    if not choices:
        raise NotFound(kind, reference, "`crioctl ps -a` and `crioctl pods` list what there is")
    if len(choices) > 1:
        listed = ", ".join(str(choice) for choice in choices[:4]) + (", ..." if len(choices) > 4 else "")
        raise InvalidArgument(kind, reference, f"is ambiguous, use an id: {listed}")
    return choices[0]
