"""A pull of 500 MB in 12 layers and 30,000 files: ours by the CRI, beside `skopeo copy` into containers-storage.

Both read from one Debian registry on the loopback, and both wait until what they wrote is on the disk, as far as each
does so itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import statistics
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from isal import igzip

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.cli.scratch import ScratchDaemon
from crio_native.linux import syscalls
from tests.images_support import Registry, picture, running_registry
from tests.perf.peers import run
from tests.perf.report import Result

LAYERS, FILES, BYTES = 12, 30_000, 500 << 20
OTHER_CALLS_EVERY = 0.02  # seconds
GOAL_WALL, GOAL_CPU, GOAL_PEAK, GOAL_CALL = 0.8, 1.1, 150, 20
Samples = list[tuple[float, float]]  # (wall, CPU) in seconds
MNT_DETACH = 2
CLOCK = os.sysconf("SC_CLK_TCK")


def measure(directory: Path, rounds: int, say: Callable[[str], None]) -> list[Result]:
    say("making an image of 500 MB")
    layers = [_layer(number) for number in range(LAYERS)]
    with running_registry(_made(directory / "registry")) as registry:
        image = picture(*layers, compress=lambda data: igzip.compress(data, 2))
        name = registry.push("bench/large", "v1", image)
        last = picture(*layers[:-1], _layer(LAYERS), compress=lambda data: igzip.compress(data, 2))
        changed = registry.push("bench/large", "v2", last)
        del layers, image, last
        return _measure(registry, directory, name, changed, rounds, say)


def _measure(
    registry: Registry, directory: Path, name: str, changed: str, rounds: int, say: Callable[[str], None]
) -> list[Result]:
    ours, theirs, again, calls, peaks = [], [], [], [], []
    for number in range(rounds):
        say(f"pulling, round {number + 1} of {rounds}")
        theirs.append(_skopeo(directory / "storage", name))
        with _daemon() as daemon:
            server = Ours(daemon)
            ours.append(server.pull(name))
            again.append(server.pull(changed))
            calls += server.calls
            peaks.append(server.peak())
    return [
        _compared("pull of 500 MB, 12 layers", ours, theirs, 0, GOAL_WALL),
        _compared("the same, CPU", ours, theirs, 1, GOAL_CPU),
        Result("the same, daemon's peak (RSS)", "MiB", max(peaks), None, None, GOAL_PEAK),
        Result("the same, other CRI calls, 99th of 100", "ms", _percentile(calls, 99), None, None, GOAL_CALL),
        Result("pull of it with one changed layer", "s", _middle(again, 0), _middle(ours, 0), "the whole", 2 / LAYERS),
    ]


class Ours:
    """A daemon that pulls, and how it answers meanwhile.  calls: ms of each other call."""

    def __init__(self, daemon: ScratchDaemon) -> None:
        assert daemon.process
        self._daemon, self._pid = daemon, daemon.process.pid
        self.calls: list[float] = []

    def pull(self, name: str) -> tuple[float, float]:
        """Seconds of wall time and of CPU, the children's included."""
        done = threading.Event()
        caller = threading.Thread(target=self._call_meanwhile, args=(done,))
        before, began = self._cpu(), time.perf_counter()
        caller.start()
        try:
            self._daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=name)), timeout=600)
            wall = time.perf_counter() - began
        finally:
            done.set()
            caller.join()
        return wall, self._cpu() - before

    def _call_meanwhile(self, done: threading.Event) -> None:
        request = cri.ListContainersRequest()
        while not done.wait(OTHER_CALLS_EVERY):
            began = time.perf_counter()
            self._daemon.runtime.ListContainers(request, timeout=60)
            self.calls.append((time.perf_counter() - began) * 1e3)

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / CLOCK

    def peak(self) -> float:
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _skopeo(storage: Path, name: str) -> tuple[float, float]:
    """Seconds of wall time and of CPU of a copy into an empty storage."""
    _made(storage)
    before, began = _children(), time.perf_counter()
    target = f"containers-storage:[overlay@{storage}/root+{storage}/run]bench:v1"
    try:
        run("skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", f"docker://{name}", target)
        return time.perf_counter() - began, _children() - before
    finally:
        with contextlib.suppress(OSError):  # the storage binds its directory onto itself
            syscalls.umount2(str(storage / "root/overlay"), MNT_DETACH)
        shutil.rmtree(storage)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _daemon:
    """A scratch daemon for the time of a `with`."""

    def __enter__(self) -> ScratchDaemon:
        self._made = ScratchDaemon()
        self._made.start()
        return self._made

    def __exit__(self, *exception: object) -> None:
        problems = self._made.close()
        if problems:
            raise RuntimeError("; ".join(problems))


def _layer(number: int) -> bytes:
    """Files of many sizes, half of each compressible."""
    chance = random.Random(number)
    buffer = io.BytesIO()
    files, size = FILES // LAYERS, BYTES // FILES
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index in range(files):
            length = int(chance.expovariate(1 / size))
            data = chance.randbytes(length // 2) + b"the same words again. " * (length // 44)
            entry = tarfile.TarInfo(f"usr/share/part{number}/d{index % 97}/file{index}")
            entry.size, entry.mode, entry.mtime = len(data), 0o644, 1_700_000_000
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _percentile(samples: list[float], which: int) -> float:
    return statistics.quantiles(samples, n=100)[which - 1]


def _compared(name: str, ours: Samples, theirs: Samples, which: int, goal: float) -> Result:
    spread = " / ".join(
        f"{min(values):.2f}..{max(values):.2f}" for values in ([s[which] for s in ours], [s[which] for s in theirs])
    )
    return Result(name, "s", _middle(ours, which), _middle(theirs, which), "skopeo copy", goal, spread)


def _middle(samples: Samples, which: int) -> float:
    return statistics.median(sample[which] for sample in samples)
