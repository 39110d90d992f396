"""A plan in words: what would be called, by which process, in which namespaces, and which field asked for it.

The rows are made of the very `Plan` that the executor runs, so an explanation cannot promise other than what happens;
nothing is done and no privilege is needed.  How each step's arguments become system calls is in `calls`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.linux import capabilities, namespaces, resctrl, syscalls
from crio_native.linux.cgroup import Cgroup, cgroup_of, hierarchy, resources
from crio_native.oci import calls
from crio_native.oci import seccomp as filters
from crio_native.oci import spec as specs
from crio_native.oci.builtin import plan as plans
from crio_native.oci.runtime import ContainerSpec

RUNTIME = "runtime"  # what makes the cgroup and asks for the rest: the daemon, or `crio-oci create` itself
PARENT = "parent"  # the init's parent: the monitor's predecessor, or `crio-oci create`
INIT = "init"
# Steps that enter one namespace.
ENTERED_BY = {"new_time_namespace": "time", "join_mount_namespace": "mount"}


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


def explain(
    spec: Mapping[str, Any],
    bundle: Path = Path("/bundle"),
    name: str = "container",
    *,
    pivot: bool = True,
    keyring: bool = True,
    notify_socket: str = "",
) -> Explanation:
    """The plan of a container made from `spec`, a parsed config.json.

    A spec without linux.cgroupsPath is of a container without a group of its own; a command-line runtime gives it one.
    bundle: what a relative root.path is relative to.  name: the container's id.  The rest: see
    `plan.container_plan`.  Raises InvalidArgument for a spec that
    the executor would refuse.
    """
    specs.validate(spec)
    container = ContainerSpec(id=name, spec=spec, bundle=bundle, run_dir=bundle)
    assumptions = [
        "the runtime is root with every capability that this kernel has",
        f"control groups are {hierarchy().mode}, as on this machine",
    ]
    linux = spec.get("linux") or {}
    cgroup = _group(linux.get("cgroupsPath") or "", spec.get("annotations") or {})
    joined = cgroup.join_files() if cgroup else []
    rdt = linux.get("intelRdt")
    if rdt is not None:
        if not resctrl.mount_point():
            assumptions.append(f"resctrl is mounted at {resctrl.USUAL_PLACE}; here it is not, so a run is refused")
        joined += resctrl.task_files(rdt, name, resctrl.mount_point() or resctrl.USUAL_PLACE)
    plan = plans.container_plan(
        container,
        plans.Host(capabilities.last_known(), (1 << capabilities.last_known() + 1) - 1, -1000),
        cgroup_files=joined,
        cgroup_directories=hierarchy().directories(cgroup.path) if cgroup else {},
        seccomp=_compiled(linux.get("seccomp")),
        keyring=keyring,
        pivot=pivot,
        notify_socket=notify_socket,
        look_up=True,
        keep_groups=specs.keeps_groups(spec),
    )
    story = _Story(specs.namespace_paths(spec))
    if rdt is not None:
        story.tell(RUNTIME, "make_resctrl", "linux.intelRdt", _resctrl_calls(rdt, name))
    if cgroup:
        for made, source, lines in _cgroup_steps(cgroup, linux.get("resources") or {}):
            story.tell(RUNTIME, made, source, lines)
    story.clone(plan, syscalls.CLONE_INTO_CGROUP if cgroup and hierarchy().unified else 0)
    for step in plan.steps:
        story.step(step)
        if step.name == "ask_parent":
            story.duty(step.args["duty"], plan.duties)
    return Explanation(tuple(assumptions), tuple(story.rows))


def _group(path: str, annotations: Mapping[str, str]) -> Cgroup | None:
    if not path:
        return None
    return cgroup_of(path, "cgroupfs" if path.startswith("/") else "systemd", annotations)


def _compiled(seccomp: Mapping[str, Any] | None) -> tuple[bytes, int] | None:
    if not seccomp:
        return None
    compiled = filters.compile(seccomp)
    return compiled.bpf, compiled.flags | (syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER if compiled.notify else 0)


@dataclass
class _Story:
    """The rows so far, and where the init is by now.

    asked: kind of namespace -> path to join, "" for a new one, as the spec has them.  entered: those of them that the
    init is in.
    """

    asked: Mapping[str, str]
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
            self._enter("pid")
        flags |= syscalls.CLONE_NEWPID if plan.new_pid_namespace else 0
        lines = [f"clone3(flags={calls.clone_flags(flags)}, exit_signal=SIGCHLD)"]
        rule = plans.RULE + "the init's parent stays outside, a process never changes its own PID namespace"
        self.tell(PARENT, "clone", rule, lines)
        self._enter(*kinds_of(flags))

    def step(self, step: plans.Step) -> None:
        self.tell(INIT, step.name, step.source, calls.of_step(step))
        if step.name == "new_namespaces":
            # Where the spec has a mount namespace by path, this is only a copy of the host's to work in.
            self._enter(*(kind for kind in kinds_of(step.args["flags"]) if self.asked.get(kind) == ""))
        elif step.name == "join_namespaces":
            self._enter(*(kind for kind, _ in step.args["namespaces"]))
        elif step.name == "enter_user_namespace":
            self._enter("user", *(("pid",) if step.args["new_pid"] or step.args["join_pid"] else ()))
        elif step.name in ENTERED_BY:
            self._enter(ENTERED_BY[step.name])

    def duty(self, word: str, duties: Mapping[str, Any]) -> None:
        """What the init waits for."""
        if word == "N":
            lines = [
                f"RTM_NEWLINK {calls.quoted(old)} into the init's network namespace, as {calls.quoted(new)}"
                for old, new in duties["net_devices"].items()
            ]
            self.tell(PARENT, "move_net_devices", "linux.netDevices", lines)
        for kind, entries in duties["hooks"].items() if word == "H" else ():
            self.tell(PARENT, "parent_hooks", f"hooks.{kind}", calls.hook_calls(entries))

    def _enter(self, *kinds: str) -> None:
        self.entered |= {kind: self.asked.get(kind, "") for kind in kinds}


def kinds_of(flags: int) -> list[str]:
    return [kind for kind, flag in namespaces.FLAG.items() if flags & flag]


def _cgroup_steps(cgroup: Cgroup, wanted: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    mounts = hierarchy().mounts
    yield "make_cgroup", "linux.cgroupsPath", [f"mkdir({calls.quoted(mount + cgroup.path)}, 0755)" for mount in mounts]
    writes, warnings = resources.plan(wanted, _UnmadeGroup())
    lines = [
        f"write({calls.quoted(f'{hierarchy().mount_of(write.controller)}{cgroup.path}/{write.file}')}, "
        f"{calls.quoted(write.value)})"
        for write in writes
    ]
    nothing = (
        [f"nothing: {warning}" for warning in warnings] if writes or warnings else ["no call: no limit is asked for"]
    )
    yield "limit_cgroup", "linux.resources", [*lines, *nothing]
    if wanted.get("devices"):
        yield (
            "limit_devices",
            "linux.resources.devices",
            calls.device_rules([*wanted["devices"], *plans.DEFAULT_DEVICE_RULES]),
        )


def _resctrl_calls(rdt: Mapping[str, Any], name: str) -> list[str]:
    group, monitor = resctrl.groups(rdt, name, resctrl.mount_point() or resctrl.USUAL_PLACE)
    lines = [f"mkdir({calls.quoted(group)}, 0777) when missing"]
    lines += [
        f"write({calls.quoted(f'{group}/schemata')}, {calls.quoted(line)}), where closID names a group that exists "
        "compared instead"
        for line in resctrl.schemata(rdt)
    ]
    return [*lines, f"mkdir({calls.quoted(monitor)}, 0777)"] if monitor else lines


class _UnmadeGroup:
    """What `resources.plan` may ask about a group that does not exist: the files are taken to be there."""

    def version(self, controller: str) -> int:
        return hierarchy().version_of(controller)

    def read(self, controller: str, file: str) -> str:
        return ""
