"""A node full of exec probes: ExecSync at a steady rate, beside containerd: what each costs, and what grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.cli.scratch import ScratchDaemon
from tests.perf import stub
from tests.perf.containerd import IMAGE, Containerd
from tests.perf.containers import TRUE
from tests.perf.daemon import Client
from tests.perf.host import Account
from tests.perf.peers import CGROUP, resident_set_size
from tests.perf.report import Result
from tests.perf.sandboxes import pod_of, start

RATE = 50  # a second
TURN = 100  # probes of one side before it is the other's turn
TURNS = 10
AT_ONCE = 16  # probes that may be under way; one that takes longer than its turn waits
GOAL = 0.33
PEER = "containerd, runc"


@dataclass
class Contestant:
    """A CRI server with one container: its process, its account, and what its probes took so far, in seconds."""

    runtime: Any
    pid: int
    account: Account
    container: str
    latencies: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def turn(self, workers: ThreadPoolExecutor) -> None:
        """TURN probes at the rate, each sent when it is due, whatever the others do."""
        before, began = self.account.seconds(), time.perf_counter()
        probes = []
        for number in range(TURN):
            time.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            probes.append(workers.submit(self._probe))
        self.latencies += [probe.result() for probe in probes]
        self.cpu += self.account.seconds() - before

    def _probe(self) -> float:
        began = time.perf_counter()
        request = cri.ExecSyncRequest(container_id=self.container, cmd=TRUE, timeout=30)
        answer = self.runtime.ExecSync(request, timeout=60)
        if answer.exit_code != 0:
            raise RuntimeError(f"/bin/true ended with {answer.exit_code}")
        return time.perf_counter() - began


def measure(daemon: ScratchDaemon, directory: Path, progress: Callable[[str], None]) -> list[Result]:
    """Latency, CPU time of daemon, helpers and command together, and the daemon's growth in the second half."""
    assert daemon.process is not None
    peer = Containerd(directory / "containerd-probes")
    try:
        account = Account(daemon.cgroup_parent, daemon.process.pid)
        _, container = start(daemon.runtime, pod_of(daemon, "probed"), Client(daemon).image)
        ours = Contestant(stub.runtime(daemon.socket), daemon.process.pid, account, container)
        account = Account(f"{CGROUP}/containerd", peer.process.pid)
        _, container = start(peer.runtime, peer.pod("probed"), IMAGE)
        its = Contestant(stub.runtime(peer.socket), peer.process.pid, account, container)
        sizes: list[float] = []
        with ThreadPoolExecutor(AT_ONCE) as workers:
            for number in range(TURNS):
                progress(f"ExecSync, {RATE} a second: turn {number + 1} of {TURNS}")
                ours.turn(workers)
                sizes.append(resident_set_size(ours.pid))
                its.turn(workers)
        return _rows(ours, its, sizes)
    finally:
        peer.close()


def _rows(ours: Contestant, peer: Contestant, sizes: list[float]) -> list[Result]:
    results = []
    for word, pick in (("median", statistics.median), ("p95", _p95)):
        mine, its = (pick(side.latencies) * 1e3 for side in (ours, peer))
        results.append(Result(f"ExecSync, {RATE} a second, {word}", "ms", mine, its, PEER, GOAL))
    mine, its = (side.cpu / len(side.latencies) * 1e3 for side in (ours, peer))
    results.append(Result(f"ExecSync, {RATE} a second, CPU of each", "ms", mine, its, PEER, GOAL))
    sizes = sizes[TURNS // 2 - 1 :]  # by then all threads have worked, and the allocator has what it wants
    name = f"daemon's growth over {TURN * (len(sizes) - 1)} ExecSync"
    spread = f"{sizes[0]:.0f}..{sizes[-1]:.0f} KiB"
    results.append(Result(name, "KiB", sizes[-1] - sizes[0], None, None, 128, spread=spread))
    return results


def _p95(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=20, method="inclusive")[18]
