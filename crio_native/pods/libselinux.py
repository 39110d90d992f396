"""libselinux's own Python bindings, wherever the distribution put them.

They are built for the distribution's interpreter (Debian: python3-selinux, Fedora: python3-libselinux), so no index
carries them.  PyPI's `selinux` finds them from inside a virtual environment, but not on Debian, where it answers that
SELinux is off.  Here belongs the finding of the real ones; what labels mean is `selinux`'s.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from crio_native.errors import FailedPrecondition

DEBIAN = "/usr/lib/python3/dist-packages"


@functools.cache
def bindings() -> Any:
    """The module.  Raises FailedPrecondition where there is none for this interpreter."""
    try:
        found = importlib.import_module("selinux")
        if not hasattr(found, "context_new"):  # PyPI's alone
            sys.path.insert(0, DEBIAN)
            try:
                found = importlib.reload(found)
            finally:
                sys.path.remove(DEBIAN)
        if hasattr(found, "context_new"):
            return found
        reason = f"{found.__file__} is not libselinux's"
    except (ImportError, OSError) as error:
        reason = str(error)
    raise FailedPrecondition(
        f"libselinux's Python bindings cannot be loaded ({reason}): install python3-selinux (Debian) or "
        "python3-libselinux (Fedora), or set crio.runtime.selinux = false to run containers without labels"
    )
