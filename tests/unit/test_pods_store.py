"""The store: names, durability, group commit, damage."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import AlreadyExists, Internal, NotFound, ResourceExhausted
from crio_native.linux import mounts, syscalls
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
            with pytest.raises(Internal, match=r"belongs to none: FOREIGN KEY constraint failed$"):
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


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = b"no database, whatever its name says " * 50
    (tmp_path / "s.db").write_bytes(text)
    store = Store(tmp_path / "s.db")
    store.insert(pod(1))
    store.close()
    (kept,) = (tmp_path / "damaged").iterdir()
    assert kept.read_bytes() == text and str(kept) in caplog.text
    assert list(Store(tmp_path / "s.db").pods) == [pod(1).id]


@pytest.mark.parametrize("damage", ["a page", "the second half", "most pages"])
def test_what_is_left_of_a_damaged_file_goes_on(tmp_path: Path, damage: str) -> None:
    """The records on the other pages are there, with their containers, and can be changed."""
    path = tmp_path / "s.db"
    store = Store(path)
    for number in range(100):
        store.insert(pod(number))
        store.insert(container(number, pod(number)))
    store.close()
    data = bytearray(path.read_bytes())
    pages = len(data) // 4096
    assert pages > 20
    match damage:
        case "a page":  # a leaf of the pods' table: those after the first few hold rows
            leaf = next(p for p in range(pages) if b'"pod-50"' in data[p * 4096 : p * 4096 + 4096])
            data[leaf * 4096 : leaf * 4096 + 4096] = os.urandom(4096)
        case "the second half":
            del data[pages // 2 * 4096 :]
        case _:
            data[4096 * 2 :] = os.urandom(len(data) - 4096 * 2)
    path.write_bytes(data)
    again = Store(path)
    assert any((tmp_path / "damaged").iterdir())
    assert all(c.pod_id in again.pods for c in again.containers.values())
    if damage == "a page":
        assert 80 < len(again.pods) < 100 and len(again.containers) == len(again.pods)
    for known in list(again.pods):
        again.update(Pod, known, state=PodState.READY)
    again.insert(pod(1000))
    again.close()
    third = Store(path)
    assert dict(third.pods) == dict(again.pods) and dict(third.containers) == dict(again.containers)


@pytest.mark.parametrize("text", ["{", "no JSON", "[]", "{}", '{"id": "x"}', '{"id": 5, "config": 7}', "NULL"])
def test_a_damaged_record_is_set_aside_with_its_containers(tmp_path: Path, text: str, caplog: Any) -> None:
    path = tmp_path / "s.db"
    store = Store(path)
    for number in range(3):
        store.insert(pod(number))
        store.insert(container(number, pod(number)))
    store.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE pods SET record = ? WHERE id = ?", (text, pod(1).id))
    database.close()
    again = Store(path)
    assert set(again.pods) == {pod(0).id, pod(2).id} and set(again.containers) == {
        container(0, pod(0)).id,
        container(2, pod(2)).id,
    }
    assert (tmp_path / "damaged" / f"pods-{pod(1).id}.json").read_text() == text
    assert pod(1).id in caplog.text and container(1, pod(1)).id in caplog.text
    again.insert(pod(1))  # its name is free
    again.close()


@pytest.mark.root
def test_what_a_full_disk_did_not_take_goes_with_the_next_write(tmp_path: Path) -> None:
    """A real full disk: a file system of a few pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    syscalls.mount("tmpfs", str(disk), "tmpfs", 0, "size=1m")
    try:
        store = Store(disk / "s.db")
        one, two, three = pod(1), pod(2), pod(3)
        store.insert(one)
        store.insert(two)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        with pytest.raises(ResourceExhausted, match=r"s\.db.*ENOSPC"):
            for _ in range(1000):  # until the log's last page is full
                store.update(Pod, one.id, hostname=os.urandom(2000).hex())
        with pytest.raises(ResourceExhausted):
            store.insert(three)
        assert three.id not in store.pods and store.by_name(Pod, three.name) is None
        store.update(Pod, one.id, wait=False, state=PodState.NOT_READY)
        store.delete(two)
        filler.unlink()
        store.insert(replace(pod(4), name=two.name))  # the name's old row goes in the same write
        store.close()
        again = Store(disk / "s.db")
        assert set(again.pods) == {one.id, pod(4).id} and again.pods[one.id].state == PodState.NOT_READY
        again.close()
    finally:
        syscalls.umount2(str(disk), mounts.MNT_DETACH)


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(Internal, match="later version"):
        Store(tmp_path / "s.db")


def pragma(store: Store, name: str) -> Any:
    return store._database._connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_the_medium_is_waited_for_when_a_record_is_added(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    assert (pragma(store, "journal_mode"), pragma(store, "foreign_keys")) == ("wal", 1)
    store.insert(pod(1))
    assert pragma(store, "synchronous") == 2  # FULL: the commit was flushed
    store.update(Pod, pod(1).id, state=PodState.READY)
    assert pragma(store, "synchronous") == 1  # NORMAL: written
    store.insert(container(1, pod(1)))
    assert pragma(store, "synchronous") == 2
    store.delete(container(1, pod(1)))
    assert pragma(store, "synchronous") == 1
    store.close()


def test_a_change_survives_a_daemon_that_is_killed(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            store = Store(tmp_path / "s.db")
            store.insert(pod(1))
            store.insert(pod(2))
            store.update(Pod, pod(1).id, state=PodState.READY)
            store.delete(pod(2))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    store = Store(tmp_path / "s.db")
    assert dict(store.pods) == {pod(1).id: replace(pod(1), state=PodState.READY)}
    store.close()
