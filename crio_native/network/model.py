"""The values that `pods/` gives to the pod network and gets from it; nothing that acts.

Addresses are text in the kernel's canonical form (``10.87.0.2``, ``fd63::2``): they travel to the CRI and to disk as
they are.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crio_native.errors import InvalidArgument

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
MAX_PORT_MAPPINGS = 1024
_SANDBOX_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A port of the node that leads into the pod.

    protocol: "tcp", "udp" or "sctp".  host_ip: one address of the node, or "" for all of them, in both families.
    """

    host_port: int
    container_port: int
    protocol: str = "tcp"
    host_ip: str = ""

    def __str__(self) -> str:
        host = f"[{self.host_ip}]" if ":" in self.host_ip else self.host_ip
        return f"{self.protocol} {host}:{self.host_port}"


@dataclass(frozen=True, slots=True)
class Route:
    """A route inside the pod: destination in CIDR form, and the next hop's address."""

    dst: str
    gateway: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """A pod's place in the network.

    addresses: with prefix length, the primary one first (``10.87.0.2/16``).  gateways: one for each address.
    mtu: bytes, 0 for the kernel's own choice.  bridge: the built-in one, "" where plugin programs made the attachment.
    host_interface: the node's end of the veth pair, a port of `bridge`.  network: its name.  maps_ports: whether
    `port_mappings` are ours to map, or a plugin program's.
    """

    interface: str
    mac: str
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]
    routes: tuple[Route, ...]
    host_interface: str
    bridge: str
    mtu: int = 0
    port_mappings: tuple[PortMapping, ...] = ()
    network: str = ""
    maps_ports: bool = True

    @property
    def table(self) -> str:
        """The name of the network's nf_tables table."""
        return f"crio_native_{self.bridge}" if self.bridge else f"crio_cni_{self.network}"

    @property
    def ips(self) -> tuple[str, ...]:
        """The addresses alone, the primary one first."""
        return tuple(address.partition("/")[0] for address in self.addresses)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Attachment:
        """The inverse of `to_dict` after a way through JSON."""
        return cls(
            **{
                **data,
                "addresses": tuple(data["addresses"]),
                "gateways": tuple(data["gateways"]),
                "routes": tuple(Route(**route) for route in data["routes"]),
                "port_mappings": tuple(PortMapping(**mapping) for mapping in data["port_mappings"]),
            }
        )


def check_sandbox_id(sandbox_id: str) -> None:
    """Raise InvalidArgument unless the id is 1 to 128 letters, digits, '_', '.' or '-', a letter or digit first."""
    if not _SANDBOX_ID.fullmatch(sandbox_id):
        raise InvalidArgument("sandbox_id", sandbox_id, "must be 1 to 128 letters, digits, '_', '.' or '-'")


def checked_port_mappings(
    mappings: Sequence[PortMapping], versions: Collection[int] = (4, 6)
) -> tuple[PortMapping, ...]:
    """The mappings that ask for a port of the node, with host_ip in canonical form ("" for a wildcard address).

    versions: the IP versions that pods have.  A mapping with host port 0 asks for none: the CRI lists all container
    ports.  Raises InvalidArgument with the field's path.
    """
    if len(mappings) > MAX_PORT_MAPPINGS:
        raise InvalidArgument("port_mappings", len(mappings), f"at most {MAX_PORT_MAPPINGS} are accepted")
    checked = [_checked(f"port_mappings[{index}]", mapping, versions) for index, mapping in enumerate(mappings)]
    wanted = tuple(dict.fromkeys(mapping for mapping in checked if mapping.host_port))
    for index, mapping in enumerate(wanted):
        if any(clashes(mapping, other) for other in wanted[:index]):
            raise InvalidArgument("port_mappings", str(mapping), "the pod maps this port of the node twice")
    return wanted


def clashes(one: PortMapping, other: PortMapping) -> bool:
    """Whether the two claim the same port of the node."""
    return (one.protocol, one.host_port) == (other.protocol, other.host_port) and (
        one.host_ip == other.host_ip or not one.host_ip or not other.host_ip
    )


def _checked(field: str, mapping: PortMapping, versions: Collection[int]) -> PortMapping:
    if mapping.protocol not in PROTOCOLS:
        raise InvalidArgument(f"{field}.protocol", mapping.protocol, f"must be one of {', '.join(PROTOCOLS)}")
    if not 0 <= mapping.host_port <= 65535:
        raise InvalidArgument(f"{field}.host_port", mapping.host_port, "must be 0 to 65535")
    if not 1 <= mapping.container_port <= 65535:
        raise InvalidArgument(f"{field}.container_port", mapping.container_port, "must be 1 to 65535")
    host_ip = _checked_host_ip(f"{field}.host_ip", mapping.host_ip, versions) if mapping.host_ip else ""
    return PortMapping(mapping.host_port, mapping.container_port, mapping.protocol, host_ip)


def _checked_host_ip(field: str, text: str, versions: Collection[int]) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidArgument(field, text, "must be an IP address or empty") from None
    if address.is_unspecified:
        return ""
    if getattr(address, "scope_id", None):
        raise InvalidArgument(field, text, "must be an address without a zone")
    if address.version == 6 and address.is_loopback:
        raise InvalidArgument(
            field, text, "the kernel leads nothing from ::1 to a pod; use 127.0.0.1 or another address"
        )
    if address.version not in versions:
        raise InvalidArgument(field, text, f"the pod network has no IPv{address.version} address to lead to")
    return str(address)
