"""The commands that take a container's isolation apart: `explain`, `diff` and `isolation`.

They are among `crio-oci`'s `verbs`; but not hot, so that they may import what they like.  What is said is made in
`oci/`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from crio_native.errors import FailedPrecondition, NotFound, printable
from crio_native.oci import spec as specs
from crio_native.oci.builtin.standalone import create, resources, state
from crio_native.oci.builtin.standalone.options import Usage

ANY_ID = "ID"  # stands for an id that is not known yet


def explain(options: SimpleNamespace) -> int:
    """The plan of a bundle, step by step, as `run` would make it.  No root needed, nothing done."""
    from crio_native.oci.explain import explain

    path = Path(*options.arguments)
    name = state.check_id(options.id) if options.id else ANY_ID
    explanation = explain(
        _placed(read_config(path), name, options.cgroup_manager),
        bundle_of(path),
        name,
        pivot=not options.no_pivot,
        keyring=not options.no_new_keyring,
        notify_socket=os.environ.get("NOTIFY_SOCKET", ""),
    )
    assumed = list(explanation.assumptions)
    if not options.id:
        assumed.append(f"the container's id is {ANY_ID}; --id tells another")
    if options.json:
        return as_json({**explanation.to_dict(), "assumptions": assumed})
    show = _Printer()
    for sentence in assumed:
        show.line(f"assumed: {sentence}", "dim")
    for row in explanation.rows:
        show.line(f"\n{row.number:3} {row.step}", "bold cyan")
        show.line(f"    by {row.process}, in namespaces: {row.namespaces}; asked for by {row.source}", "dim")
        for call in row.calls:
            show.line(f"    {call}")
    return 0


def _placed(config: Mapping[str, Any], name: str, manager: str) -> Mapping[str, Any]:
    """The config as root's `run` goes by it, in this environment: with the group that it gives the container."""
    specs.validate(config)
    config = create.without_mount_label(config)
    config = {**config, "process": create.listen_environment(config["process"])}
    linux = config.get("linux") or {}
    path, manager = create.group_of(linux, name, manager, rootless=False)
    return {**config, "linux": {**linux, "cgroupsPath": path if manager != "disabled" else ""}}


def diff(options: SimpleNamespace) -> int:
    """What isolates two bundles differently; 0 when nothing does, 1 when something."""
    from crio_native.oci.diff import diff

    a, b = (read_config(Path(path)) for path in options.arguments)
    found = diff(a, b)
    if options.json:
        as_json([difference.to_dict() for difference in found])
    else:
        show = _Printer()
        for difference in found:
            show.line(difference.text)
    return 1 if found else 0


def isolation(options: SimpleNamespace) -> int:
    """The kernel's word against what was asked for: of a container, or of --pid and --config.  1 when something is
    weaker than asked."""
    from crio_native.cli.isolation import print_report

    if bool(options.arguments) == (options.pid is not None) or (options.pid is None) != (options.config == ""):
        raise Usage("give a container's ID, or --pid and --config")
    if options.pid is not None:
        return print_report(options.pid, read_config(Path(options.config)), options.json)
    found = state.load(options.root, options.arguments[0])
    status = found.status()
    if status == "created":
        raise FailedPrecondition(f"container {found.id!r} is created only: its process is still ours, start it first")
    if status not in ("running", "paused"):
        raise FailedPrecondition(f"container not running: {found.id!r} is {status}")
    try:
        return print_report(found.pid, _completed(resources.asked(found)), options.json)
    except NotFound:
        raise FailedPrecondition(f"container not running: {found.id!r} has just ended") from None


def bundle_of(path: Path) -> Path:
    return Path(os.path.abspath(path if path.is_dir() else path.parent))


def read_config(path: Path) -> Mapping[str, Any]:
    """A bundle's config.json as `create` reads it, which `path` is or contains.  Raises InvalidArgument."""
    file = str(path if path.exists() and not path.is_dir() else path / "config.json")
    return _completed(state.foreign_json(state.read_config(file), file, ""))


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return specs.complete(config, os.geteuid(), os.getegid())


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
        safe = head + break_ + printable(rest)
        if self._console is None:
            print(safe)
        else:
            self._console.print(safe, style=style or None, markup=False, soft_wrap=True)
