"""The system calls that a step makes, as text, from the step's arguments alone.

One function a step, of the step's name and with its arguments, in `files` and `process`; `DESCRIPTIONS` has them all,
and a test that it has one for every step.  Calls are written as strace does: symbolic flags, quoted strings; a variable
stands for a descriptor that an earlier call gave.  Left out: looking (stat, readlink), reading and closing; and the
other ways in which an old kernel is asked for the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crio_native.oci.calls import files  # noqa: F401  fill DESCRIPTIONS
from crio_native.oci.calls.process import hook_calls
from crio_native.oci.calls.words import DESCRIPTIONS, clone_flags, device_rule, device_rules, quoted

if TYPE_CHECKING:
    from crio_native.oci.builtin.plan import Step

__all__ = ["DESCRIPTIONS", "clone_flags", "device_rule", "device_rules", "hook_calls", "of_step", "quoted"]


def of_step(step: Step) -> list[str]:
    """The calls, in order; one that depends on what is found says so."""
    return list(DESCRIPTIONS[step.name](**step.args))
