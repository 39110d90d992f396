"""What network the pods get: a CNI configuration list, read, checked and turned into values.

The keys are those of the CNI plugins `bridge`, `host-local` and `portmap`, which this program is itself.  Nothing here
touches the kernel.  A key that would change how isolated the pods are (`vlan`, `macspoofchk`, ...) and is not supported
is refused; any other unknown key is warned about, as CNI tells to ignore it.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crio_native.errors import InvalidArgument, NotFound, Unimplemented

log = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
T = TypeVar("T", str, int, bool, list[Any])

MAX_FILE_BYTES = 1 << 20
MAX_FILES = 256
MAX_RANGE_SETS = 8
MAX_RANGES = 64
MAX_ROUTES = 64
_LINK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_NETWORK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_ANY = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}

# The same content as conf/10-crio-native.conflist, which is there to be copied and changed.
BUILT_IN: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "name": "crio-native",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "crio0",
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.87.0.0/16"}], [{"subnet": "fd63:7269:6f6e::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}

_BRIDGE_ONLY_DEFAULT = (
    "vlan vlanTrunk promiscMode macspoofchk forceAddress enabledad portIsolation disableContainerInterface".split()
)
_IGNORED = "name cniVersion capabilities args dns runtimeConfig prevResult".split()


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
class NetworkConfig:
    """A checked network.  range_sets: a pod gets one address from each; a set's ranges are alternatives.

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
    def built_in(cls, *, ipv6: bool = True) -> NetworkConfig:
        """The network of a node whose network_dir is empty; without its IPv6 half where the kernel has none."""
        data = json.loads(json.dumps(BUILT_IN))
        if not ipv6:
            ipam = data["plugins"][0]["ipam"]
            ipam["ranges"], ipam["routes"] = ipam["ranges"][:1], ipam["routes"][:1]
        return cls.parse(data, "built-in default")

    @classmethod
    def load(cls, network_dir: str | Path, default_network: str = "") -> NetworkConfig:
        """The first network in `network_dir` by file name, or the one named `default_network`.

        The built-in default serves when there is no file.  Raises InvalidArgument with file and key, Unimplemented
        for a plugin that is not built in, NotFound when no file defines `default_network`.
        """
        paths = _candidates(Path(network_dir))
        if not default_network:
            return cls.parse(_read(paths[0]), str(paths[0])) if paths else cls.built_in(ipv6=_kernel_has_ipv6())
        for path in paths:
            try:
                data = _read(path)
            except InvalidArgument as error:
                log.warning("skipped while looking for network %r: %s", default_network, error)
                continue
            if isinstance(data, dict) and data.get("name") == default_network:
                return cls.parse(data, str(path))
        if default_network == BUILT_IN["name"]:
            return cls.built_in(ipv6=_kernel_has_ipv6())
        hint = f"crio.network.cni_default_network names it, but no file in {network_dir} defines it"
        raise NotFound("network", default_network, hint)

    @classmethod
    def parse(cls, data: Any, source: str) -> NetworkConfig:
        """Check a configuration list (or a single plugin's configuration) that was JSON.

        Raises InvalidArgument with the key's path, Unimplemented for a plugin type that is not built in.
        """
        if isinstance(data, dict) and "plugins" not in data and "type" in data:
            data = {"cniVersion": data.get("cniVersion", "0.4.0"), "name": data.get("name"), "plugins": [data]}
        top = _Keys(data, source, "")
        name = top.take("name", str)
        if not _NETWORK_NAME.fullmatch(name):
            raise top.wrong("name", name, "must be letters, digits, '_', '.' and '-', a letter or digit first")
        plugins = [_Keys(item, source, f"plugins[{i}].") for i, item in enumerate(top.take("plugins", list))]
        top.finish("cniVersion cniVersions disableCheck disableGC loadOnlyInlinedPlugins".split())
        for index, plugin in enumerate(plugins):
            kind = plugin.take("type", str)
            if kind != ("bridge" if index == 0 else "portmap"):
                raise Unimplemented(
                    f"{source}: plugins[{index}].type: {kind!r} is not built in here (a list is 'bridge', which may be "
                    "followed by 'portmap'), and CNI programs are not run by this version"
                )
        if not 1 <= len(plugins) <= 2:
            raise top.wrong("plugins", len(plugins), "must be 'bridge', which may be followed by 'portmap'")
        for plugin in plugins[1:]:
            if not plugin.take("snat", bool, True):
                raise plugin.wrong("snat", False, "only true is supported: a pod reaches itself by its host port")
            plugin.finish(_IGNORED)
        return cls._parse_bridge(plugins[0], name, source)

    @classmethod
    def _parse_bridge(cls, keys: _Keys, name: str, source: str) -> NetworkConfig:
        bridge = keys.take("bridge", str, "cni0")
        if not _LINK_NAME.fullmatch(bridge):
            raise keys.wrong("bridge", bridge, "must be a link's name: 1 to 15 letters, digits, '_', '.' and '-'")
        mtu = keys.take("mtu", int, 0)
        if mtu and not 1280 <= mtu <= 65535:
            raise keys.wrong("mtu", mtu, "must be 0 (the kernel's choice) or 1280 to 65535 bytes")
        for key in _BRIDGE_ONLY_DEFAULT:
            if value := keys.data.pop(key, None):
                raise keys.wrong(key, value, "is not supported by the built-in bridge; leave it out")
        default_gateway = keys.take("isDefaultGateway", bool, False)
        is_gateway = keys.take("isGateway", bool, False) or default_gateway
        masq, hairpin = keys.take("ipMasq", bool, False), keys.take("hairpinMode", bool, False)
        range_sets, routes = _parse_ipam(keys.inner("ipam"))
        keys.finish([*_IGNORED, "ipMasqBackend"])
        if default_gateway:
            versions = {item.subnet.version for range_set in range_sets for item in range_set}
            routes += tuple(RouteConfig(_ANY[v]) for v in sorted(versions) if RouteConfig(_ANY[v]) not in routes)
        return cls(name, bridge, is_gateway, masq, hairpin, mtu, range_sets, routes, source)


