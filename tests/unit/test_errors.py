"""What errors say, and how the daemon's log has it: in one line, without anything that a terminal obeys."""

from __future__ import annotations

import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native import errors
from crio_native.daemon import LineFormatter

FOREIGN = "no\n2026-01-01 INFO forged \x1b[31mred \u202ereversed \udc80"
SHOWN = "no\\n2026-01-01 INFO forged \\x1b[31mred \\u202ereversed \\udc80"


@given(st.text())
def test_what_is_printable_is_so_and_in_one_line(text: str) -> None:
    assert errors.printable(text).isprintable()
    assert errors.printable(errors.printable(text)) == errors.printable(text)


@pytest.mark.parametrize(
    "error",
    [
        errors.Unavailable(f"the registry said {FOREIGN}"),
        errors.InvalidArgument(f"config.{FOREIGN}", "x", "wrong"),
        errors.UntrustedImage(FOREIGN),
        errors.StepFailed("execute", 2, FOREIGN),
        errors.StepFailed("hook", 0, "", FOREIGN),
    ],
)
def test_an_errors_text_is_printable(error: errors.CrioError) -> None:
    assert SHOWN in str(error) == f"{error}"
    assert str(error).isprintable()


def test_what_a_step_worked_on_travels_as_it_is() -> None:
    assert errors.StepFailed.from_dict(errors.StepFailed("execute", 2, FOREIGN).to_dict()).path == FOREIGN


def test_a_record_of_the_log_is_one_line_and_its_traceback_is_indented() -> None:
    try:
        raise ValueError(FOREIGN)
    except ValueError:
        record = logging.LogRecord("name", logging.ERROR, "", 0, "it said %s", (FOREIGN,), sys.exc_info())
    first, *rest = LineFormatter("%(levelname)s %(name)s: %(message)s").format(record).split("\n")
    assert first == f"ERROR name: it said {SHOWN}"
    assert rest[0] == "  Traceback (most recent call last):" and len(rest) > 2
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
