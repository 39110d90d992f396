"""The kinds of configuration value: which TOML type each is written in, how it is read and printed.

Here belong `Kind` and its instances; the languages inside strings are in `values`, the options in `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from crio_native.config import values
from crio_native.errors import InvalidArgument

TEXT_MAX = 4096  # PATH_MAX, and far more than any other value needs
ITEMS_MAX = 1024

_TYPE_NAMES = {str: "a string", int: "an integer", bool: "a boolean", list: "a list", dict: "a table", float: "a float"}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value.

    toml: the type that tomllib gives.  allowed: what is accepted, in words that follow "must be".  parse: from the TOML
    value to ours, raising ValueError with the reason; render: back.  item: the kind of a list's or map's members
    (`parse` and `render` then do not apply).
    """

    toml: type
    allowed: str
    parse: Callable[[Any], Any] = _same
    render: Callable[[Any], Any] = _same
    item: Kind | None = None

    def read(self, raw: Any, where: str) -> Any:
        """Our value of a TOML value.  Raises InvalidArgument whose field is `where`, or a member of it."""
        if type(raw) is not self.toml:
            given = _TYPE_NAMES.get(type(raw), f"a {type(raw).__name__}")
            raise InvalidArgument(where, raw, f"must be {self.allowed}, not {given}")
        if self.item is not None:
            return self._read_members(self.item, raw, where)
        try:
            if isinstance(raw, str):
                _refuse_unprintable(raw)
            return self.parse(raw)
        except ValueError as error:
            raise InvalidArgument(where, raw, f"must be {self.allowed}: {error}") from None

    def _read_members(self, item: Kind, raw: Any, where: str) -> Any:
        if len(raw) > ITEMS_MAX:
            raise InvalidArgument(where, len(raw), f"must not have more than {ITEMS_MAX} members")
        if isinstance(raw, Mapping):
            names = {TEXT.read(name, where): value for name, value in raw.items()}
            return MappingProxyType({name: item.read(value, f"{where}.{name}") for name, value in names.items()})
        return tuple(item.read(value, f"{where}[{index}]") for index, value in enumerate(raw))

    def write(self, value: Any) -> Any:
        """The TOML value that `read` takes back to the same."""
        if self.item is None:
            return self.render(value)
        if isinstance(value, Mapping):
            return {name: self.item.write(member) for name, member in value.items()}
        return [self.item.write(member) for member in value]


def _refuse_unprintable(text: str) -> None:
    # A line break in a value would become a second line of whatever file the value is written to.
    if len(text) > TEXT_MAX:
        raise ValueError(f"it is longer than {TEXT_MAX} characters")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("it holds a control character")


def integer(least: int = 0, most: int = 2**63 - 1) -> Kind:
    def check(value: int) -> int:
        if not least <= value <= most:
            raise ValueError("it is out of range")
        return value

    bound = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
    return Kind(int, f"an integer {bound}", check)


def choice(*names: str) -> Kind:
    allowed = "one of " + ", ".join(f'"{name}"' for name in names)

    def check(value: str) -> str:
        if value not in names:
            raise ValueError("it is none of them")
        return value

    return Kind(str, allowed, check)


def many(item: Kind) -> Kind:
    return Kind(list, f"a list whose members are each {item.allowed}", item=item)


def mapping(item: Kind) -> Kind:
    return Kind(dict, f"a table whose values are each {item.allowed}", item=item)


def optional(kind: Kind) -> Kind:
    """The same kind, or the empty string."""
    return Kind(str, f"{kind.allowed}, or empty", lambda text: kind.parse(text) if text else text, kind.render)


def or_default(kind: Kind, default: Any) -> Kind:
    """The same kind; the empty string is the default."""
    return Kind(str, f"{kind.allowed}, or empty", lambda text: kind.parse(text) if text else default, kind.render)


def _socket_path(text: str) -> str:
    # sockaddr_un.sun_path has 108 bytes, the last of which is the terminating zero.
    if len(values.parse_path(text).encode()) > 107:
        raise ValueError("a socket's path has at most 107 bytes")
    return text


TEXT = Kind(str, "a string")
FLAG = Kind(bool, "true or false")
PATH = Kind(str, "an absolute path", values.parse_path)
OPTIONAL_PATH = optional(PATH)
SOCKET = Kind(str, "the absolute path of a unix socket", _socket_path)
DURATION = Kind(str, 'a duration such as "1m30s"', values.parse_duration, values.format_duration)
SIZE = Kind(str, 'a size such as "12 MiB"', values.parse_size, values.format_size)
SYSCTL = Kind(str, 'a sysctl such as "net.ipv4.ip_forward=1"', values.parse_sysctl, values.format_sysctl)
ULIMIT = Kind(str, 'a limit such as "nofile=1024:4096"', values.parse_ulimit, values.format_ulimit)
DEVICE_PATH = Kind(str, "a path below /dev", values.parse_device_path)
DEVICE = Kind(str, 'a device such as "/dev/sda:/dev/xvda:rwm"', values.parse_device, values.format_device)
ID_MAPPINGS = Kind(str, 'mappings "container:host:size,..."', values.parse_id_mappings, values.format_id_mappings)
CAPABILITY = Kind(str, 'a capability such as "NET_RAW"', values.parse_capability, values.format_capability)
ENVIRONMENT = Kind(str, 'a variable "NAME=value"', values.parse_environment)
CPUSET = Kind(str, 'a list of CPUs such as "0-3,7"', values.parse_cpuset)
PORT_TEXT = Kind(str, 'a port number in quotes, "0" to "65535"', values.parse_port, str)
IMAGE = Kind(str, 'an image such as "registry.k8s.io/pause:3.10"', values.parse_image)
REGEX = Kind(str, "a regular expression", values.parse_regex)
TIMEZONE = Kind(str, '"Local", a time zone such as "Europe/Berlin", or empty', values.parse_timezone)
