"""The durable records of pods and containers: an index in memory over one SQLite file (`state_database`).

Readers use the index and take no lock.  A writer's change is in the index at once and in the file when the call returns
(or soon after, with ``wait=False``).  Whoever gets to write commits whatever has queued up together: twenty pods at
once cost a few flushes, not forty.  What is queued is only which records have changed: the disk gets them as the index
has them then.  So what the disk did not take (it is full) is not lost: it goes with the next write that succeeds.

The medium is waited for only when a record is added, which is before the kernel is touched: whatever happens then,
somebody will know what to look for.  Later changes are the operating system's to keep: they survive a daemon that is
killed.  A machine that loses power may lose the last of them, and has by then lost the processes that they tell of: a
start finds the object in an earlier state, and removes it or goes on with removing it.

`record` in the file is the JSON of `records.Pod` or `records.Container`; the other columns repeat what SQLite must
watch over.  A record that cannot be read any more is set aside with its containers, and the rest serves.

A name is taken exactly as long as its record exists: there are no reservations that could outlive their object.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from crio_native.errors import AlreadyExists, CrioError, NotFound
from crio_native.pods import names
from crio_native.pods.records import Container, ContainerState, Pod, PodState, Record
from crio_native.pods.state_database import Row, StateDatabase
from crio_native.pods.values import from_json, to_json

log = logging.getLogger(__name__)

R = TypeVar("R", Pod, Container)
Key = tuple[type, str]  # of a record: its kind and its id


class Store:
    """All pods and containers.  `close` commits what is queued."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.  Raises Internal when it is of a later version or cannot be opened."""
        self._lock = threading.Lock()
        self._tables: dict[type, dict[str, Any]] = {Pod: {}, Container: {}}
        self._names: dict[str, str] = {}
        self._listeners: list[Callable[[type, str, Record | None], None]] = []
        self._queue: deque[tuple[Key, Future[None]]] = deque()
        self._added: set[Key] = set()  # of those in the queue, what the medium must have
        self._unwritten: set[Key] = set()  # what the disk did not take; touched by who holds `_writing`
        self._writing = threading.Lock()
        self._database = StateDatabase(path)
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
        """Add a record and so take its name; flushed to the medium when this returns.

        Raises AlreadyExists, ResourceExhausted when the disk is full; then the name is free again.
        """
        with self._lock:
            holder = self._names.get(record.name)
            if holder is not None:
                raise AlreadyExists(f"the name {record.name!r} is taken by {_word(type(record))} {holder}")
            self._names[record.name] = record.id
            self._added.add((type(record), record.id))
            done = self._publish(type(record), record.id, record)
        try:
            self._flush(done)
        except BaseException:
            with self._lock:
                self._forget(record)
            raise

    def change(self, kind: type[R], object_id: str, make: Callable[[R], R], *, wait: bool = True) -> R:
        """Replace a record by what `make` makes of it, atomically.  Raises NotFound when it is gone.

        wait: return only when it is in the file.  `make` runs with the index locked.
        """
        with self._lock:
            old = self.get(kind, object_id)
            record = make(old)
            if record == old:
                return old
            done = self._publish(kind, object_id, record)
        if wait:
            self._flush(done)
        else:
            self._background.submit(self._flush_later, done)
        return record

    def update(self, kind: type[R], object_id: str, *, wait: bool = True, **changes: Any) -> R:
        """`change` of some fields."""
        return self.change(kind, object_id, lambda old: dataclasses.replace(old, **changes), wait=wait)

    def delete(self, record: Record) -> None:
        """Remove a record and free its name; idempotent.

        A disk that does not take it is told to the log alone: the object is gone, and its row will be.
        """
        with self._lock:
            self._forget(record)
            done = self._submit((type(record), record.id))
        self._flush_later(done)

    def close(self) -> None:
        """Write what is not yet on the disk, as far as it takes it, and let go of the file."""
        self._background.shutdown()
        with self._writing:
            self._write(())
        self._database.close()

    def _publish(self, kind: type, object_id: str, record: Record) -> Future[None]:
        self._tables[kind][object_id] = record
        for listener in self._listeners:
            listener(kind, object_id, record)
        return self._submit((kind, object_id))

    def _forget(self, record: Record) -> None:
        if self._tables[type(record)].pop(record.id, None) is not None:
            self._names.pop(record.name, None)
            for listener in self._listeners:
                listener(type(record), record.id, None)

    def _submit(self, key: Key) -> Future[None]:
        done: Future[None] = Future()
        self._queue.append((key, done))
        return done

    def _flush_later(self, wanted: Future[None]) -> None:
        try:
            self._flush(wanted)
        except CrioError as error:
            log.error("%s; until then only the running daemon knows of it", error)

    def _flush(self, wanted: Future[None]) -> None:
        """Have all that is queued on the disk, `wanted` included; raises what became of that one."""
        with self._writing:
            if not wanted.done():
                batch = [self._queue.popleft() for _ in range(len(self._queue))]
                failed = self._write(key for key, _ in batch)
                for key, done in batch:
                    if key in failed:
                        done.set_exception(failed[key])
                    else:
                        done.set_result(None)
        wanted.result()

    def _write(self, changed: Iterable[Key]) -> Mapping[Key, CrioError]:
        """Bring these records, and what is owed from before, to the disk as the index has them; what it refused."""
        keys = self._unwritten.union(changed)
        failed: dict[Key, CrioError] = {}
        if keys and (error := self._commit(keys)) is not None:
            # One bad change must not take its neighbours with it.  Deletions first: they make room, and free names.
            for key in sorted(keys, key=lambda k: k[1] in self._tables[k[0]]):
                if len(keys) > 1:
                    error = self._commit({key})
                if error is not None:
                    failed[key] = error
        self._unwritten = set(failed)
        return failed

    def _commit(self, keys: set[Key]) -> CrioError | None:
        with self._lock:
            records = {key: self._tables[key[0]].get(key[1]) for key in keys}
            added = self._added & keys
        error = self._database.write(
            deleted=[(_table(kind), object_id) for (kind, object_id), record in records.items() if record is None],
            written=[(_table(kind), _row(record)) for (kind, _), record in records.items() if record is not None],
            flush=bool(added),
        )
        if error is None and added:
            with self._lock:
                self._added -= added
        return error

    def _load(self) -> None:
        kinds: tuple[type[Pod], type[Container]] = (Pod, Container)
        for kind in kinds:
            for object_id, text in self._database.rows(_table(kind)):
                try:
                    record = self._read(kind, object_id, text)
                except Exception as error:  # whatever can be wrong with what was read from a damaged disk
                    file = self._database.set_aside(_table(kind), object_id, text)
                    log.error(
                        "the record of %s %s is damaged (%s): kept as %s; what is left of the %s will be removed",
                        _word(kind),
                        object_id,
                        error,
                        file,
                        _word(kind),
                    )
                    self._unwritten.add((kind, object_id))
                    continue
                self._tables[kind][record.id] = record
                self._names[record.name] = record.id
        self._write(())

    def _read(self, kind: type[Pod] | type[Container], object_id: str, text: str) -> Record:
        """Raises ValueError, and what `from_json` does, when it is no record."""
        record: Record = from_json(kind, json.loads(text))
        (PodState if isinstance(record, Pod) else ContainerState)(record.state)
        if record.id != object_id or not names.is_id(record.id):
            raise ValueError(f"it says that its id is {record.id!r}")
        if record.name in self._names:
            raise ValueError(f"the name {record.name!r} is that of {self._names[record.name]}")
        if isinstance(record, Container) and record.pod_id not in self._tables[Pod]:
            raise ValueError(f"there is no pod {record.pod_id!r}")
        return record


def _row(record: Record) -> Row:
    text = json.dumps(to_json(record))
    if isinstance(record, Pod):
        return record.id, record.name, record.state, text
    return record.id, record.pod_id, record.name, record.state, text


def _table(kind: type) -> str:
    return "pods" if kind is Pod else "containers"


def _word(kind: type) -> str:
    return "pod" if kind is Pod else "container"


def images_in_use(store: Store) -> dict[str, str]:
    """The ids of images that containers stand on, and what uses each, in words."""
    return {
        image_id: f"container {container.id}"
        for container in list(store.containers.values())
        for image_id in (container.image_id, *(volume.image_id for volume in container.image_volumes))
    }
