"""What the kernel says about a running container, compared with what its config.json asked for.

`report` is the whole; `subject` reads one process, `credentials`, `files` and `limits` each compare a part.  Nothing is
changed, and nothing that the container says of itself is believed: what is read is /proc of the host, the control
groups' files, and the container's root through descriptors that never leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from crio_native.errors import NotFound
from crio_native.linux import namespaces as kinds
from crio_native.oci import spec as specs
from crio_native.oci.isolation import credentials, files, limits
from crio_native.oci.isolation.finding import Finding, Verdict
from crio_native.oci.isolation.subject import Subject

__all__ = ["Finding", "Subject", "Verdict", "report"]

Part = Callable[[Subject, Mapping[str, Any]], Iterator[Finding]]

# What each thread has by itself, and may have otherwise than the others.
_OF_THREADS: tuple[Part, ...] = (
    credentials.namespaces,
    credentials.user,
    credentials.capability_sets,
    credentials.privileges,
    credentials.labels,
    limits.cgroup,
)


def threads(subject: Subject, spec: Mapping[str, Any]) -> Iterator[Finding]:
    """What is weaker of the other threads.  Most are as the first one in all of this, which has been looked at."""
    known = {_own(subject)}
    for name in subject.names("task"):
        try:
            with Subject(subject.pid, int(name)) as thread:
                own = _own(thread)
                if own not in known:
                    found = [finding for part in _OF_THREADS for finding in part(thread, spec) if finding.weaker]
                    yield from (replace(finding, field=f"thread {name}: {finding.field}") for finding in found)
        except (NotFound, FileNotFoundError, ProcessLookupError):
            continue  # it has ended


def _own(thread: Subject) -> tuple[object, ...]:
    return (
        *(thread.status.get(name) for name in credentials.OF_THREADS),
        *map(thread.namespace, kinds.FILE.values()),
        credentials.label(thread),
        thread.text("cgroup"),
    )


_PARTS: tuple[Part, ...] = (
    credentials.namespaces,
    credentials.mappings,
    credentials.user,
    credentials.capability_sets,
    credentials.privileges,
    credentials.labels,
    files.mounted,
    files.root,
    files.masked,
    files.read_only,
    files.devices,
    files.descriptors,
    limits.cgroup,
    limits.resources,
    limits.device_rules,
    limits.rlimits,
    limits.oom_score,
    threads,
)

_OF_RESTORED: tuple[Part, ...] = (credentials.user_namespace, files.sources)


def report(pid: int, spec: Mapping[str, Any], *, restored: bool = False) -> list[Finding]:
    """Every comparison, in a fixed order.  pid: the container's init, in the caller's PID namespace.  restored: it has
    just been made of a checkpoint, whose it was to say what is mounted where and who its users are.

    What cannot be read has the verdict `Verdict.UNKNOWN` and the reason as what was found; of a restored one it counts
    as weaker, for whoever wrote the checkpoint could see to it that it cannot.  Raises InvalidArgument for
    a spec that the executor would refuse, NotFound when there is no such process, or when it has ended meanwhile.
    """
    specs.validate(spec)
    found: list[Finding] = []
    with Subject(pid) as subject:
        for part in (*_PARTS, *_OF_RESTORED) if restored else _PARTS:
            try:
                found += part(subject, spec)
            except OSError as error:
                subject.check_alive()
                field = part.__name__.replace("_", " ")
                verdict = Verdict.WEAKER if restored else Verdict.UNKNOWN
                found.append(Finding(field, "", f"cannot be read: {error}", verdict))
        subject.check_alive()  # one that was ending had lost a part of what it was asked to have
    return found
