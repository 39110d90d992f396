"""One comparison of a report."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Verdict(enum.Enum):
    SAME = "as asked"
    STRICTER = "stricter"
    DIFFERENT = "different"
    WEAKER = "weaker"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """field: of config.json, or what is looked at.  asked, found: in words."""

    field: str
    asked: str
    found: str
    verdict: Verdict

    @property
    def weaker(self) -> bool:
        return self.verdict is Verdict.WEAKER

    def to_dict(self) -> dict[str, Any]:
        return {
            "field": self.field,
            "asked": self.asked,
            "found": self.found,
            "verdict": self.verdict.value,
            "weaker": self.weaker,
        }


def compared(field: str, asked: str, found: str, *, weaker: bool, same: bool) -> Finding:
    """A finding for things that have an order: what is neither weaker nor the same is stricter."""
    verdict = Verdict.WEAKER if weaker else Verdict.SAME if same else Verdict.STRICTER
    return Finding(field, asked, found, verdict)
