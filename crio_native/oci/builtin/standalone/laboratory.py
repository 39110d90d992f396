"""`--trace` and `--fail`: what was done step by step, and a step that fails as if the kernel had said so.

A trace line is a JSON object: step, the how-maniest of that name (`occurrence`), what asked for it (`source`), the
process that did it (`process`, `pid`), `result` ("ok" or the errno's name, or the exception's) and `microseconds`.  A
step that does not come back when it succeeds (execute) has a line with the result "begun" first.

Without either flag nothing of this is in the way: the steps are called as they are.
"""

from __future__ import annotations

import errno
import os
import time

from crio_native.errors import CrioError, InvalidArgument, StepFailed
from crio_native.oci.builtin import steps, wire
from crio_native.oci.builtin.standalone import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from crio_native.oci.builtin.plan import Plan

# What the command itself does around the plan, in the order that it does it.
OWN_STEPS = ("make_resctrl", "make_cgroup", "limit_cgroup", "limit_devices", "clone", "record_state", "write_pid_file")
WITHOUT_RETURN = ("execute", "execute_pause")


class Laboratory:
    """Watches and breaks the steps of one command.

    trace: path of the file to append to, "" for none.  fail: the value of --fail, "" for none.
    """

    def __init__(self, trace: str, fail: str) -> None:
        """Raises InvalidArgument for a malformed --fail, OSError when the trace cannot be written."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._path = os.path.abspath(trace)
        self.trace = os.open(trace, flags, 0o600) if trace else -1
        self.broken, self.occurrence, self.errno = _parse(fail) if fail else ("", 0, 0)
        self._seen: dict[str, int] = {}

    def check(self, plan: Plan) -> None:
        """Raise InvalidArgument when --fail names a step that this plan does not have."""
        names = [*OWN_STEPS, *(step.name for step in plan.steps)]
        if self.broken and names.count(self.broken) < self.occurrence:
            known = ", ".join(dict.fromkeys(names))
            asked = f"{self.broken}#{self.occurrence}"
            raise InvalidArgument("--fail", asked, f"this plan has no such step; it has {known}")

    def acts(self, process: str, plan: Plan) -> Mapping[str, Callable[..., None]]:
        """The steps' functions for `steps.run`, watched."""
        return _Watched(self, process, [step.source for step in plan.steps])

    def own(self, step: str, act: Callable[[], Any]) -> Any:
        """Do an act of the command itself.  Raises StepFailed for an injected failure."""
        try:
            return self.perform(step, "crio-oci", "", act)
        except Injected as error:
            raise StepFailed(step, error.errno or 0, "", "as --fail asked") from None

    def perform(self, step: str, process: str, source: str, act: Callable[[], Any]) -> Any:
        self._seen[step] = occurrence = self._seen.get(step, 0) + 1
        began = time.perf_counter_ns()

        def note(result: str) -> None:
            if self.trace >= 0:
                line = {
                    "step": step,
                    "occurrence": occurrence,
                    "source": source,
                    "process": process,
                    "pid": os.getpid(),
                    "result": result,
                    "microseconds": (time.perf_counter_ns() - began) // 1000,
                }
                say = log.warning if process == "crio-oci" else _say_inside
                self._write((wire.encode(line) + "\n").encode(), say)

        if step in WITHOUT_RETURN:
            note("begun")
        try:
            if step == self.broken and occurrence == self.occurrence:
                raise Injected(self.errno, os.strerror(self.errno))
            result = act()
        except BaseException as error:
            number = error.number if isinstance(error, (StepFailed, steps.Refused)) else getattr(error, "errno", None)
            note(errno.errorcode.get(number or 0, type(error).__name__))
            raise
        note("ok")
        return result

    def _write(self, line: bytes, say: Callable[[str], None]) -> None:
        """Append to the trace.  What cannot be written is a warning: a disk that is full is none of the container's
        business, and a line after half a line would be no JSON."""
        try:
            if os.write(self.trace, line) == len(line):
                return
            why = os.strerror(errno.ENOSPC)
        except OSError as error:
            why = os.strerror(error.errno or 0)
        os.close(self.trace)
        self.trace = -1
        what = "the next steps are not traced: free some space, or give another file"
        say(f"--trace {self._path}: writing the trace: {why.lower()}; {what}")


def _say_inside(text: str) -> None:
    """Not to the file of --log, whose path leads into the container's root by now."""
    log.tell(f"crio-oci: warning: {text}\n")


class Injected(OSError):
    """What --fail asked for; to the step's caller it is the kernel's refusal."""


class _Watched(dict[str, "Callable[..., None]"]):
    """`steps.STEPS`, with a look at each that is taken from it, in the plan's order."""

    def __init__(self, laboratory: Laboratory, process: str, sources: list[str]) -> None:
        super().__init__(steps.STEPS)
        self._laboratory, self._process, self._sources = laboratory, process, iter(sources)

    def __getitem__(self, name: str) -> Callable[..., None]:
        act, source = super().__getitem__(name), next(self._sources, "")

        def watched(context: steps.Context, **arguments: Any) -> None:
            self._laboratory.perform(name, self._process, source, lambda: act(context, **arguments))

        return watched


def of(trace: str, fail: str) -> Laboratory | None:
    """None when neither is asked for.  Raises InvalidArgument for what cannot be done."""
    if not trace and not fail:
        return None
    try:
        return Laboratory(trace, fail)
    except OSError as error:
        raise InvalidArgument("--trace", trace, f"cannot be written: {os.strerror(error.errno or 0).lower()}") from None


def own(laboratory: Laboratory | None, step: str, act: Callable[[], Any]) -> Any:
    """Do an act of the command itself, watched if anybody does.  Raises StepFailed that names it."""
    try:
        return act() if laboratory is None else laboratory.own(step, act)
    except CrioError:
        raise
    except OSError as error:
        raise StepFailed.from_dict(steps.describe(step, error)) from error


def _parse(fail: str) -> tuple[str, int, int]:
    """STEP[#OCCURRENCE][=ERRNO], the errno by name or number, EPERM when it is missing."""
    target, _, number = fail.partition("=")
    step, _, occurrence = target.partition("#")
    names = {name: value for value, name in errno.errorcode.items()}
    value = names.get(number.upper(), int(number) if number.isascii() and number.isdecimal() else 0)
    if not number:
        value = errno.EPERM
    if not 0 < value < 4096:
        raise InvalidArgument("--fail", number, "is no errno: give a name like ENOSPC, or a number")
    if occurrence and not (occurrence.isascii() and occurrence.isdecimal() and 0 < int(occurrence) < 10_000):
        raise InvalidArgument("--fail", occurrence, "which of the steps of that name: must be 1 or more")
    if step not in steps.STEPS and step not in OWN_STEPS:
        raise InvalidArgument("--fail", step, f"is no step; the steps are {', '.join((*OWN_STEPS, *steps.STEPS))}")
    return step, int(occurrence or 1), value
