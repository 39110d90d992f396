"""Whole-file-system calls that the standard library lacks."""

from __future__ import annotations

import ctypes
import os

# CDLL, not the PyDLL of `syscalls`: this call can take seconds, and other threads must run meanwhile.
_libc = ctypes.CDLL(None, use_errno=True)
_syncfs = _libc.syncfs
_syncfs.argtypes, _syncfs.restype = (ctypes.c_int,), ctypes.c_int


def syncfs(path: str) -> None:
    """Write all that is dirty in the file system of `path` to its device (syncfs(2)).  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _syncfs(fd) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)
