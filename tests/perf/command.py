"""crio-oci beside runc, both as commands that somebody starts: time, processor time, memory of the largest process.

Most of a command's price is its interpreter's, which no other benchmark sees.  On a busy machine the processor time
says more than the time.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from tests.perf.peers import SLEEP, Bundle, program, run
from tests.perf.report import Result, compare

CRIO_OCI = Path(__file__).parents[2] / "build/crio-oci"
Line = Sequence[str | Path]
# A process's peak counts the memory that it was started from, so a small one starts it; KiB (getrusage(2)).
PEAK = """
import os, resource, sys
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
if os.waitpid(child, 0)[1]:
    sys.exit("the command failed")
print("\\n", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure(bundle: Bundle, count: int) -> list[Result]:
    """A whole container; then what engines ask of one that runs."""
    root = bundle.directory / "state"
    programs: dict[str, Line] = {
        "ours": (CRIO_OCI, "--root", root / "crio-oci"),
        "runc": (program("runc"), "--root", root / "runc"),
    }
    results: list[Result] = []
    lines = {}
    for name, words in programs.items():
        directory = bundle.sibling(f"command-{name}", bundle.spec(("/bin/true",), cgroup=f"command-{name}"))
        lines[name] = (*words, "run", "--bundle", directory, f"bench-{name}")
    results += _compared("crio-oci run", lines, count, goal=1.0)
    for name, words in programs.items():
        directory = bundle.sibling(f"sleep-{name}", bundle.spec(SLEEP, cgroup=f"sleep-{name}"))
        run(*words, "run", "--detach", "--bundle", directory, f"sleep-{name}")
    try:
        for words in (("exec", "{}", "/bin/true"), ("state", "{}"), ("kill", "{}", "0")):
            asked = {
                name: (*line, *(word.format(f"sleep-{name}") for word in words)) for name, line in programs.items()
            }
            results += _compared(f"crio-oci {words[0]}", asked, count)
    finally:
        for name, words in programs.items():
            run(*words, "delete", "--force", f"sleep-{name}")
    return results


def _compared(name: str, lines: Mapping[str, Line], count: int, goal: float | None = None) -> list[Result]:
    """Three rows.  Without a goal they are shown for their own sake."""
    taken: dict[str, list[tuple[float, float]]] = {contestant: [] for contestant in lines}
    for number in range(count + 2):
        for contestant, line in lines.items():
            sample = _timed(line)
            if number >= 2:  # the first warm caches
                taken[contestant].append(sample)
    rows = []
    for index, what in enumerate(("", ", processor time")):
        samples = {contestant: [sample[index] for sample in all_] for contestant, all_ in taken.items()}
        rows += compare(name + what, samples["ours"], {"runc": (samples["runc"], goal)})
    peaks = {contestant: median(_peak(line) for _ in range(5)) for contestant, line in lines.items()}
    return [*rows, Result(f"{name}, peak memory", "KiB", peaks["ours"], peaks["runc"], "runc", goal)]


def _timed(line: Line) -> tuple[float, float]:
    """Seconds, and seconds of processor time, children's and theirs included."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(line, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended - began, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _peak(line: Line) -> float:
    starter = [sys.executable, "-I", "-S", "-c", PEAK, *line]
    output = subprocess.run(starter, check=True, stdin=subprocess.DEVNULL, capture_output=True).stdout
    return float(output.split()[-1])
