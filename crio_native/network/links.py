"""The links of the pod network: the node's bridge, the veth pairs, and the inside of a pod.

Each function is one or two conversations with the kernel by rtnetlink (linux/rtnetlink.h); the caller decides on order
and undoing.  All raise StepFailed with the step, the link and the kernel's own explanation.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from crio_native.errors import FailedPrecondition, StepFailed
from crio_native.network.config import BridgeConfig
from crio_native.network.model import Attachment, Route
from crio_native.network.netlink import CREATE, EXCL, REPLACE, Netlink, Request, is_missing, messages

POD_INTERFACE = "eth0"
_LOOPBACK_INDEX = 1  # in every network namespace
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_NEWROUTE = 16, 17, 18, 20, 24
_IFF_UP = 1
_IFA_F_NODAD = 2
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST, _RT_SCOPE_UNIVERSE = 254, 4, 1, 0
_SKIP_STATISTICS = 8  # RTEXT_FILTER_SKIP_STATS: they would be most of the answer


def host_interface(sandbox_id: str) -> str:
    """The name of the node's end of a pod's veth pair: "veth" and 44 bits of a hash of the sandbox's id.

    The kernel allows 15 bytes; a hash tells apart ids that begin alike.
    """
    return "veth" + hashlib.sha256(sandbox_id.encode()).hexdigest()[:11]


def random_mac() -> str:
    """A random unicast address, locally administered (IEEE 802).

    Chosen here, not by the kernel, so that it is recorded before use and no network manager replaces it.
    """
    octets = bytearray(os.urandom(6))
    octets[0] = octets[0] & 0xFE | 0x02
    return octets.hex(":")


def check_bridge(netlink: Netlink, config: BridgeConfig) -> int:
    """The index of the bridge, 0 when there is none yet.

    Raises FailedPrecondition when another kind of link has its name.
    """
    link = netlink.get(_find(config.bridge), messages.link)
    if link is None:
        return 0
    info = link.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info else None
    if kind != "bridge":
        raise FailedPrecondition(
            f"link {config.bridge!r} exists and is no bridge ({kind or 'a device'}); remove it, or give the network "
            f"another name of a bridge ({config.source}: plugins[0].bridge)"
        )
    return int(link["index"])


def bridges(netlink: Netlink) -> set[str]:
    """The names of all bridges of the node."""
    # The kernel filters by kind.
    attributes = [("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]}), ("IFLA_EXT_MASK", _SKIP_STATISTICS)]
    request = Request("list-bridges", "", messages.link, _RTM_GETLINK, 0, {"attrs": attributes})
    return {link.get_attr("IFLA_IFNAME") for link in netlink.dump(request, messages.link)}


def create_bridge(netlink: Netlink, config: BridgeConfig) -> None:
    """Make the bridge, down and without addresses."""
    attributes: list[tuple[str, object]] = [
        ("IFLA_IFNAME", config.bridge),
        # A bridge without an address of its own takes one of its ports', and changes it as pods come and go.
        ("IFLA_ADDRESS", random_mac()),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]}),
    ]
    if config.mtu:
        attributes.append(("IFLA_MTU", config.mtu))
    body = {"attrs": attributes}
    netlink.run(Request("create-bridge", config.bridge, messages.link, _RTM_NEWLINK, CREATE | EXCL, body))


def set_up_bridge(netlink: Netlink, config: BridgeConfig, index: int) -> None:
    """Give the bridge the gateways' addresses (when it is the gateway) and bring it up.  Idempotent."""
    if config.is_gateway:
        gateways = [f"{item.gateway}/{item.subnet.prefixlen}" for item in config.ranges()]
        netlink.run(*(_address("set-bridge-address", address, index, REPLACE) for address in gateways))
    netlink.run(_up("bring-up-bridge", config.bridge, index))


def create_veth(netlink: Netlink, attachment: Attachment, netns_path: Path, bridge_index: int) -> None:
    """Make the pair: one end a port of the bridge, the other at once in the pod's namespace.

    Raises StepFailed; then neither end exists.
    """
    name = attachment.host_interface
    # Without following links: the path is a bind mount that a launcher made in a directory of root's.
    try:
        namespace = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StepFailed("open-netns", error.errno or 0, str(netns_path)) from error
    try:
        body = _veth(attachment, namespace, bridge_index)
        netlink.run(Request("create-veth", name, messages.link, _RTM_NEWLINK, CREATE | EXCL, body))
    finally:
        os.close(namespace)


