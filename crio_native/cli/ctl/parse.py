"""Option values: from the words on the command line to CRI messages and numbers.

Pure functions that raise ValueError with what would be accepted; `Parsed` makes click types of them.  What the
runtime alone can judge (does the path exist, is the capability known) is left to the runtime.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import click

from crio_native.api.runtime.v1 import api_pb2 as api

INT64_MAX = 2**63 - 1
CPU_PERIOD = 100_000  # microseconds; the kernel's default
CPU_QUOTA_MIN = 1_000  # microseconds; the kernel refuses less
CPUS_MAX = 100_000

UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
PROPAGATIONS = {
    "rprivate": api.PROPAGATION_PRIVATE,
    "rslave": api.PROPAGATION_HOST_TO_CONTAINER,
    "rshared": api.PROPAGATION_BIDIRECTIONAL,
}
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)",
    re.ASCII,
)
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")


class Parsed(click.ParamType[Any]):
    """A click type whose values `parse` makes; its ValueError becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(f"{error} (got {value!r})", param, ctx)


class Seconds(click.FloatRange):
    """A number between bounds; "nan" is none, though no comparison says that it is outside of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


def socket(text: str) -> str:
    """The path of a unix socket, from "/PATH" or "unix:///PATH"."""
    path = text.removeprefix("unix://")
    if not os.path.isabs(path):
        raise ValueError("want an absolute path or unix:///PATH")
    return path


def size(text: str) -> int:
    """Bytes: "64m", "1.5g", "64Mi"; the units are powers of 1024."""
    found = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*([bkmgt]?)(?:ib|i|b)?", text.lower())
    if not found:
        raise ValueError("want a number with b, k, m, g or t behind it, such as 64m")
    value = int(float(found[1]) * UNITS[found[2]]) if "." in found[1] else int(found[1]) * UNITS[found[2]]
    if not 0 < value <= INT64_MAX:
        raise ValueError("want more than 0 and less than 8 EiB")
    return value


def cpus(text: str) -> int:
    """CPU time in microseconds of each period of `CPU_PERIOD`: "0.5" is half a CPU."""
    if not re.fullmatch(r"[0-9]{0,6}(\.[0-9]{0,9})?", text) or not re.search(r"[0-9]", text):
        raise ValueError("want a number of CPUs, such as 0.5")
    quota = round(float(text) * CPU_PERIOD)
    if not CPU_QUOTA_MIN <= quota <= CPUS_MAX * CPU_PERIOD:
        raise ValueError(f"want at least {CPU_QUOTA_MIN / CPU_PERIOD} CPUs and at most {CPUS_MAX}")
    return quota


def volume(text: str) -> api.Mount:
    """A mount from "HOST:CONTAINER[:OPTIONS]"; options: ro, rw, rro, rprivate, rslave, rshared, z."""
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise ValueError("want HOST:CONTAINER[:OPTIONS]")
    host, container = parts[:2]
    for side, path in (("HOST", host), ("CONTAINER", container)):
        if not path.startswith("/") or "\0" in path:
            raise ValueError(f"{side} must be an absolute path")
    mount = api.Mount(host_path=host, container_path=container)
    for option in filter(None, ",".join(parts[2:]).split(",")):
        if option in PROPAGATIONS:
            mount.propagation = PROPAGATIONS[option]
        elif option in ("ro", "rro"):
            mount.readonly = True
            mount.recursive_read_only = option == "rro"
        elif option == "z":
            mount.selinux_relabel = True
        elif option != "rw":
            raise ValueError(f"option {option!r} is not one of ro, rw, rro, {', '.join(PROPAGATIONS)}, z")
    if mount.recursive_read_only and mount.propagation != api.PROPAGATION_PRIVATE:
        raise ValueError("rro cannot be combined with rslave or rshared")
    return mount


def publish(text: str) -> api.PortMapping:
    """A port mapping from "[ADDRESS:]HOST:CONTAINER[/PROTOCOL]"; an IPv6 address stands in brackets."""
    found = re.fullmatch(r"(?:(\[[^\]]+\]|[^:\[\]]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/([a-z]+))?", text)
    if not found:
        raise ValueError("want [ADDRESS:]HOST-PORT:CONTAINER-PORT[/tcp|udp|sctp]")
    address, host, container, protocol = found.groups()
    if address:
        try:
            address = str(ipaddress.ip_address(address.strip("[]")))
        except ValueError:
            raise ValueError("the address before the ports is not an IP address") from None
    for port in (int(host), int(container)):
        if not 1 <= port <= 65535:
            raise ValueError(f"port {port} is not between 1 and 65535")
    if protocol not in (None, "tcp", "udp", "sctp"):
        raise ValueError("the protocol is not one of tcp, udp, sctp")
    return api.PortMapping(
        protocol=api.Protocol.Value((protocol or "tcp").upper()),
        host_port=int(host),
        container_port=int(container),
        host_ip=address or "",
    )


def forward(text: str) -> tuple[int, int]:
    """(local, remote) from "[LOCAL:]REMOTE"."""
    found = re.fullmatch(r"(?:([0-9]{1,5}):)?([0-9]{1,5})", text)
    if not found:
        raise ValueError("want [LOCAL:]REMOTE")
    remote = int(found[2])
    local = int(found[1]) if found[1] else remote
    if not (local <= 65535 and 1 <= remote <= 65535):
        raise ValueError("a port is a number between 1 and 65535 (LOCAL may be 0)")
    return local, remote


def pair(text: str) -> tuple[str, str]:
    """ "KEY=VALUE"; the value may be empty."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError("want KEY=VALUE")
    return key, value


