"""Printing: tables for people, JSON for scripts, sizes and ages in words.

Whatever comes from the runtime may come from an image or a tenant: control characters never reach the terminal
through a table or an error.  (A container's own output does, unchanged: that is what it is for.)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.message import Message

from crio_native.errors import printable

WIDTH_MAX = 10_000  # columns; more than any row has

output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Form of the list."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids only.")


def as_dict(message: Message) -> dict[str, Any]:
    """The message in protobuf's JSON mapping (camelCase; 64-bit numbers are strings), fields at zero included."""
    result: dict[str, Any] = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    return result


def as_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def with_info(message: Any) -> dict[str, Any]:
    """`as_dict` of a verbose answer, with the JSON inside `info` opened up."""
    result = as_dict(message)
    result["info"] = {topic: _json_or_text(text) for topic, text in message.info.items()}
    return result


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """A rich table: columns as wide as their content whatever the width of the terminal, so that an id stays whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for title in titles:
        grid.add_column(title)
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    grid.width = Console(width=WIDTH_MAX).measure(grid).maximum
    return grid


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console

    Console(highlight=False).print(table(titles, rows), crop=False)


def listing(items: Sequence[Message], key: str, quiet: bool, output: str, titles: Sequence[str], row: Any) -> None:
    """One list, in the form asked for: ids, JSON under `key`, or a table of `row(item)`."""
    if quiet:
        click.echo("\n".join(item.id for item in items), nl=bool(items))
    elif output == "json":
        as_json({key: [as_dict(item) for item in items]})
    else:
        print_table(titles, (row(item) for item in items))


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number above one: "1.5 MiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count / 1024**power:.1f} {units[power]}" if power else f"{count} B"


def age(moment: int, now: int | None = None) -> str:
    """How long ago `moment` (ns since the epoch) was, in the two largest units: "3h 5m"."""
    if not moment:
        return "-"
    seconds = max(0, (time.time_ns() if now is None else now) - moment) // 10**9
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    for (unit, length), (smaller, short) in pairwise(units):
        if seconds >= length:
            rest = seconds % length // short
            return f"{seconds // length}{unit}" + (f" {rest}{smaller}" if rest else "")
    return f"{seconds}s"


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(f"crioctl: {printable(text)}", err=True)
