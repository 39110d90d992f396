"""spec -> Plan: an ordered list of steps, computed before anything runs.

`container_plan` and `exec_plan` are pure functions: they read no kernel state beyond the `Host` they are handed, so
they are tested without root and can be printed.  A step is plain data: the name of a function in `steps`, its
arguments, and the part of config.json (or the rule of ours) that asked for it.  The file tree's steps are made in
`plan_mounts`, the process's in `plan_process`; their order is decided here.
"""

from __future__ import annotations

from types import MappingProxyType

from crio_native.errors import InvalidArgument
from crio_native.linux import capabilities, syscalls
from crio_native.oci import spec as specs
from crio_native.oci.builtin import plan_process as processes
from crio_native.oci.builtin.plan_mounts import (
    DEFAULT_DEVICE_RULES,
    DEFAULT_DEVICES,
    NOTIFY_SOCKET,
    FileTree,
    id_map,
    outside,
)
from crio_native.oci.builtin.plan_types import RULE, Host, Plan, Step, Steps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from crio_native.oci.runtime import ContainerSpec, ExecSpec

__all__ = [
    "DEFAULT_DEVICES",
    "DEFAULT_DEVICE_RULES",
    "RULE",
    "UNSHARE_FLAG",
    "Host",
    "Plan",
    "Step",
    "container_plan",
    "exec_plan",
    "state_of",
]

UNSHARE_FLAG = {
    "mount": syscalls.CLONE_NEWNS,
    "network": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}
_JOINED_ELSEWHERE = ("pid", "user", "mount")
PARENT_HOOKS = ("prestart", "createRuntime")


