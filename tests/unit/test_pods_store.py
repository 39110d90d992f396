"""The store: names, durability, group commit, damage."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import AlreadyExists, Internal, NotFound
from crio_native.pods.records import Container, Pod, PodState, ProcessRecord
from crio_native.pods.store import Store
from crio_native.pods.values import ContainerConfig, KeyValue, PodConfig, PodMetadata


def pod(number: int) -> Pod:
    config = PodConfig(metadata=PodMetadata("name", "uid", "space", number), labels={"a": "b"})
    return Pod(f"{number:064x}", f"pod-{number}", config, "builtin", 123)


def container(number: int, of: Pod) -> Container:
    config = ContainerConfig(envs=(KeyValue("A", "\udcff"),))
    return Container(f"c{number:063x}", f"container-{number}", of.id, config, "builtin", 456)


def test_records_survive(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    one = pod(1)
    store.insert(one)
    store.insert(container(1, one))
    process = ProcessRecord(7, 8, 9, 0, 0, (1, 2), "/root")
    store.update(Container, container(1, one).id, state="running", process=process)
    store.update(Pod, one.id, wait=False, claimed=True)
    store.close()
    again = Store(tmp_path / "s.db")
    assert dict(again.pods) == {one.id: replace(one, claimed=True)}
    assert again.containers[container(1, one).id].process == process
    assert again.by_name(Pod, "pod-1") == replace(one, claimed=True)
    assert [c.id for c in again.of_pod(one.id)] == [container(1, one).id]
    again.close()


def test_a_name_is_held_as_long_as_its_record(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    store.insert(pod(1))
    other = replace(pod(2), name="pod-1")
    with pytest.raises(AlreadyExists, match=pod(1).id):
        store.insert(other)
    store.delete(pod(1))
    store.delete(pod(1))
    store.insert(other)
    store.close()


def test_one_bad_change_does_not_take_its_neighbours(tmp_path: Path) -> None:
    """A container of a pod that does not exist breaks a constraint in the same commit as good ones."""
    store = Store(tmp_path / "s.db")
    orphan = container(99, pod(99))
    with store._writing, ThreadPoolExecutor(8) as pool:  # all queue up behind the lock
        good = [pool.submit(store.insert, pod(n)) for n in range(5)]
        bad = pool.submit(store.insert, orphan)
        while len(store._queue) < 6:
            threading.Event().wait(0.01)
        store._writing.release()
        try:
            for future in good:
                future.result(5)
            with pytest.raises(Internal, match="FOREIGN KEY"):
                bad.result(5)
        finally:
            store._writing.acquire()
    assert orphan.id not in store.containers and store.by_name(Container, orphan.name) is None
    store.close()
    assert len(Store(tmp_path / "s.db").pods) == 5


def test_many_writers(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")

    def life(number: int) -> None:
        store.insert(pod(number))
        store.update(Pod, pod(number).id, state=PodState.READY)
        if number % 2:
            store.delete(pod(number))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(life, range(200)))
    store.close()
    again = Store(tmp_path / "s.db")
    assert len(again.pods) == 100 and {p.state for p in again.pods.values()} == {PodState.READY}


def test_listeners_hear_every_change_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    store.insert(pod(1))
    heard: list[tuple[str, str | None]] = []

    def listener(kind: type, object_id: str, record: Any) -> None:
        heard.append((kind.__name__, record and record.state))

    store.listen(listener)
    store.update(Pod, pod(1).id, state=PodState.READY)
    store.update(Pod, pod(1).id, state=PodState.READY)
    store.delete(pod(1))
    assert heard == [("Pod", "creating"), ("Pod", "ready"), ("Pod", None)]
    with pytest.raises(NotFound):
        store.update(Pod, pod(1).id, state=PodState.READY)
    store.close()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"no database, whatever its name says " * 50)
    with pytest.raises(Internal, match=r"s\.db"):
        Store(tmp_path / "s.db")


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(Internal, match="later version"):
        Store(tmp_path / "s.db")


def test_durability_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    pragma = {
        n: store._database.execute(f"PRAGMA {n}").fetchone()[0] for n in ("journal_mode", "synchronous", "foreign_keys")
    }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    store.close()
