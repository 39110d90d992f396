"""Long work: stopping it, and doing it once when several callers want it at the same time."""

from __future__ import annotations

import math
import socket
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

from crio_native.errors import DeadlineExceeded

Result = TypeVar("Result")
POLL = 0.1  # seconds between looks at the events


class Stop:
    """Whether some work should end: its caller says so, the daemon ends, a part of it failed, or it stands still.

    what: names the work in the error.  patience: seconds that it may go on without `progressed`; None for ever.
    """

    def __init__(self, what: str, *events: threading.Event | None, patience: float | None = None) -> None:
        self._what = what
        self._own = threading.Event()
        self._events = [self._own, *(event for event in events if event)]
        self.patience = patience or math.inf
        self._last = time.monotonic()

    def set(self) -> None:
        self._own.set()

    def progressed(self) -> None:
        self._last = time.monotonic()

    def check(self) -> None:
        """Raises DeadlineExceeded if it should."""
        if any(event.is_set() for event in self._events):
            raise DeadlineExceeded(f"{self._what} was cancelled before it was complete")
        if time.monotonic() - self._last > self.patience:
            raise DeadlineExceeded(
                f"{self._what} made no progress for {self.patience:g} s (pull_progress_timeout) and was cancelled"
            )

    def pause(self, seconds: float) -> None:
        """Sleep, but not through a stop."""
        end = time.monotonic() + seconds
        self.check()
        while (rest := end - time.monotonic()) > 0:
            self._own.wait(min(rest, POLL))
            self.check()


class Connections:
    """Open connections, of any number of works, for whoever stops them: no event reaches a thread that reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._ended = False

    def add(self, sock: Any) -> None:
        sock = getattr(sock, "socket", sock)  # that of TLS in a proxy's TLS is no socket itself
        with self._lock:
            self._sockets.add(sock)
            if self._ended:
                _shut(sock)

    def end(self) -> None:
        """Whoever reads from one of them, now or later, finds its end."""
        with self._lock:
            self._ended = True
            for sock in self._sockets:
                _shut(sock)


def _shut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # an SSLSocket's own would take the TLS away from its reader
    except OSError:
        pass  # it has ended already


def in_time(work: Callable[[], Result], seconds: float) -> Result:
    """What `work` returns or raises; TimeoutError if it takes longer, as a file system does whose server has gone.

    No thread can be ended from outside, so it is left behind: nothing waits for it any more.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="in-time", daemon=True).start()
    return done.result(seconds)


class Joining:
    """Runs of work by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[Any]] = {}

    def run(
        self,
        key: Hashable,
        work: Callable[[], Result],
        stop: Stop,
        *,
        shares: Callable[[BaseException], bool] = lambda error: False,
    ) -> Result:
        """Do `work`, or wait for whoever does it already and return what came of it.

        stop: ends the waiting.  shares: whether another's failure is ours as well; if not, we try ourselves.
        """
        while True:
            with self._lock:
                theirs = self._running.get(key)
                if theirs is None:
                    mine: Future[Result] = Future()
                    self._running[key] = mine
            if theirs is None:
                return self._do(key, mine, work)
            error = self._wait(theirs, stop)
            if error is None:
                result: Result = theirs.result()
                return result
            if shares(error):
                raise error

    def _do(self, key: Hashable, mine: Future[Result], work: Callable[[], Result]) -> Result:
        try:
            result = work()
        except BaseException as error:
            self._end(key)
            mine.set_exception(error)
            raise
        self._end(key)
        mine.set_result(result)
        return result

    def _end(self, key: Hashable) -> None:
        with self._lock:
            del self._running[key]

    @staticmethod
    def _wait(theirs: Future[Any], stop: Stop) -> BaseException | None:
        while True:
            stop.check()
            try:
                return theirs.exception(timeout=POLL)
            except TimeoutError:
                continue
