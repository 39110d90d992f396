"""Events from the records' changes: their order, what subscribers may and may not do.  No daemon."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.errors import ResourceExhausted, Unavailable
from crio_native.pods import events as module
from crio_native.pods.events import Events, Kind, Subscription
from crio_native.pods.records import Container, ContainerState, Pod, PodState
from crio_native.pods.store import Store
from crio_native.pods.values import ContainerConfig, PodConfig

_names = itertools.count()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state.db")
    yield store
    store.close()


def pod(store: Store, state: str = PodState.READY) -> str:
    name = f"p{next(_names)}"
    store.insert(Pod(name, name, PodConfig(), "builtin", 1))
    store.update(Pod, name, state=state)
    return name


def container(store: Store, pod_id: str, *states: str) -> str:
    name = f"c{next(_names)}"
    store.insert(Container(name, name, pod_id, ContainerConfig(), "builtin", 1))
    for state in states:
        step(store, name, state)
    return name


def step(store: Store, container_id: str, state: str) -> None:
    started: dict[str, Any] = {"started_at": 5} if state == ContainerState.RUNNING else {}
    store.update(Container, container_id, state=state, **started)


def listen(events: Events) -> Subscription:
    return events.subscribe(lambda: None)


def words(subscription: Subscription) -> list[tuple[Kind, str]]:
    return [(event.kind, event.subject) for event in subscription.take()]


def test_what_was_there_before_is_not_news(store: Store) -> None:
    old = pod(store)
    container(store, old, ContainerState.CREATED)
    subscription = listen(Events(store))
    assert words(subscription) == []


def test_a_container_that_skips_a_state(store: Store) -> None:
    """One that ended before its creation was recorded was created and has ended; it never ran."""
    mine = pod(store)
    subscription = listen(Events(store))
    one = container(store, mine, ContainerState.EXITED)
    assert words(subscription) == [(Kind.CREATED, one), (Kind.STOPPED, one)]


def test_what_fails_in_the_making_was_never_there(store: Store) -> None:
    mine = pod(store)
    subscription = listen(Events(store))
    failed = container(store, mine)
    store.delete(store.get(Container, failed))
    broken = pod(store, PodState.CREATING)
    store.delete(store.get(Pod, broken))
    assert words(subscription) == []


def test_a_pod_stops_with_its_last_container_and_only_once(store: Store) -> None:
    subscription = listen(Events(store))
    mine = pod(store)
    one, two = (container(store, mine, ContainerState.CREATED, ContainerState.RUNNING) for _ in range(2))
    store.update(Pod, mine, state=PodState.NOT_READY)
    step(store, one, ContainerState.EXITED)
    before = words(subscription)
    assert (Kind.STOPPED, mine) not in before
    step(store, two, ContainerState.EXITED)
    store.update(Pod, mine, state=PodState.REMOVING)
    for each in (one, two):
        step(store, each, ContainerState.REMOVING)
        store.delete(store.get(Container, each))
    store.delete(store.get(Pod, mine))
    kinds = [Kind.STOPPED, Kind.STOPPED, Kind.DELETED, Kind.DELETED, Kind.DELETED]
    assert words(subscription) == list(zip(kinds, [two, mine, one, two, mine], strict=True))


def test_an_event_holds_what_was_true_then(store: Store) -> None:
    mine = pod(store)
    subscription = listen(Events(store))
    one = container(store, mine, ContainerState.CREATED, ContainerState.RUNNING, ContainerState.EXITED)
    store.delete(store.get(Container, one))
    states = [[c.state for c in event.containers] for event in subscription.take()]
    assert states == [[ContainerState.CREATED], [ContainerState.RUNNING], [ContainerState.EXITED], []]


@given(st.lists(st.sampled_from(list(ContainerState)), max_size=12))
def test_no_event_comes_twice(states: list[ContainerState]) -> None:
    """Whatever the records do, also what they should not."""
    tell: list[object] = []

    class Told:
        def listen(self, listener: object) -> None:
            tell.append(listener)

    events = Events(Told())  # type: ignore[arg-type]
    subscription = listen(events)
    [changed] = tell
    record = Container("c", "c", "p", ContainerConfig(), "builtin", 1, started_at=1)
    changed(Pod, "p", Pod("p", "p", PodConfig(), "builtin", 1, state=PodState.READY))  # type: ignore[operator]
    highest = 0
    for state in states:
        if module._STEPS[state] >= highest:  # a container's state never goes back
            highest = module._STEPS[state]
            changed(Container, "c", dataclasses.replace(record, state=state))  # type: ignore[operator]
    kinds = [kind for kind, subject in words(subscription) if subject == "c"]
    assert kinds == sorted(set(kinds))


def test_a_slow_subscriber_is_cut_off_and_others_go_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_MAX", 5)
    events = Events(store)
    slow, quick, woken = listen(events), listen(events), []
    told = events.subscribe(lambda: woken.append(1))
    seen = []
    for _ in range(4):
        pod(store)
        seen += words(quick)
        told.take()
    assert len(seen) == 8 and events.dropped == 1
    with pytest.raises(ResourceExhausted, match="5 events behind"):
        slow.take()
    with pytest.raises(ResourceExhausted):
        slow.take()
    slow.close()
    assert len(woken) == 8
    pod(store)
    assert len(words(quick)) == 2


def test_subscribers_are_bounded_and_told_the_end(store: Store) -> None:
    events = Events(store)
    all_ = [listen(events) for _ in range(module.SUBSCRIBERS_MAX)]
    with pytest.raises(ResourceExhausted):
        listen(events)
    all_.pop().close()
    last = listen(events)
    events.close()
    with pytest.raises(Unavailable, match="stopping"):
        last.take()
