"""Seccomp profiles by path, fitted to a container's capabilities, and remembered: most containers use the same few."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from crio_native.errors import InvalidArgument, NotFound
from crio_native.oci import seccomp_profile


class SeccompProfiles:
    """Reads a profile again when its file has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fitted: LRUCache[object, dict[str, Any]] = LRUCache(maxsize=16)

    def default(self, path: str, capabilities: Sequence[str]) -> dict[str, Any]:
        """RuntimeDefault: the profile at path, or the program's own when path is ""."""
        return self.localhost(path, capabilities) if path else self._fit(("", 0, 0), capabilities)

    def localhost(self, path: str, capabilities: Sequence[str]) -> dict[str, Any]:
        """A profile file.  Raises InvalidArgument for a bad one, and when there is none."""
        try:
            info = os.stat(path)
        except OSError as error:
            raise InvalidArgument(
                "seccomp profile", path, f"cannot be read: {os.strerror(error.errno or 0).lower()}"
            ) from None
        return self._fit((path, info.st_mtime_ns, info.st_ino), capabilities)

    def _fit(self, identity: tuple[str, int, int], capabilities: Sequence[str]) -> dict[str, Any]:
        key = (identity, tuple(capabilities))
        with self._lock:
            if key in self._fitted:
                return self._fitted[key]
        try:
            profile = (
                seccomp_profile.load_profile(Path(identity[0])) if identity[0] else seccomp_profile.default_profile()
            )
        except NotFound as error:
            raise InvalidArgument("seccomp profile", identity[0], str(error)) from None
        fitted = seccomp_profile.resolve(profile, capabilities)
        with self._lock:
            self._fitted[key] = fitted
        return fitted