def variable(text: str, environment: Mapping[bytes, bytes] = os.environb) -> api.KeyValue:
    """An environment variable from "KEY=VALUE", or from "KEY" with the caller's own value."""
    key, equals, value = text.partition("=")
    if not key:
        raise ValueError("want KEY=VALUE, or KEY to pass on your own")
    if equals:
        return api.KeyValue(key=key, value=os.fsencode(value))
    if os.fsencode(key) not in environment:
        raise ValueError("there is no such variable here to pass on; give KEY=VALUE")
    return api.KeyValue(key=key, value=environment[os.fsencode(key)])


def user(text: str) -> api.LinuxContainerSecurityContext:
    """The user fields from "UID[:GID]" or "NAME[:GID]"; names are looked up in the image."""
    name, colon, group = text.partition(":")
    if not name or (colon and not re.fullmatch(r"[0-9]{1,10}", group)):
        raise ValueError("want UID[:GID] or NAME[:GID] (the CRI has no group names)")
    numbers = [part for part in (name, group) if part.isascii() and part.isdigit()]
    if any(len(number) > 10 or int(number) > 2**32 - 2 for number in numbers):
        raise ValueError("ids are at most 4294967294")
    context = api.LinuxContainerSecurityContext()
    if name.isascii() and name.isdigit():
        context.run_as_user.value = int(name)
    else:
        context.run_as_username = name
    if colon:
        context.run_as_group.value = int(group)
    return context


def seccomp(text: str) -> api.SecurityProfile:
    """A profile from "runtime-default", "unconfined" or "localhost/ABSOLUTE-PATH"."""
    if text == "runtime-default":
        return api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)
    if text == "unconfined":
        return api.SecurityProfile(profile_type=api.SecurityProfile.Unconfined)
    if text.startswith("localhost//"):
        return api.SecurityProfile(
            profile_type=api.SecurityProfile.Localhost, localhost_ref=text.removeprefix("localhost/")
        )
    raise ValueError("want runtime-default, unconfined or localhost/ABSOLUTE-PATH, such as localhost//etc/profile.json")


def capability(text: str) -> str:
    """A capability's name in capitals, CAP_ or not, or ALL."""
    if not re.fullmatch(r"[A-Za-z_]+", text):
        raise ValueError("want a capability's name, such as NET_ADMIN, or ALL")
    return text.upper()


def name(text: str) -> str:
    """A name for a pod or container: it becomes a part of file names."""
    if not NAME.fullmatch(text):
        raise ValueError("want letters, digits, '_', '.' and '-', at most 63, the first a letter or digit")
    return text


def duration(text: str) -> float:
    """Seconds: "90", "1.5h", "1h30m"."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return float(text)
    if not re.fullmatch(f"({DURATION.pattern})+", text) or len(text) > 40:
        raise ValueError("want a duration, such as 90s or 1h30m")
    return sum(float(number) * SECONDS[unit] for number, unit in DURATION.findall(text))


def since(text: str) -> int:
    """A moment in ns since the epoch, from a duration before now or an RFC 3339 time."""
    moment = timestamp(text)
    if moment is not None:
        return moment
    try:
        return time.time_ns() - int(duration(text) * 1e9)
    except ValueError:
        raise ValueError("want a duration, such as 10m, or a time, such as 2026-01-31T12:00:00Z") from None


def timestamp(text: str) -> int | None:
    """ns since the epoch of an RFC 3339 time with up to nine digits of a second; None when it is not one."""
    found = TIMESTAMP.fullmatch(text)
    if not found:
        return None
    try:
        seconds = datetime.fromisoformat(found[1] + found[3]).timestamp()
    except ValueError:  # the 31st of February
        return None
    return int(seconds) * 10**9 + int((found[2] or "").ljust(9, "0"))


def credentials(text: str) -> api.AuthConfig:
    """ "USER:PASSWORD"; a password left out is asked for on the terminal."""
    username, colon, password = text.partition(":")
    if not username:
        raise ValueError("want USER[:PASSWORD]")
    return api.AuthConfig(
        username=username, password=password if colon else click.prompt("Password", hide_input=True, err=True)
    )
