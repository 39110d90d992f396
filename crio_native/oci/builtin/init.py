"""The container's init and the exec'ed process: their descriptors, and their plan.

Each ends in exec or `_exit`.  A failure travels as the JSON object of `errors.StepFailed`.
"""

from __future__ import annotations

import os

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.oci.builtin import steps, wire
from crio_native.oci.builtin.warmth import Lesson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from crio_native.oci.builtin.steps import Plan


def run_init(
    plan: Plan, channels: list[int], gate: bool, lesson: Lesson | None, made: int = 0, born: int = 0
) -> NoReturn:
    """The container's first process, its descriptors as they come out of a parcel.

    channels: to the monitor, and to a parent with duties if it has one.  gate: whether one comes after them, see
    `steps.await_cgroup`.  lesson: what somebody wants to learn from this start.  made: CLONE_NEW* of the namespaces
    that it was born in and that are its own.  born: our pid as the monitor knows it, if we are to tell it.
    """
    _prctl.prctl(_prctl.PR_SET_NAME, "crio-init")
    context = steps.Context(*map(wire.channel, channels))
    assert context.sync is not None and context.parent is not None
    context.gate = channels[-1] + 1 if gate else -1
    context.made = made
    try:
        if born:
            context.sync.send(b"B%d" % born)
        report = b"E" + wire.encode(_run(plan, context, lesson)).encode()
        try:
            context.parent.send(report)
        except OSError:  # a parent that is gone hears nothing; the monitor does
            context.sync.send(report)
    finally:  # also when there is nobody to tell: no more of the launcher's program runs in here
        os._exit(1)


def run_exec(plan: Plan, lesson: Lesson | None, parent: int = -1) -> NoReturn:
    """One more process of a running container: born in its cgroup, and if it has no parent in its PID namespace, enters
    the rest here.

    3: the status, closed by a successful exec, else it gets the failure; 4: the container's pidfd.  parent: a channel
    to one that waits for the step `appear`.
    """
    # The status is also where a terminal's master goes.
    context = steps.Context(wire.channel(3), None if parent < 0 else wire.channel(parent))
    context.container = 4
    failure = _run(plan, context, lesson)
    wire.tell(3, {"error": failure})
    os._exit(127)


def _run(plan: Plan, context: steps.Context, lesson: Lesson | None) -> dict[str, Any]:
    if lesson is None:
        return steps.run(plan, context)
    return steps.run(lesson.before_the_filter(plan), context, lesson.acts())
