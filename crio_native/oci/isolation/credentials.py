"""Who the process is and what it may do: namespaces, users, capabilities, filters, labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from crio_native.linux import capabilities
from crio_native.linux import namespaces as kinds
from crio_native.oci import spec as specs
from crio_native.oci.isolation.finding import Finding, Verdict, compared
from crio_native.oci.isolation.subject import Subject

Spec = Mapping[str, Any]
SECCOMP_MODES = {"0": "none", "1": "strict", "2": "filter"}
SETS = {
    "bounding": "CapBnd",
    "effective": "CapEff",
    "permitted": "CapPrm",
    "inheritable": "CapInh",
    "ambient": "CapAmb",
}
# Fields of a thread's status that are compared.
OF_THREADS = ("Uid", "Gid", "Groups", *SETS.values(), "NoNewPrivs", "Seccomp", "Seccomp_filters")


def namespaces(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """Against ours: who reads the report is taken to be on the host."""
    asked = specs.namespace_paths(spec)
    for kind, name in kinds.FILE.items():
        identity, hosts = subject.namespace(name), own_namespace(name)
        field = f"linux.namespaces {kind}"
        path = asked.get(kind)
        if identity is None:
            if path is not None:
                yield Finding(field, "its own", "this kernel has none", Verdict.WEAKER)
            continue
        shared = identity == hosts
        found = "the host's" if shared else f"its own ({name}:[{identity[1]}])"
        if path is None:
            yield compared(field, "the host's", found, weaker=False, same=shared)
        elif not path:
            yield compared(field, "its own", found, weaker=shared, same=not shared)
        else:
            yield _joined(field, path, identity, found, shared)


def _joined(field: str, path: str, identity: tuple[int, int], found: str, shared: bool) -> Finding:
    try:
        target = os.stat(path)
    except OSError as error:
        return Finding(field, path, f"{found}; {path} is gone: {error.strerror}", Verdict.UNKNOWN)
    if (target.st_dev, target.st_ino) == identity:
        return Finding(field, path, path, Verdict.SAME)
    return Finding(field, path, found, Verdict.WEAKER if shared else Verdict.DIFFERENT)


def own_namespace(name: str) -> tuple[int, int] | None:
    """Identity of our own namespace of kind "net", "mnt", ..., which stands for the host's."""
    with Subject(os.getpid()) as us:
        return us.namespace(name)


def mappings(subject: Subject, spec: Spec) -> Iterator[Finding]:
    linux = spec.get("linux") or {}
    for field, name in (("uidMappings", "uid_map"), ("gidMappings", "gid_map")):
        asked = [(entry["containerID"], entry["hostID"], entry["size"]) for entry in linux.get(field) or ()]
        if asked:
            found = _map(subject, name)
            verdict = Verdict.SAME if sorted(asked) == sorted(found) else Verdict.WEAKER
            yield Finding(f"linux.{field}", _spans(asked), _spans(found), verdict)


