"""A measurement, the table of them, and build/bench.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

BENCH_FILE = Path(__file__).parents[2] / "build/bench.json"


@dataclass(frozen=True)
class Result:
    """One row.  ours, peer: in `unit`.  goal: what `ratio` must not exceed, or `ours` itself where there is no
    peer; None for a number that is shown for its own sake."""

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str | None
    goal: float | None
    spread: str = ""
    more_is_better: bool = False  # the goal is what must be reached

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        value = self.ours if self.ratio is None else self.ratio
        reached = value >= self.goal if self.more_is_better else value <= self.goal
        return "[green]reached[/]" if reached else "[red]missed[/]"

    def to_dict(self) -> dict[str, object]:
        names = ("name", "unit", "ours", "peer", "peer_name", "ratio", "goal")
        return {name: getattr(self, name) for name in names}


def compare(name: str, ours: Sequence[float], peers: dict[str, tuple[Sequence[float], float | None]]) -> list[Result]:
    """Rows of medians in ms from samples in seconds.  peers: name to samples and goal."""
    return [
        Result(name, "ms", _ms(ours), _ms(samples), peer, goal, spread=f"{_range(ours)} / {_range(samples)}")
        for peer, (samples, goal) in peers.items()
    ]


def show(results: Sequence[Result], console: Console) -> None:
    """The table; `spread` is the middle half of ours and of the peer's samples."""
    table = Table(title="ours beside its peers: medians of interleaved rounds", title_justify="left")
    for column in ("benchmark", "unit", "ours", "peer", "ratio", "goal", "", "spread, ours / peer"):
        table.add_column(column, justify="right" if column in ("ours", "ratio", "goal") else "left")
    for row in results:
        peer = f"{row.peer:.2f} {row.peer_name}" if row.peer is not None else ""
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        goal = f"{row.goal:g}" if row.goal is not None else ""
        table.add_row(row.name, row.unit, f"{row.ours:.2f}", peer, ratio, goal, row.verdict, row.spread)
    console.print(table)


def write(results: Sequence[Result]) -> None:
    """build/bench.json: a list of objects, one a row."""
    BENCH_FILE.parent.mkdir(exist_ok=True)
    BENCH_FILE.write_text(json.dumps([row.to_dict() for row in results], indent=2) + "\n")


def _ms(samples: Sequence[float]) -> float:
    return statistics.median(samples) * 1e3


def _range(samples: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(samples, n=4)
    return f"{low * 1e3:.1f}..{high * 1e3:.1f}"
