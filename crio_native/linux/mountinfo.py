"""/proc/PID/mountinfo as values: what is mounted where in a process's mount namespace (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_SIZE = 32 << 20  # bytes; the kernel bounds a namespace to 100 000 mounts (fs.mount-max)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line.  id, parent: the kernel's numbers.  device: "major:minor".  root: the part of the file system that is
    seen at `point`.  options: of this mount; super_options: of the file system.  fields: "shared:1", "master:2", ..."""

    id: int
    parent: int
    device: str
    root: str
    point: str
    options: frozenset[str]
    fields: tuple[str, ...]
    fstype: str
    source: str
    super_options: frozenset[str]

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options


def read(pid: int | str = "self") -> dict[int, Mount]:
    """The mounts that a process sees, by id.  Raises OSError.  What is beyond MAX_SIZE bytes is left out."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return {mount.id: mount for mount in parse(file.read(MAX_SIZE).decode("utf-8", "surrogateescape"))}


def parse(text: str) -> list[Mount]:
    """The lines that are whole, in order; one that is cut off or malformed is left out."""
    return [mount for line in text.split("\n") if (mount := _line(line)) is not None]


def _line(line: str) -> Mount | None:
    before, separator, after = line.partition(" - ")
    head, tail = before.split(" "), after.split(" ")
    if not separator or len(head) < 6 or len(tail) < 3 or not (_number(head[0]) and _number(head[1])):
        return None
    return Mount(
        int(head[0]),
        int(head[1]),
        head[2],
        unescape(head[3]),
        unescape(head[4]),
        frozenset(head[5].split(",")),
        tuple(head[6:]),
        tail[0],
        unescape(tail[1]),
        frozenset(tail[2].split(",")),
    )


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


def unescape(text: str) -> str:
    """Blanks, line breaks and backslashes are octal in a path."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def id_of(descriptor: int) -> int:
    """The number of the mount that an open descriptor is on.  Raises OSError."""
    with open(f"/proc/self/fdinfo/{descriptor}", "rb", buffering=0) as file:
        return int(field(file.read(4096).decode("ascii", "replace"), "mnt_id"))


def field(fdinfo: str, name: str) -> str:
    """A field of a /proc/PID/fdinfo file's text; "0" when it is not there."""
    for line in fdinfo.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    return "0"
