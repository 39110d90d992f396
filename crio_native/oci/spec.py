"""Checking a config.json at the door (runtime-spec 1.3, Linux): refused with the JSON path before anything is made.

The spec stays a plain dict, as parsed; `validate` says whether a plan can be made of it.  What the kernel alone can
know (does the source exist, is the limit too small) is not checked here.
"""

from __future__ import annotations

import itertools
from _collections_abc import Mapping  # without the package around it, which costs as much as all of this file

from crio_native.errors import InvalidArgument
from crio_native.linux import capabilities

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

VERSION = "1.3.0"  # of the runtime specification that this is an implementation of
NAMESPACES = ("mount", "pid", "network", "ipc", "uts", "user", "cgroup", "time")
RLIMITS = (
    "RLIMIT_AS RLIMIT_CORE RLIMIT_CPU RLIMIT_DATA RLIMIT_FSIZE RLIMIT_LOCKS RLIMIT_MEMLOCK RLIMIT_MSGQUEUE RLIMIT_NICE "
    "RLIMIT_NOFILE RLIMIT_NPROC RLIMIT_RSS RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_STACK"
).split()
MAX_STRING = 128 * 1024  # the kernel's own bound of one argument (MAX_ARG_STRLEN)
MAX_ITEMS = 10_000
MAX_ID = 2**32 - 2
_UTS_SYSCTLS = ("kernel.domainname", "kernel.hostname")
_IPC_SYSCTLS = r"kernel\.(msgmax|msgmnb|msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced)|fs\.mqueue\.[\w.-]+"
_SYSCTL_NAME = r"[A-Za-z0-9_][A-Za-z0-9_./*-]*"
# What may be mounted below /proc: files that only inform, which runtimes replace by a container's own view.
_PROC_TARGETS = frozenset(
    "/proc/cpuinfo /proc/diskstats /proc/meminfo /proc/stat /proc/swaps /proc/uptime /proc/loadavg /proc/slabinfo "
    "/proc/sys/kernel/ns_last_pid /proc/sys/crypto/fips_enabled".split()
)


def validate(spec: Mapping[str, Any]) -> None:
    """Raise InvalidArgument for the first thing in `spec` that the specification, or this runtime, cannot accept."""
    _object(spec, "config")
    version = _string(spec.get("ociVersion"), "ociVersion")
    major, *others = version.partition("-")[0].partition("+")[0].split(".")
    if major != "1" or len(others) != 2 or not all(part.isdecimal() for part in others):
        raise InvalidArgument("ociVersion", version, "must be a 1.x version of the runtime specification")
    root = _object(spec.get("root"), "root")
    _string(root.get("path"), "root.path")
    _process(spec.get("process"))
    for index, mount in enumerate(_list(spec.get("mounts", ()), "mounts")):
        _mount(mount, f"mounts[{index}]")
    namespaces = _namespaces(spec)
    _linux(_object(spec.get("linux", {}), "linux"), namespaces)
    for field in ("hostname", "domainname"):
        if spec.get(field) and namespaces.get("uts") is None:
            raise InvalidArgument(field, spec[field], "needs a uts namespace in linux.namespaces")
    if len(_string(spec.get("hostname", ""), "hostname").encode()) > 64:
        raise InvalidArgument("hostname", spec["hostname"], "must have at most 64 bytes")


def namespace_paths(spec: Mapping[str, Any]) -> dict[str, str]:
    """The namespaces of a valid spec: type -> path to join, "" for a new one."""
    return {entry["type"]: entry.get("path", "") for entry in spec.get("linux", {}).get("namespaces", ())}


