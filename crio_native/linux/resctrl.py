"""Intel's Resource Director Technology: groups of the resctrl file system (runtime-spec `linux.intelRdt`).

A group is a directory; a process joins by its `tasks` file, into which it writes "0" for itself.
"""

from __future__ import annotations

import os

from crio_native.errors import FailedPrecondition, InvalidArgument, StepFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_FIELD = "linux.intelRdt"
_SCHEMATA_MAX = 1 << 16
USUAL_PLACE = "/sys/fs/resctrl"


def mount_point() -> str:
    """Where resctrl is mounted; "" when it is not."""
    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        content = b"".join(iter(lambda: file.read(1 << 16), b"")).decode("utf-8", "surrogateescape")
    for line in content.splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "resctrl":
            return fields[4]
    return ""


def prepare(rdt: Mapping[str, Any], container_id: str, root: str) -> list[str]:
    """Make or check the groups that a checked `linux.intelRdt` object asks for; the `tasks` files to join.

    root: `mount_point`.  Raises FailedPrecondition without one, InvalidArgument for a group that is not there or that
    is another than was asked for, StepFailed for what the kernel refuses.  After a failure `remove` clears up.
    """
    if not root:
        raise FailedPrecondition(f"{_FIELD}: no resctrl file system is mounted: this machine's processor has none")
    name = rdt.get("closID") or container_id
    group, monitor = groups(rdt, container_id, root)
    lines = schemata(rdt)
    exists = os.path.isdir(group)
    if rdt.get("closID") and exists:
        _compare(group, lines, name)
    elif rdt.get("closID") and not lines:
        raise InvalidArgument(
            f"{_FIELD}.closID", name, f"there is no group {group}, and nothing says what it should be"
        )
    else:
        _make(group, exists)
        for line in lines:
            _write(f"{group}/schemata", line)
    if monitor:
        _make(monitor, False)
    return task_files(rdt, container_id, root)


def groups(rdt: Mapping[str, Any], container_id: str, root: str) -> tuple[str, str]:
    """The directories of the group and of its monitoring group, "" where none is asked for."""
    name = rdt.get("closID") or container_id
    group = root if name == "/" else f"{root}/{name}"
    return group, f"{group}/mon_groups/{container_id}" if rdt.get("enableMonitoring") else ""


def schemata(rdt: Mapping[str, Any]) -> list[str]:
    """The lines that are asked for, in the order that they are written in."""
    return [rdt[key] for key in ("l3CacheSchema", "memBwSchema") if rdt.get(key)] + list(rdt.get("schemata") or ())


def task_files(rdt: Mapping[str, Any], container_id: str, root: str) -> list[str]:
    """The files by which a process joins the groups."""
    return [f"{directory}/tasks" for directory in groups(rdt, container_id, root) if directory]


def remove(rdt: Mapping[str, Any], container_id: str, root: str) -> None:
    """Remove what `prepare` made for this container alone; what is gone already is fine."""
    if not root:
        return
    group, monitor = groups(rdt, container_id, root)
    for directory in ([monitor] if monitor else []) + ([] if rdt.get("closID") else [group]):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            pass


def _make(directory: str, exists: bool) -> None:
    try:
        if not exists:
            os.mkdir(directory)
    except OSError as error:
        raise StepFailed("resctrl", error.errno or 0, directory, "the group cannot be made") from None


def _compare(group: str, lines: list[str], name: str) -> None:
    """A group that exists is used as it is, if that is what was asked for."""
    if not lines:
        return
    with open(f"{group}/schemata", "rb", buffering=0) as file:
        present = [_normal(line) for line in file.read(_SCHEMATA_MAX).decode().splitlines()]
    for line in lines:
        kind, wanted = _normal(line)
        if not any(kind == found and wanted.items() <= shares.items() for found, shares in present):
            raise InvalidArgument(f"{_FIELD}.closID", name, f"the group exists, and its schemata are not {line!r}")


def _normal(line: str) -> tuple[str, dict[str, str]]:
    """ "  L3:0=00ff;1=f" -> ("L3", {"0": "ff", "1": "f"})."""
    kind, _, shares = line.strip().partition(":")
    pairs = (share.partition("=") for share in shares.split(";") if share)
    return kind.strip(), {cache.strip(): value.strip().lstrip("0") or "0" for cache, _, value in pairs}


def _write(path: str, line: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, line.encode() + b"\n")
    except OSError as error:
        raise StepFailed("resctrl", error.errno or 0, path, f"refused {line!r}") from None
    finally:
        os.close(fd)
