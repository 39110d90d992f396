"""checkpoint and restore: what an engine is told that asks for them.

Saving and remaking processes is CRIU's work.  Whether this host has it is said first, for that is what an operator can
change; that this version does not drive it, second.
"""

from __future__ import annotations

import os

from crio_native.errors import FailedPrecondition, Unimplemented
from crio_native.oci.builtin.standalone import state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import SimpleNamespace
    from typing import NoReturn

_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")


def checkpoint(options: SimpleNamespace) -> NoReturn:
    """Raises FailedPrecondition for a container that does not run and on a host without CRIU, else Unimplemented."""
    found = state.load(options.root, options.arguments[0])
    if found.status() not in ("running", "paused"):
        raise FailedPrecondition(f"container not running: {found.id!r} is {found.status()}")
    _refuse("checkpoint")


def restore(options: SimpleNamespace) -> NoReturn:
    state.check_id(options.arguments[0])
    _refuse("restore")


def _refuse(verb: str) -> NoReturn:
    if not any(os.access(f"{directory}/criu", os.X_OK) for directory in _DIRECTORIES):
        raise FailedPrecondition(f"{verb} needs CRIU, and this host has no program `criu`")
    raise Unimplemented(f"{verb} is not available in this version of crio-oci, with or without CRIU")
