"""The groups above the pods' containers that the daemon itself made, where a pod's `cgroup_parent` was not there.

They go with the last pod below them.  A kubelet makes its groups before its pods, and removes them itself: those are
never touched.  A directory of ours is known by its inode, too, for somebody may have removed it and made another; the
list is in `crio.runroot`, so it outlives the daemon.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from crio_native.linux.cgroup import Cgroup

log = logging.getLogger(__name__)

Made = dict[str, tuple[str, int]]  # directory -> its group's path, its inode


class CgroupParents:
    """For the manager cgroupfs alone: systemd's slices are systemd's.  file: of the list."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()

    def make(self, path: str, pod_id: str) -> None:
        """Make what a pod's parent lacks in any hierarchy.  The pod must have its record.  Raises StepFailed."""
        with self._lock:
            if Cgroup(path).everywhere():
                return
            below = Cgroup(f"{path}/crio-{pod_id}")  # its parent may be there, with processes
            below.create()
            below.remove()
            made = {directory: (above, os.stat(directory).st_ino) for above, directory in below.made_above}
            self._write(self._read() | made)

    def leave(self, used: Callable[[], Iterable[str]]) -> None:
        """Remove what no pod needs any more.  used: the parents of all that have a record."""
        with self._lock:
            made = self._read()
            if not made:
                return
            needed = {above for path in used() for above in (path, *map(str, Path(path).parents))}
            left = dict(made)
            for directory, (path, inode) in sorted(made.items(), reverse=True):  # what is below comes first
                if path not in needed and _remove(directory, inode):
                    del left[directory]
            if left != made:
                self._write(left)

    def _read(self) -> Made:
        try:
            found = json.loads(self._file.read_bytes())
            return {str(directory): (str(path), int(inode)) for directory, path, inode in found}
        except (OSError, ValueError, TypeError):
            return {}  # none yet; or damaged, and then nothing is known to be ours

    def _write(self, made: Made) -> None:
        temporary = self._file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps([[directory, path, inode] for directory, (path, inode) in made.items()]))
            temporary.rename(self._file)
        except OSError as error:  # no pod fails for it: at worst empty groups stay
            log.warning("what cgroups were made for pods cannot be noted in %s: %s", self._file, error)


def _remove(directory: str, inode: int) -> bool:
    """Whether it is ours no more: removed, now or before.  The kernel refuses to remove one that is in use."""
    try:
        if os.stat(directory).st_ino == inode:
            os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
