"""What a plan is made of: plain data without behaviour."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

RULE = "rule: "  # prefix of a step's source that is no field of config.json


class Host:
    """What a plan has to know of the machine.

    last_capability: /proc/sys/kernel/cap_last_cap.  permitted: our own capability mask; more cannot be given.
    oom_score_adj: our own, the least that a process without CAP_SYS_RESOURCE can have.
    """

    __slots__ = ("last_capability", "oom_score_adj", "permitted")

    def __init__(self, last_capability: int, permitted: int, oom_score_adj: int = 0) -> None:
        self.last_capability, self.permitted, self.oom_score_adj = last_capability, permitted, oom_score_adj


class Step:
    """One system call, or one small group of them; `name` is the function in `steps` that makes it."""

    __slots__ = ("args", "name", "source")

    def __init__(self, name: str, args: Mapping[str, Any], source: str) -> None:
        self.name, self.args, self.source = name, args, source


class Plan:
    """What happens, in order.  new_pid_namespace: whether the init is cloned into one.  join_pid: one that the init's
    parent enters first instead; both concern the parent because a process never changes its own PID namespace.

    duties: what the init's parent has to serve it with (`parent.Duties`); nothing when the plan never asks.
    """

    __slots__ = ("duties", "join_pid", "new_pid_namespace", "steps")

    def __init__(
        self, new_pid_namespace: bool, join_pid: str, steps: tuple[Step, ...], duties: Mapping[str, Any]
    ) -> None:
        self.new_pid_namespace, self.join_pid, self.steps = new_pid_namespace, join_pid, steps
        self.duties = duties


class Steps:
    """Collects steps; `add` reads like the step that it adds."""

    def __init__(self) -> None:
        self.all: list[Step] = []

    def add(self, step: str, source: str, /, **args: Any) -> None:
        self.all.append(Step(step, args, source))
