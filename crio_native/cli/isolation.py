"""What the kernel says about a container's isolation, printed: as a summary, and against what was asked for.

The reading and comparing is `crio_native.oci.isolation`; here belong the words for people.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import printable
from crio_native.linux import namespaces
from crio_native.linux.cgroup import hierarchy
from crio_native.oci.isolation import Finding, Verdict, credentials, report
from crio_native.oci.isolation.subject import Subject

# Controller, the v1 file, the v2 file; the numbers are shown in the file's own unit.
LIMITS = (
    ("memory", "memory.limit_in_bytes", "memory.max"),
    ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    ("pids", "pids.max", "pids.max"),
)
STYLES = {Verdict.WEAKER: "bold red", Verdict.DIFFERENT: "yellow", Verdict.UNKNOWN: "magenta", Verdict.STRICTER: "cyan"}
CELL_MAX = 400  # characters of a cell


def print_report(pid: int, spec: Mapping[str, Any], as_json: bool = False) -> int:
    """Print the comparison of a container with its config.json.  Returns 1 when something is weaker than asked, else 0.

    Raises InvalidArgument, NotFound.
    """
    findings = report(pid, spec)
    if as_json:
        json.dump([finding.to_dict() for finding in findings], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print_table(findings)
    return 1 if any(finding.weaker for finding in findings) else 0


def _print_table(findings: Sequence[Finding]) -> None:
    """Differences are marked; rich only on a terminal, elsewhere one line a finding."""
    weaker = sum(finding.weaker for finding in findings)
    end = f"{weaker} of {len(findings)} are weaker than asked" if weaker else "nothing is weaker than asked"
    if not sys.stdout.isatty():
        for finding in findings:
            mark = {Verdict.SAME: " ", Verdict.WEAKER: "!"}.get(finding.verdict, "~")
            print(f"{mark} {finding.verdict.value:9} " + "\t".join(_cells(finding)))
        print(end)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("FIELD", "ASKED", "FOUND", "VERDICT"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        cells = (*_cells(finding), finding.verdict.value)
        table.add_row(*map(Text, cells), style=STYLES.get(finding.verdict, ""))
    console = Console(highlight=False)
    console.print(table)
    console.print(end, style="bold red" if weaker else "bold green")


def _cells(finding: Finding) -> tuple[str, ...]:
    return tuple(_clean(text) for text in (finding.field, finding.asked, finding.found))


def _clean(text: str) -> str:
    """A container may choose what its files are called: no control characters reach the terminal."""
    shown = text if len(text) <= CELL_MAX else text[: CELL_MAX - 3] + "..."
    return printable(shown)


def describe(pid: int) -> dict[str, str]:
    """The isolation of a live process, one entry a subject.  Raises NotFound when there is no such process."""
    with Subject(pid) as subject:
        status = subject.status
        mode, count = credentials.seccomp(subject)
        return {
            "process": f"pid {pid} on the host, {status['NSpid'].split()[-1]} in its own namespace",
            **_namespaces(subject),
            "user": f"uid {status['Uid'].split()[1]}, gid {status['Gid'].split()[1]}",
            "capabilities": credentials.mask_words(int(status["CapEff"], 16)),
            "  can ever gain": credentials.mask_words(int(status["CapBnd"], 16)),
            "no_new_privs": "yes" if status["NoNewPrivs"] == "1" else "no",
            "seccomp": credentials.seccomp_words(mode, count),
            **_cgroup(subject),
            "lsm": f"{credentials.label(subject) or 'no label'} (the kernel's modules: {_modules()})",
        }


def _namespaces(subject: Subject) -> dict[str, str]:
    """Which namespaces differ from ours.  A kernel without one (time) has no such file."""
    kinds = [kind for kind in namespaces.FILE.values() if subject.namespace(kind)]
    own = [kind for kind in kinds if subject.namespace(kind) != credentials.own_namespace(kind)]
    shared = [kind for kind in kinds if kind not in own]
    return {"namespaces": " ".join(own) or "none of its own", "  the host's": " ".join(shared) or "none"}


def _cgroup(subject: Subject) -> dict[str, str]:
    limits = []
    for controller, *files in LIMITS:
        version = hierarchy().version_of(controller)
        if version == 0:
            continue
        path = subject.cgroups[controller if version == 1 else ""]
        file = Path(f"{hierarchy().mount_of(controller)}{path}") / files[version - 1]
        if file.exists():
            limits.append(f"{file.name} {_limit(file)}")
    path = subject.cgroups.get("memory") or subject.cgroups[""]
    return {"cgroup": path, "  limits": ", ".join(limits) or "none readable"}


def _limit(file: Path) -> str:
    text = file.read_text().strip()
    period = file.with_name("cpu.cfs_period_us")
    return f"{text} of {period.read_text().strip()}" if file.name == "cpu.cfs_quota_us" else text


def _modules() -> str:
    try:
        return Path("/sys/kernel/security/lsm").read_text().strip()
    except OSError:
        return "not told, securityfs is not mounted"