def user_namespace(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """Whether a user namespace is there that nobody asked for: its maps say who its users are outside, and whoever made
    it chose them.  For a container that has just been made: later it may make some of its own."""
    if "user" not in specs.namespace_paths(spec) and subject.namespace("user") != own_namespace("user"):
        found = f"its own, with {_spans(_map(subject, 'uid_map'))}"
        yield Finding("linux.namespaces user", "the host's", found, Verdict.WEAKER)


def _map(subject: Subject, name: str) -> list[tuple[int, int, int]]:
    """Lines of a uid_map: (first inside, first outside, count)."""
    rows = [line.split() for line in subject.text(name).splitlines()]
    return [(int(row[0]), int(row[1]), int(row[2])) for row in rows if len(row) == 3]


def _spans(entries: Collection[tuple[int, int, int]]) -> str:
    return ", ".join(f"{inside}+{size} at {outside}" for inside, outside, size in entries) or "none"


def _inside(subject: Subject, name: str, number: int) -> int:
    """A number that /proc tells, in the process's own user namespace; as it is where that has no word for it."""
    for inside, outside, size in _map(subject, name):
        if outside <= number < outside + size:
            return number - outside + inside
    return number


def user(subject: Subject, spec: Spec) -> Iterator[Finding]:
    asked = spec["process"].get("user")
    uid = _inside(subject, "uid_map", int(subject.status["Uid"].split()[1]))
    gid = _inside(subject, "gid_map", int(subject.status["Gid"].split()[1]))
    groups = {_inside(subject, "gid_map", int(group)) for group in subject.status["Groups"].split()} - {gid}
    if not asked or "uid" not in asked:
        yield Finding("process.user", "the image's", f"uid {uid}, gid {gid}", Verdict.SAME)
        return
    wanted = asked["uid"]
    verdict = Verdict.SAME if uid == wanted else Verdict.WEAKER if uid == 0 else Verdict.DIFFERENT
    yield Finding("process.user.uid", str(wanted), str(uid), Verdict.STRICTER if wanted == 0 != uid else verdict)
    wanted = asked.get("gid", 0)
    verdict = Verdict.SAME if gid == wanted else Verdict.WEAKER if gid == 0 else Verdict.DIFFERENT
    yield Finding("process.user.gid", str(wanted), str(gid), verdict)
    wanted_groups = {*(asked.get("additionalGids") or ())} - {gid}
    yield compared(
        "process.user.additionalGids",
        _listed(wanted_groups),
        _listed(groups),
        weaker=bool(groups - wanted_groups),
        same=groups == wanted_groups,
    )


def _listed(numbers: Collection[int]) -> str:
    return " ".join(map(str, sorted(numbers))) or "none"


def capability_sets(subject: Subject, spec: Spec) -> Iterator[Finding]:
    asked = spec["process"].get("capabilities") or {}
    for kind, name in SETS.items():
        wanted = capabilities.mask(asked.get(kind) or ())
        found = int(subject.status[name], 16)
        extra = found & ~wanted
        words = mask_words(found) + (f"; more than asked: {mask_words(extra)}" if extra else "")
        field = f"process.capabilities.{kind}"
        yield compared(field, mask_words(wanted), words, weaker=bool(extra), same=found == wanted)


def mask_words(mask: int) -> str:
    names = capabilities.names(mask)
    if len(names) > capabilities.last_known():
        return "all"
    return " ".join(name.removeprefix("CAP_").lower() for name in names) or "none"


def privileges(subject: Subject, spec: Spec) -> Iterator[Finding]:
    asked = bool(spec["process"].get("noNewPrivileges"))
    found = subject.status.get("NoNewPrivs") == "1"
    words = ("no", "yes")
    yield compared(
        "process.noNewPrivileges", words[asked], words[found], weaker=asked and not found, same=asked == found
    )
    asked = bool((spec.get("linux") or {}).get("seccomp"))
    mode, count = seccomp(subject)
    # Filters of whoever started us are inherited by all, and were not asked for by this container.
    with Subject(os.getpid()) as us:
        loaded = mode == "filter" and count > seccomp(us)[1]
    yield compared(
        "linux.seccomp",
        "a filter" if asked else "none",
        seccomp_words(mode, count),
        weaker=asked and not loaded,
        same=asked == loaded,
    )


def seccomp(subject: Subject) -> tuple[str, int]:
    """(mode, number of programs); a kernel before 5.9 does not tell the number."""
    mode = SECCOMP_MODES.get(subject.status.get("Seccomp", "0"), "unknown")
    return mode, int(subject.status.get("Seccomp_filters", "1" if mode == "filter" else "0"))


def seccomp_words(mode: str, count: int) -> str:
    return mode if mode != "filter" else f"filter, {count} program{'s' if count > 1 else ''}"


def labels(subject: Subject, spec: Spec) -> Iterator[Finding]:
    process = spec["process"]
    for field, names in (
        ("apparmorProfile", ("attr/apparmor/current", "attr/current")),
        ("selinuxLabel", ("attr/current",)),
    ):
        asked = process.get(field) or ""
        if asked and asked != "unconfined":
            found = next((text for name in names if (text := label(subject, name))), "none")
            same = found == asked or found.startswith(f"{asked} (enforce)")
            yield compared(f"process.{field}", asked, found, weaker=not same, same=same)


def label(subject: Subject, name: str = "attr/current") -> str:
    """A security module's label; "" when no module keeps one there."""
    try:
        return subject.text(name).strip("\n\0")
    except OSError:  # EINVAL: no module keeps labels
        return ""
