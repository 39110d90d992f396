"""A CNI network configuration list as this program runs it: which plugins are itself, and which are programs.

Built in are `bridge` with `host-local` (first in a list), `portmap` and `loopback`; what of these is asked for more
than is built in, and every other type, is a program of that name in `plugin_dirs`.  Nothing here runs one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crio_native.errors import Unimplemented
from crio_native.network.config import IGNORED, BridgeConfig
from crio_native.network.keys import Keys

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
_WITHOUT_VERSION = "0.2.0"  # the specification's own default for files from before there was the key
MAX_PLUGINS = 32
_NETWORK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_PLUGIN_TYPE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_LIST_KEYS = "cniVersion cniVersions disableCheck disableGC loadOnlyInlinedPlugins".split()

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

HasProgram = Callable[[str], bool]


def no_programs(kind: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class PluginProgram:
    """A plugin that is a program: its type, which is the program's name, its configuration, its place in the list."""

    kind: str
    config: Mapping[str, Any]
    index: int

    def takes(self, capability: str) -> bool:
        return (self.config.get("capabilities") or {}).get(capability) is True


@dataclass(frozen=True, slots=True)
class NetworkList:
    """A checked list.

    versions: of the CNI specification, at which the list may be run, the newest first.  bridge: the built-in bridge, if
    the list begins with it.  programs: the plugins to run, in order.  maps_ports: whether `portmap` is in the list and
    is built in.  data: the list as it was read.  source: the file, or "built-in default".
    """

    name: str
    versions: tuple[str, ...]
    bridge: BridgeConfig | None
    programs: tuple[PluginProgram, ...]
    maps_ports: bool
    disable_check: bool
    disable_gc: bool
    data: Mapping[str, Any]
    source: str

    @property
    def programs_map_ports(self) -> bool:
        return any(program.takes("portMappings") for program in self.programs)

    @property
    def ip_versions(self) -> set[int]:
        """The IP versions that pods can have."""
        return {item.subnet.version for item in self.bridge.ranges()} if self.bridge else {4, 6}

    @classmethod
    def built_in(cls, *, ipv6: bool = True) -> NetworkList:
        """The network of a node whose network_dir is empty; without its IPv6 half where the kernel has none."""
        data = json.loads(json.dumps(BUILT_IN))
        if not ipv6:
            ipam = data["plugins"][0]["ipam"]
            ipam["ranges"], ipam["routes"] = ipam["ranges"][:1], ipam["routes"][:1]
        return cls.parse(data, "built-in default")

    @classmethod
    def parse(cls, data: Any, source: str, has_program: HasProgram = no_programs) -> NetworkList:
        """Check a configuration list (or a single plugin's configuration) that was JSON.

        has_program: whether a plugin type is installed as a program.  Raises InvalidArgument with the key's path,
        Unimplemented for a plugin that is neither built in nor installed.
        """
        data = _as_list(data)
        top = Keys(data, source, "")
        name = top.take("name", str)
        if not _NETWORK_NAME.fullmatch(name):
            raise top.wrong("name", name, "must be letters, digits, '_', '.' and '-', a letter or digit first")
        versions = _versions(top)
        plugins = top.take("plugins", list)
        if not 1 <= len(plugins) <= MAX_PLUGINS:
            raise top.wrong("plugins", len(plugins), f"must be 1 to {MAX_PLUGINS}")
        flags = {key: _flag(top, key) for key in ("disableCheck", "disableGC")}
        top.finish(_LIST_KEYS)
        bridge, programs, maps_ports = _sort(plugins, name, source, has_program)
        if bridge is None and not programs:
            raise top.wrong("plugins", len(plugins), "none of them connects a pod to anything")
        return cls(
            name, versions, bridge, programs, maps_ports, flags["disableCheck"], flags["disableGC"], data, source
        )


def _as_list(data: Any) -> Any:
    """A .conf file has one plugin's configuration, with the network's name in it."""
    if isinstance(data, dict) and "plugins" not in data and "type" in data:
        head = {key: data[key] for key in ("cniVersion", "name") if key in data}
        return {**head, "plugins": [data]}
    return data


def _versions(top: Keys) -> tuple[str, ...]:
    """`cniVersion` is one, `cniVersions` (1.1.0) are alternatives; those that we do not know do not matter then."""
    several = top.take("cniVersions", list, [])
    known = [version for version in VERSIONS if version in several]
    if not known or "cniVersion" in top.data:
        one = top.take("cniVersion", str, _WITHOUT_VERSION)
        if one not in VERSIONS and not known:
            raise top.wrong("cniVersion", one, f"must be one of {', '.join(VERSIONS)}")
        known = [version for version in VERSIONS if version in (*known, one)]
    return tuple(reversed(known))


def _flag(top: Keys, key: str) -> bool:
    """The specification has these as booleans and, for older files, as "true" and "false"."""
    value = top.data.pop(key, False)
    if value not in (True, False, "true", "false"):
        raise top.wrong(key, value, "must be true or false")
    return value in (True, "true")


def _sort(
    plugins: list[Any], name: str, source: str, has_program: HasProgram
) -> tuple[BridgeConfig | None, tuple[PluginProgram, ...], bool]:
    """The list's plugins: the built-in bridge, the programs, and whether the built-in portmap is among them."""
    bridge: BridgeConfig | None = None
    programs: list[PluginProgram] = []
    maps_ports = False
    for index, config in enumerate(plugins):
        keys = Keys(config, source, f"plugins[{index}].")
        kind = keys.take("type", str)
        if not _PLUGIN_TYPE.fullmatch(kind):
            raise keys.wrong("type", kind, "must be a program's name: letters, digits, '_', '.' and '-'")
        try:
            match kind:
                case "bridge" if index == 0:
                    bridge = BridgeConfig.parse(keys, name)
                case "portmap":
                    _check_portmap(keys)
                    maps_ports = True
                case "loopback":
                    pass  # every pod's is brought up
                case _:
                    raise Unimplemented(
                        f"{keys.source}: {keys.path}type: {kind!r} is not built in here, and no directory of "
                        "crio.network.plugin_dirs has a program of that name; install it"
                    )
        except Unimplemented:
            if not has_program(kind):
                raise
            _check_program(keys)
            programs.append(PluginProgram(kind, config, index))
    return bridge, tuple(programs), maps_ports


def _check_portmap(keys: Keys) -> None:
    if not keys.take("snat", bool, True):
        raise Unimplemented(
            f"{keys.source}: {keys.path}snat: only true is built in: a pod reaches itself by its host port"
        )
    for key in ("conditionsV4", "conditionsV6"):
        if keys.data.pop(key, None):
            raise Unimplemented(f"{keys.source}: {keys.path}{key}: is not built in")
    keys.finish([*IGNORED, "masqAll", "markMasqBit", "externalSetMarkChain", "backend"])


def _check_program(keys: Keys) -> None:
    """What we ourselves read of a program's configuration; the rest is its own."""
    capabilities = keys.data.get("capabilities", {})
    if not isinstance(capabilities, dict):
        raise keys.wrong("capabilities", capabilities, "must be an object of booleans")


def kernel_has_ipv6() -> bool:
    """Whether links can get IPv6 addresses: the protocol may be absent, or switched off for the whole node."""
    try:
        return Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").read_text().strip() == "0"
    except OSError:
        return False
