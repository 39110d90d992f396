"""Work that outlives the call that asked for it.

A kubelet gives up after its deadline and asks again; half-made pods are not torn by that.  A change runs as a task of
its own, keyed by what it changes; whoever asks for the same change meanwhile waits for the same task.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from crio_native.errors import AlreadyExists, DeadlineExceeded

log = logging.getLogger(__name__)

# An answer needs some time on its way: what the call says at its deadline must still reach the client.
_ANSWER_SECONDS = 0.2

Work = Callable[[Callable[[str], None]], Any]


@dataclass(slots=True)
class _Job:
    what: str
    subject: object
    task: asyncio.Future[Any]
    stage: list[str]
    started: float = field(default_factory=time.monotonic)
    waiting: int = 0


class Jobs:
    """The running changes, in one event loop."""

    def __init__(self, stalled: Callable[[str], None] = lambda stage: None) -> None:
        """stalled: told the stage of a run whose caller's time is over."""
        self._jobs: dict[Hashable, _Job] = {}
        self._stalled = stalled

    async def run(
        self, executor: Executor, key: Hashable, what: str, work: Work, *, seconds: float | None, subject: object = None
    ) -> Any:
        """Run `work(stage)` in the executor, or join the run that is under way for the key; its result.

        what: the change in words, for errors.  seconds: how long the caller can wait, None for ever; then
        DeadlineExceeded names the stage, and the work goes on.  subject: what two equal changes must agree in; raises
        AlreadyExists where the run under way is about another.
        """
        job = self._jobs.get(key)
        if job is None:
            job = self._start(executor, key, what, work, subject)
        elif job.subject != subject:
            raise AlreadyExists(f"{what} is under way with another configuration; it is {job.stage[0]}")
        patience = None if seconds is None else max(seconds - min(_ANSWER_SECONDS, seconds / 5), 0.0)
        job.waiting += 1
        try:
            done, _ = await asyncio.wait([job.task], timeout=patience)
        finally:
            job.waiting -= 1
        if not done:
            self._stalled(job.stage[0])
            age = time.monotonic() - job.started
            raise DeadlineExceeded(
                f"{what} is still {job.stage[0]} after {age:.1f} s; the work goes on, and a retry of the call joins it"
            )
        return job.task.result()

    async def drain(self, seconds: float) -> None:
        """Wait for all that runs, at most so long."""
        if self._jobs:
            await asyncio.wait([job.task for job in self._jobs.values()], timeout=seconds)

    def _start(self, executor: Executor, key: Hashable, what: str, work: Work, subject: object) -> _Job:
        stage = ["waiting for a worker"]

        def set_stage(text: str) -> None:
            stage[0] = text

        context = contextvars.copy_context()
        task = asyncio.get_running_loop().run_in_executor(executor, lambda: context.run(work, set_stage))
        job = self._jobs[key] = _Job(what, subject, task, stage)

        def finished(future: asyncio.Future[Any]) -> None:
            del self._jobs[key]
            error = None if future.cancelled() else future.exception()
            if error is not None and not job.waiting:
                log.warning("%s failed after its caller had given up: %s", what, error)

        task.add_done_callback(finished)
        return job
