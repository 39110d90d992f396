"""The network's configuration: what a CNI list means, and what each wrong key is answered."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.errors import CrioError, InvalidArgument, NotFound, Unimplemented
from crio_native.network.conflist import BUILT_IN, NetworkList
from crio_native.network.directory import MAX_FILE_BYTES, NetworkDirectory

CONF = Path(__file__).parents[2] / "conf" / "10-crio-native.conflist"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The built-in list with the value at a path like "plugins.0.ipam.ranges" replaced, or removed by ...."""
    data = copy.deepcopy(BUILT_IN)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = data
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def write(directory: Path, name: str, data: Any) -> Path:
    path = directory / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_the_file_to_copy_is_the_built_in_default() -> None:
    assert json.loads(CONF.read_text()) == BUILT_IN


def test_what_the_default_means() -> None:
    network = NetworkList.built_in()
    config = network.bridge
    assert config is not None and network.maps_ports and not network.programs
    assert (config.name, config.bridge, config.mtu, config.source) == ("crio-native", "crio0", 0, "built-in default")
    assert config.is_gateway and config.ip_masq and config.hairpin and config.has_ipv4 and config.has_ipv6
    (four,), (six,) = config.range_sets
    assert [str(item) for item in (four.subnet, four.start, four.end, four.gateway)] == [
        "10.87.0.0/16",
        "10.87.0.1",
        "10.87.255.254",
        "10.87.0.1",
    ]
    assert str(six.end) == "fd63:7269:6f6e:0:ffff:ffff:ffff:ffff"
    assert [str(route.dst) for route in config.routes] == ["0.0.0.0/0", "::/0"]
    assert NetworkList.built_in(ipv6=False).ip_versions == {4}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("name", ..., "name: is required"),
        ("name", "a/b", "name: must be letters"),
        ("name", 7, "name: must be of type str"),
        ("plugins", {}, "plugins: must be of type list"),
        ("plugins.0", "bridge", "plugins[0]: must be an object"),
        ("plugins.0.bridge", "sixteen-letters-", "plugins[0].bridge: must be a link's name"),
        ("plugins.0.bridge", "a/b", "plugins[0].bridge"),
        ("plugins.0.bridge", "..", "plugins[0].bridge"),
        ("plugins.0.bridge", "crio0\n", "plugins[0].bridge"),
        ("plugins.0.isGateway", "yes", "plugins[0].isGateway: must be of type bool"),
        ("plugins.0.mtu", True, "plugins[0].mtu: must be of type int"),
        ("plugins.0.mtu", 576, "plugins[0].mtu: must be 0"),
        ("plugins.0.ipam", ..., "plugins[0].ipam: must be an object"),
        ("plugins.0.ipam.ranges", [], "plugins[0].ipam.ranges: must have 1 to 8"),
        ("plugins.0.ipam.ranges", [{}], "plugins[0].ipam.ranges[0]: must be a list of 1 to 64"),
        ("plugins.0.ipam.ranges.0.0", {}, "plugins[0].ipam.ranges[0][0].subnet: is required"),
        ("plugins.0.ipam.ranges.0.0.subnet", "10.0.0.1/16", "has host bits set"),
        ("plugins.0.ipam.ranges.0.0.subnet", "10.0.0.0/31", "is too small"),
        ("plugins.0.ipam.ranges.0.0.subnet", "224.0.0.0/16", "must be a unicast network"),
        ("plugins.0.ipam.ranges.0.0.gateway", "10.88.0.1", "ranges[0][0].gateway: must be an address of 10.87.0.0/16"),
        ("plugins.0.ipam.ranges.0.0.gateway", "10.87.0.0", "ranges[0][0].gateway: must be an address of"),
        ("plugins.0.ipam.ranges.0.0.rangeEnd", "10.87.255.255", "ranges[0][0].rangeEnd"),
        ("plugins.0.ipam.ranges.0.0.rangeStart", "fd00::1", "ranges[0][0].rangeStart"),
        ("plugins.0.ipam.ranges.0.0.rangeStart", "ten", "ranges[0][0].rangeStart: must be an IP address"),
        ("plugins.0.ipam.ranges.1.0.gateway", "fe80::1%eth0", "without a zone"),
        ("plugins.0.ipam.ranges.0", [{"subnet": "10.0.0.0/24"}, {"subnet": "fd00::/64"}], "mixes IPv4 and IPv6"),
        ("plugins.0.ipam.ranges.1", [{"subnet": "10.87.3.0/24"}], "overlaps 10.87.0.1-10.87.255.254"),
        ("plugins.0.ipam.ranges.0.0", {"subnet": "10.0.0.0/24", "rangeEnd": "10.0.0.1"}, "leaves no address"),
        ("plugins.0.ipam.routes.0.dst", "everywhere", "plugins[0].ipam.routes[0].dst: must be a network"),
        ("plugins.0.ipam.routes.0", {"dst": "0.0.0.0/0", "gw": "fd00::1"}, "routes[0].gw: must be of the same family"),
        ("plugins", [], "plugins: must be 1 to 32"),
        ("plugins", [{"type": "portmap"}], "none of them connects a pod"),
        ("plugins.0.type", "../bin/sh", "plugins[0].type: must be a program's name"),
        ("cniVersion", "2.0.0", "cniVersion: must be one of 0.1.0, "),
        ("disableGC", "often", "disableGC: must be true or false"),
    ],
)
def test_a_wrong_key_is_named_with_its_path_and_file(path: str, value: Any, named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        NetworkList.parse(changed(path, value), "/etc/cni/net.d/10-x.conflist")
    assert named in str(caught.value) and str(caught.value).startswith("/etc/cni/net.d/10-x.conflist: ")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("plugins.0.type", "ptp", "plugins[0].type: 'ptp' is not built in"),
        ("plugins.1.type", "firewall", "plugins[1].type: 'firewall' is not built in"),
        ("plugins.1.type", "bridge", "plugins[1].type: 'bridge' is not built in here"),
        ("plugins.1.snat", False, "plugins[1].snat: only true is built in"),
        ("plugins.0.macspoofchk", True, "plugins[0].macspoofchk: is not supported by the built-in bridge"),
        ("plugins.0.vlan", 7, "plugins[0].vlan: is not supported by the built-in bridge"),
        ("plugins.0.ipam.type", "dhcp", "plugins[0].ipam.type: 'dhcp' is not built in"),
    ],
)
def test_another_plugin_is_refused_by_name(path: str, value: Any, named: str) -> None:
    with pytest.raises(Unimplemented) as caught:
        NetworkList.parse(changed(path, value), "x.conflist")
    assert named in str(caught.value)