def _namespaces(spec: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    entries = _list(_object(spec.get("linux", {}), "linux").get("namespaces", ()), "linux.namespaces")
    for index, entry in enumerate(entries):
        field = f"linux.namespaces[{index}]"
        kind = _string(_object(entry, field).get("type"), f"{field}.type")
        if kind not in NAMESPACES:
            raise InvalidArgument(f"{field}.type", kind, f"must be one of {', '.join(NAMESPACES)}")
        if kind in found:
            raise InvalidArgument(f"{field}.type", kind, "is named twice")
        path = _string(entry.get("path", ""), f"{field}.path")
        if path and not path.startswith("/"):
            raise InvalidArgument(f"{field}.path", path, "must be absolute")
        found[kind] = path
    return found


def _process(process: Any) -> None:
    field = "process"
    check_process(_object(process, field), field)


def check_process(process: Mapping[str, Any], field: str = "process") -> None:
    """Check an OCI process object, of a container or of an exec; `field` is its path."""
    args = _strings(process.get("args"), f"{field}.args")
    if not args or not args[0]:
        raise InvalidArgument(f"{field}.args", args, "must name a command")
    for index, entry in enumerate(_strings(process.get("env", ()), f"{field}.env")):
        if "=" not in entry or entry.startswith("="):
            raise InvalidArgument(f"{field}.env[{index}]", entry, "must have the form NAME=VALUE")
    cwd = _string(process.get("cwd"), f"{field}.cwd")
    if not cwd.startswith("/"):
        raise InvalidArgument(f"{field}.cwd", cwd, "must be absolute")
    user = _object(process.get("user", {}), f"{field}.user")
    for name in ("uid", "gid"):
        _number(user.get(name, 0), f"{field}.user.{name}", 0, MAX_ID)
    for index, gid in enumerate(_list(user.get("additionalGids", ()), f"{field}.user.additionalGids")):
        _number(gid, f"{field}.user.additionalGids[{index}]", 0, MAX_ID)
    if "umask" in user:
        _number(user["umask"], f"{field}.user.umask", 0, 0o777)
    _capabilities(_object(process.get("capabilities", {}), f"{field}.capabilities"), f"{field}.capabilities")
    _rlimits(_list(process.get("rlimits", ()), f"{field}.rlimits"), f"{field}.rlimits")
    if process.get("oomScoreAdj") is not None:
        _number(process["oomScoreAdj"], f"{field}.oomScoreAdj", -1000, 1000)


def _capabilities(sets: Mapping[str, Any], field: str) -> None:
    for kind in sets:
        if kind not in ("bounding", "effective", "inheritable", "permitted", "ambient"):
            raise InvalidArgument(f"{field}.{kind}", kind, "is not a capability set")
        for index, name in enumerate(_strings(sets[kind], f"{field}.{kind}")):
            if name not in capabilities.NUMBER:
                raise InvalidArgument(f"{field}.{kind}[{index}]", name, "is not a capability that Linux has")


def _rlimits(limits: list[Any], field: str) -> None:
    seen = set()
    for index, limit in enumerate(limits):
        here = f"{field}[{index}]"
        kind = _string(_object(limit, here).get("type"), f"{here}.type")
        if kind not in RLIMITS:
            raise InvalidArgument(f"{here}.type", kind, "is not a resource limit that Linux has")
        if kind in seen:
            raise InvalidArgument(f"{here}.type", kind, "is named twice")
        seen.add(kind)
        soft = _number(limit.get("soft"), f"{here}.soft", 0, 2**64 - 1)
        hard = _number(limit.get("hard"), f"{here}.hard", 0, 2**64 - 1)
        if soft > hard:
            raise InvalidArgument(f"{here}.soft", soft, f"is above the hard limit {hard}")


def _mount(mount: Any, field: str) -> None:
    destination = _string(_object(mount, field).get("destination"), f"{field}.destination")
    if not destination.startswith("/"):
        raise InvalidArgument(f"{field}.destination", destination, "must be absolute")
    normal = normalise(destination)
    if normal == "/":
        raise InvalidArgument(f"{field}.destination", destination, "may not be the root itself")
    if normal.startswith("/proc/") and normal not in _PROC_TARGETS:
        raise InvalidArgument(
            f"{field}.destination", destination, "inside /proc only the informing files may be covered"
        )
    options = _strings(mount.get("options", ()) or (), f"{field}.options")
    kind = _string(mount.get("type", ""), f"{field}.type")
    bind = "bind" in options or "rbind" in options or kind in ("bind", "rbind")
    if bind and not _string(mount.get("source", ""), f"{field}.source"):
        raise InvalidArgument(f"{field}.source", "", "a bind mount needs a source")
    if not bind and not kind:
        raise InvalidArgument(f"{field}.type", "", "must name a file system, unless options have bind or rbind")
    for extension in ("idmap", "ridmap"):
        if extension in options and not mount.get("uidMappings"):
            raise InvalidArgument(f"{field}.options", extension, "needs uidMappings and gidMappings on the mount")


def normalise(path: str) -> str:
    """An absolute path without `.`, `..`, doubled or trailing slashes; `..` at the root stays there."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def _linux(linux: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    for field in ("maskedPaths", "readonlyPaths"):
        for index, path in enumerate(_strings(linux.get(field, ()) or (), f"linux.{field}")):
            if not path.startswith("/"):
                raise InvalidArgument(f"linux.{field}[{index}]", path, "must be absolute")
    for index, device in enumerate(_list(linux.get("devices", ()) or (), "linux.devices")):
        _device(device, f"linux.devices[{index}]")
    _sysctls(_object(linux.get("sysctl", {}) or {}, "linux.sysctl"), namespaces)
    path = _string(linux.get("cgroupsPath", ""), "linux.cgroupsPath")
    if ".." in path.split("/"):
        raise InvalidArgument("linux.cgroupsPath", path, "may not contain '..'")
    propagation = _string(linux.get("rootfsPropagation", ""), "linux.rootfsPropagation")
    if propagation.removeprefix("r") not in ("", "shared", "slave", "private", "unbindable"):
        raise InvalidArgument("linux.rootfsPropagation", propagation, "must be shared, slave, private or unbindable")
    for field in ("uidMappings", "gidMappings"):
        _mappings(_list(linux.get(field, ()) or (), f"linux.{field}"), f"linux.{field}")
    if linux.get("uidMappings") and "user" not in namespaces:
        raise InvalidArgument("linux.uidMappings", linux["uidMappings"], "needs a user namespace in linux.namespaces")


def _device(device: Any, field: str) -> None:
    kind = _string(_object(device, field).get("type"), f"{field}.type")
    if kind not in ("c", "b", "u", "p"):
        raise InvalidArgument(f"{field}.type", kind, "must be c, b, u or p")
    path = _string(device.get("path"), f"{field}.path")
    if not path.startswith("/"):
        raise InvalidArgument(f"{field}.path", path, "must be absolute")
    if kind != "p":
        _number(device.get("major"), f"{field}.major", 0, 2**32 - 1)
        _number(device.get("minor"), f"{field}.minor", 0, 2**32 - 1)
    if device.get("fileMode") is not None:
        _number(device["fileMode"], f"{field}.fileMode", 0, 0o7777 | 0o170000)


def _sysctls(sysctls: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    """Only what belongs to a namespace of the container: anything else is the node's (CVE-2022-0532, -0811)."""
    for name, value in sysctls.items():
        field = f"linux.sysctl[{name!r}]"
        _string(value, field)
        if not _matches(_SYSCTL_NAME, name) or ".." in name:
            raise InvalidArgument(field, name, "is not a sysctl name")
        dotted = name.replace("/", ".")
        if dotted.startswith("net."):
            needed = "network"
        elif _matches(_IPC_SYSCTLS, dotted):
            needed = "ipc"
        elif dotted in _UTS_SYSCTLS:
            needed = "uts"
        else:
            raise InvalidArgument(field, value, "is not in any namespace: setting it would change the node")
        if needed not in namespaces:
            raise InvalidArgument(field, value, f"needs a {needed} namespace of the container's own")


def _mappings(mappings: list[Any], field: str) -> None:
    for index, entry in enumerate(mappings):
        here = f"{field}[{index}]"
        _object(entry, here)
        for name in ("containerID", "hostID"):
            _number(entry.get(name), f"{here}.{name}", 0, MAX_ID)
        _number(entry.get("size"), f"{here}.size", 1, 2**32 - 1)
    for name in ("containerID", "hostID"):
        spans = sorted((entry[name], entry[name] + entry["size"]) for entry in mappings)
        for before, after in itertools.pairwise(spans):
            if after[0] < before[1]:
                raise InvalidArgument(field, mappings, f"the {name} ranges overlap")


def _matches(pattern: str, text: str) -> bool:
    """Whether all of the text fits.  The import is as dear as all else here, and few containers need it."""
    import re

    return re.fullmatch(pattern, text, re.ASCII) is not None


def _typed(value: Any, field: str, kind: type | tuple[type, ...], words: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidArgument(field, value, f"must be {words}")
    return value


def _object(value: Any, field: str) -> Mapping[str, Any]:
    if type(value) is dict:  # what a parser makes; asking the abstract class costs ten times as much
        return value
    checked: Mapping[str, Any] = _typed(value, field, Mapping, "an object")
    return checked


def _list(value: Any, field: str) -> list[Any]:
    checked = list(_typed(value, field, (list, tuple), "a list"))
    if len(checked) > MAX_ITEMS:
        raise InvalidArgument(field, len(checked), f"may have at most {MAX_ITEMS} entries")
    return checked


def _string(value: Any, field: str) -> str:
    checked: str = value if type(value) is str else _typed(value, field, str, "a string")
    if "\0" in checked:
        raise InvalidArgument(field, checked, "may not contain a NUL byte")
    if len(checked) > MAX_STRING:
        raise InvalidArgument(field, checked, f"may have at most {MAX_STRING} characters")
    return checked


def _strings(value: Any, field: str) -> list[str]:
    check: Callable[[Any, str], str] = _string
    return [check(entry, f"{field}[{index}]") for index, entry in enumerate(_list(value, field))]


def _number(value: Any, field: str, least: int, most: int) -> int:
    number: int = _typed(value, field, int, "a whole number")
    if not least <= number <= most:
        raise InvalidArgument(field, number, f"must be between {least} and {most}")
    return number