def _parse_ipam(keys: _Keys) -> tuple[tuple[tuple[Range, ...], ...], tuple[RouteConfig, ...]]:
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
    parsed = tuple(_parse_route(_Keys(r, keys.source, f"{keys.path}routes[{i}].")) for i, r in enumerate(routes))
    keys.finish("dataDir resolvConf".split())
    return range_sets, parsed


def _parse_range_set(keys: _Keys, name: str, data: Any) -> tuple[Range, ...]:
    if not isinstance(data, list) or not 1 <= len(data) <= MAX_RANGES:
        raise keys.wrong(name, data, f"must be a list of 1 to {MAX_RANGES} ranges")
    ranges = tuple(_parse_range(_Keys(r, keys.source, f"{keys.path}{name}[{i}].")) for i, r in enumerate(data))
    if len({item.subnet.version for item in ranges}) > 1:
        raise keys.wrong(name, data, "mixes IPv4 and IPv6; make one set for each")
    return ranges


def _parse_range(keys: _Keys) -> Range:
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


def _parse_route(keys: _Keys) -> RouteConfig:
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


def _refuse_overlaps(keys: _Keys, range_sets: tuple[tuple[Range, ...], ...]) -> None:
    """Two ranges that share an address would lease it twice."""
    seen: list[Range] = []
    for item in (item for range_set in range_sets for item in range_set):
        for other in seen:
            if item.subnet.version != other.subnet.version:
                continue
            if int(item.start) <= int(other.end) and int(other.start) <= int(item.end):
                raise keys.wrong("ranges", f"{item.start}-{item.end}", f"overlaps {other.start}-{other.end}")
        seen.append(item)


class _Keys:
    """A JSON object that is consumed key by key, so that what is left over was not understood."""

    def __init__(self, data: Any, source: str, path: str) -> None:
        self.source, self.path = source, path
        if not isinstance(data, dict):
            raise InvalidArgument(f"{source}: {path.rstrip('.') or 'document'}", data, "must be an object")
        self.data = dict(data)

    def wrong(self, key: str, value: object, reason: str) -> InvalidArgument:
        return InvalidArgument(f"{self.source}: {self.path}{key}", value, reason)

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.data.pop(key, default)
        if value is None:
            raise self.wrong(key, None, f"is required and must be of type {kind.__name__}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(key, value, f"must be of type {kind.__name__}")
        return value

    def inner(self, key: str) -> _Keys:
        return _Keys(self.data.pop(key, None), self.source, f"{self.path}{key}.")

    def address(self, key: str, default: Address | None) -> Address:
        text = self.take(key, str, None if default is None else str(default))
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise self.wrong(key, text, "must be an IP address") from None
        if getattr(address, "scope_id", None):
            raise self.wrong(key, text, "must be an address without a zone")
        return address

    def finish(self, ignored: list[str]) -> None:
        for key in self.data:
            if key not in ignored:
                log.warning("%s: %s%.60s: unknown key, ignored", self.source, self.path, key)


def _candidates(network_dir: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(network_dir))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidArgument("crio.network.network_dir", str(network_dir), f"cannot be read: {error}") from None
    paths = [network_dir / name for name in names if name.endswith((".conf", ".conflist", ".json"))]
    if len(paths) > MAX_FILES:
        raise InvalidArgument("crio.network.network_dir", str(network_dir), f"has more than {MAX_FILES} networks")
    return paths


def _read(path: Path) -> Any:
    try:
        # Non-blocking, because opening a FIFO that someone left there would never return.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidArgument(str(path), f"{len(data)} bytes or more", f"at most {MAX_FILE_BYTES} are accepted")
        return json.loads(data)
    except OSError as error:
        raise InvalidArgument(str(path), error.strerror, "cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(str(path), str(error), "is not JSON") from None


def _kernel_has_ipv6() -> bool:
    """Whether links can get IPv6 addresses: the protocol may be absent, or switched off for the whole node."""
    try:
        return Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").read_text().strip() == "0"
    except OSError:
        return False
