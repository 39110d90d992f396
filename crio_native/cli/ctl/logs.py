"""The CRI log format: reading a container's log file, joined, selected, and followed over rotations.

A record is a line ``TIME STREAM TAG CONTENT``: an RFC 3339 time with nanoseconds, stdout or stderr, and P for a part
of a line or F for its last part (the kubelet's container log format).  Nothing here knows the CRI or click.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from crio_native.cli.ctl.parse import timestamp

READ_SIZE = 64 * 1024
RECORD_MAX = 1024 * 1024
"""Bytes after which a record without an end is passed on as it is, so that no file can fill the memory."""

POLL_MIN, POLL_MAX = 0.02, 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Record:
    """One record.  time: as written.  last: whether the line ends here.  A line that is no record is all content."""

    time: str
    stream: str
    last: bool
    content: bytes


def parse_record(line: bytes) -> Record:
    """The record in `line` (without its newline); never fails."""
    parts = line.split(b" ", 3)
    if len(parts) == 4 and parts[1] in (b"stdout", b"stderr"):
        tag = parts[2].split(b":")[0]
        if tag in (b"P", b"F"):
            return Record(parts[0].decode("ascii", "replace"), parts[1].decode(), tag == b"F", parts[3])
    return Record("", "stdout", True, line)


class LogFile:
    """A log file that may be rotated, truncated or not there yet.  A context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._rest = b""

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def rewind(self) -> None:
        """Go back to the beginning of the same file."""
        if self._fd >= 0:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._rest = b""

    def records(self) -> Iterator[Record]:
        """All complete records that are there now; call again for later ones."""
        while True:
            if self._fd < 0 and not self._open():
                return
            # Asked before reading: once the path leads elsewhere the writer has left this file, so its end is final.
            rotated = self._rotated()
            yield from self._rest_of_file()
            if not rotated:
                return
            self._close()

    def _rest_of_file(self) -> Iterator[Record]:
        if os.fstat(self._fd).st_size < os.lseek(self._fd, 0, os.SEEK_CUR):
            self.rewind()  # truncated in place
        while chunk := os.read(self._fd, READ_SIZE):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            yield from map(parse_record, lines)
            if len(self._rest) > RECORD_MAX:
                yield parse_record(self._rest)
                self._rest = b""

    def _open(self) -> bool:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        return True

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._rest = -1, b""

    def _rotated(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            return False  # renamed, and the writer has not reopened yet


class Printer:
    """Writes records to two streams, parts joined.

    since: ns since the epoch, lines older are left out.  skip: number of lines to leave out at the start.
    Parts go out as they come, so a line may be longer than the memory.
    """

    def __init__(
        self, out: BinaryIO, err: BinaryIO, *, timestamps: bool = False, since: int = 0, skip: int = 0
    ) -> None:
        self._outputs = {"stdout": out, "stderr": err}
        self._timestamps, self._since, self._skip = timestamps, since, skip
        self._shown: dict[str, bool] = {}  # streams in the middle of a line, and whether that line is shown

    def write(self, records: Iterable[Record]) -> bool:
        """Write and flush; returns whether there was any record."""
        any_record = False
        for record in records:
            any_record = True
            self._write(record)
        for output in self._outputs.values():
            output.flush()
        return any_record

    def _write(self, record: Record) -> None:
        begins = record.stream not in self._shown
        shown = self._wanted(record) if begins else self._shown[record.stream]
        if shown:
            prefix = f"{record.time} ".encode() if begins and self._timestamps else b""
            self._outputs[record.stream].write(prefix + record.content + (b"\n" if record.last else b""))
        if record.last:
            self._shown.pop(record.stream, None)
        else:
            self._shown[record.stream] = shown

    def _wanted(self, record: Record) -> bool:
        self._skip -= 1
        if self._skip >= 0:
            return False
        moment = timestamp(record.time) if self._since else None
        return moment is None or moment >= self._since


def count_lines(records: Iterable[Record]) -> int:
    """Number of lines that `records` begin."""
    count, open_streams = 0, set[str]()
    for record in records:
        count += record.stream not in open_streams
        (open_streams.discard if record.last else open_streams.add)(record.stream)
    return count


def follow(log: LogFile, printer: Printer, ended: Callable[[], bool]) -> None:
    """Print what there is and what comes, until `ended` and all is printed.

    `ended` is asked only when the log is silent; what was logged before it says yes is still printed.
    """
    delay = POLL_MIN
    while True:
        if printer.write(log.records()):
            delay = POLL_MIN
        elif ended():
            printer.write(log.records())
            return
        else:
            delay = min(delay * 2, POLL_MAX)
        time.sleep(delay)


def terminal(timestamps: bool = False, since: int = 0, skip: int = 0) -> Printer:
    """A printer to this process's own stdout and stderr."""
    return Printer(sys.stdout.buffer, sys.stderr.buffer, timestamps=timestamps, since=since, skip=skip)
