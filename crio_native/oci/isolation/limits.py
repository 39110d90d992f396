"""What bounds the process: its control group and the group's effective limits, device rules, rlimits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from crio_native.errors import CrioError
from crio_native.linux import bpf
from crio_native.linux.cgroup import devices, files, hierarchy
from crio_native.linux.cgroup import resources as planner
from crio_native.oci.builtin.plan import DEFAULT_DEVICE_RULES
from crio_native.oci.isolation.finding import Finding, Verdict, compared
from crio_native.oci.isolation.subject import Subject

Spec = Mapping[str, Any]
# As /proc/PID/limits calls them.
LIMIT_NAMES = {
    "RLIMIT_AS": "address space",
    "RLIMIT_CORE": "core file size",
    "RLIMIT_CPU": "cpu time",
    "RLIMIT_DATA": "data size",
    "RLIMIT_FSIZE": "file size",
    "RLIMIT_LOCKS": "file locks",
    "RLIMIT_MEMLOCK": "locked memory",
    "RLIMIT_MSGQUEUE": "msgqueue size",
    "RLIMIT_NICE": "nice priority",
    "RLIMIT_NOFILE": "open files",
    "RLIMIT_NPROC": "processes",
    "RLIMIT_RSS": "resident set",
    "RLIMIT_RTPRIO": "realtime priority",
    "RLIMIT_RTTIME": "realtime timeout",
    "RLIMIT_SIGPENDING": "pending signals",
    "RLIMIT_STACK": "stack size",
}
NO_LIMIT = 2**64 - 1  # RLIM_INFINITY
INFINITE = float("inf")
# Files in which less is stricter, and an ancestor's value binds too.
BOUNDS = frozenset(
    "memory.max memory.swap.max memory.limit_in_bytes memory.memsw.limit_in_bytes pids.max cpu.max "
    "cpu.cfs_quota_us".split()
)
PAGE = os.sysconf("SC_PAGE_SIZE")  # the kernel keeps memory in these: numbers of bytes are rounded down to it
AMOUNTS = frozenset(("memory.soft_limit_in_bytes", "memory.low"))  # of bytes, that bound nothing


def cgroup(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """Whether it is in the group that was asked for, in every hierarchy."""
    asked = (spec.get("linux") or {}).get("cgroupsPath") or ""
    if not asked:
        return
    for name, path in _memberships(subject).items():
        inside = _is_within(path, asked)
        yield compared(f"linux.cgroupsPath {name}", asked, path, weaker=not inside, same=inside)


def _memberships(subject: Subject) -> dict[str, str]:
    """Hierarchy -> path, of the hierarchies that containers' groups are made in."""
    host = hierarchy()
    found = {name: subject.cgroups[name] for name in host.v1 if name in subject.cgroups}
    return found | ({"unified": subject.cgroups[""]} if host.unified and "" in subject.cgroups else {})


def _is_within(path: str, asked: str) -> bool:
    if asked.count(":") == 2 and not asked.startswith("/"):  # the systemd manager's slice:prefix:name
        _, prefix, name = asked.split(":")
        scope = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        return scope in path.split("/")
    top = "/" + asked.strip("/")
    return path == top or path.startswith(top + "/")


