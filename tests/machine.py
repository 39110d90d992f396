"""What a test could leave behind on the machine, as sets to compare.

On a machine that others use too, what is theirs comes and goes; only what stays new over several looks is a leak.
"""

from __future__ import annotations

import functools
import gc
import os
import socket
import time
from collections.abc import Mapping, Sequence

Machine = Mapping[str, frozenset[str]]

# Descriptors that stay on purpose: the cache of loaded device programs, which has a bound, and what gRPC polls with.
KEPT = ("anon_inode:bpf-prog", "anon_inode:[eventpoll]", "anon_inode:[eventfd]")
SETTLE_SECONDS = 3.0  # how long a test's last processes and lazy unmounts may take


def machine_state(containing: str = "", group: str = "") -> Machine:
    """A snapshot: mounts, pinned network namespaces, cgroups, network links, our descendants, our descriptors.

    containing: count only mounts, pins, cgroups and links with this in their name (a test's own prefix); group: the
    same for cgroups alone.
    """
    mounts = _mounts()
    named = {
        "mounts": {f"{kind} on {where}" for where, kind in mounts.items() if kind != "nsfs"},
        "namespace pins": {where for where, kind in mounts.items() if kind == "nsfs"},
        "cgroups": _cgroups([where for where, kind in mounts.items() if kind in ("cgroup", "cgroup2")]),
        "links": {name for _, name in socket.if_nameindex()},
    }
    named["cgroups"] = {name for name in named["cgroups"] if group in name}
    state = {what: frozenset(name for name in names if containing in name) for what, names in named.items()}
    return state | {"processes": frozenset(_descendants()), "descriptors": frozenset(_descriptors())}


def assert_machine_unchanged(before: Machine, containing: str = "", group: str = "", also: Sequence[str] = ()) -> None:
    """Fail with all that is new since before and stays; things that are gone are not our concern.

    also: what somebody else found left behind.
    """
    gc.collect()  # what closes with an object that nobody has any more is not left open
    deadline = time.monotonic() + SETTLE_SECONDS
    new = _added(before, containing, group)
    while any(new.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
        again = _added(before, containing, group)
        new = {what: names & again[what] for what, names in new.items()}
    left = [f"{what}: {', '.join(sorted(names))}" for what, names in new.items() if names] + list(also)
    assert not left, "left behind:\n" + "\n".join(left)


def _added(before: Machine, containing: str, group: str) -> dict[str, frozenset[str]]:
    reap_orphans()
    added = {what: names - before[what] for what, names in machine_state(containing, group).items()}
    known = {_identity(process) for process in before["processes"]}
    return added | {"processes": frozenset(new for new in added["processes"] if _identity(new) not in known)}


def _identity(process: str) -> str:
    """Without its name, which changes: a launcher that is still starting is a python3."""
    return process.partition(" (")[2]


def _mounts() -> dict[str, str]:
    """Mount point -> file system type, of our mount namespace."""
    with open("/proc/self/mountinfo") as file:
        rows = [line.split() for line in file]
    return {row[4]: row[row.index("-") + 1] for row in rows}


@functools.cache
def _foreign_cgroups(root: str) -> frozenset[str]:
    """The top groups of a hierarchy that somebody else had when the first test looked; what they hold is theirs."""
    return frozenset(entry.path for entry in os.scandir(root) if entry.is_dir() and "crio" not in entry.name)


def _cgroups(roots: list[str]) -> set[str]:
    found: set[str] = set()
    for root in roots:
        foreign = _foreign_cgroups(root)
        for directory, children, _ in os.walk(root):
            children[:] = [child for child in children if f"{directory}/{child}" not in foreign]
            found.add(directory)
    return found


def _stat(pid: str) -> tuple[str, str, int, str] | None:
    """(name, state, parent, start time) of a process; None when it has gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = rest.split()
    return name, fields[0], int(fields[1]), fields[19]


def _descendants() -> set[str]:
    table = {int(pid): stat for pid in os.listdir("/proc") if pid.isdigit() and (stat := _stat(pid))}
    family = {os.getpid()}
    while more := {pid for pid, stat in table.items() if stat[2] in family} - family:
        family |= more
    # A launcher replaces its waiting spare whenever one is used: that is no leak.
    spares = {pid for pid in family if table[pid][0] in ("crio-spare", "crio-init")}
    spares = {
        pid for pid in spares if (parent := table.get(table[pid][2])) and parent[0] in ("crio-launcher", "crio-spare")
    }
    return {f"{table[pid][0]} (pid {pid}, started {table[pid][3]})" for pid in family - spares - {os.getpid()}}


def _descriptors() -> set[str]:
    names = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the listing's own
            continue
        if target not in KEPT:
            names.add(f"{number} -> {target}")
    return names


def reap_orphans() -> None:
    """Wait for dead children that nobody else waits for: the test is over, so these were re-parented to us."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(entry)) and stat[2] == os.getpid() and stat[1] == "Z":
            try:
                os.waitpid(int(entry), os.WNOHANG)
            except ChildProcessError:
                continue
