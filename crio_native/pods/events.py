"""What happened to pods and containers, in order and once, for whoever subscribes.

Events are worked out from the records' changes, which the store tells in order: what is recorded has happened.  An
event holds the records as they were at its moment, so a subscriber that reads late still reads the truth of then.
Turning events into messages is `cri`'s.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from crio_native.errors import ResourceExhausted, Unavailable
from crio_native.pods.records import Container, ContainerState, Pod, PodState, Record
from crio_native.pods.store import Store

QUEUE_MAX = 4096  # events that wait for one subscriber; they share their records with the store
SUBSCRIBERS_MAX = 64


class Kind(IntEnum):
    """By the numbers of the CRI's ContainerEventType."""

    CREATED = 0
    STARTED = 1
    STOPPED = 2
    DELETED = 3


# How far a container has come; an event for each step on the way.
_STEPS = {
    ContainerState.CREATING: 0,
    ContainerState.CREATED: 1,
    ContainerState.RUNNING: 2,
    ContainerState.EXITED: 3,
    ContainerState.REMOVING: 3,
}


@dataclass(frozen=True, slots=True)
class Event:
    """subject: the id of the container, or of the pod itself, which the CRI treats as a container.  at: ns since the
    epoch.  pod, containers: the pod and all its containers, as they were then."""

    kind: Kind
    subject: str
    at: int
    pod: Pod
    containers: tuple[Container, ...]


class Subscription:
    """One subscriber's queue.  `close` it, whatever happens."""

    def __init__(self, events: Events, wake: Callable[[], None]) -> None:
        self._events = events
        self._queue: deque[Event] = deque()
        self._cut: Exception | None = None
        self.wake = wake

    def take(self) -> list[Event]:
        """All that waits.  Raises ResourceExhausted when the subscriber was too slow, Unavailable at the end."""
        if self._cut is not None:
            raise self._cut
        taken = []
        for _ in range(len(self._queue)):
            try:
                taken.append(self._queue.popleft())
            except IndexError:
                break  # cut off in another thread just now, as the next call will say
        return taken

    def close(self) -> None:
        self._events.leave(self)

    def put(self, event: Event) -> bool:
        """False when there is no room for it, which ends the subscription: a gap would be a lie."""
        if len(self._queue) >= QUEUE_MAX:
            self.cut(
                ResourceExhausted(
                    f"this subscriber is {QUEUE_MAX} events behind and was cut off: list what exists and subscribe anew"
                )
            )
            return False
        self._queue.append(event)
        self.wake()
        return True

    def cut(self, why: Exception) -> None:
        self._cut = why
        self._queue.clear()
        self.wake()


class Events:
    """Thread-safe.  dropped: events that a subscriber was cut off for."""

    def __init__(self, store: Store) -> None:
        self.dropped = 0
        self._lock = threading.Lock()
        self._subscriptions: list[Subscription] = []
        self._pods: dict[str, Pod] = {}
        self._containers: dict[str, dict[str, Container]] = {}
        self._stopped: set[str] = set()  # pods whose end was told
        store.listen(self._changed)

    def subscribe(self, wake: Callable[[], None]) -> Subscription:
        """All events from now on.  wake: called in any thread when there is something to take; it must be quick.

        Raises ResourceExhausted when there are too many subscribers.
        """
        with self._lock:
            if len(self._subscriptions) >= SUBSCRIBERS_MAX:
                raise ResourceExhausted(f"{SUBSCRIBERS_MAX} subscribers listen to events already; end one of them")
            subscription = Subscription(self, wake)
            self._subscriptions.append(subscription)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)

    def close(self) -> None:
        """Tell every subscriber that the daemon stops."""
        with self._lock:
            for subscription in self._subscriptions:
                subscription.cut(Unavailable("the daemon is stopping; subscribe again when it serves"))
            self._subscriptions.clear()

    def _changed(self, kind: type, object_id: str, record: Record | None) -> None:
        """With the store's index locked, so that there is one order."""
        with self._lock:
            if kind is Pod:
                self._pod_changed(object_id, record if isinstance(record, Pod) else None)
            else:
                self._container_changed(object_id, record if isinstance(record, Container) else None)

    def _pod_changed(self, pod_id: str, new: Pod | None) -> None:
        old = self._pods.get(pod_id)
        if new is None:
            if old is not None and old.state != PodState.CREATING:
                self._tell_stopped(pod_id)
                self._tell(Kind.DELETED, pod_id, pod_id)
            for known in (self._pods, self._containers):
                known.pop(pod_id, None)
            self._stopped.discard(pod_id)
            return
        self._pods[pod_id] = new
        if new.state != PodState.CREATING and (old is None or old.state == PodState.CREATING):
            self._tell(Kind.CREATED, pod_id, pod_id)
            self._tell(Kind.STARTED, pod_id, pod_id)
        self._tell_stopped(pod_id)

    def _container_changed(self, container_id: str, new: Container | None) -> None:
        if new is None:
            pod_id = next((pod for pod, mine in self._containers.items() if container_id in mine), "")
            old = self._containers[pod_id].pop(container_id) if pod_id else None
            if old is not None and old.state != ContainerState.CREATING:
                self._tell(Kind.DELETED, container_id, pod_id)
            return
        mine = self._containers.setdefault(new.pod_id, {})
        old = mine.get(container_id)
        before = _STEPS[ContainerState(old.state)] if old else 0
        mine[container_id] = new
        for step in range(before + 1, _STEPS[ContainerState(new.state)] + 1):
            kind = Kind(step - 1)
            if kind != Kind.STARTED or new.started_at:
                self._tell(kind, container_id, new.pod_id)
        if not new.live:
            self._tell_stopped(new.pod_id)

    def _tell_stopped(self, pod_id: str) -> None:
        """A pod has stopped when it is not ready and none of its containers lives: they end first."""
        pod = self._pods.get(pod_id)
        if pod is None or pod.state in (PodState.CREATING, PodState.READY) or pod_id in self._stopped:
            return
        if not any(container.live for container in self._containers.get(pod_id, {}).values()):
            self._stopped.add(pod_id)
            self._tell(Kind.STOPPED, pod_id, pod_id)

    def _tell(self, kind: Kind, subject: str, pod_id: str) -> None:
        pod = self._pods.get(pod_id)
        if pod is None or not self._subscriptions:
            return
        event = Event(kind, subject, time.time_ns(), pod, tuple(self._containers.get(pod_id, {}).values()))
        for subscription in list(self._subscriptions):
            if not subscription.put(event):
                self._subscriptions.remove(subscription)
                self.dropped += 1
