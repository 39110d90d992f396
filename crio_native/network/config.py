"""The built-in bridge's configuration: a plugin of type `bridge` with `host-local` addresses, checked and turned into
values.

The keys are those of the CNI plugins of these names.  Nothing here touches the kernel.  What only the program `bridge`
can do is Unimplemented, so that the program serves where it is installed; any other unknown key is warned about, as CNI
tells to ignore it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crio_native.errors import Unimplemented
from crio_native.network.keys import Address, Keys

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_RANGE_SETS = 8
MAX_RANGES = 64
MAX_ROUTES = 64
_LINK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_ANY = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}

_BRIDGE_ONLY_DEFAULT = (
    "vlan vlanTrunk promiscMode macspoofchk forceAddress enabledad portIsolation disableContainerInterface".split()
)
IGNORED = "name cniVersion capabilities args dns runtimeConfig prevResult".split()


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses start..end of a subnet, gateway excepted, that may be leased to pods."""

    subnet: Network
    start: Address
    end: Address
    gateway: Address

    @property
    def size(self) -> int:
        return int(self.end) - int(self.start) + 1


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """A route that every pod gets; without a gateway, by the gateway of the pod's own range."""

    dst: Network
    gateway: Address | None = None


@dataclass(frozen=True, slots=True)
class BridgeConfig:
    """A checked bridge network.  range_sets: a pod gets one address from each; a set's ranges are alternatives.

    mtu: bytes, 0 for the kernel's own choice.  source: the file, or "built-in default".
    """

    name: str
    bridge: str
    is_gateway: bool
    ip_masq: bool
    hairpin: bool
    mtu: int
    range_sets: tuple[tuple[Range, ...], ...]
    routes: tuple[RouteConfig, ...]
    source: str

    def ranges(self) -> Iterator[Range]:
        for range_set in self.range_sets:
            yield from range_set

    @property
    def has_ipv6(self) -> bool:
        return any(item.subnet.version == 6 for item in self.ranges())

    @property
    def has_ipv4(self) -> bool:
        return any(item.subnet.version == 4 for item in self.ranges())

    @classmethod
    def parse(cls, keys: Keys, name: str) -> BridgeConfig:
        """Check the configuration of a plugin of type `bridge` in the network `name`; its `type` is taken already.

        Raises InvalidArgument with the key's path, Unimplemented for what only the program `bridge` can do.
        """
        bridge = keys.take("bridge", str, "cni0")
        if not _LINK_NAME.fullmatch(bridge):
            raise keys.wrong("bridge", bridge, "must be a link's name: 1 to 15 letters, digits, '_', '.' and '-'")
        mtu = keys.take("mtu", int, 0)
        if mtu and not 1280 <= mtu <= 65535:
            raise keys.wrong("mtu", mtu, "must be 0 (the kernel's choice) or 1280 to 65535 bytes")
        for key in _BRIDGE_ONLY_DEFAULT:
            if value := keys.data.pop(key, None):
                raise Unimplemented(
                    f"{keys.source}: {keys.path}{key}: is not supported by the built-in bridge; leave it out, or "
                    f"install the program 'bridge' (got {value!r})"
                )
        capabilities = keys.data.get("capabilities") or {}
        if isinstance(capabilities, dict) and capabilities.get("ipRanges"):
            raise Unimplemented(f"{keys.source}: {keys.path}capabilities.ipRanges: is not built in")
        default_gateway = keys.take("isDefaultGateway", bool, False)
        is_gateway = keys.take("isGateway", bool, False) or default_gateway
        masq, hairpin = keys.take("ipMasq", bool, False), keys.take("hairpinMode", bool, False)
        range_sets, routes = _parse_ipam(keys.inner("ipam"))
        keys.finish([*IGNORED, "ipMasqBackend"])
        if default_gateway:
            versions = {item.subnet.version for range_set in range_sets for item in range_set}
            routes += tuple(RouteConfig(_ANY[v]) for v in sorted(versions) if RouteConfig(_ANY[v]) not in routes)
        return cls(name, bridge, is_gateway, masq, hairpin, mtu, range_sets, routes, keys.source)