def test_an_unknown_key_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        NetworkList.parse(changed("plugins.0.colour", "red"), "x.conflist")
    assert caplog.messages == ["x.conflist: plugins[0].colour: unknown key, ignored"]


def test_older_and_shorter_forms() -> None:
    ipam = {"type": "host-local", "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.10", "gateway": "10.1.0.254"}
    data = {"name": "old", "type": "bridge", "isDefaultGateway": True, "ipam": ipam}
    config = NetworkList.parse(data, "old.conf").bridge
    assert config is not None
    ((only,),) = config.range_sets
    assert [str(item) for item in (only.start, only.end, only.gateway)] == ["10.1.0.10", "10.1.0.254", "10.1.0.254"]
    assert config.bridge == "cni0" and config.is_gateway
    assert [str(route.dst) for route in config.routes] == ["0.0.0.0/0"]


def test_the_first_file_by_name_decides(tmp_path: Path) -> None:
    write(tmp_path, "20-b.conflist", changed("name", "second"))
    write(tmp_path, "10-a.conflist", changed("name", "first"))
    write(tmp_path, "00-readme.txt", "not a network")
    assert NetworkDirectory(tmp_path)().name == "first"
    assert NetworkDirectory(tmp_path, "second")().source == str(tmp_path / "20-b.conflist")
    assert NetworkDirectory(tmp_path, "crio-native")().source == "built-in default"
    with pytest.raises(NotFound, match="cni_default_network names it, but no file in"):
        NetworkDirectory(tmp_path, "third")()


def test_no_directory_and_an_empty_one_mean_the_default(tmp_path: Path) -> None:
    assert NetworkDirectory(tmp_path / "none")().source == NetworkDirectory(tmp_path)().source == "built-in default"


def test_a_file_that_cannot_be_used_is_skipped_and_told(tmp_path: Path) -> None:
    broken = write(tmp_path, "10-a.conflist", "{")
    directory = NetworkDirectory(tmp_path)
    with pytest.raises(InvalidArgument, match=r"10-a\.conflist: is not JSON"):
        directory()
    write(tmp_path, "20-b.conflist", changed("name", "second"))
    assert directory().name == "second" and "10-a.conflist: is not JSON" in directory.skipped
    with pytest.raises(NotFound, match="no file in"):
        NetworkDirectory(tmp_path, "first")()
    write(tmp_path, "10-a.conflist", changed("name", "first"))
    assert directory().name == "first" and directory.skipped == ""
    broken.unlink()
    assert directory().name == "second"


