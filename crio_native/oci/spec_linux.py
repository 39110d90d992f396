"""Checking the `linux` section of a config.json; see `spec`, which is the door."""

from __future__ import annotations

import itertools

from crio_native.errors import InvalidArgument
from crio_native.linux import scheduling
from crio_native.oci.checks import (
    absolute,
    items,
    mapping,
    matches,
    number,
    one_of,
    optional_string,
    string,
    strings,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

NAMESPACES = ("mount", "pid", "network", "ipc", "uts", "user", "cgroup", "time")
MAX_ID = 2**32 - 2
MAX_MAPPINGS = 340  # UID_GID_MAP_MAX_EXTENTS
MAX_LINK_NAME = 15  # IFNAMSIZ less the zero
_UTS_SYSCTLS = ("kernel.domainname", "kernel.hostname")
_IPC_SYSCTLS = r"kernel\.(msgmax|msgmnb|msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced)|fs\.mqueue\.[\w.-]+"
_SYSCTL_NAME = r"[A-Za-z0-9_][A-Za-z0-9_./*-]*"
_WITHOUT_NODES = ("MPOL_DEFAULT", "MPOL_LOCAL")
_WITH_NODES = ("MPOL_BIND", "MPOL_INTERLEAVE", "MPOL_WEIGHTED_INTERLEAVE", "MPOL_PREFERRED_MANY")


def check_namespaces(linux: Mapping[str, Any]) -> dict[str, str]:
    """`linux.namespaces`: type -> path to join, "" for a new one.  Raises InvalidArgument."""
    found: dict[str, str] = {}
    for index, entry in enumerate(items(linux.get("namespaces"), "linux.namespaces")):
        field = f"linux.namespaces[{index}]"
        kind = string(mapping(entry, field).get("type"), f"{field}.type")
        if kind not in NAMESPACES:
            raise InvalidArgument(f"{field}.type", kind, f"must be one of {', '.join(NAMESPACES)}")
        if kind in found:
            raise InvalidArgument(f"{field}.type", kind, "is named twice")
        path = optional_string(entry.get("path"), f"{field}.path")
        if path and not path.startswith("/"):
            raise InvalidArgument(f"{field}.path", path, "must be absolute")
        found[kind] = path
    return found


def check(linux: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    """All other fields.  Raises InvalidArgument."""
    for field in ("maskedPaths", "readonlyPaths"):
        for index, path in enumerate(strings(linux.get(field), f"linux.{field}")):
            if not path.startswith("/"):
                raise InvalidArgument(f"linux.{field}[{index}]", path, "must be absolute")
    _devices(items(linux.get("devices"), "linux.devices"))
    items(mapping(linux.get("resources"), "linux.resources").get("devices"), "linux.resources.devices")
    _sysctls(mapping(linux.get("sysctl"), "linux.sysctl"), namespaces)
    _strings(linux)
    _user_namespace(linux, namespaces)
    _time_offsets(mapping(linux.get("timeOffsets"), "linux.timeOffsets"), namespaces)
    _net_devices(mapping(linux.get("netDevices"), "linux.netDevices"), namespaces)
    _listener(mapping(linux.get("seccomp"), "linux.seccomp"))
    if linux.get("memoryPolicy") is not None:
        _memory_policy(mapping(linux["memoryPolicy"], "linux.memoryPolicy"))
    if linux.get("personality") is not None:
        asked = mapping(linux["personality"], "linux.personality")
        one_of(asked.get("domain"), "linux.personality.domain", scheduling.PERSONALITIES)
        if strings(asked.get("flags"), "linux.personality.flags"):
            raise InvalidArgument("linux.personality.flags", asked["flags"], "the specification defines no flags")
    if linux.get("intelRdt") is not None:
        _intel_rdt(mapping(linux["intelRdt"], "linux.intelRdt"))


def normalise(path: str) -> str:
    """An absolute path without `.`, `..`, doubled or trailing slashes; `..` at the root stays there."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def number_list(value: Any, field: str, most: int) -> list[int]:
    """A list such as "0-3,7".  Raises InvalidArgument."""
    text = optional_string(value, field)
    try:
        return scheduling.parse_list(text, most)
    except ValueError as error:
        raise InvalidArgument(field, text, str(error)) from None


def _strings(linux: Mapping[str, Any]) -> None:
    path = optional_string(linux.get("cgroupsPath"), "linux.cgroupsPath")
    if ".." in path.split("/"):
        raise InvalidArgument("linux.cgroupsPath", path, "may not contain '..'")
    propagation = optional_string(linux.get("rootfsPropagation"), "linux.rootfsPropagation")
    if propagation.removeprefix("r") not in ("", "shared", "slave", "private", "unbindable") or propagation == "r":
        raise InvalidArgument("linux.rootfsPropagation", propagation, "must be shared, slave, private or unbindable")
    label = optional_string(linux.get("mountLabel"), "linux.mountLabel")
    if set(label) & set('"\n'):
        raise InvalidArgument("linux.mountLabel", label, "may not contain quotes or line ends")


def _devices(devices: list[Any]) -> None:
    seen: dict[str, tuple[Any, ...]] = {}
    for index, device in enumerate(devices):
        field = f"linux.devices[{index}]"
        kind = string(mapping(device, field).get("type"), f"{field}.type")
        if kind not in ("c", "b", "u", "p"):
            raise InvalidArgument(f"{field}.type", kind, "must be c, b, u or p")
        path = normalise(absolute(device.get("path"), f"{field}.path"))
        if path == "/":
            raise InvalidArgument(f"{field}.path", device["path"], "may not be the root itself")
        which = kind, device.get("major"), device.get("minor")
        if seen.setdefault(path, which) != which:
            raise InvalidArgument(f"{field}.path", path, "is named twice, for different devices")
        if kind != "p":
            number(device.get("major"), f"{field}.major", 0, 2**12 - 1)  # as many as the kernel's dev_t has
            number(device.get("minor"), f"{field}.minor", 0, 2**20 - 1)
        if device.get("fileMode") is not None:
            number(device["fileMode"], f"{field}.fileMode", 0, 0o7777 | 0o170000)
        for name in ("uid", "gid"):
            if device.get(name) is not None:
                number(device[name], f"{field}.{name}", 0, MAX_ID)


def _sysctls(sysctls: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    """Only what belongs to a namespace of the container: anything else is the node's (CVE-2022-0532, -0811)."""
    for name, value in sysctls.items():
        field = f"linux.sysctl[{name!r}]"
        string(value, field)
        if not matches(_SYSCTL_NAME, name) or ".." in name:
            raise InvalidArgument(field, name, "is not a sysctl name")
        dotted = name.replace("/", ".")
        if dotted.startswith("net."):
            needed = "network"
        elif matches(_IPC_SYSCTLS, dotted):
            needed = "ipc"
        elif dotted in _UTS_SYSCTLS:
            needed = "uts"
        else:
            raise InvalidArgument(field, value, "is not in any namespace: setting it would change the node")
        if needed not in namespaces:
            raise InvalidArgument(field, value, f"needs a {needed} namespace of the container's own")


def _user_namespace(linux: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    for field in ("uidMappings", "gidMappings"):
        mappings = items(linux.get(field), f"linux.{field}")
        check_mappings(mappings, f"linux.{field}")
        if mappings and "user" not in namespaces:
            raise InvalidArgument(f"linux.{field}", mappings, "needs a user namespace in linux.namespaces")
        if namespaces.get("user") == "" and not any(entry["containerID"] == 0 for entry in mappings):
            raise InvalidArgument(
                f"linux.{field}", mappings, "a new user namespace needs a mapping of its root, containerID 0"
            )


def check_mappings(mappings: list[Any], field: str) -> None:
    """A list of id mappings, of a user namespace or a mount.  Raises InvalidArgument."""
    if len(mappings) > MAX_MAPPINGS:
        raise InvalidArgument(field, len(mappings), f"the kernel takes at most {MAX_MAPPINGS} ranges")
    for index, entry in enumerate(mappings):
        here = f"{field}[{index}]"
        mapping(entry, here)
        ids = [number(entry.get(name), f"{here}.{name}", 0, MAX_ID) for name in ("containerID", "hostID")]
        size = number(entry.get("size"), f"{here}.size", 1, 2**32 - 1)
        if max(ids) + size - 1 > MAX_ID:
            raise InvalidArgument(f"{here}.size", size, f"the range ends above {MAX_ID}")
    for name in ("containerID", "hostID"):
        spans = sorted((entry[name], entry[name] + entry["size"]) for entry in mappings)
        for before, after in itertools.pairwise(spans):
            if after[0] < before[1]:
                raise InvalidArgument(field, mappings, f"the {name} ranges overlap")


def _time_offsets(offsets: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    if offsets and namespaces.get("time") != "":
        raise InvalidArgument("linux.timeOffsets", dict(offsets), "needs a new time namespace in linux.namespaces")
    for clock, offset in offsets.items():
        field = f"linux.timeOffsets.{clock}"
        if clock not in ("boottime", "monotonic"):
            raise InvalidArgument(field, clock, "must be boottime or monotonic")
        if offset is None:
            raise InvalidArgument(field, None, "may not be null")
        number(mapping(offset, field).get("secs") or 0, f"{field}.secs", -(2**63), 2**63 - 1)
        number(offset.get("nanosecs") or 0, f"{field}.nanosecs", 0, 999_999_999)


def _net_devices(devices: Mapping[str, Any], namespaces: Mapping[str, str]) -> None:
    if devices and "network" not in namespaces:
        raise InvalidArgument("linux.netDevices", list(devices), "needs a network namespace in linux.namespaces")
    seen = set()
    for host_name, device in devices.items():
        field = f"linux.netDevices[{host_name!r}]"
        if not _is_link_name(string(host_name, field)) or "%" in host_name:
            raise InvalidArgument(field, host_name, "is not the name of a network device")
        name = optional_string(mapping(device, field).get("name"), f"{field}.name") or host_name
        if not _is_link_name(name) or name.replace("%d", "", 1).count("%"):
            reason = f"must be a name of at most {MAX_LINK_NAME} bytes, without '/', ':' or blanks, with at most one %d"
            raise InvalidArgument(f"{field}.name", name, reason)
        if name in seen and "%d" not in name:
            raise InvalidArgument(f"{field}.name", name, "is named twice")
        seen.add(name)


def _is_link_name(name: str) -> bool:
    """As the kernel's dev_valid_name."""
    usable = name not in ("", ".", "..") and len(name.encode(errors="surrogateescape")) <= MAX_LINK_NAME
    return usable and not any(letter in "/:\0" or letter.isspace() for letter in name)


def _listener(seccomp: Mapping[str, Any]) -> None:
    """Where the filter's notifications go.  The rest of a profile is checked when it is compiled."""
    rules = [
        mapping(rule, f"linux.seccomp.syscalls[{index}]")
        for index, rule in enumerate(items(seccomp.get("syscalls"), "linux.seccomp.syscalls"))
    ]
    by_default = seccomp.get("defaultAction")
    notified = "SCMP_ACT_NOTIFY" in (by_default, *(rule.get("action") for rule in rules))
    if not notified and not seccomp.get("listenerMetadata"):
        return
    # What hands the listener over, when the filter is in force already.
    sendmsg = {rule.get("action") for rule in rules if "sendmsg" in (rule.get("names") or ())} or {by_default}
    path = optional_string(seccomp.get("listenerPath"), "linux.seccomp.listenerPath")
    if "SCMP_ACT_NOTIFY" in sendmsg:
        raise InvalidArgument(
            "linux.seccomp.syscalls", "sendmsg", "cannot be handed to the listener: it is what hands the listener over"
        )
    if notified:
        absolute(path, "linux.seccomp.listenerPath")
    if optional_string(seccomp.get("listenerMetadata"), "linux.seccomp.listenerMetadata") and not path:
        raise InvalidArgument("linux.seccomp.listenerMetadata", seccomp["listenerMetadata"], "needs a listenerPath")


def _memory_policy(policy: Mapping[str, Any]) -> None:
    field = "linux.memoryPolicy"
    mode = one_of(policy.get("mode"), f"{field}.mode", scheduling.MEMORY_MODES)
    nodes = number_list(policy.get("nodes"), f"{field}.nodes", scheduling.MAX_NODE)
    if nodes and mode in _WITHOUT_NODES:
        raise InvalidArgument(f"{field}.nodes", policy["nodes"], f"{mode} has no nodes")
    if not nodes and mode in _WITH_NODES:
        raise InvalidArgument(f"{field}.nodes", policy.get("nodes"), f"{mode} needs nodes")
    flags = strings(policy.get("flags"), f"{field}.flags")
    for index, flag in enumerate(flags):
        one_of(flag, f"{field}.flags[{index}]", scheduling.MEMORY_FLAGS)
    if {"MPOL_F_STATIC_NODES", "MPOL_F_RELATIVE_NODES"} <= set(flags):
        raise InvalidArgument(f"{field}.flags", flags, "nodes are either static or relative")
    if flags and not nodes:
        raise InvalidArgument(f"{field}.flags", flags, "are about nodes, and there are none")


def _intel_rdt(rdt: Mapping[str, Any]) -> None:
    field = "linux.intelRdt"
    group = optional_string(rdt.get("closID"), f"{field}.closID")
    if group != "/" and ("/" in group or group in (".", "..") or "\n" in group):
        raise InvalidArgument(f"{field}.closID", group, "must be the name of a directory, or '/' for the default group")
    lines = {name: optional_string(rdt.get(name), f"{field}.{name}") for name in ("l3CacheSchema", "memBwSchema")}
    lines |= {
        f"schemata[{index}]": line for index, line in enumerate(strings(rdt.get("schemata"), f"{field}.schemata"))
    }
    for name, line in lines.items():
        if "\n" in line:
            raise InvalidArgument(f"{field}.{name}", line, "may not contain a line end")
    if lines["memBwSchema"] and not lines["memBwSchema"].startswith("MB:"):
        raise InvalidArgument(f"{field}.memBwSchema", lines["memBwSchema"], "must start with 'MB:'")
