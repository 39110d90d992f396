"""GetContainerEvents: every event, in order, once, with the pod's status and those of its containers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client

pytestmark = pytest.mark.root


class Listener:
    """A subscriber in a thread of its own."""

    def __init__(self, client: Client) -> None:
        self.events: list[Any] = []
        self.error: grpc.RpcError | None = None
        self.call = client.runtime.GetContainerEvents(pb.GetEventsRequest())
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        try:
            self.events.extend(self._each())
        except grpc.RpcError as error:
            self.error = error

    def _each(self) -> Iterator[Any]:
        for event in self.call:
            self.events.append(event)
        return iter(())

    def words(self, *ids: str) -> list[tuple[int, str]]:
        """(number in ids, kind) of each event so far."""
        names = {id_: number for number, id_ in enumerate(ids)}
        return [
            (names[e.container_id], pb.ContainerEventType.Name(e.container_event_type).split("_")[1].lower())
            for e in list(self.events)
            if e.container_id in names
        ]

    def close(self) -> None:
        self.call.cancel()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def listener(cri: Client) -> Iterator[Listener]:
    one = Listener(cri)
    ready(cri, one)
    yield one
    one.close()


def ready(cri: Client, *listeners: Listener) -> None:
    """A subscription begins when the daemon has taken it: a pod's events show that."""
    while not all(listener.events for listener in listeners):
        cri.remove_pod(cri.pod())
        time.sleep(0.05)
    cri.until(lambda: all(each.events[-1].container_event_type == pb.CONTAINER_DELETED_EVENT for each in listeners))
    for listener in listeners:
        listener.events.clear()


def test_a_whole_life(cri: Client, listener: Listener) -> None:
    pod = cri.pod(labels={"app": "x"})
    container = cri.start(pod, "sleep", "60")
    cri.call("StopContainer", container_id=container, timeout=0)
    cri.call("RemoveContainer", container_id=container)
    cri.remove_pod(pod)
    expected = [
        *((0, word) for word in ("created", "started")),
        *((1, word) for word in ("created", "started", "stopped", "deleted")),
        *((0, word) for word in ("stopped", "deleted")),
    ]
    cri.until(lambda: len(listener.words(pod, container)) >= len(expected))
    assert listener.words(pod, container) == expected
    times = [event.created_at for event in listener.events]
    assert times == sorted(times) and abs(times[-1] - time.time_ns()) < 60e9
    for event in listener.events:
        assert event.pod_sandbox_status.id == pod and event.pod_sandbox_status.labels["app"] == "x"
    created, started, *_ = (event for event in listener.events if event.container_id == container)
    assert [s.state for s in created.containers_statuses] == [pb.CONTAINER_CREATED]
    assert [s.state for s in started.containers_statuses] == [pb.CONTAINER_RUNNING]
    stopped, deleted = [event for event in listener.events if event.container_id == container][2:]
    assert [(s.state, s.exit_code) for s in stopped.containers_statuses] == [(pb.CONTAINER_EXITED, 137)]
    assert not deleted.containers_statuses
    last = listener.events[-1].pod_sandbox_status
    assert last.state == pb.SANDBOX_NOTREADY and last.metadata.uid == "uid"


def test_a_container_that_ends_at_once_has_started(cri: Client, listener: Listener) -> None:
    pod = cri.pod()
    containers = [cri.start(pod, "true") for _ in range(20)]
    cri.until(lambda: all(len(listener.words(container)) == 3 for container in containers))
    for number, container in enumerate(containers):
        assert listener.words(container) == [(0, "created"), (0, "started"), (0, "stopped")], number


def test_a_pod_stops_after_its_containers(cri: Client, listener: Listener) -> None:
    pod = cri.pod()
    containers = [cri.start(pod, "sleep", "60") for _ in range(3)]
    cri.remove_pod(pod)
    cri.until(lambda: (0, "deleted") in listener.words(pod))
    words = listener.words(pod, *containers)
    assert words.index((0, "stopped")) > max(words.index((n, "stopped")) for n in (1, 2, 3))
    assert len(words) == len(set(words)) == 16


def test_a_command_that_cannot_start(cri: Client, listener: Listener) -> None:
    pod = cri.pod()
    container = cri.create(pod, "/no/such/program")
    with pytest.raises(grpc.RpcError):
        cri.call("StartContainer", container_id=container)
    cri.until(lambda: len(listener.words(container)) == 2)
    assert listener.words(container) == [(0, "created"), (0, "stopped")]
    assert listener.events[-1].containers_statuses[0].reason == "StartError"


def test_a_pod_that_fails_was_never_there(cri: Client, listener: Listener) -> None:
    with pytest.raises(grpc.RpcError):
        cri.pod(handler="no-such-handler")
    pod = cri.pod()
    with pytest.raises(grpc.RpcError):
        cri.create(pod, "true", image="localhost/no/such:image")
    cri.remove_pod(pod)
    cri.until(lambda: (0, "deleted") in listener.words(pod))
    assert {event.container_id for event in listener.events} == {pod}


def test_subscribers_get_the_same(cri: Client) -> None:
    listeners = [Listener(cri) for _ in range(3)]
    ready(cri, *listeners)
    pods = [cri.pod() for _ in range(5)]
    for pod in pods:
        cri.remove_pod(pod)
    first, *others = listeners
    cri.until(lambda: all(len(each.events) == 20 for each in listeners))
    assert all(
        [e.SerializeToString() for e in each.events] == [e.SerializeToString() for e in first.events] for each in others
    )
    for each in listeners:
        each.close()


def test_subscribers_are_told_that_the_daemon_stops(fresh: Client) -> None:
    listener = Listener(fresh)
    ready(fresh, listener)
    began = time.monotonic()
    assert fresh.stop_daemon() == 0
    assert time.monotonic() - began < 4
    listener.thread.join(10)
    assert listener.error is not None and listener.error.code() is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in listener.error.details()
    fresh.start_daemon()
