"""The small languages that configuration values are written in: durations, sizes, sysctls, limits, devices.

Here belong pure functions from one string to one typed value and back; each `parse_*` raises ValueError with the
reason.  Which option uses which language is said in `kinds` and `tables`.  Characters are admitted by list, never
refused by list: these strings end up in kernel files and in other programs' arguments.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

NANOSECOND = 10**9
DURATION_MAX = 30 * 24 * 3600
SIZE_MAX = 2**63 - 1

_DURATION_UNITS = {"h": 3600 * NANOSECOND, "m": 60 * NANOSECOND, "s": NANOSECOND, "ms": 10**6, "us": 10**3, "ns": 1}
_DURATION_PART = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)(h|ms|m|s|us|µs|ns)", re.ASCII)
_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,9})?)\s?(?:([kmgtp])?i?b?)", re.ASCII | re.IGNORECASE)
_SIZE_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}

_SYSCTL_KEY = re.compile(r"[A-Za-z0-9_-]+(?:[./][A-Za-z0-9_-]+)+", re.ASCII)
_SYSCTL_VALUE = re.compile(r"[A-Za-z0-9_.,:/-]+(?: [A-Za-z0-9_.,:/-]+)*", re.ASCII)
_SYSCTL_IPC = re.compile(r"kernel\.(?:sem|(?:shm|msg)[a-z_]+)|fs\.mqueue\.[a-z_]+")
_DEVICE_PATH = re.compile(r"/dev(?:/[A-Za-z0-9_.:@+=,-]+)+", re.ASCII)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_WORD = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?/)?{_WORD}(?:/{_WORD})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha(?:256:[0-9a-f]{64}|512:[0-9a-f]{128}))?",
    re.ASCII,
)
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
_CPUSET = re.compile(r"\d{1,5}(?:-\d{1,5})?(?:,\d{1,5}(?:-\d{1,5})?)*", re.ASCII)

# Kernel order: the position is the capability's number.
CAPABILITIES = tuple(
    "CAP_" + name
    for name in (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL "
        "SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    ).split()
)

RLIMITS = tuple(
    "core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()
)


class Sysctl(NamedTuple):
    """A namespaced sysctl; key in dotted form."""

    key: str
    value: str


class Ulimit(NamedTuple):
    """A resource limit; name as setrlimit(2) has it without RLIMIT_, lower case; -1 is unlimited."""

    name: str
    soft: int
    hard: int


class Device(NamedTuple):
    """A host device for containers; permissions is a subset of "rwm"."""

    host: str
    container: str
    permissions: str


class IDMapping(NamedTuple):
    """One line of a user namespace's uid_map or gid_map."""

    container: int
    host: int
    size: int


def parse_duration(text: str) -> float:
    """Seconds of a duration in Go's notation: "1m30s", "1.5h"; "0" and "" are none."""
    parts = list(_DURATION_PART.finditer(text))
    if text != "0" and "".join(part.group() for part in parts) != text:
        raise ValueError("it is not a number and a unit, repeated")
    total = sum(Decimal(part[1]) * _DURATION_UNITS[part[2].replace("µ", "u")] for part in parts)
    if total > DURATION_MAX * NANOSECOND:
        raise ValueError("it is longer than 30 days")
    return int(total) / NANOSECOND


def format_duration(seconds: float) -> str:
    """The shortest notation that `parse_duration` reads back as the same number."""
    rest, parts = round(seconds * NANOSECOND), []
    for unit, length in _DURATION_UNITS.items():
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def parse_size(text: str) -> int:
    """Bytes of a size; every unit is a power of 1024, with or without the "i" and the "B"."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError("it is not a number and a unit")
    size = int(Decimal(match[1]) * 2 ** _SIZE_UNITS[(match[2] or "").lower()])
    if size > SIZE_MAX:
        raise ValueError("it is more than 8 EiB")
    return size


def format_size(size: int) -> str:
    for prefix, power in (("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)):
        if size and size % 2**power == 0:
            return f"{size >> power} {prefix}B"
    return f"{size} B"


def parse_sysctl(text: str) -> Sysctl:
    """A `key=value` whose key belongs to a pod's own IPC or network namespace.

    Others would change the node.  The admitted characters leave no room for a second setting in one string.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError("there is no '='")
    if not _SYSCTL_KEY.fullmatch(key) or not _SYSCTL_VALUE.fullmatch(value):
        raise ValueError("a character is not admitted (no spaces around '=')")
    # A slash-separated key may hold dots in its parts (net/ipv4/conf/eth0.1/...): sysctl(8) swaps the two.
    if "/" in key and ("." not in key or key.index("/") < key.index(".")):
        key = key.translate(str.maketrans("./", "/."))
    if not (key.startswith("net.") or _SYSCTL_IPC.fullmatch(key)):
        raise ValueError(
            "it belongs to the whole node, not to a pod (net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*)"
        )
    return Sysctl(key, value)


