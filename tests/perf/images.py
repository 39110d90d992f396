"""Pulls by the CRI beside `skopeo copy` into containers-storage and containerd's: 500 MB in 12 layers and 30,000
files, and many small images at once.

All read from one Debian registry on the loopback, and all wait until what they wrote is on the disk, as far as each
does so itself.  Nothing is removed before the end: ext4 does not use the inodes of removed files again for minutes,
and whoever comes next would have to look past them.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import statistics
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isal import igzip

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.api.runtime.v1 import api_pb2_grpc
from crio_native.cli.scratch import ScratchDaemon
from crio_native.images import ImageStore
from crio_native.linux import syscalls
from tests.images_support import load, member, picture, running_registry, tar
from tests.perf.containerd import Containerd
from tests.perf.peers import run
from tests.perf.report import Result

LAYERS, FILES, BYTES = 12, 30_000, 500 << 20
SMALL = 50  # images
OTHER_CALLS_EVERY = 0.02  # seconds
MANY, ROOTS, GOAL_ROOT = 100, 50, 1  # layers, containers, ms
GOAL_WALL, GOAL_CPU, GOAL_PEAK, GOAL_CALL = 0.8, 1.1, 150, 20
Samples = list[tuple[float, float]]  # (wall, CPU) in seconds
MNT_DETACH = 2
CLOCK = os.sysconf("SC_CLK_TCK")


def measure(directory: Path, rounds: int, say: Callable[[str], None]) -> list[Result]:
    say("making an image of 500 MB")
    layers = [_layer(number) for number in range(LAYERS)]
    with running_registry(_made(directory / "registry")) as registry, contextlib.ExitStack() as end:
        image = picture(*layers, compress=lambda data: igzip.compress(data, 2))
        name = registry.push("bench/large", "v1", image)
        last = picture(*layers[:-1], _layer(LAYERS), compress=lambda data: igzip.compress(data, 2))
        changed = registry.push("bench/large", "v2", last)
        del layers, image, last
        small = [registry.push(f"bench/small{n}", "v1", picture(_small_layer(n))) for n in range(SMALL)]
        return [*_measure(directory, (name, changed, small), rounds, end, say), _prepared(_made(directory / "roots"))]


def _measure(
    directory: Path,
    images: tuple[str, str, list[str]],
    rounds: int,
    end: contextlib.ExitStack,
    say: Callable[[str], None],
) -> list[Result]:
    """end: removes what was made, when all is measured."""
    name, changed, small = images
    ours, skopeo, containerd, again, many, their_many, peaks = [], [], [], [], [], [], []
    calls, calls_at_rest, their_calls = list[float](), list[float](), list[float]()
    for number in range(rounds):
        say(f"pulling, round {number + 1} of {rounds}")
        skopeo.append(_skopeo(directory / f"storage{number}", name, end))
        peer = Containerd(directory / f"containerd{number}", pulls=True)
        end.callback(peer.close)
        theirs = Puller(peer.process.pid, peer.runtime, api_pb2_grpc.ImageServiceStub(peer.channel))
        containerd.append(theirs.pull(name))
        their_calls += theirs.calls
        their_many.append(theirs.pull_all(small))
        daemon, other = end.enter_context(_daemon()), end.enter_context(_daemon())
        assert daemon.process
        mine = Puller(daemon.process.pid, daemon.runtime, daemon.images, other.runtime)
        ours.append(mine.pull(name))
        again.append(mine.pull(changed))
        calls, calls_at_rest = calls + mine.calls, calls_at_rest + mine.others
        peaks.append(mine.peak())
        many.append(mine.pull_all(small))
    return [
        _compared("pull of 500 MB, 12 layers", ours, skopeo, 0, GOAL_WALL, "skopeo copy"),
        _compared("the same, CPU", ours, skopeo, 1, GOAL_CPU, "skopeo copy"),
        _compared("the same", ours, containerd, 0, GOAL_WALL, "containerd"),
        _compared("the same, CPU", ours, containerd, 1, GOAL_CPU, "containerd"),
        Result("the same, daemon's peak (RSS)", "MiB", max(peaks), None, None, GOAL_PEAK),
        Result("the same, other CRI calls, 99th of 100", "ms", _percentile(calls, 99), None, None, GOAL_CALL),
        # What the processors' other work costs any program, and what the pull costs the daemon that pulls.
        _waiting("the same", calls, calls_at_rest, 1.5, "a daemon at rest beside it"),
        _waiting("the same", calls, their_calls, 1.0, "containerd, pulling"),
        Result("pull of it with one changed layer", "s", _middle(again, 0), _middle(ours, 0), "the whole", 2 / LAYERS),
        _compared(f"pull of {SMALL} small images at once", many, their_many, 0, 1.0, "containerd"),
    ]


def _prepared(directory: Path) -> Result:
    """A container's root file system, but for the mount call."""
    with contextlib.closing(ImageStore(directory / "store", layers_in_parallel=4)) as store:
        image = load(store, directory, "many", *[tar(member(f"f{n}")) for n in range(MANY)])
        times = []
        for number in range(ROOTS):
            container = _made(directory / f"c{number}")
            began = time.perf_counter()
            overlay = store.prepare_root(image.id, container)
            assert overlay is not None
            overlay.data()
            times.append((time.perf_counter() - began) * 1e3)
    return Result(f"a root of {MANY} layers prepared", "ms", statistics.median(times), None, None, GOAL_ROOT)


