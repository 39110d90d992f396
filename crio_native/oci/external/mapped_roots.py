"""Where the root file systems of pods with a user namespace are mounted for an OCI runtime's program.

Such a program looks the root up by its path, as the user namespace's root, whom the host's kernel takes for anybody:
every directory on the way must be searchable by all.  A container's own directory is not, so that nobody on the node
reaches its files.  So there are empty directories elsewhere, to mount on in a mount namespace that only the program and
its container have (see `making.own_mounts`): on the host they stay empty.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition

_SEARCHABLE = 0o711


def with_hosts_sysfs(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mounts of a spec with a user namespace: in the host's network the kernel lets it have no sysfs of its own."""
    mounts = list(spec.get("mounts") or ())
    if any(each["type"] == "network" for each in spec["linux"]["namespaces"]):
        return mounts
    hosts = {"type": "bind", "source": "/sys", "options": ["rbind", "ro", "nosuid", "noexec", "nodev"]}
    return [{**each, **hosts} if each.get("type") == "sysfs" else each for each in mounts]


class MappedRoots:
    """directory: ours, made when the first container needs it, in another directory of ours, crio.runroot."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, container_id: str) -> str:
        return str(self._directory / container_id)

    def make(self, container_id: str) -> None:
        """Raises FailedPrecondition when a directory above is hidden from the program."""
        for above in self._directory.parent.parents:
            if not os.stat(above).st_mode & stat.S_IXOTH:
                raise FailedPrecondition(
                    f"crio.runroot: {above} must be searchable by all (mode {_SEARCHABLE:o}): an OCI runtime's program "
                    "looks the root file system of a pod with a user namespace up as nobody in particular"
                )
        os.chmod(self._directory.parent, _SEARCHABLE)  # what is in there has modes of its own
        self._directory.mkdir(exist_ok=True)
        os.chmod(self._directory, _SEARCHABLE)
        os.mkdir(self.path(container_id), _SEARCHABLE)

    def remove(self, container_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.path(container_id))
