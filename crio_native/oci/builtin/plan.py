"""spec -> Plan: an ordered list of steps, computed before anything runs.

`container_plan` and `exec_plan` are pure functions: they read no kernel state beyond the `Host` they are handed, so
they are tested without root and can be printed.  A step is plain data: the name of a function in `steps`, its
arguments, and the part of config.json (or the rule of ours) that asked for it.
"""

from __future__ import annotations

import resource
from types import MappingProxyType

from crio_native.errors import InvalidArgument
from crio_native.linux import capabilities, mounts, syscalls
from crio_native.oci import spec as specs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from crio_native.oci.runtime import ContainerSpec, ExecSpec, UserRequest

UNSHARE_FLAG = {
    "mount": syscalls.CLONE_NEWNS,
    "network": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}
DEFAULT_DEVICES = (
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
)
# After the spec's own device rules: the init makes nodes inside its cgroup, and every container uses the default
# devices and its terminals (pts 136, ptmx 5:2) whatever the spec denies.
DEFAULT_DEVICE_RULES = (
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
    *(
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
        for _, major, minor in (*DEFAULT_DEVICES, ("/dev/ptmx", 5, 2))
    ),
    {"allow": True, "type": "c", "major": 136, "access": "rwm"},
)
DEVICE_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)
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
    parent enters first instead; both concern the parent because a process never changes its own PID namespace."""

    __slots__ = ("join_pid", "new_pid_namespace", "steps")

    def __init__(self, new_pid_namespace: bool, join_pid: str, steps: tuple[Step, ...]) -> None:
        self.new_pid_namespace, self.join_pid, self.steps = new_pid_namespace, join_pid, steps


class _Steps:
    """Collects steps; `add` reads like the step that it adds."""

    def __init__(self) -> None:
        self.all: list[Step] = []

    def add(self, step: str, source: str, /, **args: Any) -> None:
        self.all.append(Step(step, args, source))


def container_plan(
    container: ContainerSpec,
    host: Host,
    *,
    cgroup_files: list[str],
    cgroup_directories: Mapping[str, str] = MappingProxyType({}),
    seccomp: tuple[bytes, int] | None = None,
    pause_program: str = "",
) -> Plan:
    """The plan of a container's init.  container.spec must be valid (`oci.spec.validate`).

    cgroup_files: files that the init writes "0" to, to join its v1 cgroups.  cgroup_directories: what a cgroup mount
    shows on a v1 host: name -> the container's own group in that hierarchy; {} on a v2 host.
    seccomp: compiled filter and its load flags.  pause_program: executable for `ContainerSpec.pause`.
    """
    spec = container.spec
    namespaces = specs.namespace_paths(spec)
    linux, process = spec.get("linux", {}), spec["process"]
    if "mount" not in namespaces:
        raise InvalidArgument("linux.namespaces", sorted(namespaces), "a container needs a mount namespace of its own")
    out = _Steps()
    out.add("new_session", RULE + "a container is a session of its own")
    if cgroup_files:
        out.add("join_cgroup", "linux.cgroupsPath", files=cgroup_files)
    _namespace_steps(out, namespaces, spec)
    _before_root(out, container, host)
    if container.pause:
        out.add("open_pause_program", RULE + "the pause process is a program of the host", path=pause_program)
    _root_steps(out, container, linux)
    for index, mount in enumerate(spec.get("mounts", ())):
        _mount_step(out, mount, index, cgroup_directories)
    _device_steps(out, spec, namespaces)
    if process.get("terminal"):
        size = process.get("consoleSize") or {}
        out.add("console", "process.terminal", height=size.get("height", 0), width=size.get("width", 0))
    if not container.pause:
        out.add("make_working_directory", "process.cwd", path=process["cwd"])
    # Before the masks: a masked /etc/passwd is hidden from the command, not from us.
    _user_step(out, process, container.user)
    _protect_steps(out, spec)
    out.add("pivot_root", RULE + "the root file system becomes /")
    out.add("reopen_null", RULE + "no descriptor of the host's files stays open")
    _process_steps(out, process, host, seccomp=seccomp, wait=True)
    if container.pause:
        out.add("execute_pause", RULE + "a shared PID namespace needs a process")
    else:
        out.add("execute", "process.args", args=list(process["args"]))
    return Plan(namespaces.get("pid") == "", namespaces.get("pid", ""), tuple(out.all))


def exec_plan(
    request: ExecSpec, host: Host, *, cgroup_files: list[str], seccomp: tuple[bytes, int] | None = None
) -> Plan:
    """The plan of one more process in a running container; its namespaces are entered by the launcher's request."""
    process = request.process
    specs.check_process(process)
    out = _Steps()
    out.add("new_session", RULE + "kill reaches the whole group")
    if cgroup_files:
        out.add("join_cgroup", "linux.cgroupsPath", files=cgroup_files)
    if process.get("oomScoreAdj") is not None:
        out.add("oom_score", "process.oomScoreAdj", value=max(process["oomScoreAdj"], host.oom_score_adj))
    if _labels(process):
        out.add("open_labels", RULE + "labels are written through the host's procfs")
    out.add("enter_container", RULE + "exec enters all namespaces of the init")
    out.add("reopen_null", RULE + "no descriptor of the host's files stays open")
    _user_step(out, process, None)
    _process_steps(out, process, host, seccomp=seccomp, wait=False)
    out.add("execute", "process.args", args=list(process["args"]))
    return Plan(False, "", tuple(out.all))


