"""The database of images: what must be remembered beside the layers' directories.

SQLite, write-ahead log, synchronous=FULL: a commit is on the disk when it returns.

    images   id, manifest_digest, config (the document's own bytes)
    names    name -> image          "docker.io/library/busybox:latest"; a name is one image's at a time
    digests  digest -> image        "docker.io/library/busybox@sha256:..."
    judged   image, name, requirements of a trust policy (a fingerprint) that its signatures have met

Layers are not here: their directories say themselves what they are (`layers`), and an image's config names them.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from crio_native.errors import FailedPrecondition, Internal, ResourceExhausted
from crio_native.images.model import Image

# Position n brings a database from version n (user_version) to n + 1.
_MIGRATIONS = (
    """
    CREATE TABLE images (id TEXT PRIMARY KEY, manifest_digest TEXT NOT NULL, config BLOB NOT NULL) STRICT;
    CREATE TABLE names (
        name TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE) STRICT, WITHOUT ROWID;
    CREATE TABLE digests (
        digest TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE judged (
        image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE, name TEXT NOT NULL, requirements TEXT NOT NULL,
        PRIMARY KEY (image, name, requirements)) STRICT, WITHOUT ROWID;
    """,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One image as remembered."""

    id: str
    manifest_digest: str
    config: bytes
    names: tuple[str, ...]
    digests: tuple[str, ...]


def image_of(record: Record, layer_bytes: int, *, pinned: bool) -> Image:
    """An image as its record has it."""
    config = json.loads(record.config)
    return Image(
        record.id,
        record.names,
        record.digests,
        len(record.config) + layer_bytes,
        config,
        record.manifest_digest,
        tuple(config["rootfs"]["diff_ids"]),
        pinned,
    )


class Records:
    """The open database.  Methods may be called from any thread, and write one after the other."""

    @classmethod
    def read_only(cls, path: Path) -> Records:
        """Those of a store that nobody writes, for `load` alone.  Raises FailedPrecondition, Internal."""
        journal = path.with_name(path.name + "-wal")
        if journal.exists() and journal.stat().st_size:
            raise FailedPrecondition(f"image database {path} has changes that are not in it yet: its daemon must stop")
        made = cls.__new__(cls)
        made._lock, made._path = threading.Lock(), path
        try:
            made._connection = sqlite3.connect(
                f"file:{quote(os.fspath(path))}?mode=ro&immutable=1", uri=True, check_same_thread=False
            )
            version = made._connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        if version != len(_MIGRATIONS):
            made.close()
            raise FailedPrecondition(f"image database {path} has version {version}, not {len(_MIGRATIONS)}")
        return made

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise _translated(error, path) from error
            aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
            log.error(
                "image database %s is damaged (%s): put aside as %s, images must be pulled again", path, error, aside
            )
            os.rename(path, aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = _open(path)
        self._path = path

    def load(self) -> list[Record]:
        """All images."""
        with self._lock:
            query = self._connection.execute
            names = _by_image(query("SELECT image, name FROM names ORDER BY name"))
            digests = _by_image(query("SELECT image, digest FROM digests ORDER BY digest"))
            return [
                Record(id_, manifest, config, tuple(names.get(id_, ())), tuple(digests.get(id_, ())))
                for id_, manifest, config in query("SELECT id, manifest_digest, config FROM images ORDER BY rowid")
            ]

    def add(self, record: Record) -> None:
        """Remember an image, or more names and digests of one; a name that was another image's moves here."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO images VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (record.id, record.manifest_digest, record.config),
            )
            for table, values in (("names", record.names), ("digests", record.digests)):
                connection.executemany(f"REPLACE INTO {table} VALUES (?, ?)", [(value, record.id) for value in values])

    def judge(self, id_: str, name: str, requirements: str) -> None:
        """Remember that an image has met a trust policy's requirements under a name."""
        with self._transaction() as connection:
            known = "SELECT id, ?, ? FROM images WHERE id = ?"  # it may be of another store, or have gone meanwhile
            connection.execute(f"REPLACE INTO judged {known}", (name, requirements, id_))

    def judged(self, id_: str, name: str, requirements: str) -> bool:
        """Whether that is remembered."""
        with self._lock:
            query = "SELECT 1 FROM judged WHERE image = ? AND name = ? AND requirements = ?"
            return self._connection.execute(query, (id_, name, requirements)).fetchone() is not None

    def remove(self, ids: Iterable[str]) -> None:
        """Forget images with their names and digests."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM images WHERE id = ?", [(id_,) for id_ in ids])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock, self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
        except sqlite3.Error as error:
            raise _translated(error, self._path) from error


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON")
        problems = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problems != "ok":
            raise sqlite3.DatabaseError(problems)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            newest = len(_MIGRATIONS)
            raise FailedPrecondition(f"image database {path} has version {version}; this program knows up to {newest}")
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _by_image(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for image, value in rows:
        result.setdefault(image, []).append(value)
    return result


def _translated(error: sqlite3.Error, path: Path) -> Exception:
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        return ResourceExhausted(f"no space left on the device of {path} (ENOSPC); free some and retry")
    return Internal(f"image database {path}: {error}")
