"""containers/storage, the store of podman and CRI-O: where ours must not be, and what its configuration has to say.

The two are different stores.  CRI-O's files name its directories in options that mean ours here.
"""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

from crio_native.config.loading import Loaded
from crio_native.errors import InvalidArgument

CONFIGURATION = Path("/etc/containers/storage.conf")
PLACES = ("/var/lib/containers/storage", "/run/containers/storage")  # where it is, when nothing else is said
_NAMES = {f"{driver}-{kind}" for driver in ("overlay", "vfs", "btrfs", "zfs") for kind in ("layers", "images")}
_NAMES |= {"libpod", "storage.lock"}


def check(loaded: Loaded) -> None:
    """Raises InvalidArgument for a directory of ours that is one of theirs."""
    crio = loaded.config.crio
    for key, path in (("root", crio.root), ("runroot", crio.runroot), ("imagestore", crio.imagestore)):
        if path and (_is_place(path) or _holds_theirs(path)):
            raise InvalidArgument(
                loaded.where(f"crio.{key}"),
                path,
                "must not be the directory of containers/storage (podman's and CRI-O's), which is another store; "
                "leave the option out, or name a directory of its own",
            )


def _is_place(path: str) -> bool:
    return os.path.realpath(path) in map(os.path.realpath, PLACES)


def _holds_theirs(path: str) -> bool:
    try:
        return not _NAMES.isdisjoint(os.listdir(path))
    except OSError:
        return False  # not there yet, or nothing to keep files in, which the start will say


def warnings(loaded: Loaded) -> Iterator[str]:
    """A disk that was meant for images, and would stay empty."""
    with contextlib.suppress(OSError, ValueError):
        storage = tomllib.loads(CONFIGURATION.read_text()).get("storage")
        theirs = storage.get("graphroot") if isinstance(storage, dict) else None
        ours = loaded.config.crio.imagestore or loaded.config.crio.root
        if isinstance(theirs, str) and os.path.isabs(theirs) and _device(theirs) != _device(ours):
            yield (
                f"{CONFIGURATION}: storage.graphroot: {theirs!r} is on another disk than {ours!r}: this file is not "
                "followed; for images on that disk name a directory of it in crio.root"
            )


def _device(path: str) -> int:
    """Of the nearest directory that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.stat(path).st_dev
