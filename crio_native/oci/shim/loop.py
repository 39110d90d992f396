"""One thread that reads everything shims send: answers, events, log lines.  It never waits for a single one of them."""

from __future__ import annotations

import logging
import os
import selectors
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

Readable = Callable[[], None]


class Loop:
    """Calls `readable()` in its thread whenever a descriptor can be read; the thread starts with the first of them.

    A descriptor is its owner's to close, after `remove`, from any thread.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._changes: list[tuple[int, Readable | None]] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None
        self._applied = threading.Condition(self._lock)
        self._stopping = False

    def add(self, fd: int, readable: Readable) -> None:
        self._change(fd, readable)

    def remove(self, fd: int) -> None:
        """Returns when `readable` will not be called any more (from the loop's own thread: after this call)."""
        self._change(fd, None)

    def stop(self) -> None:
        """End the thread.  The descriptors stay their owners'."""
        self._stopping = True
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._selector.close()
        os.close(self._wake)

    def _change(self, fd: int, readable: Readable | None) -> None:
        """Changes are made by the thread itself: one selector must not be changed while another thread waits in it."""
        with self._lock:
            if threading.current_thread() is self._thread:
                self._apply(fd, readable)
                return
            if self._stopping:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shims", daemon=True)
                self._thread.start()
            self._changes.append((fd, readable))
            os.eventfd_write(self._wake, 1)
            while readable is None and (fd, readable) in self._changes and not self._stopping:
                self._applied.wait(1)

    def _apply(self, fd: int, readable: Readable | None) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)
        if readable is not None:
            self._selector.register(fd, selectors.EVENT_READ, readable)

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                if key.data is None:
                    os.eventfd_read(self._wake)
                elif key.fd in self._selector.get_map():
                    self._call(key.data)
            with self._lock:
                changes, self._changes = self._changes, []
                for fd, readable in changes:
                    self._apply(fd, readable)
                self._applied.notify_all()

    @staticmethod
    def _call(readable: Readable) -> None:
        try:
            readable()
        except Exception:  # one shim's nonsense must not silence the others
            log.exception("reading from a shim")