def container_plan(
    container: ContainerSpec,
    host: Host,
    *,
    cgroup_files: list[str],
    cgroup_directories: Mapping[str, str] = MappingProxyType({}),
    seccomp: tuple[bytes, int] | None = None,
    cgroup_comes: bool = False,
    pause_program: str = "",
    keyring: bool = True,
    pivot: bool = True,
    notify_socket: str = "",
    look_up: bool = False,
    keep_groups: bool = False,
) -> Plan:
    """The plan of a container's init.  container.spec must be valid (`oci.spec.validate`).

    cgroup_files: files that the init writes "0" to, to join its v1 cgroups and its resctrl group.
    cgroup_directories: what a cgroup mount shows: on a v1 host name -> the container's own group in that hierarchy, on
    a v2 host "" -> its own group, which is shown when it has no cgroup namespace.
    cgroup_comes: the groups are being made while the init is at work.
    seccomp: compiled filter and its load flags (SECCOMP_FILTER_FLAG_NEW_LISTENER: for linux.seccomp.listenerPath).
    pause_program: executable for `ContainerSpec.pause`.  keyring: make a session keyring.  pivot: False on a host
    whose root is a ramfs.  notify_socket: the host's path of systemd's socket, to be shown to the container.
    look_up: refuse a command that does not exist before the start, as engines expect of a command-line runtime.
    keep_groups: see `oci.spec.keeps_groups`.
    """
    spec = container.spec
    namespaces = specs.namespace_paths(spec)
    linux, process = spec.get("linux") or {}, spec["process"]
    if "mount" not in namespaces and "user" in namespaces:
        why = "a user namespace may change no mounts but those of a mount namespace of its own"
        raise InvalidArgument("linux.namespaces", sorted(namespaces), why)
    rootless = not host.permitted >> capabilities.NUMBER["CAP_SYS_ADMIN"] & 1
    tree = FileTree(container, namespaces, cgroup_directories, notify_socket, rootless)
    hooks, state = spec.get("hooks") or {}, state_of(container)
    notice = processes.notice_of(linux.get("seccomp") or {}, seccomp, state)
    command = processes.Command(process, host, seccomp, notice, tree.own_user, keep_groups)
    duties = _duties(tree, linux, hooks, state)
    out = Steps()

    if not tree.own_user:
        out.add("new_session", RULE + "a container is a session of its own")
    if tree.own_user:  # it takes the host's privileges
        _cgroup_steps(out, cgroup_files, cgroup_comes)
    processes.oom_step(out, process, host)
    if notice:
        out.add("connect_listener", "linux.seccomp.listenerPath", path=linux["seccomp"]["listenerPath"])
    if container.pause:
        out.add("open_pause_program", RULE + "the pause process is a program of the host", path=pause_program)
    if tree.own_user:
        _user_namespace_steps(out, linux, process, namespaces, rootless)
    _join_step(out, namespaces)
    if not rootless:
        _time_step(out, namespaces, linux)
    if tree.outside:
        _outside_steps(out, tree, namespaces)
    if tree.own_user:
        _enter_steps(out, namespaces, keep_groups)
    if rootless:
        _time_step(out, namespaces, linux)
    _namespace_steps(out, namespaces, spec)
    if duties and linux.get("netDevices"):
        out.add("ask_parent", "linux.netDevices", duty="N")
    if linux.get("sysctl"):
        out.add("set_sysctls", "linux.sysctl", values=dict(linux["sysctl"]))
    processes.label_step(out, process)
    if notice:
        out.add("find_own_pid", RULE + "the listener is told the pid that the host knows")
    if keyring:
        out.add("session_keyring", RULE + "no container sees another's keys", name=f"_ses.{container.id}")

    if not tree.own_user:  # late, for the groups may still be in the making, but while the host's mounts are in view
        _cgroup_steps(out, cgroup_files, cgroup_comes)
        if namespaces.get("cgroup") == "":
            out.add("new_namespaces", "linux.namespaces", flags=syscalls.CLONE_NEWCGROUP)
    _root_steps(out, tree, namespaces)
    tree.mount_steps(out)
    tree.device_steps(out)
    if not container.pause:
        out.add("make_working_directory", "process.cwd", path=process["cwd"])
    # Before the masks: a masked /etc/passwd is hidden from the command, not from us.
    processes.user_step(out, process, container.user)
    if notify_socket:
        out.add("environment", RULE + "$NOTIFY_SOCKET", entries=[f"NOTIFY_SOCKET={NOTIFY_SOCKET}"])
    tree.protect_steps(out)
    if any(hooks.get(kind) for kind in PARENT_HOOKS):
        out.add("ask_parent", "hooks.prestart, hooks.createRuntime", duty="H")
    _hook_step(out, hooks, "createContainer", state)
    if duties:
        out.add("release_parent", RULE + "the init's parent becomes the monitor")
    if process.get("terminal"):
        size = process.get("consoleSize") or {}
        out.add("console", "process.terminal", height=size.get("height", 0), width=size.get("width", 0))
    tree.enter_steps(out, pivot)

    out.add("reopen_null", RULE + "no descriptor of the host's files stays open")
    processes.machine_steps(out, linux)
    command.steps(out)
    if look_up:
        command.find_step(out)
    out.add("wait_for_start", RULE + "create and start are two acts")
    _hook_step(out, hooks, "startContainer", {**state, "status": "created"})
    if not look_up and not container.pause:
        command.find_step(out)
    command.last_steps(out)
    if container.pause:
        out.add("execute_pause", RULE + "a shared PID namespace needs a process")
    else:
        out.add("execute", "process.args", args=list(process["args"]))
    own_pid = not tree.own_user  # else `enter_user_namespace` sees to it
    return Plan(
        own_pid and namespaces.get("pid") == "", namespaces.get("pid", "") if own_pid else "", tuple(out.all), duties
    )