def test_a_named_network_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path, "10-a.conflist", changed("name", "first"))
    directory = NetworkDirectory(tmp_path, "second")
    with pytest.raises(NotFound, match="'second' not found"):
        directory()
    later = write(tmp_path, "99-b.conf", {"name": "second", "type": "bridge", "ipam": BUILT_IN["plugins"][0]["ipam"]})
    assert directory().source == str(later)


def test_a_program_that_appears_makes_its_network_usable(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    write(tmp_path, "10-a.conflist", {"name": "own", "cniVersion": "1.0.0", "plugins": [{"type": "own"}]})
    write(tmp_path, "20-b.conflist", changed("name", "second"))
    directory = NetworkDirectory(tmp_path, "", [str(programs)])
    assert directory().name == "second" and "no directory of crio.network.plugin_dirs" in directory.skipped
    (programs / "own").write_text("#!/bin/sh\n")
    (programs / "own").chmod(0o755)
    os.utime(programs)
    network = directory()
    assert network.name == "own" and [program.kind for program in network.programs] == ["own"]


def test_plugins_of_a_directory_follow_those_of_the_list(tmp_path: Path) -> None:
    """CNI 1.1.0: one file a plugin in a directory with the network's name."""
    (tmp_path / "crio-native").mkdir()
    write(tmp_path, "10-a.conflist", changed("plugins", BUILT_IN["plugins"][:1]))
    directory = NetworkDirectory(tmp_path)
    assert not directory().maps_ports
    write(tmp_path / "crio-native", "10-portmap.conf", {"type": "portmap"})
    assert directory().maps_ports
    write(tmp_path, "10-a.conflist", {**changed("plugins", BUILT_IN["plugins"][:1]), "loadOnlyInlinedPlugins": True})
    assert not directory().maps_ports


def test_what_is_not_built_in_is_a_program_where_there_is_one() -> None:
    def programs(path: str, value: Any) -> list[str]:
        network = NetworkList.parse(changed(path, value), "x", lambda kind: True)
        return [f"{program.index} {program.kind}" for program in network.programs]

    assert programs("plugins.0.vlan", 7) == programs("plugins.0.ipam.type", "dhcp") == ["0 bridge"]
    assert programs("plugins.1.snat", False) == ["1 portmap"]
    assert programs("plugins.1.type", "cilium-cni") == ["1 cilium-cni"]
    assert programs("name", "same") == []


@pytest.mark.parametrize(
    ("data", "versions"),
    [
        ({}, ("0.2.0",)),
        ({"cniVersion": "0.3.1"}, ("0.3.1",)),
        ({"cniVersion": "1.0.0", "cniVersions": ["0.4.0", "1.1.0", "9.0.0"]}, ("1.1.0", "1.0.0", "0.4.0")),
        ({"cniVersion": "9.0.0", "cniVersions": ["1.0.0"]}, ("1.0.0",)),
    ],
)
def test_the_versions_of_a_list(data: dict[str, Any], versions: tuple[str, ...]) -> None:
    plugins = {"name": "x", "plugins": [{"type": "own"}]}
    assert NetworkList.parse({**plugins, **data}, "x", lambda kind: True).versions == versions


@pytest.mark.parametrize("text", ["[" * 100_000, " " * (MAX_FILE_BYTES + 1)])
def test_a_file_too_deep_or_too_long(tmp_path: Path, text: str) -> None:
    write(tmp_path, "10-a.conflist", text)
    with pytest.raises(InvalidArgument, match=r"10-a\.conflist"):
        NetworkDirectory(tmp_path)()


@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling"])
def test_something_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "10-a.conflist"
    {"fifo": os.mkfifo, "directory": os.mkdir, "dangling": lambda p: os.symlink("nowhere", p)}[kind](path)
    with pytest.raises(InvalidArgument, match=r"10-a\.conflist"):
        NetworkDirectory(tmp_path)()


keys = st.sampled_from(
    "name plugins type bridge ipam ranges routes subnet rangeStart rangeEnd gateway dst gw mtu vlan snat".split()
)
words = st.sampled_from(["bridge", "host-local", "portmap", "10.0.0.0/8", "10.0.0.5", "fd00::/64", "::", "", "\0"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=25,
)
paths = st.sampled_from(
    "name plugins plugins.0 plugins.0.bridge plugins.0.mtu plugins.0.ipam plugins.0.ipam.ranges "
    "plugins.0.ipam.ranges.0 plugins.0.ipam.ranges.0.0 plugins.0.ipam.ranges.0.0.subnet "
    "plugins.0.ipam.routes plugins.1".split()
)


@given(paths, values)
def test_nothing_but_our_own_errors_comes_of_any_json(path: str, value: Any) -> None:
    for data in (value, changed(path, value)):
        try:
            NetworkList.parse(data, "x")
        except CrioError as error:
            assert str(error).startswith("x: ")
