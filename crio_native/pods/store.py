"""The durable records of pods and containers: an index in memory over one SQLite file.

Readers use the index and take no lock.  A writer's change is in the index at once and on the disk when the call returns
(or soon after, in order, with ``wait=False``).  Whoever gets to write commits whatever has queued up together: twenty
pods at once cost a few flushes, not forty.

    pods (                                  containers (
        id    TEXT PRIMARY KEY,                 id     TEXT PRIMARY KEY,
        name  TEXT NOT NULL UNIQUE,             pod_id TEXT NOT NULL REFERENCES pods (id),
        state TEXT NOT NULL,                    name   TEXT NOT NULL UNIQUE,
        record TEXT NOT NULL                    state  TEXT NOT NULL,
    )                                           record TEXT NOT NULL
                                            )

`record` is the JSON of `records.Pod` or `records.Container`; the other columns repeat what SQLite must watch over.
A change of this schema comes with a new number in `_MIGRATIONS` (kept in ``user_version``) and an update of this text.

A name is taken exactly as long as its record exists: there are no reservations that could outlive their object.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from crio_native.errors import AlreadyExists, Internal, NotFound
from crio_native.pods.records import Container, Pod, Record
from crio_native.pods.values import from_json, to_json

R = TypeVar("R", Pod, Container)

_MIGRATIONS = (
    """
    CREATE TABLE pods (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, record TEXT NOT NULL) STRICT;
    CREATE TABLE containers (
        id TEXT PRIMARY KEY, pod_id TEXT NOT NULL REFERENCES pods (id), name TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL, record TEXT NOT NULL) STRICT;
    """,
)

Statement = tuple[str, tuple[Any, ...]]


class Store:
    """All pods and containers.  `close` commits what is queued."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.  Raises Internal when it is damaged or of a later version."""
        self._lock = threading.Lock()
        self._tables: dict[type, dict[str, Any]] = {Pod: {}, Container: {}}
        self._names: dict[str, str] = {}
        self._listeners: list[Callable[[type, str, Record | None], None]] = []
        self._queue: deque[tuple[Statement, Future[None]]] = deque()
        self._writing = threading.Lock()
        self._database = _open(path)
        self._load()
        # Only for changes that nobody waits for; who waits writes in his own thread.
        self._background = ThreadPoolExecutor(1, "store")

    @property
    def pods(self) -> Mapping[str, Pod]:
        return MappingProxyType(self._tables[Pod])

    @property
    def containers(self) -> Mapping[str, Container]:
        return MappingProxyType(self._tables[Container])

    def get(self, kind: type[R], object_id: str) -> R:
        """The record.  Raises NotFound."""
        record: R | None = self._tables[kind].get(object_id)
        if record is None:
            raise NotFound(_word(kind), object_id)
        return record

    def by_name(self, kind: type[R], name: str) -> R | None:
        found: R | None = self._tables[kind].get(self._names.get(name, ""))
        return found

    def of_pod(self, pod_id: str) -> list[Container]:
        return [c for c in list(self._tables[Container].values()) if c.pod_id == pod_id]

    def listen(self, listener: Callable[[type, str, Record | None], None]) -> None:
        """Call `listener(kind, id, record or None)` after each change, in order, with the index locked: be quick.

        It is called at once for every record that exists.
        """
        with self._lock:
            self._listeners.append(listener)
            for kind, table in self._tables.items():
                for object_id, record in table.items():
                    listener(kind, object_id, record)

    def insert(self, record: Record) -> None:
        """Add a record and so take its name; on the disk when this returns.  Raises AlreadyExists."""
        with self._lock:
            holder = self._names.get(record.name)
            if holder is not None:
                raise AlreadyExists(f"the name {record.name!r} is taken by {_word(type(record))} {holder}")
            self._names[record.name] = record.id
            done = self._publish(type(record), record.id, record, _insert(record))
        try:
            self._flush(done)
        except BaseException:
            with self._lock:
                self._forget(record)
            raise

    def change(self, kind: type[R], object_id: str, make: Callable[[R], R], *, wait: bool = True) -> R:
        """Replace a record by what `make` makes of it, atomically.  Raises NotFound when it is gone.

        wait: return only when it is on the disk.  `make` runs with the index locked.
        """
        with self._lock:
            old = self.get(kind, object_id)
            record = make(old)
            if record == old:
                return old
            done = self._publish(kind, object_id, record, _update(record))
        if wait:
            self._flush(done)
        else:
            self._background.submit(self._flush, done)
        return record

    def update(self, kind: type[R], object_id: str, *, wait: bool = True, **changes: Any) -> R:
        """`change` of some fields."""
        return self.change(kind, object_id, lambda old: dataclasses.replace(old, **changes), wait=wait)

    def delete(self, record: Record) -> None:
        """Remove a record and free its name; idempotent."""
        with self._lock:
            self._forget(record)
            done = self._submit((f"DELETE FROM {_table(type(record))} WHERE id = ?", (record.id,)))
        self._flush(done)

    def close(self) -> None:
        self._background.shutdown()
        self._database.close()

    def _publish(self, kind: type, object_id: str, record: Record, statement: Statement) -> Future[None]:
        self._tables[kind][object_id] = record
        for listener in self._listeners:
            listener(kind, object_id, record)
        return self._submit(statement)

    def _forget(self, record: Record) -> None:
        if self._tables[type(record)].pop(record.id, None) is not None:
            self._names.pop(record.name, None)
            for listener in self._listeners:
                listener(type(record), record.id, None)

    def _submit(self, statement: Statement) -> Future[None]:
        done: Future[None] = Future()
        self._queue.append((statement, done))
        return done

    def _flush(self, wanted: Future[None]) -> None:
        """Have all that is queued on the disk, `wanted` included; raises what became of that one."""
        with self._writing:
            if not wanted.done():
                batch = [self._queue.popleft() for _ in range(len(self._queue))]
                failed = self._commit([statement for statement, _ in batch])
                for statement, done in batch:
                    # One bad change must not take its neighbours with it.
                    error = failed and (self._commit([statement]) if len(batch) > 1 else failed)
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(error)
        wanted.result()

    def _commit(self, statements: list[Statement]) -> Internal | None:
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for sql, values in statements:
                    self._database.execute(sql, values)
        except sqlite3.Error as error:
            return Internal(f"the state database did not take a change: {error}; is its disk full or damaged?")
        return None

    def _load(self) -> None:
        kinds: tuple[type[Pod], type[Container]] = (Pod, Container)
        for kind in kinds:
            for (text,) in self._database.execute(f"SELECT record FROM {_table(kind)}"):
                record: Record = from_json(kind, json.loads(text))
                self._tables[kind][record.id] = record
                self._names[record.name] = record.id


def _open(path: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
        database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
        (check,) = database.execute("PRAGMA quick_check(1)").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if check != "ok":
            raise sqlite3.DatabaseError(check)
        if version > len(_MIGRATIONS):
            raise Internal(
                f"{path} was written by a later version (schema {version}, this one knows {len(_MIGRATIONS)})"
            )
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            database.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
    except sqlite3.Error as error:
        raise Internal(f"{path}: {error}; move the file away to start without the pods that it knew") from None
    return database


def _insert(record: Record) -> Statement:
    text = json.dumps(to_json(record))
    if isinstance(record, Pod):
        return "INSERT INTO pods VALUES (?, ?, ?, ?)", (record.id, record.name, record.state, text)
    return (
        "INSERT INTO containers VALUES (?, ?, ?, ?, ?)",
        (record.id, record.pod_id, record.name, record.state, text),
    )


def _update(record: Record) -> Statement:
    sql = f"UPDATE {_table(type(record))} SET state = ?, record = ? WHERE id = ?"
    return sql, (record.state, json.dumps(to_json(record)), record.id)


def _table(kind: type) -> str:
    return "pods" if kind is Pod else "containers"


def _word(kind: type) -> str:
    return "pod" if kind is Pod else "container"
