"""Acting on several things named on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import click

from crio_native.cli.ctl import show
from crio_native.errors import CrioError


def for_each(names: Sequence[str], act: Callable[[str], None]) -> None:
    """`act` on each name and print it; a failure is told, the rest go on, and the exit code is 1."""
    failed = False
    for name in names:
        try:
            act(name)
        except CrioError as error:
            show.note(str(error))
            failed = True
        else:
            click.echo(name)
    if failed:
        sys.exit(1)