def format_sysctl(sysctl: Sysctl) -> str:
    return f"{sysctl.key}={sysctl.value}"


def parse_ulimit(text: str) -> Ulimit:
    """`name=soft:hard`, or `name=both`."""
    match = re.fullmatch(r"([a-z]+)=(-1|\d{1,19})(?::(-1|\d{1,19}))?", text, re.ASCII)
    if not match:
        raise ValueError("it is not name=soft:hard")
    name, soft, hard = match[1], int(match[2]), int(match[3] or match[2])
    if name not in RLIMITS:
        raise ValueError(f"there is no limit {name!r}; there are {', '.join(RLIMITS)}")
    if hard != -1 and (soft == -1 or soft > hard):
        raise ValueError("the soft limit is above the hard limit")
    if max(soft, hard) > SIZE_MAX:
        raise ValueError("the limit does not fit in 63 bits; -1 is unlimited")
    return Ulimit(name, soft, hard)


def format_ulimit(limit: Ulimit) -> str:
    return f"{limit.name}={limit.soft}:{limit.hard}"


def parse_device_path(text: str) -> str:
    """A path below /dev that cannot leave it."""
    if not _DEVICE_PATH.fullmatch(text) or any(part in (".", "..") for part in text.split("/")):
        raise ValueError("it is not a plain path below /dev")
    return text


def parse_device(text: str) -> Device:
    """`HOST`, `HOST:CONTAINER`, `HOST:PERMISSIONS` or `HOST:CONTAINER:PERMISSIONS`."""
    host, *rest = text.split(":")
    permissions = rest.pop() if rest and not rest[-1].startswith("/") else "rwm"
    if len(rest) > 1:
        raise ValueError("it has too many parts")
    if not permissions or not set(permissions) <= set("rwm") or len(set(permissions)) != len(permissions):
        raise ValueError("the permissions are not made of r, w and m, once each")
    return Device(parse_device_path(host), parse_device_path(rest[0] if rest else host), permissions)


def format_device(device: Device) -> str:
    return f"{device.host}:{device.container}:{device.permissions}"


def parse_id_mappings(text: str) -> tuple[IDMapping, ...]:
    """`container:host:size[,...]`, or "" for none; the kernel takes at most 340 lines."""
    if not text:
        return ()
    mappings = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", part, re.ASCII)
        if not match:
            raise ValueError(f"{part!r} is not container:host:size")
        mapping = IDMapping(int(match[1]), int(match[2]), int(match[3]))
        # 2**32-1 is "no id" to the kernel, so the last mappable one is 2**32-2.
        if not mapping.size or max(mapping.container, mapping.host) + mapping.size > 2**32 - 1:
            raise ValueError(f"{part!r} maps nothing, or beyond 4294967294")
        mappings.append(mapping)
    if len(mappings) > 340:
        raise ValueError("there are more than 340 mappings")
    return tuple(mappings)


def format_id_mappings(mappings: tuple[IDMapping, ...]) -> str:
    return ",".join(f"{m.container}:{m.host}:{m.size}" for m in mappings)


def parse_capability(text: str) -> str:
    """CAP_NAME of a capability written with or without CAP_, in either case."""
    name = "CAP_" + text.upper().removeprefix("CAP_")
    if name not in CAPABILITIES:
        raise ValueError("the kernel has no such capability")
    return name


def format_capability(name: str) -> str:
    return name.removeprefix("CAP_")


def parse_image(text: str) -> str:
    """The name of an image in a registry, as OCI Distribution has it; whether it means one, the images room says."""
    if not _IMAGE.fullmatch(text):
        raise ValueError("it is not lower-case words joined by '.', '_', '-' and '/', with a tag or digest or both")
    return text


def parse_environment(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not equals or not _ENVIRONMENT_NAME.fullmatch(name):
        raise ValueError("it is not NAME=value")
    return text


def parse_cpuset(text: str) -> str:
    """A list of CPUs as cpuset.cpus takes it ("0-3,7"), or ""."""
    if text and not _CPUSET.fullmatch(text):
        raise ValueError("it is not a list of CPUs")
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if dash and int(first) > int(last):
            raise ValueError(f"the range {part!r} runs backwards")
    return text


def parse_path(text: str) -> str:
    """An absolute path without ".." parts."""
    if not text.startswith("/"):
        raise ValueError("it is not absolute")
    if ".." in text.split("/"):
        raise ValueError("it has a '..' part")
    return text


def parse_port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > 65535:
        raise ValueError("it is not a port number")
    return int(text)


def parse_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from None
    return text


def parse_timezone(text: str) -> str:
    """ "Local", a name below the zoneinfo directory, or ""."""
    if text and not re.fullmatch(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+){0,3}", text, re.ASCII):
        raise ValueError("it is not the name of a time zone")
    return text
