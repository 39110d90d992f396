"""Who connects to a server of ours: accepted, bounded in number, and each served in a task.

Whoever reaches the address can connect and say nothing, so a connection is a stranger until it has said what it is here
for.  For strangers there are few places, and where all are taken the one that has had its place longest goes for the
one that comes: a client that wants something says so at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.1  # before the next try, where the kernel refuses a connection
_QUIET_SECONDS = 60.0


def this_task() -> asyncio.Task[Any]:
    """Not for a local variable of a coroutine: a task that is cancelled keeps its frames, and they would keep it."""
    task = asyncio.current_task()
    assert task is not None
    return task


class Seldom:
    """A line of the log that strangers can cause at will: one a minute, which tells how many it stands for."""

    def __init__(self, level: int) -> None:
        self._level, self._next, self._untold = level, 0.0, 0

    def tell(self, text: str, *args: object) -> None:
        self._untold += 1
        if (now := time.monotonic()) >= self._next:
            often = f" ({self._untold} times since this was last said)" if self._untold > 1 else ""
            log.log(self._level, text + often, *args)
            self._next, self._untold = now + _QUIET_SECONDS, 0


class Reception:
    """On one event loop.

    whose: the clients' name in the log.  serve: serves a connection in its task, and closes it.  most: connections that
    are no strangers.  strangers: those that are.
    """

    def __init__(
        self, whose: str, serve: Callable[[socket.socket], Coroutine[Any, Any, None]], *, most: int, strangers: int
    ) -> None:
        self._whose, self._serve, self._most, self._places = whose, serve, most, strangers
        self._listeners: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}  # in the order in which they came
        self._dropped, self._refused = Seldom(logging.WARNING), Seldom(logging.ERROR)

    def __len__(self) -> int:
        """All connections, of strangers and others."""
        return len(self._tasks)

    def open(self, listener: socket.socket) -> None:
        """Take connections of a listener that does not block; it stays its owner's."""
        self._listeners.add(listener)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def close(self, listener: socket.socket) -> None:
        """Take no new ones of it."""
        self._listeners.discard(listener)
        asyncio.get_running_loop().remove_reader(listener)

    def hang_up(self) -> list[asyncio.Task[None]]:
        """Cancel every connection's task; those that end now."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return tasks

    def admit(self) -> None:
        """The connection that this task serves is no stranger any more."""
        self._strangers.pop(this_task(), None)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """No stranger meanwhile, and then one again."""
        self.admit()
        yield
        self._enter(this_task())

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, most likely: the connection waits, those that there are go on
            self._refused.tell("no %s can be accepted: %s", self._whose, error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_PAUSE_SECONDS, self._resume, listener)
            return
        if len(self) - len(self._strangers) >= self._most:
            self._refused.tell("%d %s are connected; no more are taken", self._most, self._whose)
            sock.close()
            return
        sock.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._serve(sock))
        self._tasks.add(task)
        self._enter(task)
        task.add_done_callback(self._leave)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self.open(listener)

    def _enter(self, task: asyncio.Task[None]) -> None:
        if len(self._strangers) >= self._places:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
            self._dropped.tell("%d %s say nothing; the oldest goes for a new one", self._places, self._whose)
        self._strangers[task] = None

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._strangers.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("one of the %s was not served; this is a defect", self._whose, exc_info=error)
