"""Mounts under names of our own: for a program that takes paths, where a stranger could swap what a path leads through.

For callers in a mount namespace that nobody else sees.
"""

from __future__ import annotations

import os
import stat

from crio_native.linux import inroot, mounts, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def bind_beneath(directory: str, wanted: Iterable[Iterable[str]]) -> None:
    """Bind what is at each (top, path below it) to `directory`/0, 1, ...: see `inroot.open_beneath`.  The directory is
    ours and empty, and what is made in it goes with the namespace.  Raises OSError."""
    syscalls.mount("tmpfs", directory, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC, "mode=700")
    for number, (top, below) in enumerate(wanted):
        point, source = f"{directory}/{number}", inroot.open_beneath(top, below)
        try:
            if stat.S_ISDIR(os.fstat(source).st_mode):
                os.mkdir(point)
            else:
                os.close(os.open(point, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            syscalls.mount(f"/proc/self/fd/{source}", point, None, mounts.MS_BIND)
        finally:
            os.close(source)