def exec_plan(
    request: ExecSpec,
    host: Host,
    *,
    cgroup_files: list[str],
    seccomp: tuple[bytes, int] | None = None,
    namespaces: int = sum(UNSHARE_FLAG.values()),
    state: Mapping[str, Any] = MappingProxyType({"ociVersion": "1.3.0", "id": "", "status": "running", "bundle": ""}),
    linux: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """The plan of one more process in a running container, whose PID namespace it is born in.  Two have a child there
    that goes on: who has not the privileges to enter it from outside (step `enter_pid_namespace`), and who may be
    traced by the processes in there, see `_watched` (step `appear`).

    namespaces: CLONE_NEW* bits of those that are not ours (`linux.namespaces.differing`).  state: the container's, for
    the listener of a seccomp filter.  linux: of the container's spec; its personality and memory policy hold for every
    process.
    """
    process = request.process
    specs.check_process(process)
    own_user = bool(namespaces & syscalls.CLONE_NEWUSER)
    notice = processes.notice_of(request.seccomp or {}, seccomp, state)
    command = processes.Command(process, host, seccomp, notice, own_user)
    rootless = own_user and not host.permitted >> capabilities.NUMBER["CAP_SYS_ADMIN"] & 1
    from_inside = rootless and bool(namespaces & syscalls.CLONE_NEWPID)
    apart = _watched(request, namespaces)
    out = Steps()
    if not from_inside and not apart:
        _session_step(out)
    if cgroup_files:
        processes.affinity_step(out, process, "initial")
        out.add("join_cgroup", "linux.cgroupsPath", files=cgroup_files)
    processes.affinity_step(out, process, "final")
    processes.oom_step(out, process, host)
    if notice:
        assert request.seccomp is not None
        out.add("connect_listener", "linux.seccomp.listenerPath", path=request.seccomp["listenerPath"])
    if own_user:
        processes.raise_limits_step(out, process)
    if from_inside:
        out.add("enter_pid_namespace", RULE + "who is not root may, from its user namespace")
        _session_step(out)
        namespaces &= ~syscalls.CLONE_NEWUSER
    if not apart:
        namespaces &= ~syscalls.CLONE_NEWPID
    processes.label_step(out, process)
    if notice and not apart:
        out.add("find_own_pid", RULE + "the listener is told the pid that the host knows")
    out.add("enter_container", RULE + "exec enters all namespaces of the init", flags=namespaces)
    if process.get("terminal"):
        size = process.get("consoleSize") or {}
        late = {"leader": False} if apart else {}
        out.add("exec_console", "process.terminal", height=size.get("height", 0), width=size.get("width", 0), **late)
    out.add("reopen_null", RULE + "no descriptor of the host's files stays open")
    processes.user_step(out, process, None)
    processes.machine_steps(out, linux)
    command.steps(out)
    command.find_step(out)
    if apart and notice:
        _appear_steps(out, process)  # its listener is to hear of the one that the filter is for
    command.last_steps(out)
    if apart and not notice:
        _appear_steps(out, process)
    out.add("execute", "process.args", args=list(process["args"]))
    return Plan(False, "", tuple(out.all), {})


def _watched(request: ExecSpec, namespaces: int) -> bool:
    """Whether a process of the container may trace any other in the PID namespace that is entered, whatever that is:
    by CAP_SYS_PTRACE in our user namespace.  What of it comes from another container that is in there, nobody knows."""
    if not namespaces & syscalls.CLONE_NEWPID or namespaces & syscalls.CLONE_NEWUSER:
        return False
    bounding = (request.process.get("capabilities") or {}).get("bounding") or ()
    return request.shared_pids or "CAP_SYS_PTRACE" in bounding


def _session_step(out: Steps) -> None:
    out.add("new_session", RULE + "kill reaches the whole group")


def _appear_steps(out: Steps, process: Mapping[str, Any]) -> None:
    out.add("appear", RULE + "who may trace it sees it only when it is no more than the command")
    _session_step(out)
    if process.get("terminal"):
        out.add("control_terminal", "process.terminal")


def state_of(container: ContainerSpec) -> dict[str, Any]:
    """The container's state (runtime-spec) as hooks and listeners get it, but for the pid, which each sees its own."""
    return {
        "ociVersion": container.spec["ociVersion"],
        "id": container.id,
        "status": "creating",
        "bundle": str(container.bundle),
        "annotations": dict(container.spec.get("annotations") or {}),
    }


def _cgroup_steps(out: Steps, files: list[str], come: bool) -> None:
    if come:
        out.add("await_cgroup", RULE + "the daemon makes the groups meanwhile")
    if files:
        out.add("join_cgroup", "linux.cgroupsPath", files=files)


def _duties(
    tree: FileTree, linux: Mapping[str, Any], hooks: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    """See `Plan`; a user namespace alone is a duty too, for the init is another process then."""
    found = {kind: _plain(hooks[kind]) for kind in PARENT_HOOKS if hooks.get(kind)}
    links = {name: (device or {}).get("name") or name for name, device in (linux.get("netDevices") or {}).items()}
    if not (found or links or tree.own_user):
        return {}
    return {"hooks": found, "net_devices": links, "state": dict(state)}


def _plain(entries: Any) -> list[dict[str, Any]]:
    return [dict(entry) for entry in entries]


def _hook_step(out: Steps, hooks: Mapping[str, Any], kind: str, state: Mapping[str, Any]) -> None:
    if hooks.get(kind):
        out.add("run_hooks", f"hooks.{kind}", kind=kind, entries=_plain(hooks[kind]), state=dict(state))


def _user_namespace_steps(
    out: Steps, linux: Mapping[str, Any], process: Mapping[str, Any], namespaces: Mapping[str, str], rootless: bool
) -> None:
    """What takes the host's privileges, and then the namespace; who is in there has them no more."""
    uid_maps = linux.get("uidMappings") or ()
    roots = [outside(linux.get(field) or (), 0) for field in ("uidMappings", "gidMappings")]
    if not rootless:
        processes.raise_limits_step(out, process)
    if None not in roots and not process.get("terminal") and not rootless:
        out.add("own_streams", RULE + "root hands its streams on to the user", uid=roots[0], gid=roots[1])
    out.add(
        "user_namespace",
        "linux.uidMappings, linux.gidMappings",
        uid_map=id_map(uid_maps),
        gid_map=id_map(linux.get("gidMappings") or ()),
        path=namespaces["user"],
    )


def _enter_steps(out: Steps, namespaces: Mapping[str, str], keep_groups: bool) -> None:
    pid = namespaces.get("pid")
    kept = {"keep_groups": True} if keep_groups else {}
    out.add("enter_user_namespace", "linux.namespaces", new_pid=pid == "", join_pid=pid or "", **kept)
    out.add("new_session", RULE + "a container is a session of its own")


def _join_step(out: Steps, namespaces: Mapping[str, str]) -> None:
    joined = [[kind, path] for kind, path in namespaces.items() if path and kind not in _JOINED_ELSEWHERE]
    if joined:
        out.add("join_namespaces", "linux.namespaces", namespaces=joined)


def _time_step(out: Steps, namespaces: Mapping[str, str], linux: Mapping[str, Any]) -> None:
    if namespaces.get("time") == "":
        offsets = "".join(
            f"{clock} {offset.get('secs') or 0} {offset.get('nanosecs') or 0}\n"
            for clock, offset in (linux.get("timeOffsets") or {}).items()
        )
        out.add("new_time_namespace", "linux.timeOffsets", offsets=offsets)


def _outside_steps(out: Steps, tree: FileTree, namespaces: Mapping[str, str]) -> None:
    """Opening what will be mounted, in a copy of the host's mounts that nobody else sees."""
    if namespaces.get("mount"):
        out.add("open_mount_namespace", "linux.namespaces", path=namespaces["mount"])
    out.add("new_namespaces", RULE + "mounts on the way to the root stay unseen", flags=syscalls.CLONE_NEWNS)
    tree.propagation_step(out)
    tree.open_steps(out)


def _namespace_steps(out: Steps, namespaces: Mapping[str, str], spec: Mapping[str, Any]) -> None:
    """All new ones, but a cgroup namespace where the groups come late: its root is the caller's group at the time."""
    late = () if "user" in namespaces else ("cgroup",)
    flags = sum(flag for kind, flag in UNSHARE_FLAG.items() if namespaces.get(kind) == "" and kind not in late)
    out.add("new_namespaces", "linux.namespaces", flags=flags)
    if namespaces.get("network") == "":
        out.add("raise_loopback", RULE + "a container can talk to itself")
    for name in ("hostname", "domainname"):
        if spec.get(name):
            out.add(f"set_{name}", name, name=spec[name])


def _root_steps(out: Steps, tree: FileTree, namespaces: Mapping[str, str]) -> None:
    if namespaces.get("mount"):
        out.add("join_mount_namespace", "linux.namespaces")
    if not tree.outside:
        tree.propagation_step(out)
        tree.open_steps(out)
    tree.root_steps(out)