def _namespace_steps(out: _Steps, namespaces: Mapping[str, str], spec: Mapping[str, Any]) -> None:
    joined = [[kind, path] for kind, path in namespaces.items() if path and kind != "pid"]
    if joined:
        out.add("join_namespaces", "linux.namespaces", namespaces=joined)
    # After join_cgroup: the root of a cgroup namespace is the caller's cgroup at that moment.
    flags = sum(flag for kind, flag in UNSHARE_FLAG.items() if namespaces.get(kind) == "")
    out.add("new_namespaces", "linux.namespaces", flags=flags)
    for name in ("hostname", "domainname"):
        if spec.get(name):
            out.add(f"set_{name}", name, name=spec[name])


def _before_root(out: _Steps, container: ContainerSpec, host: Host) -> None:
    """What must happen while the host's own /proc is in view: a container's procfs is not to be trusted."""
    process, linux = container.spec["process"], container.spec.get("linux", {})
    if linux.get("sysctl"):
        out.add("set_sysctls", "linux.sysctl", values=dict(linux["sysctl"]))
    if process.get("oomScoreAdj") is not None:
        out.add("oom_score", "process.oomScoreAdj", value=max(process["oomScoreAdj"], host.oom_score_adj))
    if _labels(process):
        out.add("open_labels", RULE + "labels are written through the host's procfs")
    out.add("session_keyring", RULE + "no container sees another's keys", name=f"_ses.{container.id}")


def _labels(process: Mapping[str, Any]) -> dict[str, str]:
    found = {"selinux": process.get("selinuxLabel", ""), "apparmor": process.get("apparmorProfile", "")}
    return {module: label for module, label in found.items() if label}


def _root_steps(out: _Steps, container: ContainerSpec, linux: Mapping[str, Any]) -> None:
    propagation = linux.get("rootfsPropagation") or "rslave"
    out.add("root_propagation", "linux.rootfsPropagation", flags=mounts.PROPAGATION[propagation] | mounts.MS_REC)
    path, overlay = container.spec["root"]["path"], container.overlay
    if not path.startswith("/"):
        path = f"{container.bundle}/{path}"
    if overlay is None:
        out.add("bind_root", "root.path", path=path)
        return
    for name in (overlay.base, overlay.upper, overlay.work):
        if set(name) & set(":,\\"):
            raise InvalidArgument("root.path", name, "an overlay directory's path may not contain ':', ',' or '\\'")
    data = "lowerdir=" + ":".join(overlay.lowers)
    if overlay.upper:
        data += f",upperdir={overlay.upper},workdir={overlay.work}"
    label = linux.get("mountLabel", "")
    if label:
        data += f',context="{label}"'
    out.add("overlay_root", "root.path", path=path, base=overlay.base, data=data)


def _mount_step(out: _Steps, mount: Mapping[str, Any], index: int, cgroup_directories: Mapping[str, str]) -> None:
    source = f"mounts[{index}]"
    options = mounts.parse(mount.get("options") or ())
    kind = mount.get("type", "")
    flags = options.flags | (mounts.MS_BIND if kind == "bind" else 0)
    flags |= mounts.MS_BIND | mounts.MS_REC if kind == "rbind" else 0
    common = {
        "destination": specs.normalise(mount["destination"]),
        "propagation": list(options.propagation),
        "tree_set": options.tree_set,
        "tree_clear": options.tree_clear,
    }
    if flags & mounts.MS_BIND:
        to_set, to_clear = mounts.attributes(flags, options.cleared)
        recursive = bool(flags & mounts.MS_REC)
        out.add("bind", source, origin=mount["source"], recursive=recursive, set=to_set, clear=to_clear, **common)
    elif kind in ("cgroup", "cgroup2") and cgroup_directories:
        to_set, _ = mounts.attributes(flags, 0)
        out.add(
            "cgroup_v1",
            source,
            destination=common["destination"],
            directories=dict(cgroup_directories),
            set=to_set,
        )
    else:
        fstype = "cgroup2" if kind == "cgroup" else kind
        copy_up = "tmpcopyup" in options.extensions
        out.add(
            "mount",
            source,
            origin=mount.get("source") or fstype,
            fstype=fstype,
            flags=flags,
            data=options.data,
            copy_up=copy_up,
            **common,
        )


