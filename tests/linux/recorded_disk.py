"""A disk whose every write and flush is recorded: what a power loss leaves is then any state that the record permits.

The kernel's loop driver needs a file that tells of each write; a FUSE file system with one file, `disk`, is that.
It is served by a process of its own (`python -m tests.linux.recorded_disk MOUNTPOINT BACKING RECORD`).  Looking up
any other name in it writes that name into the record: a note of what had been acknowledged by then.

The record is a sequence of (kind, position, length) with `length` bytes after it: W a write, F a flush (a barrier: all
before it is on the disk), N a note.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crio_native.linux import syscalls

HEAD = struct.Struct("<cQI")
ROOT, DISK = 1, 2  # node ids
MAX_WRITE = 1 << 20
MNT_DETACH = 2

# FUSE, version 7.31 (include/uapi/linux/fuse.h)
IN, OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
BIG_WRITES = 1 << 5
NO_ANSWER = {2, 36, 42}  # FORGET, INTERRUPT, BATCH_FORGET


@dataclass(frozen=True)
class Event:
    kind: bytes
    position: int
    data: bytes


def events(record: Path) -> Iterator[Event]:
    with record.open("rb") as file:
        while head := file.read(HEAD.size):
            kind, position, length = HEAD.unpack(head)
            yield Event(kind, position, file.read(length))


@dataclass(frozen=True)
class Cut:
    """A state that a power loss may leave.  notes: what had been acknowledged by then."""

    flush: int
    notes: tuple[str, ...]
    image: Path


def cuts(record: Path, backing: Path, scratch: Path, most: int, seed: int) -> Iterator[Cut]:
    """What the disk may be after a loss of power: all before a barrier, and by chance some of what came after it.

    backing: the disk before the first event.  scratch: where each state is put, one after the other.  most: of all
    barriers, evenly chosen.  Half of the states have nothing of what came after the barrier.
    """
    recorded = list(events(record))
    barriers = [index for index, event in enumerate(recorded) if event.kind == b"F"]
    chosen = {barriers[number * len(barriers) // most] for number in range(most)} if len(barriers) > most else barriers
    chance, notes = random.Random(seed), list[str]()
    with open(backing, "r+b") as disk:
        for index, event in enumerate(recorded):
            if event.kind == b"W":
                disk.seek(event.position)
                disk.write(event.data)
            elif event.kind == b"N":
                notes.append(event.data.decode())
            elif index in chosen:
                disk.flush()
                later = [] if chance.random() < 0.5 else _after(recorded, index, chance)
                yield Cut(index, tuple(notes), _copy(backing, scratch, later))


def _after(recorded: list[Event], index: int, chance: random.Random) -> list[Event]:
    """By chance some of the writes between a barrier and the next one, which a disk may do in any order."""
    pending = []
    for event in recorded[index + 1 :]:
        if event.kind == b"F":
            break
        if event.kind == b"W":
            pending.append(event)
    share = chance.random()
    return [event for event in pending if chance.random() < share]


def _copy(backing: Path, scratch: Path, later: list[Event]) -> Path:
    subprocess.run(["cp", "--sparse=always", backing, scratch], check=True)
    with scratch.open("r+b") as disk:
        for event in later:
            disk.seek(event.position)
            disk.write(event.data)
    return scratch


@contextlib.contextmanager
def recorded(mountpoint: Path, backing: Path, record: Path) -> Iterator[Path]:
    """Serve the disk for the time of a `with`; the path of its file."""
    command = [sys.executable, "-m", "tests.linux.recorded_disk", str(mountpoint), str(backing), str(record)]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        for _ in range(500):
            if (mountpoint / "disk").exists():
                break
            assert server.poll() is None, "the recorded disk has ended"
            time.sleep(0.01)
        yield mountpoint / "disk"
    finally:
        with contextlib.suppress(OSError):
            syscalls.umount2(str(mountpoint), MNT_DETACH)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class Server:
    """Answers the kernel, one request after the other."""

    def __init__(self, device: int, backing: int, record: int) -> None:
        self._device, self._backing, self._record = device, backing, record
        self._size = os.fstat(backing).st_size

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            _, operation, unique, node, *_ = IN.unpack_from(request)
            if operation in NO_ANSWER:
                continue
            body = memoryview(request)[IN.size :]
            try:
                answer = self._answer(operation, node, body)
                os.writev(self._device, [OUT.pack(OUT.size + len(answer), 0, unique), answer])
            except OSError as error:
                os.write(self._device, OUT.pack(OUT.size, -(error.errno or errno.EIO), unique))

    def _answer(self, operation: int, node: int, body: memoryview) -> bytes:
        match operation:
            case 26:  # INIT
                return struct.pack(
                    "<IIIIHHIIHHI7I", 7, 31, 1 << 17, BIG_WRITES, 16, 12, MAX_WRITE, 1, 0, 0, 0, *[0] * 7
                )
            case 1:  # LOOKUP
                return self._lookup(bytes(body).rstrip(b"\0"))
            case 3 | 4:  # GETATTR, SETATTR (times)
                return struct.pack("<QII", 3600, 0, 0) + self._attributes(node)
            case 14 | 27:  # OPEN, OPENDIR
                return bytes(16)
            case 15:  # READ
                _, offset, size = struct.unpack_from("<QQI", body)
                return os.pread(self._backing, size, offset)
            case 16:  # WRITE
                _, offset, size = struct.unpack_from("<QQI", body)
                self._note(b"W", offset, body[40 : 40 + size])
                return struct.pack("<II", os.pwrite(self._backing, body[40 : 40 + size], offset), 0)
            case 20:  # FSYNC
                self._note(b"F", 0, b"")
                return b""
            case 17:  # STATFS
                return struct.pack("<5QIIII6I", 0, 0, 0, 0, 0, 4096, 255, 4096, 0, *[0] * 6)
            case 18 | 25 | 29 | 38:  # RELEASE, FLUSH, RELEASEDIR, DESTROY
                return b""
        raise OSError(errno.ENOSYS, "")

    def _lookup(self, name: bytes) -> bytes:
        if name == b"disk":
            return struct.pack("<4QII", DISK, 0, 3600, 3600, 0, 0) + self._attributes(DISK)
        self._note(b"N", 0, name)
        raise OSError(errno.ENOENT, "")

    def _attributes(self, node: int) -> bytes:
        size, mode = (self._size, 0o100600) if node == DISK else (0, 0o40700)
        return ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _note(self, kind: bytes, position: int, data: bytes | memoryview) -> None:
        os.writev(self._record, [HEAD.pack(kind, position, len(data)), data])


def main() -> None:
    mountpoint, backing, record = sys.argv[1:]
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    syscalls.mount("recorded", mountpoint, "fuse", 0, f"fd={device},rootmode=40000,user_id=0,group_id=0")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    Server(device, os.open(backing, os.O_RDWR | os.O_CLOEXEC), os.open(record, flags, 0o600)).serve()


if __name__ == "__main__":
    main()
