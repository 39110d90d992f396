"""The ends of containers: noticed, recorded once, and followed by the release of what a container no longer needs.

The end of a container may be noticed while its start or stop is still at work, so a recorded end looks at the state
that it changes, and `before` keeps it behind what has to be recorded first.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from crio_native.errors import DeadlineExceeded, NotFound
from crio_native.oci.runtime import ExitStatus
from crio_native.pods import exit_files, tuning
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState

log = logging.getLogger(__name__)

SIGKILL = 9


class Ends:
    """All calls are synchronous and thread-safe."""

    def __init__(self, node: Node, tuned: tuning.Tuning) -> None:
        self._node, self._tuning = node, tuned
        self._lock = threading.Lock()
        self._futures: dict[str, Future[None]] = {}
        # Ends that were noticed while their start was not recorded yet: first things first.
        self._early: dict[str, list[ExitStatus | None]] = {}
        self._forbidden: dict[str, str] = {}  # by container: what it was stopped for

    @property
    def kill_seconds(self) -> int:
        """For a process that got SIGKILL to be gone; longer means a kernel that cannot free it."""
        return self._node.settings.ctr_stop_timeout

    def of(self, container_id: str) -> Future[None]:
        """A future that is done when the container has ended or is gone."""
        with self._lock:
            end = self._futures.get(container_id)
        if end is None:
            end = Future()
            end.set_result(None)
        return end

    def wait(self, container_id: str) -> None:
        """For a container that got SIGKILL.  Raises DeadlineExceeded."""
        try:
            self.of(container_id).result(self.kill_seconds)
        except TimeoutError:
            raise DeadlineExceeded(
                f"container {container_id} still lives {self.kill_seconds} s after SIGKILL; "
                "a process of it may be stuck in the kernel"
            ) from None

    def forget(self, container_id: str) -> None:
        """The container is gone."""
        with self._lock:
            self._futures.pop(container_id, None)

    def watch(self, container: Container) -> None:
        """Notice the container's end from now on.  Raises NotFound when no monitor serves it any more."""
        runtime, run_dir = self._node.executor_of(container), self._node.layout.run_dir(container.id)
        sock = runtime.watch(container.id, run_dir)
        with self._lock:
            self._futures.setdefault(container.id, Future())
        self._node.exits.watch(container.id, sock, runtime.read_exit, self._noticed)

    @contextmanager
    def before(self, container_id: str) -> Iterator[None]:
        """What is recorded inside comes before the container's end, however soon that is noticed."""
        with self._lock:
            early = self._early[container_id] = []
        try:
            yield
        finally:
            with self._lock:
                del self._early[container_id]
            for status in early:
                self._noticed(container_id, status)

    def forbid(self, container_id: str, calls: str) -> None:
        """The container is about to be killed for system calls that it made."""
        self._forbidden[container_id] = calls

    def settle(self, container: Container, *, booted: bool = False) -> None:
        """Record the end of a container that nobody watches: from its exit file, or made up when there is none.

        A process that has lost its monitor is killed: nobody reads its output, and nobody would learn of its end.
        booted: it has ended with the machine.
        """
        runtime, run_dir = self._node.executor_of(container), self._node.layout.run_dir(container.id)
        status = runtime.exit_status(run_dir)
        runtime.delete(container.id, run_dir, container.cgroup)
        self._tuning.release(container.id)
        self._node.notifiers.close(container.id)
        if status is not None:
            self.record(container.id, status)
        else:
            lost = ExitStatus(137, SIGKILL, finished_at=time.time_ns())
            message = "its monitor or shim is gone without leaving an exit status; what was left of it was killed"
            if booted:
                message = "it ended with the node, which was rebooted"
            self.record(container.id, lost, reason="ContainerStatusUnknown", message=message)

    def record(self, container_id: str, status: ExitStatus, *, reason: str = "", message: str = "") -> None:
        """reason, message: where the status alone does not say why."""
        default = "OOMKilled" if status.oom_killed else "Completed" if status.code == 0 else "Error"

        def ended(container: Container) -> Container:
            first = container.state not in (ContainerState.EXITED, ContainerState.REMOVING)
            if not first and not reason:
                return container  # a start error was recorded before its exit was noticed
            return dataclasses.replace(
                container,
                state=ContainerState.EXITED if first else container.state,
                exit_code=status.code,
                finished_at=status.finished_at or time.time_ns(),
                reason=reason or default,
                message=message,
            )

        exits = self._node.settings.container_exits_dir
        exit_files.write(exits, container_id, status.code)
        try:
            self._node.store.change(Container, container_id, ended, wait=False)
        except NotFound:  # it was removed meanwhile, its file perhaps before we wrote ours
            exit_files.remove(exits, container_id)
        with self._lock:
            end = self._futures.get(container_id)
        if end is not None and not end.done():
            end.set_result(None)

    def _noticed(self, container_id: str, status: ExitStatus | None) -> None:
        """In the exit watcher's thread: record the end; a worker does what may take time."""
        with self._lock:
            if container_id in self._early:
                self._early[container_id].append(status)
                return
        if status is not None:
            forbidden = self._forbidden.pop(container_id, "")
            self.record(container_id, status, reason="seccomp killed" if forbidden else "", message=forbidden)
        try:
            self._node.workers.submit(self._after, container_id, status)
        except RuntimeError:
            pass  # the daemon is stopping; its next start looks again

    def _after(self, container_id: str, status: ExitStatus | None) -> None:
        container = self._node.store.containers.get(container_id)
        if container is None:
            return
        steps = [self._release, self._unlisten, self._delete]
        for step in steps if status is not None else [self.settle, *steps]:
            try:
                step(container)
            except Exception as error:  # the others do not need it
                log.error("after the end of container %s: %s", container_id, error)

    def _release(self, container: Container) -> None:
        self._tuning.release(container.id)

    def _unlisten(self, container: Container) -> None:
        self._node.notifiers.close(container.id)

    def _delete(self, container: Container) -> None:
        """Kill what the first process left behind (in a shared PID namespace it outlives it) and free the cgroup."""
        with self._node.locks.hold(container.id):
            if container.id in self._node.store.containers:
                run_dir = self._node.layout.run_dir(container.id)
                self._node.executor_of(container).delete(container.id, run_dir, container.cgroup)
