"""What the pod network must remember across a crash of the daemon: leases, attachments, and changes to the node.

One SQLite file.  A record is committed before the kernel is touched, so after a kill -9 at any point whatever exists
has a record that leads to it.  Synchronous NORMAL is enough: it survives the daemon's death, and after a power failure
none of the recorded links exist any more.

Schema, version 1 (`PRAGMA user_version`; a change needs a new number and a migration):

    attachments  sandbox_id, document (Attachment as JSON), pod (JSON: name, namespace, uid, netns)
    leases       address, sandbox_id
    host_ports   protocol, host_port, host_ip, sandbox_id
    last_leased  range_set ("first subnet"), address: where the search for the next free address begins
    node         what we made or changed on the node: kind ("link", "nftables", "sysctl"), name, previous value;
                 and what a kubelet told of it: kind "pod_cidr", name, position
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from crio_native.errors import AlreadyExists, FailedPrecondition, Internal, ResourceExhausted
from crio_native.network.config import Range
from crio_native.network.keys import Address
from crio_native.network.model import Attachment, PortMapping

VERSION = 1
FILE_NAME = "network.sqlite3"
_SCHEMA = """
CREATE TABLE attachments (sandbox_id TEXT PRIMARY KEY, document TEXT NOT NULL, pod TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (address TEXT PRIMARY KEY, sandbox_id TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX leases_of ON leases (sandbox_id);
CREATE TABLE host_ports (
    protocol TEXT NOT NULL, host_port INTEGER NOT NULL, host_ip TEXT NOT NULL, sandbox_id TEXT NOT NULL,
    PRIMARY KEY (protocol, host_port, host_ip)) WITHOUT ROWID;
CREATE INDEX host_ports_of ON host_ports (sandbox_id);
CREATE TABLE last_leased (range_set TEXT PRIMARY KEY, address TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE node (kind TEXT NOT NULL, name TEXT NOT NULL, previous TEXT NOT NULL,
    PRIMARY KEY (kind, name)) WITHOUT ROWID;
"""


class Records:
    """The open file.  Thread-safe: one connection behind one lock, each method one transaction.

    Every method raises ResourceExhausted when the disk is full, Internal when the file is damaged.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = state_dir / FILE_NAME
        self._lock = threading.Lock()
        with self._explained():
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={VERSION};COMMIT;")
        elif version != VERSION:
            raise FailedPrecondition(f"{self._path} has version {version}, this program reads {VERSION}; upgrade it")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def attach(
        self,
        sandbox_id: str,
        range_sets: Sequence[Sequence[Range]],
        build: Callable[[Sequence[tuple[Address, Range]]], Attachment],
        pod: Mapping[str, str],
    ) -> Attachment:
        """Lease one address from each range set, claim the node's ports, and record what `build` makes of the leases.

        Raises AlreadyExists when the sandbox is attached, ResourceExhausted naming the subnets when a set has no
        address left, FailedPrecondition when another sandbox has one of the ports.  Then nothing is recorded.
        """
        with self._transaction():
            if self._db.execute("SELECT 1 FROM attachments WHERE sandbox_id=?", (sandbox_id,)).fetchone():
                raise AlreadyExists(f"pod sandbox {sandbox_id} is attached to the network already")
            attachment = build([self._lease(sandbox_id, range_set) for range_set in range_sets])
            for mapping in attachment.port_mappings:
                self._claim(sandbox_id, mapping)
            row = (sandbox_id, json.dumps(attachment.to_dict()), json.dumps(pod))
            self._db.execute("INSERT INTO attachments VALUES (?, ?, ?)", row)
            return attachment

    def _lease(self, sandbox_id: str, range_set: Sequence[Range]) -> tuple[Address, Range]:
        key = str(range_set[0].subnet)
        row = self._db.execute("SELECT address FROM last_leased WHERE range_set=?", (key,)).fetchone()
        last = ipaddress.ip_address(row[0]) if row else None
        (leased,) = self._db.execute("SELECT count(*) FROM leases").fetchone()
        # Of this many consecutive addresses one is free, unless all of the set's are taken.
        bound = leased + len(range_set) + 1
        for address, found in _from(range_set, last, bound):
            if address == found.gateway:
                continue
            if not self._db.execute("SELECT 1 FROM leases WHERE address=?", (str(address),)).fetchone():
                self._db.execute("INSERT INTO leases VALUES (?, ?)", (str(address), sandbox_id))
                self._db.execute("INSERT OR REPLACE INTO last_leased VALUES (?, ?)", (key, str(address)))
                return address, found
        subnets = ", ".join(str(item.subnet) for item in range_set)
        raise ResourceExhausted(f"no free pod address in {subnets} ({leased} leased); remove pods or add a range")

    def _claim(self, sandbox_id: str, mapping: PortMapping) -> None:
        query = (
            "SELECT sandbox_id, pod FROM host_ports JOIN attachments USING (sandbox_id) "
            "WHERE protocol=? AND host_port=? AND (host_ip=? OR host_ip='' OR ?='')"
        )
        row = (mapping.protocol, mapping.host_port, mapping.host_ip)
        if taken := self._db.execute(query, (*row, mapping.host_ip)).fetchone():
            holder = json.loads(taken[1])
            name = f"pod {holder.get('namespace', '')}/{holder.get('name', '')}"
            raise FailedPrecondition(f"port {mapping} of the node is taken by {name} (sandbox {taken[0]})")
        self._db.execute("INSERT INTO host_ports VALUES (?, ?, ?, ?)", (*row, sandbox_id))

    def replace(self, sandbox_id: str, attachment: Attachment) -> None:
        """Record what an attachment has become; its leases and ports remain."""
        with self._transaction():
            row = (json.dumps(attachment.to_dict()), sandbox_id)
            self._db.execute("UPDATE attachments SET document=? WHERE sandbox_id=?", row)

    def release(self, sandbox_id: str) -> None:
        """Forget the sandbox.  Idempotent."""
        with self._transaction():
            for table in ("attachments", "leases", "host_ports"):
                self._db.execute(f"DELETE FROM {table} WHERE sandbox_id=?", (sandbox_id,))

    def attachment(self, sandbox_id: str) -> Attachment | None:
        with self._transaction():
            row = self._db.execute("SELECT document FROM attachments WHERE sandbox_id=?", (sandbox_id,)).fetchone()
        return Attachment.from_dict(json.loads(row[0])) if row else None

    def netns(self, sandbox_id: str) -> str:
        """The path of the sandbox's network namespace, "" when it is not attached."""
        with self._transaction():
            row = self._db.execute("SELECT pod FROM attachments WHERE sandbox_id=?", (sandbox_id,)).fetchone()
        return str(json.loads(row[0]).get("netns", "")) if row else ""

    def attachments(self) -> dict[str, Attachment]:
        with self._transaction():
            rows = self._db.execute("SELECT sandbox_id, document FROM attachments").fetchall()
        return {sandbox_id: Attachment.from_dict(json.loads(document)) for sandbox_id, document in rows}

    def note_change(self, kind: str, name: str, previous: str = "") -> None:
        """Remember what the node was like before our first change of it."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO node VALUES (?, ?, ?)", (kind, name, previous))

    def changes(self, kind: str) -> list[tuple[str, str]]:
        """(name, previous value) of each change of that kind."""
        with self._transaction():
            return self._db.execute("SELECT name, previous FROM node WHERE kind=?", (kind,)).fetchall()

    def forget_change(self, kind: str, name: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM node WHERE kind=? AND name=?", (kind, name))

    def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM node WHERE kind='pod_cidr'")
            rows = [(cidr, str(index)) for index, cidr in enumerate(cidrs)]
            self._db.executemany("INSERT OR IGNORE INTO node VALUES ('pod_cidr', ?, ?)", rows)

    def pod_cidrs(self) -> list[str]:
        """In the order in which they were told."""
        return [name for name, _ in sorted(self.changes("pod_cidr"), key=lambda item: int(item[1]))]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)  # the module's own errors have none
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
                raise ResourceExhausted(f"{self._path}: {error}; free space on its file system") from error
            damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            advice = "; the file is damaged: stop all pods, remove it, and start again" if damaged else ""
            raise Internal(f"{self._path}: {error}{advice}") from error


def _from(range_set: Sequence[Range], last: Address | None, bound: int) -> Iterator[tuple[Address, Range]]:
    """At most `bound` addresses of the set in a circle, beginning after `last`: so the most recently released ones
    are the last to be leased again."""
    total = sum(item.size for item in range_set)
    offset = 0
    if last is not None:
        before = 0
        for item in range_set:
            if item.start.version == last.version and int(item.start) <= int(last) <= int(item.end):
                offset = before + int(last) - int(item.start) + 1
            before += item.size
    for step in range(min(bound, total)):
        position = (offset + step) % total
        for item in range_set:
            if position < item.size:
                yield item.start + position, item
                break
            position -= item.size
