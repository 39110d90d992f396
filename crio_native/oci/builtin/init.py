"""The container's init and the exec'ed process: what they do with their descriptors, and their plan.

Each ends in exec or `_exit`.  A failure travels as the JSON object of `errors.StepFailed`.
"""

from __future__ import annotations

import fcntl
import os

import _prctl  # type: ignore[import-not-found]  # prctl's C half, without hundreds of properties

from crio_native.linux import syscalls
from crio_native.oci.builtin import steps, wire
from crio_native.oci.builtin.warmth import Lesson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Plan = list[tuple[str, dict[str, Any]]]

FIRST_FREE = 32  # above every descriptor number that an exec'ed program gets from us


def run_init(
    plan: Plan, channels: list[int], gate: int, stdio: list[int], lesson: Lesson | None, made: int = 0
) -> NoReturn:
    """The container's first process.

    channels: to the monitor, and to a parent with duties if it has one.  gate: see `steps.await_cgroup`, or -1.
    lesson: what somebody wants to learn from this start.  made: CLONE_NEW* of the namespaces that it was born in and
    that are its own.
    """
    _prctl.prctl(_prctl.PR_SET_NAME, "crio-init")
    _take_descriptors(stdio, channels if gate < 0 else [*channels, gate], lesson)
    context = steps.Context(*(wire.channel(3 + number) for number in range(len(channels))))
    context.gate = -1 if gate < 0 else 3 + len(channels)
    context.made = made
    failure = _run(plan, context, lesson)
    assert context.parent is not None
    context.parent.send(b"E" + wire.encode(failure).encode())
    os._exit(1)


def run_exec(plan: Plan, status: int, container: int, stdio: list[int], lesson: Lesson | None) -> NoReturn:
    """One more process of a running container: born in its PID namespace and cgroup, enters the rest here.

    status: closed by a successful exec, else gets the failure.
    """
    _take_descriptors(stdio, [status, container], lesson)
    context = steps.Context(wire.channel(3))  # also where a terminal's master goes
    context.container = 4
    failure = _run(plan, context, lesson)
    wire.tell(3, {"error": failure})
    os._exit(127)


def _run(plan: Plan, context: steps.Context, lesson: Lesson | None) -> dict[str, Any]:
    if lesson is None:
        return steps.run(plan, context)
    return steps.run(lesson.before_the_filter(plan), context, lesson.acts())


def _take_descriptors(stdio: list[int], others: list[int], lesson: Lesson | None) -> None:
    """stdio (-1: /dev/null) as 0 to 2, the others close-on-exec from 3 on, and nothing else open but a lesson's."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if -1 in stdio else -1
    sources = [null if fd < 0 else fd for fd in stdio] + others
    moved = [fd if fd >= FIRST_FREE else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for fd in sources]
    for number, fd in enumerate(moved):
        os.dup2(fd, number, inheritable=number < 3)
    if lesson is None:
        syscalls.close_range(len(moved))
    else:
        syscalls.close_range(len(moved), lesson.FIRST_DESCRIPTOR - 1)
