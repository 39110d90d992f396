"""What the URLs that Exec, Attach and PortForward answer stand for.

A token is good for one connection and for a minute; whoever has it needs no other right, so it cannot be guessed.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Generic, TypeVar

from crio_native.errors import ResourceExhausted

T = TypeVar("T")

LIFETIME = 60.0  # seconds
COUNT_MAX = 1000
_BYTES = 18


class Tokens(Generic[T]):
    """Safe for any thread."""

    def __init__(self, lifetime: float = LIFETIME, count_max: int = COUNT_MAX) -> None:
        self._lifetime, self._count_max = lifetime, count_max
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[float, T]] = {}  # in the order of their ends

    def give(self, meaning: T) -> str:
        """A new token.  Raises ResourceExhausted while too many are unused."""
        now = time.monotonic()
        with self._lock:
            for token in [token for token, (end, _) in self._waiting.items() if end <= now]:
                del self._waiting[token]
            if len(self._waiting) >= self._count_max:
                raise ResourceExhausted(
                    f"{self._count_max} streaming URLs were given out within {self._lifetime:g} s and not used; "
                    "use them, or try again later"
                )
            token = secrets.token_urlsafe(_BYTES)
            self._waiting[token] = now + self._lifetime, meaning
        return token

    def take(self, token: str) -> T | None:
        """What a token stands for; None when it was used, has expired or never was.  It is gone then."""
        with self._lock:
            end, meaning = self._waiting.pop(token, (0.0, None))
        return meaning if end > time.monotonic() else None
