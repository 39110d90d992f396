"""The C library's allocator, told what a process that lives for months wants."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h


def return_large_blocks(size: int) -> None:
    """Blocks of `size` bytes and more go back to the kernel when they are freed.

    glibc begins so, but keeps blocks as large as the largest that it has seen freed: a single answer of 16 MiB would
    make the process larger for ever.  Other C libraries have no such habit, and no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, size)