def _device_steps(out: _Steps, spec: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    """The default devices and the asked ones, unless the host's own /dev is mounted: that is complete."""
    if any(
        specs.normalise(mount["destination"]) == "/dev" and "bind" in "".join(mount.get("options") or ())
        for mount in spec.get("mounts", ())
    ):
        return
    asked = spec.get("linux", {}).get("devices") or ()
    taken = {specs.normalise(device["path"]) for device in asked}
    nodes = [
        {"path": path, "type": "c", "major": major, "minor": minor, "mode": 0o666, "uid": 0, "gid": 0}
        for path, major, minor in DEFAULT_DEVICES
        if path not in taken
    ]
    out.add("make_devices", RULE + "default devices", nodes=nodes)
    nodes = [
        {
            "path": specs.normalise(device["path"]),
            "type": device["type"],
            "major": device.get("major", 0),
            "minor": device.get("minor", 0),
            "mode": (device.get("fileMode") if device.get("fileMode") is not None else 0o666) & 0o7777,
            "uid": device.get("uid") or 0,
            "gid": device.get("gid") or 0,
        }
        for device in asked
    ]
    if nodes:
        out.add("make_devices", "linux.devices", nodes=nodes)
    links = [list(link) for link in (*DEVICE_LINKS, ("/dev/ptmx", "pts/ptmx"))]
    out.add("link_devices", RULE + "default links in /dev", links=links)


def _protect_steps(out: _Steps, spec: Mapping[str, Any]) -> None:
    linux = spec.get("linux", {})
    if linux.get("readonlyPaths"):
        out.add("read_only_paths", "linux.readonlyPaths", paths=list(linux["readonlyPaths"]))
    if linux.get("maskedPaths"):
        out.add("mask_paths", "linux.maskedPaths", paths=list(linux["maskedPaths"]))
    if spec["root"].get("readonly"):
        out.add("read_only_root", "root.readonly")


def _process_steps(
    out: _Steps, process: Mapping[str, Any], host: Host, *, seccomp: tuple[bytes, int] | None, wait: bool
) -> None:
    for limit in process.get("rlimits", ()):
        number = getattr(resource, limit["type"], None)
        if number is None:
            number = {"RLIMIT_LOCKS": 10, "RLIMIT_SIGPENDING": 11, "RLIMIT_MSGQUEUE": 12}[limit["type"]]
        out.add(
            "limit_resource",
            "process.rlimits",
            resource=number,
            name=limit["type"],
            soft=_signed(limit["soft"]),
            hard=_signed(limit["hard"]),
        )
    sets = process.get("capabilities") or {}
    masks = {
        kind: capabilities.mask(sets.get(kind) or ())
        for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
    }
    missing = (masks["bounding"] | masks["permitted"]) & ~host.permitted
    if missing:
        raise InvalidArgument(
            "process.capabilities",
            capabilities.names(missing),
            "this process does not have them itself, so it cannot give them",
        )
    no_new_privileges = bool(process.get("noNewPrivileges"))
    if no_new_privileges:
        out.add("no_new_privileges", "process.noNewPrivileges")
    if seccomp and not no_new_privileges:
        # Without no_new_privs loading a filter takes CAP_SYS_ADMIN, so it comes before the capabilities go.
        out.add("seccomp", "linux.seccomp", program=seccomp[0], flags=seccomp[1])
    out.add("limit_bounding_set", "process.capabilities.bounding", keep=masks["bounding"], last=host.last_capability)
    out.add("change_user", "process.user", umask=process.get("user", {}).get("umask", 0o022))
    out.add(
        "set_capabilities",
        "process.capabilities",
        effective=masks["effective"],
        permitted=masks["permitted"],
        inheritable=masks["inheritable"],
        ambient=masks["ambient"],
    )
    out.add("change_directory", "process.cwd", path=process.get("cwd", "/"))
    labels = _labels(process)
    if labels:
        out.add("write_labels", "process.selinuxLabel, process.apparmorProfile", labels=labels)
    if wait:
        out.add("wait_for_start", RULE + "create and start are two acts")
    if seccomp and no_new_privileges:
        out.add("seccomp", "linux.seccomp", program=seccomp[0], flags=seccomp[1])


def _user_step(out: _Steps, process: Mapping[str, Any], user: UserRequest | None) -> None:
    out.add("environment", "process.env", entries=list(process.get("env", ())))
    if user is not None:
        out.add(
            "find_user",
            RULE + "names are those of the image",
            user=user.user,
            group=user.group,
            supplementary=list(user.supplementary),
            merge=user.merge,
        )
        return
    asked = process.get("user", {})
    out.add(
        "take_user",
        "process.user",
        uid=asked.get("uid", 0),
        gid=asked.get("gid", 0),
        groups=list(asked.get("additionalGids", ())),
    )


def _signed(limit: int) -> int:
    """RLIM_INFINITY and its neighbours as Python's resource module wants them."""
    return limit if limit < 2**63 else limit - 2**64
