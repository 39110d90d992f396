"""The single acts of a plan, as the container's init makes them.

Each function is one step: it takes the `Context` and the step's arguments, and raises OSError (the kernel refused) or
`Refused` (what was found is not acceptable).  Between clone and exec nothing may be imported, logged or locked, and
after the root has changed no path of the host may be used; what needs the host's /proc is therefore done or opened
before.  Nothing else belongs in these modules, for every launcher has them in its memory.
"""

from __future__ import annotations

import os

from crio_native.oci.builtin.steps import command, devices, dialogue, mounting, pinning, root, surroundings
from crio_native.oci.builtin.steps.command import restore_signals
from crio_native.oci.builtin.steps.context import Context, Refused, describe
from crio_native.oci.builtin.steps.surroundings import set_sysctls, switch_loopback_on, sysctl_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Plan = list[tuple[str, dict[str, Any]]]

__all__ = [
    "STEPS",
    "Context",
    "Refused",
    "describe",
    "restore_signals",
    "run",
    "set_sysctls",
    "switch_loopback_on",
    "sysctl_path",
]

STEPS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for module in (surroundings, root, mounting, devices, command, dialogue, pinning)
    for function in module.STEPS
}


def run(plan: Plan, context: Context, acts: Mapping[str, Callable[..., None]] = STEPS) -> dict[str, Any]:
    """Run the steps; returns only when one fails, with its description.  acts: the steps' functions, or others that
    watch them."""
    os.umask(0)  # device modes mean what they say; the process's own umask comes with its user
    name = ""
    try:
        for name, arguments in plan:
            acts[name](context, **arguments)
    except BaseException as error:
        return describe(name, error)
    return {"step": name, "errno": 0, "path": "", "detail": "the plan ended without an exec"}
