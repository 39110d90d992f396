"""What is done for plugin programs beside the calls, one after the other in one thread: retries, garbage, checks.

A program may hang for its whole time limit; neither a start of the daemon nor a call about another pod waits for that.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

from crio_native.errors import CrioError

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0  # seconds before a failed chore is tried again; each pause doubles

Chore = Callable[[], None]


class Chores:
    """The thread, started with the first chore.  Nothing waits for it: what is undone, a later start does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, str, Chore, float]] = []  # a heap; the number keeps their order
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def add(self, what: str, chore: Chore, *, pause: float = 0.0) -> None:
        """Do it after a pause, and again after longer ones while it raises a CrioError or OSError."""
        with self._changed:
            if self._stopped:
                return
            heapq.heappush(self._waiting, (time.monotonic() + pause, next(self._numbers), what, chore, pause))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="network-chores", daemon=True)
                self._thread.start()
            self._changed.notify()

    def stop(self) -> None:
        """Begin no more; one that runs goes on."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify()

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            _, _, what, chore, pause = entry
            try:
                chore()
            except (CrioError, OSError) as error:
                pause = min(max(pause * 2, FIRST_PAUSE), LONGEST_PAUSE)
                log.warning("%s failed, and is tried again in %.0f s: %s", what, pause, error)
                self.add(what, chore, pause=pause)
            except Exception:  # a mistake of ours in one chore: the others are done all the same
                log.exception("%s failed", what)

    def _next(self) -> tuple[float, int, str, Chore, float] | None:
        with self._changed:
            while not self._stopped:
                left = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if left is not None and left <= 0:
                    return heapq.heappop(self._waiting)
                self._changed.wait(left)
        return None