def resources(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """The files that the limits were written to, and for those that bind below, the least of all ancestors'.  They
    are those of the group that the process is in: where none is named, a runtime chooses one."""
    wanted = (spec.get("linux") or {}).get("resources") or {}
    group = _Group(subject)
    writes, warnings = planner.plan({**wanted, "devices": None}, group)
    for warning in warnings:
        field, _, why = warning.partition(" is not applied: ")
        yield Finding(field, "set", f"not applied: {why}", Verdict.UNKNOWN)
    for write in writes:
        yield _limit(group, write)


class _Group:
    """The subject's own group, as `resources.plan` asks about it."""

    def __init__(self, subject: Subject) -> None:
        self._paths = subject.cgroups

    def version(self, controller: str) -> int:
        return hierarchy().version_of(controller)

    def path(self, controller: str) -> str:
        return self._paths.get(controller if self.version(controller) == 1 else "", "/")

    def read(self, controller: str, file: str, path: str | None = None) -> str | None:
        where = self.path(controller) if path is None else path
        try:
            return files.read(f"{hierarchy().mount_of(controller)}{where}/{file}")
        except FileNotFoundError:
            return None
        except OSError:
            return ""

    def chain(self, controller: str) -> list[str]:
        """The group and its ancestors below the hierarchy's root."""
        parts = self.path(controller).strip("/").split("/")
        return ["/" + "/".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _limit(group: _Group, write: planner.Write) -> Finding:
    field = f"linux.resources.{write.field}"
    where = f"{write.file} {write.value}"
    if write.file in BOUNDS or write.file.startswith("hugetlb."):
        asked = _amount(group, write.controller, write.file, write.value, None)
        chain = group.chain(write.controller)
        amounts = [
            (_amount(group, write.controller, write.file, found, path), path)
            for path in chain
            if (found := group.read(write.controller, write.file, path))
        ]
        least, path = min(amounts, default=(INFINITE, ""))
        where_ = "" if path in ("", chain[0]) else f", by {path}"
        unit = " CPUs" if write.controller == "cpu" and least != INFINITE else ""
        words = f"{write.file} {_number_words(least)}{unit}{where_}"
        same = least == asked or (write.controller == "memory" and asked - PAGE < least)
        return compared(field, where, words, weaker=least > asked, same=same)
    text = group.read(write.controller, write.file)
    if text is None:
        return Finding(field, where, f"{write.file} is not there", Verdict.UNKNOWN)
    if write.file in ("cpuset.cpus", "cpuset.mems"):
        asked_set, found_set = _cpus(write.value), _cpus(text)
        words = f"{write.file} {text.strip()}"
        return compared(field, where, words, weaker=not found_set <= asked_set, same=found_set == asked_set)
    if write.file in AMOUNTS:
        wanted, has = (_amount(group, write.controller, write.file, value, None) for value in (write.value, text))
        same = wanted == has or wanted - PAGE < has <= wanted
        return Finding(field, where, f"{write.file} {text.strip()}", Verdict.SAME if same else Verdict.DIFFERENT)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    same = any(write.value == line or set(write.value.split()) <= set(line.split()) for line in lines)
    return Finding(field, where, f"{write.file} {'; '.join(lines)}", Verdict.SAME if same else Verdict.DIFFERENT)


def _amount(group: _Group, controller: str, file: str, text: str, path: str | None) -> float:
    """A bound as one number: bytes, processes, or CPUs."""
    words = text.split()
    if not words or words[0] in ("max", "-1"):
        return INFINITE
    value = float(words[0])
    if file == "cpu.max":
        return value / float(words[1]) if len(words) > 1 else value / 100_000
    if file == "cpu.cfs_quota_us":
        period = group.read(controller, "cpu.cfs_period_us", path)
        return value / float(period or 100_000)
    return INFINITE if value >= 2**62 else value


def _number_words(value: float) -> str:
    return "unlimited" if value == INFINITE else f"{value:g}" if value < 1000 else f"{value:.0f}"


def _cpus(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found |= set(range(int(first), min(int(last or first), 1 << 16) + 1))
    return found


def device_rules(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """On v1 the group's own list of exceptions; on v2 whether there is a program at all."""
    wanted = ((spec.get("linux") or {}).get("resources") or {}).get("devices") or ()
    if not wanted:
        return
    field = "linux.resources.devices"
    rules = devices.parse([*wanted, *DEFAULT_DEVICE_RULES])
    group = _Group(subject)
    if group.version("devices") == 2:
        loaded = _has_program(f"{hierarchy().unified}{group.path('devices')}")
        words = ("no program of ours on its group", "a program of ours on its group")[loaded]
        yield compared(field, f"a program of {len(rules)} rules", words, weaker=not loaded, same=loaded)
        return
    found = set((group.read("devices", "devices.list") or "").splitlines())
    try:
        lines = devices.v1_lines(rules)
    except CrioError as error:
        yield Finding(field, f"{len(rules)} rules", str(error), Verdict.UNKNOWN)
        return
    if lines[0][0] == "devices.allow":
        open_ = found == {"a *:* rwm"}
        yield compared(field, "all devices", ", ".join(sorted(found)), weaker=False, same=open_)
        return
    allowed = {line for file, line in lines[1:] if file == "devices.allow"}
    extra = {entry for entry in found if not _covered(entry, allowed)}
    words = f"{len(found)} allowed" + (f", not asked for: {', '.join(sorted(extra))}" if extra else "")
    yield compared(field, f"{len(allowed)} allowed", words, weaker=bool(extra), same=not extra)


def _has_program(directory: str) -> bool:
    """Programs cannot be read back as rules; that one of ours is there is all that the kernel tells."""
    group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        program = bpf.our_program(group)
    finally:
        os.close(group)
    if program is not None:
        os.close(program)
    return program is not None


def _covered(entry: str, rules: set[str]) -> bool:
    """Whether the rules together allow what an entry of the list ("c 1:3 rw") does: the kernel merges entries."""
    kind, number, letters = entry.split()
    granted: set[str] = set()
    for rule in rules:
        kind_, number_, letters_ = rule.split()
        pairs = zip(number_.split(":"), number.split(":"), strict=True)
        if kind == kind_ and all(one in ("*", other) for one, other in pairs):
            granted |= set(letters_)
    return set(letters) <= granted


def rlimits(subject: Subject, spec: Spec) -> Iterator[Finding]:
    found = _rlimits(subject.text("limits"))
    for entry in spec["process"].get("rlimits") or ():
        soft, hard = found.get(LIMIT_NAMES[entry["type"]], (NO_LIMIT, NO_LIMIT))
        asked, has = (f"{one}, at most {other}" for one, other in ((entry["soft"], entry["hard"]), (soft, hard)))
        weaker = hard > entry["hard"]
        yield compared(f"process.rlimits {entry['type']}", asked, has, weaker=weaker, same=asked == has)


def _rlimits(text: str) -> dict[str, tuple[int, int]]:
    """The kernel's name -> soft and hard limit.  (prlimit(2) would need CAP_SYS_RESOURCE for another user's.)"""
    rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[1:])
    return {row[0].removeprefix("Max "): (_rlimit(row[1]), _rlimit(row[2])) for row in rows if len(row) > 2}


def _rlimit(word: str) -> int:
    return int(word) if word.isdigit() else NO_LIMIT


def oom_score(subject: Subject, spec: Spec) -> Iterator[Finding]:
    asked = spec["process"].get("oomScoreAdj")
    if asked is not None:
        found = int(subject.text("oom_score_adj"))
        yield compared("process.oomScoreAdj", str(asked), str(found), weaker=found < asked, same=found == asked)
