"""The storage driver `vfs`: a container's root file system as one plain directory, for hosts that can mount no overlay.

The layers are copied one over the other, which takes the time and the space of the whole image for each container.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable

from crio_native.linux import copytree

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPAQUE = "trusted.overlay.opaque"


def flatten(layers: Iterable[str], target: str) -> None:
    """Copy layers, topmost first, into an empty directory.  Hard links become copies.  Raises OSError."""
    into = os.open(target, _DIRECTORY)
    try:
        for layer in reversed(list(layers)):
            source = os.open(layer, _DIRECTORY)
            try:
                _apply(source, into, 0)
            finally:
                os.close(source)
    finally:
        os.close(into)


def _apply(source: int, target: int, depth: int) -> None:
    if depth > copytree.MAX_DEPTH:
        raise OSError(errno.ELOOP, f"directories are nested deeper than {copytree.MAX_DEPTH}")
    for name in os.listdir(source):
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            _apply_directory(source, target, name, info, depth)
            continue
        _remove(target, name)
        if not (stat.S_ISCHR(info.st_mode) and info.st_rdev == 0):  # a whiteout
            copytree.copy_entry(source, target, name)


def _apply_directory(source: int, target: int, name: str, info: os.stat_result, depth: int) -> None:
    old, new = os.open(name, _DIRECTORY, dir_fd=source), -1
    try:
        if not _is_directory(target, name) or _is_opaque(old):
            _remove(target, name)
            os.mkdir(name, 0o700, dir_fd=target)
        new = os.open(name, _DIRECTORY, dir_fd=target)
        _apply(old, new, depth + 1)
        copytree.copy_metadata(old, new, info)
    finally:
        os.close(old)
        if new >= 0:
            os.close(new)


def _is_directory(parent: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, _OPAQUE) == b"y"
    except OSError:
        return False


def _remove(parent: int, name: str) -> None:
    if _is_directory(parent, name):
        shutil.rmtree(name, dir_fd=parent)
        return
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
