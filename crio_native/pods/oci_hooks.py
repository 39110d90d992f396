"""Hooks that an operator configures for containers: the JSON files of `hooks_dir`, oci-hooks(5), version 1.0.0.

A file says which program runs at which stages of a container's life, and of which containers; here it is decided
whether a container is meant.  Running hooks is the runtime's work.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition
from crio_native.oci.spec import HOOKS

_FILE_MAX = 1 << 20
_FILES_MAX = 1024


def of_container(
    directories: Iterable[str], *, annotations: Mapping[str, str], command: Sequence[str], has_bind_mounts: bool
) -> dict[str, list[dict[str, Any]]]:
    """The `hooks` object of a container's config.json, in the order of the files' names.

    directories: a file in a later one replaces one of the same name in an earlier one.  Raises FailedPrecondition for a
    file that cannot be used: a hook may be what makes a container safe, so it is never passed over.
    """
    result: dict[str, list[dict[str, Any]]] = {}
    for path in _files(directories):
        try:
            document = _read(path)
            if not _matches(document.get("when") or {}, annotations, command, has_bind_mounts):
                continue
            hook = {
                key: document["hook"][key] for key in ("path", "args", "env", "timeout") if document["hook"].get(key)
            }
            for stage in document["stages"]:
                if stage not in HOOKS:
                    raise ValueError(f"{stage!r} is none of the stages {', '.join(HOOKS)}")
                result.setdefault(stage, []).append(hook)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
            raise FailedPrecondition(f"the hook file {path} cannot be used: {error}") from None
    return result


def _files(directories: Iterable[str]) -> list[Path]:
    found: dict[str, Path] = {}
    for directory in directories:
        try:
            names = sorted(os.listdir(directory))[:_FILES_MAX]
        except OSError:
            continue
        found |= {name: Path(directory) / name for name in names if name.endswith(".json")}
    return [found[name] for name in sorted(found)]


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        data = file.read(_FILE_MAX + 1)
    if len(data) > _FILE_MAX:
        raise ValueError(f"it has more than {_FILE_MAX} bytes")
    document = json.loads(data)
    if document["version"] != "1.0.0":
        raise ValueError(f"version {document['version']!r} is not 1.0.0")
    if not os.access(document["hook"]["path"], os.X_OK):
        raise ValueError(f"its program {document['hook']['path']!r} cannot be executed")
    return document


def _matches(
    when: Mapping[str, Any], annotations: Mapping[str, str], command: Sequence[str], has_bind_mounts: bool
) -> bool:
    """All conditions that are named must hold, and one must be named."""
    held = []
    if "always" in when:
        held.append(bool(when["always"]))
    if "hasBindMounts" in when:
        held.append(bool(when["hasBindMounts"]) == has_bind_mounts)
    for key, value in (when.get("annotations") or {}).items():
        held.append(any(re.search(key, name) and re.search(value, text) for name, text in annotations.items()))
    if when.get("commands"):
        held.append(any(re.search(pattern, command[0]) for pattern in when["commands"]))
    return bool(held) and all(held)
