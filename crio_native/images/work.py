"""Long work: stopping it, and doing it once when several callers want it at the same time."""

from __future__ import annotations

import math
import socket
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, wait
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
        self._ended: Future[None] = Future()

    def open(self, connect: Callable[[], None]) -> None:
        """Do `connect`, which looks a name up, dials and shakes hands: there is no socket yet whose end it would find.

        Raises what it raises, and ConnectionAbortedError at our end.
        """
        opened = _aside(connect)
        wait((opened, self._ended), return_when=FIRST_COMPLETED)
        if not opened.done():
            raise ConnectionAbortedError("the daemon ends")
        opened.result()

    def add(self, sock: Any) -> None:
        sock = getattr(sock, "socket", sock)  # that of TLS in a proxy's TLS is no socket itself
        with self._lock:
            self._sockets.add(sock)
            if self._ended.done():
                _shut(sock)

    def end(self) -> None:
        """Whoever reads from one of them, or opens one, now or later, finds its end."""
        with self._lock:
            if not self._ended.done():
                self._ended.set_result(None)
            for sock in self._sockets:
                _shut(sock)


def _shut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # an SSLSocket's own would take the TLS away from its reader
    except OSError:
        pass  # it has ended already


def in_time(work: Callable[[], Result], seconds: float) -> Result:
    """What `work` returns or raises; TimeoutError if it takes longer, as a file system does whose server has gone."""
    return _aside(work).result(seconds)


def _aside(work: Callable[[], Result]) -> Future[Result]:
    """`work` in a thread that can be left behind: none can be ended from outside, and nothing waits for this one."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return done


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
