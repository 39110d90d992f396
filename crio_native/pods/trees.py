"""Directory trees that a container has filled: removing one, and measuring one.

The content is hostile: any depth, any names, links to anywhere.  Both walks go by descriptors, never follow a link,
use a bounded number of descriptors, and never recurse.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator

from crio_native.linux import syscalls

_MAX_DEPTH = 64  # descriptors open at once; deeper directories are moved up first
_PATH_MAX = 3500  # the kernel's is 4096
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Remove a directory and all below it; nothing happens when it does not exist.  Raises OSError."""
    try:
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    try:
        while not _empty(top):
            pass
    finally:
        os.close(top)
    os.rmdir(path)


def _empty(top: int) -> bool:
    """One pass over the tree; whether nothing is left.  What is too deep is moved under `top` for the next pass."""
    stack: list[tuple[int, list[str], str]] = [(top, _directories(top), "")]
    moved = 0
    try:
        while stack:
            fd, names, own_name = stack[-1]
            if not names:
                stack.pop()
                if fd != top:
                    os.close(fd)
                    os.rmdir(own_name, dir_fd=stack[-1][0])
                continue
            name = names.pop()
            if len(stack) > _MAX_DEPTH:
                _move_up(fd, name, top, moved)
                moved += 1
                continue
            child = os.open(name, _DIRECTORY, dir_fd=fd)
            stack.append((child, _directories(child), name))
    finally:
        for fd, _, _ in stack:
            if fd != top:
                os.close(fd)
    return moved == 0


def _directories(fd: int) -> list[str]:
    """Unlink all that is no directory; the directories' names."""
    found = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=fd)
    return found


def _move_up(fd: int, name: str, top: int, number: int) -> None:
    while True:
        try:
            os.rename(name, f"deep-{number}", src_dir_fd=fd, dst_dir_fd=top)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            number += 1_000_000


def disk_usage(path: str | os.PathLike[str], *, seconds: float = 0.5, entries: int = 200_000) -> tuple[int, int]:
    """(bytes, inodes) that a tree takes on its disk; what was counted so far when a bound is reached.

    A file with several names counts once.  A tree that changes meanwhile gives a number in between.
    """
    deadline = time.monotonic() + seconds
    used = inodes = 0
    seen: set[int] = set()
    top = os.open(path, _DIRECTORY)
    pending = ["."]
    try:
        while pending and inodes < entries and time.monotonic() < deadline:
            directory = pending.pop()
            for name, info in _entries(top, directory):
                is_directory = stat.S_ISDIR(info.st_mode)
                if info.st_nlink > 1 and not is_directory:
                    if info.st_ino in seen:
                        continue
                    seen.add(info.st_ino)
                used += info.st_blocks * 512
                inodes += 1
                if is_directory and len(directory) < _PATH_MAX:
                    pending.append(f"{directory}/{name}")
    finally:
        os.close(top)
    return used, inodes


def _entries(top: int, directory: str) -> Iterator[tuple[str, os.stat_result]]:
    try:
        fd = syscalls.openat2(
            top, directory, _DIRECTORY, resolve=syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
        )
    except OSError:
        return  # gone, or swapped for a link, since it was listed
    try:
        with os.scandir(fd) as found:
            for entry in found:
                try:
                    yield entry.name, entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
    finally:
        os.close(fd)