def _parse_ipam(keys: Keys) -> tuple[tuple[tuple[Range, ...], ...], tuple[RouteConfig, ...]]:
    kind = keys.take("type", str)
    if kind != "host-local":
        raise Unimplemented(f"{keys.source}: {keys.path}type: {kind!r} is not built in; 'host-local' is")
    sets = keys.take("ranges", list, [])
    if "subnet" in keys.data:  # the older form: one range, its keys beside `type`
        only = {key: keys.data.pop(key) for key in ("subnet", "rangeStart", "rangeEnd", "gateway") if key in keys.data}
        sets = [[only], *sets]
    if not 1 <= len(sets) <= MAX_RANGE_SETS:
        raise keys.wrong("ranges", len(sets), f"must have 1 to {MAX_RANGE_SETS} sets of ranges")
    range_sets = tuple(_parse_range_set(keys, f"ranges[{i}]", item) for i, item in enumerate(sets))
    _refuse_overlaps(keys, range_sets)
    routes = keys.take("routes", list, [])
    if len(routes) > MAX_ROUTES:
        raise keys.wrong("routes", len(routes), f"at most {MAX_ROUTES} are accepted")
    parsed = tuple(_parse_route(Keys(r, keys.source, f"{keys.path}routes[{i}].")) for i, r in enumerate(routes))
    keys.finish("dataDir resolvConf".split())
    return range_sets, parsed


def _parse_range_set(keys: Keys, name: str, data: Any) -> tuple[Range, ...]:
    if not isinstance(data, list) or not 1 <= len(data) <= MAX_RANGES:
        raise keys.wrong(name, data, f"must be a list of 1 to {MAX_RANGES} ranges")
    ranges = tuple(_parse_range(Keys(r, keys.source, f"{keys.path}{name}[{i}].")) for i, r in enumerate(data))
    if len({item.subnet.version for item in ranges}) > 1:
        raise keys.wrong(name, data, "mixes IPv4 and IPv6; make one set for each")
    return ranges


def _parse_range(keys: Keys) -> Range:
    text = keys.take("subnet", str)
    try:
        subnet = ipaddress.ip_network(text)
    except ValueError as error:
        raise keys.wrong("subnet", text, f"must be a network in CIDR form: {error}") from None
    if subnet.num_addresses < 4:
        raise keys.wrong("subnet", text, "is too small: it needs a gateway and a pod, so at least four addresses")
    if subnet.is_multicast or subnet.is_loopback or subnet.network_address.is_unspecified:
        raise keys.wrong("subnet", text, "must be a unicast network")
    # The first address names the subnet (in IPv6: any router of it), the last is IPv4's broadcast address.
    first, last = subnet.network_address + 1, subnet.broadcast_address - (subnet.version == 4)
    start, end = keys.address("rangeStart", first), keys.address("rangeEnd", last)
    gateway = keys.address("gateway", first)
    for key, value in (("rangeStart", start), ("rangeEnd", end), ("gateway", gateway)):
        if value.version != subnet.version or not first <= value <= last:  # type: ignore[operator]
            raise keys.wrong(key, str(value), f"must be an address of {subnet}, {first} to {last}")
    if int(start) > int(end):
        raise keys.wrong("rangeStart", str(start), f"must not be after rangeEnd, {end}")
    if start == end == gateway:
        raise keys.wrong("rangeEnd", str(end), "leaves no address for a pod: the gateway has the only one")
    keys.finish([])
    return Range(subnet, start, end, gateway)


def _parse_route(keys: Keys) -> RouteConfig:
    text = keys.take("dst", str)
    try:
        dst = ipaddress.ip_network(text)
    except ValueError as error:
        raise keys.wrong("dst", text, f"must be a network in CIDR form: {error}") from None
    gateway = keys.address("gw", None) if "gw" in keys.data else None
    if gateway is not None and gateway.version != dst.version:
        raise keys.wrong("gw", str(gateway), f"must be of the same family as {dst}")
    keys.finish([])
    return RouteConfig(dst, gateway)


def _refuse_overlaps(keys: Keys, range_sets: tuple[tuple[Range, ...], ...]) -> None:
    """Two ranges that share an address would lease it twice."""
    seen: list[Range] = []
    for item in (item for range_set in range_sets for item in range_set):
        for other in seen:
            if item.subnet.version != other.subnet.version:
                continue
            if int(item.start) <= int(other.end) and int(other.start) <= int(item.end):
                raise keys.wrong("ranges", f"{item.start}-{item.end}", f"overlaps {other.start}-{other.end}")
        seen.append(item)
