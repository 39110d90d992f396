"""Waiting for containers to end: one thread over the monitors' watch sockets.

It only notices and tells; what an end means for a container is `ends`' business.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable

from crio_native.oci.runtime import ExitStatus

Read = Callable[[socket.socket], ExitStatus | None]
Ended = Callable[[str, ExitStatus | None], None]


class ExitWatcher:
    """Calls `ended(key, status)` once for each watched socket, in its own thread; status None when the monitor died."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # Sockets are handed to the thread through a list: a selector may not be changed while another thread waits.
        self._new: list[tuple[socket.socket, str, Read, Ended]] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="exits", daemon=True)
        self._thread.start()

    def watch(self, key: str, sock: socket.socket, read: Read, ended: Ended) -> None:
        """Watch a socket; it belongs to the watcher from now on.  `ended` must be quick."""
        with self._lock:
            self._new.append((sock, key, read, ended))
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread and close every socket; nothing is told any more."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for entry in list(self._selector.get_map().values()):
            if entry.data is not None:
                entry.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._stopping:
            for entry, _ in self._selector.select():
                if entry.data is None:
                    os.eventfd_read(self._wake)
                else:
                    self._tell(*entry.data)
            with self._lock:
                fresh, self._new = self._new, []
            for item in fresh:
                self._selector.register(item[0], selectors.EVENT_READ, item)

    def _tell(self, sock: socket.socket, key: str, read: Read, ended: Ended) -> None:
        self._selector.unregister(sock)
        try:
            status = read(sock)
        except Exception:  # a monitor that tells nonsense is a dead monitor
            status = None
        finally:
            sock.close()
        ended(key, status)
