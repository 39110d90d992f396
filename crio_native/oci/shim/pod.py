"""One pod's shim: found, spoken to, and its death noticed.

A connection that is lost does not mean that the shim is: it is looked for again, for a moment.  Then it counts as dead,
and every container that is watched here is lost with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

from crio_native.errors import CrioError, NotFound, Unavailable
from crio_native.oci.shim.bootstrap import Address
from crio_native.oci.shim.client import Client
from crio_native.oci.shim.loop import Loop
from crio_native.oci.shim.task import End, Tasks

log = logging.getLogger(__name__)

AGAIN_SECONDS = 2.0  # for a shim whose connection was lost to be there again
LOSSES_MAX = 20  # of one shim's connection: it may be lost, but a shim that keeps closing it is no shim
LOG_LINE_MAX = 2000
Ended = Callable[[str, End | None], None]
"""Told a container's id and how it ended; None when nobody will ever know."""


class PodShim:
    """The shim of a pod, wherever it listens.  ended: called by a worker, once for each container that is watched."""

    def __init__(self, pod_id: str, address: Address, loop: Loop, workers: Executor, ended: Ended) -> None:
        self.pod_id, self.address = pod_id, address
        self._loop, self._workers, self._ended = loop, workers, ended
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._watched: set[str] = set()
        self._log = -1
        self._closed = False
        self._losses = 0

    def tasks(self) -> Tasks:
        """Its task service.  Raises Unavailable when it is not there."""
        with self._lock:
            if self._closed:
                raise Unavailable(f"the shim of pod {self.pod_id} has ended")
            if self._client is None or not self._client.is_open:
                name = f"the shim of pod {self.pod_id}"
                self._client = Client(self.address.connect(0.5), name, self._loop, self._lost)
            return Tasks(self._client, self.address.version)

    def watch(self, container_id: str) -> None:
        """Have `ended` called when the container has; nothing happens when it is watched.  Raises Unavailable."""
        with self._lock:
            if container_id in self._watched:
                return
            self._watched.add(container_id)
        try:
            self._wait(container_id)
        except CrioError:
            with self._lock:
                self._watched.discard(container_id)
            raise

    def forget(self, container_id: str) -> None:
        with self._lock:
            self._watched.discard(container_id)

    def close(self) -> None:
        """Let the connection go; the shim and its containers live on, unwatched."""
        with self._lock:
            self._closed, client, self._client = True, self._client, None
            self._watched.clear()
            fd, self._log = self._log, -1
        if client is not None:
            client.close()
        if fd >= 0:
            self._loop.remove(fd)
            os.close(fd)

    def follow_log(self, pipe: Path) -> None:
        """Pass what the shim says on to our own log.

        The pipe must be there when the shim starts, and somebody must read it while it lives, or it waits for ever.
        """
        if not pipe.exists():
            os.mkfifo(pipe, 0o600)
        # For writing too, so that it does not end whenever the shim closes it.
        fd = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        with self._lock:
            self._log = fd
        self._loop.add(fd, self._read_log)

    def _read_log(self) -> None:
        try:
            data = os.read(self._log, 65536)
        except (BlockingIOError, OSError):
            return
        for line in data.decode(errors="replace").splitlines():
            level = logging.WARNING if "level=error" in line or "level=fatal" in line else logging.DEBUG
            log.log(level, "shim of pod %s: %s", self.pod_id, line[:LOG_LINE_MAX])

    def _wait(self, container_id: str) -> None:
        self.tasks().wait(container_id).add_done_callback(
            lambda answer: self._submit(self._waited, container_id, answer)
        )

    def _waited(self, container_id: str, answer: Future[End]) -> None:
        """In a worker: an answer, or the loss of the connection, which `_lost` sees to."""
        try:
            end: End | None = answer.result()
        except Unavailable:
            return
        except NotFound:
            end = None
        except CrioError as error:
            log.error("the end of container %s cannot be known: %s", container_id, error)
            end = None
        self._tell(container_id, end)

    def _tell(self, container_id: str, end: End | None) -> None:
        with self._lock:
            if container_id not in self._watched:
                return
            self._watched.discard(container_id)
        self._ended(container_id, end)

    def _lost(self) -> None:
        self._losses += 1
        self._submit(self._look_again)

    def _look_again(self) -> None:
        """In a worker: watch its containers again over a new connection, or give them up."""
        deadline = time.monotonic() + AGAIN_SECONDS
        while not self._closed:
            with self._lock:
                watched = list(self._watched)
            if not watched:
                return
            try:
                if self._losses > LOSSES_MAX:
                    raise Unavailable(f"it closed the connection {self._losses} times")
                self.tasks().connect(watched[0])
            except NotFound:
                pass  # it lives, and will say so of each container
            except CrioError as error:
                if time.monotonic() < deadline and self._losses <= LOSSES_MAX:
                    time.sleep(0.1)
                    continue
                log.error("the shim of pod %s is lost: %s", self.pod_id, error)
                for container_id in watched:
                    self._tell(container_id, None)
                return
            for container_id in watched:
                with contextlib.suppress(CrioError):  # lost again, which begins this anew
                    self._wait(container_id)
            return

    def _submit(self, work: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the daemon is stopping; its next start looks again
            self._workers.submit(self._guarded, work, *arguments)

    @staticmethod
    def _guarded(work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except Exception:
            log.exception("following a shim")
