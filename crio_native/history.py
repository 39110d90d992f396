"""What the daemon's last run left to know about itself: three small files, named as CRI-O's and with its meaning.

    version_file           on a tmpfs: where it is missing, the machine has booted since
    version_file_persist   on the disk: where it names an older minor version, the program was upgraded
    clean_shutdown_file    on the disk, only while no daemon runs: where it is missing, the last stop was not orderly

What follows from them is `recovery`'s and the daemon's.  A file that cannot be written is a warning: it costs a check
or a clean-up too many at the next start, never the service.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from crio_native import __version__
from crio_native.config.tables import RootTable

log = logging.getLogger(__name__)

_LONGEST = 256  # bytes of a version that are read


@dataclass(frozen=True, slots=True)
class History:
    """booted: for the first time since the machine was.  upgraded: from an older minor version.
    unclean: the last run did not end in order."""

    booted: bool
    upgraded: bool
    unclean: bool


def read(crio: RootTable) -> History:
    """What the files say now."""
    old = _version(_text(crio.version_file_persist))
    known = os.path.exists(f"{crio.root}/state.db")
    return History(
        booted=not _text(crio.version_file),
        upgraded=old is not None and old < (_version(__version__) or (0, 0)),
        unclean=known and bool(crio.clean_shutdown_file) and not os.path.exists(crio.clean_shutdown_file),
    )


def begin(crio: RootTable) -> None:
    """From now on this run is the one that the files tell of: what ends before `end` was not orderly."""
    if crio.clean_shutdown_file:
        _try(lambda: Path(crio.clean_shutdown_file).unlink(missing_ok=True), crio.clean_shutdown_file)
    for path in filter(None, (crio.version_file, crio.version_file_persist)):
        _try(lambda path=path: _write(path, json.dumps(__version__)), path)


def end(crio: RootTable) -> None:
    """The run has ended in order."""
    if crio.clean_shutdown_file:
        _try(lambda: _write(crio.clean_shutdown_file, ""), crio.clean_shutdown_file)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST)
    except OSError:
        return ""


def _version(text: str) -> tuple[int, int] | None:
    match = re.match(r'\s*"?v?(\d{1,9})\.(\d{1,9})', text)
    return (int(match[1]), int(match[2])) if match else None


def _write(path: str, text: str) -> None:
    """Durable, and whole or not there."""
    directory, temporary = os.path.dirname(path), f"{path}.new"
    os.makedirs(directory, 0o755, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _try(act: object, path: str) -> None:
    try:
        act()  # type: ignore[operator]
    except OSError as error:
        log.warning("%s: %s; the next start takes this run for one that it does not know", path, error.strerror)
