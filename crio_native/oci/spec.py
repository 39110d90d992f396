"""Checking a config.json at the door (runtime-spec 1.3, Linux): refused with the JSON path before anything is made.

The spec stays a plain dict, as parsed; `validate` says whether a plan can be made of it.  What the kernel alone can
know (does the source exist, is the limit too small) is not checked here, nor `linux.resources`, which the control
groups check as they read it.  The `linux` section's own fields are in `spec_linux`.
"""

from __future__ import annotations

from crio_native.errors import InvalidArgument
from crio_native.linux import capabilities, scheduling
from crio_native.oci import spec_linux
from crio_native.oci.checks import (
    MAX_ANNOTATION,
    absolute,
    boolean,
    items,
    mapping,
    number,
    one_of,
    optional_string,
    string,
    strings,
)
from crio_native.oci.spec_linux import MAX_ID, normalise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["HOOKS", "VERSION", "check_process", "complete", "keeps_groups", "namespace_paths", "normalise", "validate"]

VERSION = "1.3.0"  # of the runtime specification that this is an implementation of
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
RLIMITS = (
    "RLIMIT_AS RLIMIT_CORE RLIMIT_CPU RLIMIT_DATA RLIMIT_FSIZE RLIMIT_LOCKS RLIMIT_MEMLOCK RLIMIT_MSGQUEUE RLIMIT_NICE "
    "RLIMIT_NOFILE RLIMIT_NPROC RLIMIT_RSS RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_STACK"
).split()
CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
MAX_TIMEOUT = 24 * 3600  # seconds that a hook may be given
# What may be mounted below /proc: files that only inform, which runtimes replace by a container's own view.
_DEADLINE_TIMES = (1024, 2**63 - 1)  # ns, as the kernel bounds each of the three
_PROC_TARGETS = frozenset(
    "/proc/cpuinfo /proc/diskstats /proc/meminfo /proc/stat /proc/swaps /proc/uptime /proc/loadavg /proc/slabinfo "
    "/proc/sys/kernel/ns_last_pid /proc/sys/crypto/fips_enabled".split()
)


def validate(spec: Mapping[str, Any]) -> None:
    """Raise InvalidArgument for the first thing in `spec` that the specification, or this runtime, cannot accept.

    Properties that the specification does not know are passed over, as it wants.
    """
    spec = mapping(spec, "config")
    version = string(spec.get("ociVersion"), "ociVersion")
    major, *others = version.partition("-")[0].partition("+")[0].split(".")
    if major != "1" or len(others) != 2 or not all(part.isdecimal() for part in others):
        raise InvalidArgument("ociVersion", version, "must be a 1.x version of the runtime specification")
    _root(mapping(spec.get("root"), "root"))
    check_process(mapping(spec.get("process"), "process"))
    linux = mapping(spec.get("linux"), "linux")
    namespaces = spec_linux.check_namespaces(linux)
    for index, mount in enumerate(items(spec.get("mounts"), "mounts")):
        _mount(mapping(mount, f"mounts[{index}]"), f"mounts[{index}]", namespaces)
    spec_linux.check(linux, namespaces)
    if "user" in namespaces:
        _mapped_user(mapping(spec["process"].get("user"), "process.user"), linux)
    _names(spec, namespaces)
    _hooks(mapping(spec.get("hooks"), "hooks"))
    for name, value in mapping(spec.get("annotations"), "annotations").items():
        string(value, f"annotations[{name!r}]", MAX_ANNOTATION)


def complete(spec: Mapping[str, Any], uid: int, gid: int) -> Mapping[str, Any]:
    """The spec, not yet validated, with what it leaves to a command-line runtime: a new user namespace without any
    mapping has uid and gid, the caller's own, as its root, as `unshare --map-root-user` makes it.  Raises
    InvalidArgument."""
    linux = mapping(mapping(spec, "config").get("linux"), "linux")
    maps = ("uidMappings", "gidMappings")
    if spec_linux.check_namespaces(linux).get("user") != "" or any(linux.get(field) for field in maps):
        return spec
    own = {field: [{"containerID": 0, "hostID": id, "size": 1}] for field, id in zip(maps, (uid, gid), strict=True)}
    return {**spec, "linux": {**linux, **own}}


