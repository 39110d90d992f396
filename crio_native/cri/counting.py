"""What the daemon counts of its own work, in plain numbers; who shows them to whom is in `exporter`.

Calls and pulls are counted on the event loop; ends of containers by the store, in order.  Nothing here grows without a
bound: a label that tenants choose has at most `_LABELS_MAX` values.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from crio_native.errors import CrioError
from crio_native.images.model import Progress
from crio_native.pods.records import Container, ContainerState, Record
from crio_native.pods.store import Store

_RECENT = 512  # latencies that quantiles are taken of
_LABELS_MAX = 1000
_SIZES = (
    1 << 10,
    1 << 20,
    10 << 20,
    50 << 20,
    100 << 20,
    200 << 20,
    300 << 20,
    400 << 20,
    500 << 20,
    1 << 30,
    10 << 30,
)


@dataclass(slots=True)
class Operation:
    """A call by its name.  seconds: of all; last: of the last one; recent: a ring, which never grows."""

    calls: int = 0
    errors: int = 0
    seconds: float = 0.0
    last: float = 0.0
    recent: array[float] = field(default_factory=lambda: array("d", bytes(8 * _RECENT)))

    def took(self, seconds: float, failed: bool) -> None:
        self.recent[self.calls % _RECENT] = seconds
        self.calls += 1
        self.errors += failed
        self.seconds += seconds
        self.last = seconds

    def quantile(self, part: float) -> float:
        """Of the recent ones; part: 0 to 1."""
        ordered = sorted(self.recent[: self.calls])
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0


@dataclass(slots=True)
class Layers:
    """Sizes of pulled layers, in bytes: how many fell into each bucket, and their sum."""

    buckets: Counter[int] = field(default_factory=Counter)
    total: int = 0

    def add(self, size: int) -> None:
        self.total += size
        self.buckets[next((limit for limit in _SIZES if size <= limit), -1)] += 1

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound, count at or below it), as histograms are told."""
        found, count = [], 0
        for limit in (*_SIZES, -1):
            count += self.buckets[limit]
            found.append(("+Inf" if limit < 0 else str(limit), count))
        return found


class Counts:
    """The numbers themselves."""

    def __init__(self, store: Store) -> None:
        self.operations: dict[str, Operation] = {}
        self.stalled: Counter[str] = Counter()
        self.oom: Counter[str] = Counter()
        self.lost_monitors: Counter[str] = Counter()
        self.pulled = 0
        self.pull_failures: Counter[str] = Counter()
        self.pulled_bytes: Counter[tuple[str, str]] = Counter()
        self.skipped_bytes: Counter[str] = Counter()
        self.reused_layers: Counter[str] = Counter()
        self.layers = Layers()
        self.forbidden_calls: Mapping[tuple[str, ...], int] = {}  # by container and system call
        self._ended: set[str] = set()
        store.listen(self._changed)

    def operation(self, name: str, seconds: float, failed: bool) -> None:
        operation = self.operations.get(name)
        if operation is None:
            operation = self.operations[name] = Operation()
        operation.took(seconds, failed)

    def stall(self, stage: str) -> None:
        """A call ran out of time in this stage."""
        _count(self.stalled, stage)

    def pull_succeeded(self, layers: dict[str, Progress]) -> None:
        """layers: the last that was heard of each."""
        self.pulled += 1
        for digest, layer in layers.items():
            if layer.stage == "exists":
                _count(self.reused_layers, digest)
                _count(self.skipped_bytes, _bucket(layer.total), layer.total)
            else:
                self.layers.add(layer.total)
                _count(self.pulled_bytes, ("layer", _bucket(layer.total)), layer.total)

    def pull_failed(self, error: Exception) -> None:
        known = isinstance(error, CrioError)
        _count(self.pull_failures, type(error).__name__ if known else "Internal")

    def _changed(self, kind: type, object_id: str, record: Record | None) -> None:
        if kind is not Container:
            return
        if not isinstance(record, Container):
            self._ended.discard(object_id)
        elif record.state == ContainerState.EXITED and object_id not in self._ended:
            self._ended.add(object_id)
            if record.reason == "OOMKilled":
                _count(self.oom, record.name)
            elif record.reason == "ContainerStatusUnknown":
                _count(self.lost_monitors, record.name)


def _count(counter: Counter[str] | Counter[tuple[str, str]], label: object, by: int = 1) -> None:
    known = label in counter or len(counter) < _LABELS_MAX
    if known:
        counter[label] += by  # type: ignore[index]


def _bucket(size: int) -> str:
    return next((str(limit) for limit in _SIZES if size <= limit), "+Inf")
