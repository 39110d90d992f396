"""Between the pod network's values and the CNI's: arguments for plugin programs, and an attachment of their result."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

from crio_native.errors import InvalidArgument
from crio_native.network.cni.attachment import CniAttachment
from crio_native.network.cni.protocol import PluginFailed, Result
from crio_native.network.links import POD_INTERFACE
from crio_native.network.model import Attachment, PortMapping, Route

_LINK_NAME = re.compile(r"[^/\s\x00]{1,15}")


def arguments(sandbox_id: str, pod: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """CNI_ARGS as all CRI runtimes give them.  Raises InvalidArgument for what its form cannot carry."""
    found = (
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", pod["namespace"]),
        ("K8S_POD_NAME", pod["name"]),
        ("K8S_POD_INFRA_CONTAINER_ID", sandbox_id),
        ("K8S_POD_UID", pod["uid"]),
    )
    for key, value in found:
        if ";" in value or "=" in value or "\0" in value:
            field = f"config.metadata.{key.rpartition('_')[2].lower()}"
            raise InvalidArgument(field, value, "must not contain ';', '=' or a null byte, for the network's plugins")
    return found


def port_capability(ports: Sequence[PortMapping]) -> dict[str, Any]:
    """The conventions' `portMappings`."""
    mappings = [
        {
            "hostPort": port.host_port,
            "containerPort": port.container_port,
            "protocol": port.protocol,
            **({"hostIP": port.host_ip} if port.host_ip else {}),
        }
        for port in ports
    ]
    return {"portMappings": mappings} if mappings else {}


def range_capability(cidrs: Sequence[str]) -> dict[str, Any]:
    """The conventions' `ipRanges`: an address from each."""
    return {"ipRanges": [[{"subnet": cidr}] for cidr in cidrs]} if cidrs else {}


def expected(network: str, ports: tuple[PortMapping, ...]) -> Attachment:
    """What is known of an attachment by programs before they ran."""
    return Attachment(POD_INTERFACE, "", (), (), (), "", "", port_mappings=ports, network=network)


def of_bridge(attachment: Attachment, netns: str) -> Result:
    """What the built-in bridge made, as the program of that name tells it."""
    interfaces = [
        {"name": attachment.bridge},
        {"name": attachment.host_interface},
        {"name": attachment.interface, "mac": attachment.mac, "sandbox": netns},
    ]
    pairs = zip(attachment.addresses, attachment.gateways, strict=True)
    ips = [{"address": address, "gateway": gateway, "interface": 2} for address, gateway in pairs]
    routes = [{"dst": route.dst, "gw": route.gateway} for route in attachment.routes]
    return {"interfaces": interfaces, "ips": ips, "routes": routes, "dns": {}}


def merge(attachment: Attachment, result: Result, cni: CniAttachment) -> Attachment:
    """The attachment as the programs' result has it.  Raises PluginFailed when the pod has no address."""
    interfaces = result.get("interfaces") or []
    inside = {index for index, item in enumerate(interfaces) if item.get("sandbox")}
    ips = [item for item in result.get("ips") or [] if item.get("interface") is None or item["interface"] in inside]
    if not ips:
        last = cni.programs[-1]
        raise PluginFailed(f"cni ADD plugins[{last.index}]", last.kind, 0, "its result has no address for the pod")
    hosts = host_links(result)
    macs = {item.get("name"): item["mac"] for item in interfaces if item.get("sandbox") and item.get("mac")}
    return dataclasses.replace(
        attachment,
        mac=macs.get(attachment.interface) or next(iter(macs.values()), attachment.mac),
        addresses=tuple(str(ipaddress.ip_interface(item["address"])) for item in ips),
        gateways=tuple(str(item.get("gateway") or "") for item in ips),
        routes=tuple(Route(str(item["dst"]), str(item.get("gw") or "")) for item in result.get("routes") or []),
        host_interface=attachment.host_interface or (hosts[-1] if hosts else ""),
    )


def host_links(result: Result) -> list[str]:
    """The names of the node's links that the programs made or used."""
    names = [item.get("name", "") for item in result.get("interfaces") or [] if not item.get("sandbox")]
    return [name for name in names if _LINK_NAME.fullmatch(name) and name not in (".", "..", "all", "default")]
