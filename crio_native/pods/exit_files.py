"""Exit codes for other programs: a file for each ended container in `container_exits_dir`, as conmon writes them.

The file's name is the container's id, its text the exit code; it appears whole (others watch the directory) and goes
with the container.  Nothing of ours reads it: a directory that does not take it is a warning.
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)


def write(directory: str, container_id: str, code: int) -> None:
    temporary = f"{directory}/.{container_id}.new"
    try:
        os.makedirs(directory, 0o755, exist_ok=True)
        with open(temporary, "w", encoding="ascii") as file:
            file.write(str(code))
        os.rename(temporary, f"{directory}/{container_id}")
    except OSError as error:
        log.warning("container %s: its exit code is not in %s: %s", container_id, directory, error.strerror)


def remove(directory: str, container_id: str) -> None:
    for name in (container_id, f".{container_id}.new"):
        try:
            os.unlink(f"{directory}/{name}")
        except OSError:
            pass
