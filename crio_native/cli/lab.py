"""The commands that take a container's isolation apart: `explain`, `diff` and `isolation`.

`crio-oci` dispatches to the three functions, each of which takes the words after its verb and returns the exit code.
They are not among the hot commands, so they may be served by argparse.  What is said is made in `oci/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument

CONFIG_MAX = 16 << 20  # bytes of a config.json


class WrongUsage(Exception):
    """The command line; the message has the usage."""


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, for `crio-oci` reports errors in its own way."""

    def error(self, message: str) -> NoReturn:
        raise WrongUsage(f"{self.prog}: {message}\n{self.format_usage()}".rstrip())


def explain_command(args: Sequence[str]) -> int:
    """`explain [--json] [--id ID] [BUNDLE]`: the plan of a bundle, step by step.  No root needed, nothing done."""
    from crio_native.oci.explain import explain

    parser = _Parser("crio-oci explain", description="Print what would be done to run a bundle; nothing is done.")
    parser.add_argument("bundle", nargs="?", type=Path, default=Path(), help="directory of config.json, or the file")
    parser.add_argument("--id", default="container", help="the container's id, which some arguments contain")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(args)
    bundle = bundle_of(given.bundle)
    explanation = explain(read_config(given.bundle), bundle, given.id)
    if given.json:
        return as_json(explanation.to_dict())
    show = _Printer()
    for sentence in explanation.assumptions:
        show.line(f"assumed: {sentence}", "dim")
    for row in explanation.rows:
        show.line(f"\n{row.number:3} {row.step}", "bold cyan")
        show.line(f"    by {row.process}, in namespaces: {row.namespaces}; asked for by {row.source}", "dim")
        for call in row.calls:
            show.line(f"    {call}")
    return 0


def diff_command(args: Sequence[str]) -> int:
    """`diff [--json] BUNDLE_A BUNDLE_B`: what isolates them differently; 0 when nothing does, 1 when something."""
    from crio_native.oci.diff import diff

    parser = _Parser("crio-oci diff", description="Say what isolates two bundles differently, the weightiest first.")
    parser.add_argument("a", type=Path, metavar="BUNDLE_A")
    parser.add_argument("b", type=Path, metavar="BUNDLE_B")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(args)
    found = diff(read_config(given.a), read_config(given.b))
    if given.json:
        as_json([difference.to_dict() for difference in found])
    else:
        show = _Printer()
        for difference in found:
            show.line(difference.text)
    return 1 if found else 0


def isolation_command(args: Sequence[str], root: str = "") -> int:
    """`isolation [--json] ID`, or `--pid PID --config FILE`: the kernel's word against what was asked for.

    root: directory of `crio-oci`'s states.  Exit code 1 when something is weaker than asked.
    """
    from crio_native.cli import isolation

    parser = _Parser("crio-oci isolation", description="Compare what a container is kept from with what was asked for.")
    parser.add_argument("id", nargs="?", help="a container of crio-oci")
    parser.add_argument("--pid", type=int, help="any process instead")
    parser.add_argument("--config", type=Path, help="config.json, or its directory, to compare --pid with")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(args)
    if (given.id is None) == (given.pid is None) or (given.pid is None) != (given.config is None):
        parser.error("give a container's id, or --pid and --config")
    pid, config = (given.pid, read_config(given.config)) if given.id is None else _container(given.id, root)
    return isolation.print_report(pid, config, given.json)


def _container(name: str, root: str) -> tuple[int, Mapping[str, Any]]:
    """(pid, config) of a container of crio-oci that runs.  Raises NotFound, FailedPrecondition."""
    from crio_native.oci.builtin.standalone import state, verbs

    found = state.load(root or verbs.DEFAULT_ROOT, name)
    if not found.alive():
        raise FailedPrecondition(f"container not running: {name!r} is {found.status()}")
    return found.pid, _completed(found.config())


def bundle_of(path: Path) -> Path:
    return (path.parent if path.is_file() else path).absolute()


def read_config(path: Path) -> Mapping[str, Any]:
    """A bundle's config.json as parsed JSON, which `path` names or contains.  Raises InvalidArgument."""
    file = path if path.is_file() else path / "config.json"
    try:
        with file.open("rb") as opened:
            text = opened.read(CONFIG_MAX + 1)
        if len(text) > CONFIG_MAX:
            raise InvalidArgument(str(file), len(text), f"may have at most {CONFIG_MAX} bytes")
        config = json.loads(text)
    except OSError as error:
        raise InvalidArgument("bundle", str(file), f"cannot be read: {(error.strerror or '').lower()}") from None
    except RecursionError:
        raise InvalidArgument(str(file), "", "is nested too deeply") from None
    except ValueError as error:
        raise InvalidArgument(str(file), "", f"is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidArgument(str(file), config, "must be a JSON object")
    return _completed(config)


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """As `create` completes it."""
    from crio_native.oci import spec

    return spec.complete(config, os.geteuid(), os.getegid())


def as_json(value: Any) -> int:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 0


class _Printer:
    """Lines, with colours on a terminal and as they are elsewhere; control characters in a config stay harmless."""

    def __init__(self) -> None:
        self._console: Any = None
        if sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False)

    def line(self, text: str, style: str = "") -> None:
        head, break_, rest = text.rpartition("\n")
        safe = head + break_ + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in rest)
        if self._console is None:
            print(safe)
        else:
            self._console.print(safe, style=style or None, markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The three without `crio-oci`: `python -m crio_native.cli.lab VERB ...`."""
    verbs = {"explain": explain_command, "diff": diff_command, "isolation": isolation_command}
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] not in verbs:
            raise WrongUsage(f"usage: lab {{{','.join(verbs)}}} ...")
        return verbs[words[0]](words[1:])
    except WrongUsage as error:
        print(error, file=sys.stderr)
        return 2
    except CrioError as error:
        print(error, file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