class Puller:
    """A daemon that pulls, and how it answers meanwhile.  calls: ms of each other call; others: of the same calls to
    another daemon, at rest."""

    def __init__(self, pid: int, runtime: Any, images: Any, at_rest: Any = None) -> None:
        self._pid, self._runtime, self._images, self._at_rest = pid, runtime, images, at_rest
        self.calls, self.others = list[float](), list[float]()

    def pull(self, name: str) -> tuple[float, float]:
        """Seconds of wall time and of CPU, the children's included."""
        done = threading.Event()
        asked = [(self._runtime, self.calls)] + ([(self._at_rest, self.others)] if self._at_rest else [])
        callers = [threading.Thread(target=_call_meanwhile, args=(done, *each)) for each in asked]
        for caller in callers:
            caller.start()
        try:
            return self.pull_all([name])
        finally:
            done.set()
            for caller in callers:
                caller.join()

    def pull_all(self, names: Sequence[str]) -> tuple[float, float]:
        """The same, of several at once."""
        before, began = self._cpu(), time.perf_counter()
        requests = [cri.PullImageRequest(image=cri.ImageSpec(image=name)) for name in names]
        for answer in [self._images.PullImage.future(request, timeout=600) for request in requests]:
            answer.result()
        return time.perf_counter() - began, self._cpu() - before

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / CLOCK

    def peak(self) -> float:
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _call_meanwhile(done: threading.Event, runtime: Any, times: list[float]) -> None:
    request = cri.ListContainersRequest()
    while not done.wait(OTHER_CALLS_EVERY):
        began = time.perf_counter()
        runtime.ListContainers(request, timeout=60)
        times.append((time.perf_counter() - began) * 1e3)


def _skopeo(storage: Path, name: str, end: contextlib.ExitStack) -> tuple[float, float]:
    """Seconds of wall time and of CPU of a copy into an empty storage."""
    _made(storage)
    before, began = _children(), time.perf_counter()
    target = f"containers-storage:[overlay@{storage}/root+{storage}/run]bench:v1"
    end.callback(_unmount, storage / "root/overlay")  # the storage binds its directory onto itself
    run("skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", f"docker://{name}", target)
    return time.perf_counter() - began, _children() - before


def _unmount(directory: Path) -> None:
    with contextlib.suppress(OSError):
        syscalls.umount2(str(directory), MNT_DETACH)


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


def _small_layer(number: int) -> bytes:
    """An image as many pods have: a program and some files."""
    chance = random.Random(-number)
    files = [member(f"srv/{number}/{n}", data=chance.randbytes(chance.randrange(40_000))) for n in range(30)]
    return tar(member("bin/program", data=chance.randbytes(1 << 20), mode=0o755), *files)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _percentile(samples: list[float], which: int) -> float:
    return statistics.quantiles(samples, n=100)[which - 1]


def _waiting(name: str, ours: list[float], theirs: list[float], goal: float, peer: str) -> Result:
    """Of calls meanwhile, the 99th of 100; `spread` shows the middle one."""
    spread = f"{statistics.median(ours):.2f} / {statistics.median(theirs):.2f}"
    return Result(f"{name}, other calls", "ms", _percentile(ours, 99), _percentile(theirs, 99), peer, goal, spread)


def _compared(name: str, ours: Samples, theirs: Samples, which: int, goal: float, peer: str) -> Result:
    spread = " / ".join(
        f"{min(values):.2f}..{max(values):.2f}" for values in ([s[which] for s in ours], [s[which] for s in theirs])
    )
    return Result(name, "s", _middle(ours, which), _middle(theirs, which), peer, goal, spread)


def _middle(samples: Samples, which: int) -> float:
    return statistics.median(sample[which] for sample in samples)