def keeps_groups(spec: Mapping[str, Any]) -> bool:
    """Whether the container's process keeps the caller's supplementary groups, as `podman run --group-add keep-groups`
    asks it of crun.  For a command-line runtime only: a pod must not get the daemon's."""
    return (spec.get("annotations") or {}).get("run.oci.keep_original_groups") == "1"


def namespace_paths(spec: Mapping[str, Any]) -> dict[str, str]:
    """The namespaces of a valid spec: type -> path to join, "" for a new one."""
    return {entry["type"]: entry.get("path") or "" for entry in (spec.get("linux") or {}).get("namespaces") or ()}


def _root(root: Mapping[str, Any]) -> None:
    if not string(root.get("path"), "root.path"):
        raise InvalidArgument("root.path", "", "must name a directory")
    boolean(root.get("readonly"), "root.readonly")


def _names(spec: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    for field in ("hostname", "domainname"):
        name = optional_string(spec.get(field), field)
        if name and "uts" not in namespaces:
            raise InvalidArgument(field, name, "needs a uts namespace in linux.namespaces")
        if len(name.encode(errors="surrogateescape")) > 64:
            raise InvalidArgument(field, name, "must have at most 64 bytes")
    sysctls = {key.replace("/", "."): value for key, value in ((spec.get("linux") or {}).get("sysctl") or {}).items()}
    # Who asks for a host name by sysctl has not asked for what goes with it: peers refuse it always.
    for field, same in (("hostname", None), ("domainname", spec.get("domainname") or sysctls.get("kernel.domainname"))):
        key = f"kernel.{field}"
        if key in sysctls and sysctls[key] != same:
            reason = f"the sysctl `{key}` conflicts with OCI field `{field}`"
            raise InvalidArgument(f"linux.sysctl[{key!r}]", sysctls[key], reason)


def check_process(process: Mapping[str, Any]) -> None:
    """Check an OCI process object, of a container or of an exec.  Raises InvalidArgument."""
    args = strings(process.get("args"), "process.args")
    if not args or not args[0]:
        raise InvalidArgument("process.args", args, "must name a command")
    _environment(process.get("env"), "process.env")
    absolute(process.get("cwd"), "process.cwd")
    _user(mapping(process.get("user"), "process.user"), "process.user")
    _capabilities(mapping(process.get("capabilities"), "process.capabilities"), "process.capabilities")
    _rlimits(items(process.get("rlimits"), "process.rlimits"), "process.rlimits")
    for name in ("terminal", "noNewPrivileges"):
        boolean(process.get(name), f"process.{name}")
    for name in ("apparmorProfile", "selinuxLabel"):
        if "\n" in optional_string(process.get(name), f"process.{name}"):
            raise InvalidArgument(f"process.{name}", process[name], "may not contain a line end")
    if process.get("oomScoreAdj") is not None:
        number(process["oomScoreAdj"], "process.oomScoreAdj", -1000, 1000)
    if process.get("consoleSize") is not None:
        size = mapping(process["consoleSize"], "process.consoleSize")
        for name in ("height", "width"):
            number(size.get(name), f"process.consoleSize.{name}", 0, 65535)
    if process.get("scheduler") is not None:
        _scheduler(mapping(process["scheduler"], "process.scheduler"), "process.scheduler")
    if process.get("ioPriority") is not None:
        asked = mapping(process["ioPriority"], "process.ioPriority")
        one_of(asked.get("class"), "process.ioPriority.class", scheduling.IO_CLASSES)
        number(asked.get("priority", 0), "process.ioPriority.priority", 0, 7)
    for name, cpus in mapping(process.get("execCPUAffinity"), "process.execCPUAffinity").items():
        if name in ("initial", "final"):
            spec_linux.number_list(cpus, f"process.execCPUAffinity.{name}", scheduling.MAX_CPU)


def _environment(entries: Any, field: str) -> None:
    for index, entry in enumerate(strings(entries, field)):
        if "=" not in entry or entry.startswith("="):
            raise InvalidArgument(f"{field}[{index}]", entry, "must have the form NAME=VALUE")


def _user(user: Mapping[str, Any], field: str) -> None:
    for name in ("uid", "gid"):
        number(user.get(name, 0), f"{field}.{name}", 0, MAX_ID)
    for index, gid in enumerate(items(user.get("additionalGids"), f"{field}.additionalGids")):
        number(gid, f"{field}.additionalGids[{index}]", 0, MAX_ID)
    if user.get("umask") is not None:
        number(user["umask"], f"{field}.umask", 0, 0o777)


def _mapped_user(user: Mapping[str, Any], linux: Mapping[str, Any]) -> None:
    """Whose id the user namespace does not map cannot be taken in there."""
    wanted = [("uid", "uid", user.get("uid", 0)), ("gid", "gid", user.get("gid", 0))]
    wanted += [("gid", f"additionalGids[{index}]", gid) for index, gid in enumerate(user.get("additionalGids") or ())]
    for kind, name, value in wanted:
        mappings = linux.get(f"{kind}Mappings") or ()
        if mappings and not any(0 <= value - entry["containerID"] < entry["size"] for entry in mappings):
            raise InvalidArgument(f"process.user.{name}", value, f"is not mapped by linux.{kind}Mappings")


def _capabilities(sets: Mapping[str, Any], field: str) -> None:
    for kind in sets:
        if kind not in CAPABILITY_SETS:
            raise InvalidArgument(f"{field}.{kind}", kind, "is not a capability set")
        for index, name in enumerate(strings(sets[kind], f"{field}.{kind}")):
            if name not in capabilities.NUMBER:
                raise InvalidArgument(f"{field}.{kind}[{index}]", name, "is not a capability that Linux has")
    # What capset(2) refuses, whoever asks: the bounding set has been dropped by then.  An ambient one that cannot be
    # is no error: engines ask for it without the others, and get a warning.
    for kind, within in (("effective", "permitted"), ("inheritable", "bounding")):
        if outside := set(sets.get(kind) or ()) - set(sets.get(within) or ()):
            name = min(outside)
            index = sets[kind].index(name)
            raise InvalidArgument(f"{field}.{kind}[{index}]", name, f"the kernel wants it in {field}.{within} too")


def _rlimits(limits: list[Any], field: str) -> None:
    seen = set()
    for index, limit in enumerate(limits):
        here = f"{field}[{index}]"
        kind = string(mapping(limit, here).get("type"), f"{here}.type")
        if kind not in RLIMITS:
            raise InvalidArgument(f"{here}.type", kind, "is not a resource limit that Linux has")
        if kind in seen:
            raise InvalidArgument(f"{here}.type", kind, "is named twice")
        seen.add(kind)
        soft = number(limit.get("soft"), f"{here}.soft", 0, 2**64 - 1)
        hard = number(limit.get("hard"), f"{here}.hard", 0, 2**64 - 1)
        if soft > hard:
            raise InvalidArgument(f"{here}.soft", soft, f"is above the hard limit {hard}")


def _scheduler(asked: Mapping[str, Any], field: str) -> None:
    policy = one_of(asked.get("policy"), f"{field}.policy", scheduling.POLICIES)
    for index, flag in enumerate(strings(asked.get("flags"), f"{field}.flags")):
        one_of(flag, f"{field}.flags[{index}]", scheduling.SCHED_FLAGS)
    nice = number(asked.get("nice") or 0, f"{field}.nice", -20, 19)
    if nice and policy not in ("SCHED_OTHER", "SCHED_BATCH"):
        raise InvalidArgument(f"{field}.nice", nice, f"{policy} has no nice value")
    priority = number(asked.get("priority") or 0, f"{field}.priority", 0, 99)
    if bool(priority) != (policy in scheduling.REALTIME):
        reason = "must be between 1 and 99" if policy in scheduling.REALTIME else "has no priority"
        raise InvalidArgument(
            f"{field}.priority", priority, f"{policy}'s {reason}" if priority == 0 else f"{policy} {reason}"
        )
    times = {
        name: number(asked.get(name) or 0, f"{field}.{name}", 0, 2**64 - 1)
        for name in ("runtime", "deadline", "period")
    }
    if policy != "SCHED_DEADLINE":
        for name, value in times.items():
            if value:
                raise InvalidArgument(f"{field}.{name}", value, "is for SCHED_DEADLINE only")
    else:
        _deadline(asked, times, field)


def _deadline(asked: Mapping[str, Any], times: Mapping[str, int], field: str) -> None:
    """What the kernel wants of the three, which it refuses with the same EINVAL for all; ns."""
    what = "sched_setattr: `SCHED_DEADLINE`"
    for name in ("runtime", "deadline"):
        if asked.get(name) is None:
            raise InvalidArgument(f"{field}.{name}", None, f"{what} requires `{name}`")
    if not times["runtime"]:
        raise InvalidArgument(f"{field}.runtime", 0, f"{what} runtime must be greater than 0")
    for name, value in times.items():
        if value and not _DEADLINE_TIMES[0] <= value <= _DEADLINE_TIMES[1]:
            reason = f"{what} {name} {value} must be between {_DEADLINE_TIMES[0]} and {_DEADLINE_TIMES[1]} ns"
            raise InvalidArgument(f"{field}.{name}", value, reason)
    for name, limit in (("runtime", "deadline"), ("deadline", "period")):
        if times[limit] and times[name] > times[limit]:
            reason = f"{what} {name} {times[name]} must be <= {limit} {times[limit]}"
            raise InvalidArgument(f"{field}.{name}", times[name], reason)


def _mount(mount: Mapping[str, Any], field: str, namespaces: Mapping[str, str]) -> None:
    destination = string(mount.get("destination"), f"{field}.destination")
    normal = normalise(destination)  # a relative one is relative to the root
    if normal.startswith("/proc/") and normal not in _PROC_TARGETS:
        raise InvalidArgument(
            f"{field}.destination", destination, "inside /proc only the informing files may be covered"
        )
    options = strings(mount.get("options"), f"{field}.options")
    kind = optional_string(mount.get("type"), f"{field}.type")
    bind = "bind" in options or "rbind" in options or kind in ("bind", "rbind")
    if normal == "/" and not bind:
        raise InvalidArgument(f"{field}.destination", destination, "may be the root itself only of a bind mount")
    source = optional_string(mount.get("source"), f"{field}.source")
    if "remount" not in options:
        if bind and not source:
            raise InvalidArgument(f"{field}.source", "", "a bind mount needs a source")
        if normal == "/proc" and (normalise(source) != "/proc" if bind else kind != "proc"):
            # Masks and read-only paths would be put on files that are no procfs's, and the runtime's own writes too.
            raise InvalidArgument(f"{field}.destination", destination, "may be covered by a procfs only")
        if not bind and kind in ("", "none"):
            raise InvalidArgument(
                f"{field}.type", kind, "must name a file system, unless options have bind, rbind or remount"
            )
    if "tmpcopyup" in options and kind != "tmpfs":
        raise InvalidArgument(f"{field}.options", "tmpcopyup", "is for mounts of type tmpfs only")
    _id_mapping(mount, field, options, bind, "user" in namespaces)


def _id_mapping(mount: Mapping[str, Any], field: str, options: list[str], bind: bool, own_user: bool) -> None:
    asked = [name for name in ("idmap", "ridmap") if name in options]
    if not (asked or mount.get("uidMappings") is not None or mount.get("gidMappings") is not None):
        return
    uids, gids = (items(mount.get(name), f"{field}.{name}") for name in ("uidMappings", "gidMappings"))
    if not (asked or uids or gids):
        return
    for name, mappings in (("uidMappings", uids), ("gidMappings", gids)):
        spec_linux.check_mappings(mappings, f"{field}.{name}")
        if not mappings and (uids or gids):
            raise InvalidArgument(f"{field}.{name}", mappings, "uidMappings and gidMappings come together")
    if not uids and not own_user:
        reason = "needs uidMappings and gidMappings on the mount, or a user namespace of the container"
        raise InvalidArgument(f"{field}.options", asked[0], reason)
    if not bind:
        raise InvalidArgument(f"{field}.options", asked, "only bind mounts can be id-mapped")


def _hooks(hooks: Mapping[str, Any]) -> None:
    for kind in HOOKS:
        for index, hook in enumerate(items(hooks.get(kind), f"hooks.{kind}")):
            field = f"hooks.{kind}[{index}]"
            absolute(mapping(hook, field).get("path"), f"{field}.path")
            strings(hook.get("args"), f"{field}.args")
            _environment(hook.get("env"), f"{field}.env")
            if hook.get("timeout") is not None:
                number(hook["timeout"], f"{field}.timeout", 1, MAX_TIMEOUT)
