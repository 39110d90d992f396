"""Standard streams that the caller has closed."""

from __future__ import annotations

import os
import sys


def open_closed() -> None:
    """Let each be /dev/null, as conmon's and runc's are.

    Else its number goes to the next file that is opened, and what is meant for the stream goes there.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8"))
