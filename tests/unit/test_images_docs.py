"""docs/images.md names tests as proofs: they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_proof_is_a_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/images.md").read_text()))
    there: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))
    assert len(named) > 40
    assert not named - there
