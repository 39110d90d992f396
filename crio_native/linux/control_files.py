"""Files by which the kernel is told something: sysctls, mappings, groups."""

from __future__ import annotations

import os


def write(path: str, value: str) -> None:
    """One write(2).  Raises OSError with the path and the value: the kernel says of what it refuses only a number."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (value {value.strip()!r})", path) from None
    finally:
        os.close(fd)
