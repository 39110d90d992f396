"""What of a pod's configuration its network is told: ports of the node, and what the network's plugins may ask for.

The names of the capabilities and the form of each are CNI's conventions.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Any

from crio_native.errors import InvalidArgument
from crio_native.network import Attachment
from crio_native.network.model import PortMapping
from crio_native.pods.node import Node
from crio_native.pods.records import Pod
from crio_native.pods.values import PodConfig

# kubernetes.io/ingress-bandwidth is what the pod receives, in bits per second; the limits are kubenet's.
_RATE_NAMES = {"ingress": "kubernetes.io/ingress-bandwidth", "egress": "kubernetes.io/egress-bandwidth"}
_LEAST_RATE, _MOST_RATE = 10**3, 10**15
_BURST = (2**31 - 1) * 8  # bits: a rate is meant, not a budget, so as much as the kernel's bucket can hold
_QUANTITY = re.compile(r"(\d{1,18}(?:\.\d{0,9})?|\.\d{1,9})(m|k|Ki|[MGTPE]i?|[eE]\d{1,2})?", re.ASCII)
_SCALE = {"": 1, "m": 1e-3, "k": 10**3} | {
    letter + suffix: (1024 if suffix else 1000) ** power
    for power, letter in enumerate("KMGTPE", 1)
    for suffix in ("", "i")
}


def connect(node: Node, pod: Pod, netlink: socket.socket) -> Attachment:
    """Attach the pod to its network; `netlink` is of its namespace.  Raises what `PodNetwork.setup` does."""
    meta = pod.config.metadata
    return node.network.setup(
        pod.id,
        netlink,
        netns_path=node.layout.pins(pod.id)["net"],
        name=meta.name,
        namespace=meta.namespace,
        uid=meta.uid,
        port_mappings=_port_mappings(pod.config),
        map_ports=not node.settings.disable_hostport_mapping,
        capabilities={**capabilities(pod.config), "cgroupPath": pod.cgroup},
    )


def capabilities(config: PodConfig) -> dict[str, Any]:
    """What plugins may ask for.  Raises InvalidArgument naming the annotation."""
    found: dict[str, Any] = {
        "aliases": [config.metadata.name],
        "io.kubernetes.cri.pod-annotations": dict(config.annotations),
    }
    if bandwidth := _bandwidth(config.annotations):
        found["bandwidth"] = bandwidth
    if (dns := config.dns_config) is not None:
        found["dns"] = {"servers": dns.servers, "searches": dns.searches, "options": dns.options}
    return found


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for direction, name in _RATE_NAMES.items():
        if (text := annotations.get(name)) is not None:
            found |= {f"{direction}Rate": _rate(name, text), f"{direction}Burst": _BURST}
    return found


def _rate(name: str, text: str) -> int:
    """Kubernetes' notation of a quantity: 10M, 1.5G, 512Ki, 2e6."""
    field = f"config.annotations[{name}]"
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise InvalidArgument(field, text, "must be a number of bits per second, such as 10M")
    number, suffix = match[1], match[2] or ""
    scale = 10 ** int(suffix[1:]) if len(suffix) > 1 and suffix[0] in "eE" and suffix[1].isdigit() else _SCALE[suffix]
    rate = int(float(number) * scale)
    if not _LEAST_RATE <= rate <= _MOST_RATE:
        raise InvalidArgument(field, text, "must be from 1k to 1P bits per second")
    return rate


def _port_mappings(config: PodConfig) -> tuple[PortMapping, ...]:
    return tuple(
        PortMapping(m.host_port, m.container_port, m.protocol.name.lower(), m.host_ip)
        for m in config.port_mappings
        if m.host_port
    )