def _veth(attachment: Attachment, namespace: int, bridge_index: int) -> dict[str, object]:
    peer: list[tuple[str, object]] = [
        ("IFLA_IFNAME", attachment.interface),
        ("IFLA_ADDRESS", attachment.mac),
        ("IFLA_NET_NS_FD", namespace),
    ]
    attributes: list[tuple[str, object]] = [
        ("IFLA_IFNAME", attachment.host_interface),
        ("IFLA_ADDRESS", random_mac()),
        ("IFLA_MASTER", bridge_index),
    ]
    if attachment.mtu:
        peer.append(("IFLA_MTU", attachment.mtu))
        attributes.append(("IFLA_MTU", attachment.mtu))
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
    attributes.append(("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}))
    return {"attrs": attributes}


def bring_up_port(netlink: Netlink, attachment: Attachment, *, hairpin: bool) -> None:
    """Bring the node's end of the pair up.

    hairpin: whether the bridge may send a frame back to the port that it came from, which a pod needs that reaches
    itself by a service address or a host port.
    """
    slave = {"attrs": [("IFLA_BRPORT_MODE", int(hairpin))]}
    info = {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", slave)]}
    attributes = [("IFLA_IFNAME", attachment.host_interface), ("IFLA_LINKINFO", info)]
    body = {"flags": _IFF_UP, "change": _IFF_UP, "attrs": attributes}
    netlink.run(Request("bring-up-port", attachment.host_interface, messages.link, _RTM_NEWLINK, 0, body))


def configure_inside(netlink: Netlink, attachment: Attachment) -> None:
    """Loopback, the interface's addresses, and the routes, through a socket of the pod's own namespace.  Raises
    StepFailed."""
    link = netlink.get(_find(attachment.interface), messages.link_head)
    if link is None:
        raise StepFailed("find-link", 0, attachment.interface, "not in the namespace that the pod's socket belongs to")
    index = link["index"]
    netlink.run(
        _up("bring-up-loopback", "lo", _LOOPBACK_INDEX),
        _up("bring-up-interface", attachment.interface, index),
        *(_address("set-pod-address", address, index, CREATE | EXCL) for address in attachment.addresses),
    )
    if attachment.routes:
        netlink.run(*(_route(route, index) for route in attachment.routes))


def bring_up_loopback(netlink: Netlink) -> None:
    """Through a socket of the pod's own namespace."""
    netlink.run(_up("bring-up-loopback", "lo", _LOOPBACK_INDEX))


def delete(netlink: Netlink, name: str) -> None:
    """Remove a link, with its peer.  Nothing happens when it is gone, for instance with the pod's namespace."""
    body = {"attrs": [("IFLA_IFNAME", name)]}
    try:
        netlink.run(Request("delete-link", name, messages.link, _RTM_DELLINK, 0, body))
    except StepFailed as error:
        if not is_missing(error):
            raise


def routes_for(config: BridgeConfig, addresses: Iterable[str], gateways: Sequence[str]) -> tuple[Route, ...]:
    """The configured routes that a pod with these addresses can use, each with its next hop.

    A route without one goes by the gateway of the first address of its family.
    """
    by_version: dict[int, str] = {}
    for address, gateway in zip(addresses, gateways, strict=True):
        by_version.setdefault(ipaddress.ip_interface(address).version, gateway)
    return tuple(
        Route(str(route.dst), str(route.gateway or by_version[route.dst.version]))
        for route in config.routes
        if route.dst.version in by_version
    )


def _find(name: str) -> Request:
    attributes = [("IFLA_IFNAME", name), ("IFLA_EXT_MASK", _SKIP_STATISTICS)]
    return Request("find-link", name, messages.link, _RTM_GETLINK, 0, {"attrs": attributes})


def _up(step: str, name: str, index: int) -> Request:
    body = {"index": index, "flags": _IFF_UP, "change": _IFF_UP, "attrs": []}
    return Request(step, name, messages.link, _RTM_NEWLINK, 0, body)


def _address(step: str, text: str, index: int, flags: int) -> Request:
    address = ipaddress.ip_interface(text)
    attributes: list[tuple[str, object]] = [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.ip))]
    if address.version == 4:
        attributes.append(("IFA_BROADCAST", str(address.network.broadcast_address)))
        family = socket.AF_INET
    else:
        # Leases make it unique; duplicate address detection would keep it from being used for a second.
        attributes.append(("IFA_FLAGS", _IFA_F_NODAD))
        family = socket.AF_INET6
    body = {"family": family, "prefixlen": address.network.prefixlen, "index": index, "attrs": attributes}
    return Request(step, text, messages.address, _RTM_NEWADDR, CREATE | flags, body)


def _route(route: Route, index: int) -> Request:
    destination = ipaddress.ip_network(route.dst)
    attributes: list[tuple[str, object]] = [("RTA_GATEWAY", route.gateway), ("RTA_OIF", index)]
    if destination.prefixlen:
        attributes.append(("RTA_DST", str(destination.network_address)))
    body = {
        "family": socket.AF_INET if destination.version == 4 else socket.AF_INET6,
        "dst_len": destination.prefixlen,
        "table": _RT_TABLE_MAIN,
        "proto": _RTPROT_STATIC,
        "type": _RTN_UNICAST,
        "scope": _RT_SCOPE_UNIVERSE,
        "attrs": attributes,
    }
    return Request("add-route", f"{route.dst} via {route.gateway}", messages.route, _RTM_NEWROUTE, CREATE | EXCL, body)
