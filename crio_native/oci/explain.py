"""A plan in words: what would be called, by which process, in which namespaces, and which field asked for it.

The rows are made of the very `Plan` that the executor runs, so an explanation cannot promise other than what happens;
nothing is done and no privilege is needed.  How each step's arguments become system calls is in `calls`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.linux import capabilities, syscalls
from crio_native.linux.cgroup import Cgroup, hierarchy, resources
from crio_native.oci import calls
from crio_native.oci import seccomp as filters
from crio_native.oci import spec as specs
from crio_native.oci.builtin import plan as plans
from crio_native.oci.builtin.client import cgroup_directories
from crio_native.oci.runtime import ContainerSpec

RUNTIME = "runtime"  # what makes the cgroup and asks for the rest: the daemon, or `crio-oci create` itself
PARENT = "parent"  # the init's parent: the monitor's predecessor, or `crio-oci create`
INIT = "init"
# clone and unshare flag -> the kind of namespace in config.json's words
KIND_OF_FLAG = {flag: kind for kind, flag in plans.UNSHARE_FLAG.items()} | {
    syscalls.CLONE_NEWPID: "pid",
    syscalls.CLONE_NEWUSER: "user",
    syscalls.CLONE_NEWTIME: "time",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One step.  namespaces: those that are not the host's when it begins.  source: the field of config.json, or our
    rule, that asked for it.  calls: in order; a call that depends on what is found says so."""

    number: int
    step: str
    process: str
    namespaces: str
    source: str
    calls: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Explanation:
    """assumptions: what was taken for granted of the machine, a sentence each."""

    assumptions: tuple[str, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"assumptions": list(self.assumptions), "steps": [row.to_dict() for row in self.rows]}


def explain(spec: Mapping[str, Any], bundle: Path = Path("/bundle"), name: str = "container") -> Explanation:
    """The plan of a container made from `spec`, a parsed config.json.

    bundle: what a relative root.path is relative to.  name: the container's id.  Raises InvalidArgument for a spec that
    the executor would refuse.
    """
    specs.validate(spec)
    container = ContainerSpec(id=name, spec=spec, bundle=bundle, run_dir=bundle)
    assumptions = [
        "the runtime is root with every capability that this kernel has",
        f"control groups are {hierarchy().mode}, as on this machine",
    ]
    linux = spec.get("linux") or {}
    cgroup = Cgroup(linux["cgroupsPath"]) if linux.get("cgroupsPath") else None
    seccomp = linux.get("seccomp")
    compiled = filters.compile(seccomp) if seccomp else None
    plan = plans.container_plan(
        container,
        plans.Host(capabilities.last_known(), (1 << capabilities.last_known() + 1) - 1, -1000),
        cgroup_files=cgroup.join_files() if cgroup else [],
        cgroup_directories=cgroup_directories(cgroup.path) if cgroup else {},
        seccomp=(compiled.bpf, compiled.flags) if compiled else None,
    )
    story = _Story()
    if cgroup:
        for made, source, lines in _cgroup_steps(cgroup, linux.get("resources") or {}):
            story.tell(RUNTIME, made, source, lines)
    story.clone(plan, syscalls.CLONE_INTO_CGROUP if cgroup and hierarchy().unified else 0)
    for step in plan.steps:
        story.step(step)
    return Explanation(tuple(assumptions), tuple(story.rows))


@dataclass
class _Story:
    """The rows so far, and the namespaces that the init is in by now: kind -> "" (new) or the path it was joined by."""

    rows: list[Row] = field(default_factory=list)
    entered: dict[str, str] = field(default_factory=dict)

    def tell(self, process: str, step: str, source: str, lines: Iterable[str]) -> None:
        there = self.entered if process == INIT else {}
        words = " ".join(f"{kind}={path}" if path else kind for kind, path in there.items())
        self.rows.append(Row(len(self.rows) + 1, step, process, words or "the host's", source, tuple(lines)))

    def clone(self, plan: plans.Plan, flags: int) -> None:
        if plan.join_pid:
            call = f"setns({calls.quoted(plan.join_pid)}, CLONE_NEWPID)"
            self.tell(PARENT, "join_pid", "linux.namespaces", [call])
            self.entered["pid"] = plan.join_pid
        flags |= syscalls.CLONE_NEWPID if plan.new_pid_namespace else 0
        lines = [f"clone3(flags={calls.clone_flags(flags)}, exit_signal=SIGCHLD)"]
        rule = plans.RULE + "the init's parent stays outside, a process never changes its own PID namespace"
        self.tell(PARENT, "clone", rule, lines)
        self._enter(flags)

    def step(self, step: plans.Step) -> None:
        self.tell(INIT, step.name, step.source, calls.of_step(step))
        if step.name == "new_namespaces":
            self._enter(step.args["flags"])
        elif step.name == "join_namespaces":
            self.entered |= dict(step.args["namespaces"])

    def _enter(self, flags: int) -> None:
        self.entered |= {kind: "" for flag, kind in KIND_OF_FLAG.items() if flags & flag}


def _cgroup_steps(cgroup: Cgroup, wanted: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    mounts = hierarchy().mounts
    yield "make_cgroup", "linux.cgroupsPath", [f"mkdir({calls.quoted(mount + cgroup.path)}, 0755)" for mount in mounts]
    writes, warnings = resources.plan(wanted, _UnmadeGroup())
    lines = [
        f"write({calls.quoted(f'{hierarchy().mount_of(write.controller)}{cgroup.path}/{write.file}')}, "
        f"{calls.quoted(write.value)})"
        for write in writes
    ]
    if writes or warnings:
        yield "limit_cgroup", "linux.resources", [*lines, *(f"nothing: {warning}" for warning in warnings)]
    if wanted.get("devices"):
        yield (
            "device_rules",
            "linux.resources.devices",
            calls.device_rules([*wanted["devices"], *plans.DEFAULT_DEVICE_RULES]),
        )


class _UnmadeGroup:
    """What `resources.plan` may ask about a group that does not exist: the files are taken to be there."""

    def version(self, controller: str) -> int:
        return hierarchy().version_of(controller)

    def read(self, controller: str, file: str) -> str:
        return ""
