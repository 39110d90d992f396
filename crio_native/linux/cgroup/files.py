"""Reading and writing one cgroup file in as few system calls as it takes; the hot path of every container."""

from __future__ import annotations

import errno
import os

_READ = os.O_RDONLY | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CLOEXEC
_PAGE = 1 << 16  # larger than any accounting file; `read_all` is for the others


def read(path: str) -> str:
    """The file's first 64 KiB as text.  Raises OSError."""
    descriptor = os.open(path, _READ)
    try:
        return os.read(descriptor, _PAGE).decode("ascii", "replace")
    finally:
        os.close(descriptor)


def read_or_empty(path: str) -> str:
    """As `read`; "" when the file is not there, or its group has just gone."""
    try:
        return read(path)
    except OSError:
        return ""


def read_all(path: str) -> str:
    """The whole file, whatever its length (a list of processes).  Raises OSError."""
    with open(path, encoding="ascii") as file:
        return file.read()


def write(path: str, value: str) -> None:
    """One write(2).  Raises OSError with the path as its file name."""
    descriptor = os.open(path, _WRITE)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def write_if_there(path: str, value: str) -> None:
    """As `write`; nothing happens when the file is not there, or its group has just gone."""
    try:
        write(path, value)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def table(text: str) -> dict[str, int]:
    """The lines ``name number`` of a flat-keyed file; others are left out."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
