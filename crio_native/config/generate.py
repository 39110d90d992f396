"""Writes what follows from the schema: the tables of docs/configuration.md, and conf/crio.conf.

Run it after a change of `tables`: ``python -m crio_native.config.generate``.  A test compares.
"""

from __future__ import annotations

from pathlib import Path

from crio_native.config.render import reference, to_toml
from crio_native.config.tables import Config

CHECKOUT = Path(__file__).resolve().parents[2]
MANUAL = CHECKOUT / "docs" / "configuration.md"
INSTALLED = CHECKOUT / "conf" / "crio.conf"
TABLES_BEGIN = "## All options\n"

HEADER = """\
# The configuration of crio-native: every option, commented out at its default.
# `crio-native config` prints what is in force; files in crio.conf.d/ and flags win over this one.

"""


def manual() -> str:
    """The manual: what is written by hand, then the tables."""
    by_hand = MANUAL.read_text().partition(TABLES_BEGIN)[0]
    return f"{by_hand}{TABLES_BEGIN}\n{reference()}"


def installed() -> str:
    """conf/crio.conf: every option at its default."""
    return HEADER + to_toml(Config())


if __name__ == "__main__":
    MANUAL.write_text(manual())
    INSTALLED.write_text(installed())
