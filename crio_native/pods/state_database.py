"""The SQLite file under `store`: opened or salvaged, read row by row, and written in whole changes.

Here belongs all that knows SQL, and what is done with damage: a file that SQLite refuses is moved to ``damaged/``
beside it and what can still be read of it is taken over; a row that makes no sense is written to a file there
(`set_aside`).  What a record means is `store`'s.

    pods (                                  containers (
        id    TEXT PRIMARY KEY,                 id     TEXT PRIMARY KEY,
        name  TEXT NOT NULL UNIQUE,             pod_id TEXT NOT NULL REFERENCES pods (id),
        state TEXT NOT NULL,                    name   TEXT NOT NULL UNIQUE,
        record TEXT NOT NULL                    state  TEXT NOT NULL,
    )                                           record TEXT NOT NULL
                                            )

A change of this schema comes with a new number in `_MIGRATIONS` (kept in ``user_version``) and an update of this text.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import CrioError, Internal, ResourceExhausted

log = logging.getLogger(__name__)

Row = tuple[str, ...]
TABLES = ("pods", "containers")  # a container's row needs its pod's
_COLUMNS = {"pods": 4, "containers": 5}
_MIGRATIONS = (
    """
    CREATE TABLE pods (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, record TEXT NOT NULL) STRICT;
    CREATE TABLE containers (
        id TEXT PRIMARY KEY, pod_id TEXT NOT NULL REFERENCES pods (id), name TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL, record TEXT NOT NULL) STRICT;
    """,
)


class StateDatabase:
    """One open file.  `write` and `close` are called by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open or make it.  Raises Internal when it is of a later version or cannot be opened."""
        self._path = path
        self._damaged = path.with_name("damaged")
        try:
            self._connection = _open(path)
        except sqlite3.OperationalError as error:
            raise self._failure(error) from None
        except sqlite3.DatabaseError as error:
            self._connection = self._salvaged(error)

    def rows(self, table: str) -> Iterator[Row]:
        """(id, record) of each row."""
        yield from self._connection.execute(f"SELECT id, record FROM {table}")

    def write(
        self, deleted: Sequence[tuple[str, str]], written: Sequence[tuple[str, Row]], *, flush: bool
    ) -> CrioError | None:
        """Delete rows by (table, id) and put rows of (table, columns), all or none; what it failed with, if it did.

        flush: return when the medium has it, with all that was written before.  Without, the kernel has it: it survives
        this process, but not always the machine.
        """
        try:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")
            with self._connection as connection:
                connection.execute("BEGIN IMMEDIATE")
                for table in reversed(TABLES):
                    connection.executemany(
                        f"DELETE FROM {table} WHERE id = ?", [(id_,) for of, id_ in deleted if of == table]
                    )
                for table in TABLES:
                    connection.executemany(_put(table), [row for of, row in written if of == table])
        except sqlite3.Error as error:
            return self._failure(error)
        return None

    def set_aside(self, table: str, object_id: str, text: str) -> Path:
        """Keep the text of a row in a file of its own, for people to look at; the row stays.  Returns the file."""
        self._damaged.mkdir(mode=0o700, exist_ok=True)
        name = "".join(c if c.isalnum() else "_" for c in str(object_id))[:80]
        file = self._damaged / f"{table}-{name}.json"
        file.write_text(str(text), errors="surrogateescape")
        return file

    def close(self) -> None:
        self._connection.close()

    def _failure(self, error: sqlite3.Error) -> CrioError:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            return ResourceExhausted(
                f"the state database {self._path} did not take a change: ENOSPC (no space left on device); "
                "free space on its file system, and it will"
            )
        if isinstance(error, sqlite3.IntegrityError):
            return Internal(f"the state database {self._path} did not take a record that belongs to none: {error}")
        return Internal(f"the state database {self._path} did not take a change: {error}; is its disk full or damaged?")

    def _salvaged(self, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        self._damaged.mkdir(mode=0o700, exist_ok=True)
        old = self._damaged / f"{self._path.name}-{time.time_ns()}"
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self._path}{suffix}", f"{old}{suffix}")
        connection = _open(self._path)
        saved = _copy(old, connection)
        log.error(
            "the state database %s is damaged (%s): kept as %s; %d records could be read and go on, what the others "
            "said of pods and containers is lost and will be removed",
            self._path,
            error,
            old,
            saved,
        )
        return connection


def _open(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError for a damaged file, Internal for one of a later version."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        database.executescript("PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON;")
        (check,) = database.execute("PRAGMA quick_check(1)").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if check != "ok":
            raise sqlite3.DatabaseError(check)
        if version > len(_MIGRATIONS):
            raise Internal(
                f"{path} was written by a later version (schema {version}, this one knows {len(_MIGRATIONS)}); "
                "install that one, or move the file away to start without the pods that it knew"
            )
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            database.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
    except BaseException:
        database.close()
        raise
    return database


def _copy(old: Path, new: sqlite3.Connection) -> int:
    """Take over the rows that can be read and that the constraints let in; how many those are."""
    saved = 0
    with contextlib.closing(sqlite3.connect(f"file:{old}?mode=rw", uri=True)) as damaged:
        for table in TABLES:
            for row in _readable(damaged, table):
                with contextlib.suppress(sqlite3.Error):
                    new.execute(_put(table), row)
                    saved += 1
    return saved


def _readable(damaged: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """From both ends, up to the first page that is broken."""
    for order in ("ASC", "DESC"):
        try:
            yield from damaged.execute(f"SELECT * FROM {table} NOT INDEXED ORDER BY rowid {order}")
            return
        except sqlite3.Error:
            continue


def _put(table: str) -> str:
    values = ", ".join("?" * _COLUMNS[table])
    return (
        f"INSERT INTO {table} VALUES ({values}) "
        "ON CONFLICT (id) DO UPDATE SET state = excluded.state, record = excluded.record"
    )
