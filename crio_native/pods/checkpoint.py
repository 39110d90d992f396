"""Checkpoint and restore: what a caller is told that asks for them.

Saving and remaking processes is CRIU's work, and CRIU must fit the kernel.  Whether this host has one that does is
asked each time, and its own words are passed on, for that is what an operator can change; that this version does not
drive it comes second.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import NoReturn

from crio_native.errors import FailedPrecondition, Unimplemented

_CHECK_SECONDS = 20.0
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_WORDS_MAX = 500


def check_allowed(level: str, act: str, *, restore: bool) -> None:
    """level: `crio.checkpoint_restore.container_level_enabled`.  Raises FailedPrecondition."""
    if level == "none" or (restore and level == "checkpoint_only"):
        option = "crio.checkpoint_restore.container_level_enabled"
        raise FailedPrecondition(f"{act} is switched off on this node: {option} is {level!r}")


def refuse(act: str) -> NoReturn:
    """Raises FailedPrecondition where CRIU is missing or does not work, Unimplemented where it does."""
    program = shutil.which("criu", path=_PATH)
    if program is None:
        raise FailedPrecondition(f"{act} needs CRIU, and this host has no program `criu`: install the package criu")
    trouble = _trouble(program)
    if trouble:
        raise FailedPrecondition(
            f"{act} needs CRIU, and `criu check` says that {program} does not work with this kernel: {trouble}; "
            "install a CRIU that fits it"
        )
    raise Unimplemented(f"{act} is not available in this version, with or without CRIU")


def _trouble(program: str) -> str:
    """Why CRIU cannot work here, in its own words; "" when it can."""
    try:
        done = subprocess.run(
            [program, "check"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_CHECK_SECONDS:g} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    return " ".join(lines[0].split())[:_WORDS_MAX] if lines else f"it ended with code {done.returncode}"
