"""Pods on a node of `network_lab`: namespaces that a PodNetwork has attached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crio_native.network import Attachment, NetworkList, PodNetwork, PortMapping
from crio_native.network.records import Records

from .network_lab import Namespace


def small_network(subnet: str = "10.99.0.0/29", **changes: Any) -> NetworkList:
    ipam = {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]}
    plugin = {"type": "bridge", "bridge": "test0", "isGateway": True, "ipMasq": True, "ipam": ipam, **changes}
    return NetworkList.parse({"name": "small", "plugins": [plugin]}, "small.conflist")


def open_network(directory: Path, network: NetworkList | None = None) -> PodNetwork:
    return PodNetwork(networks=lambda: network or NetworkList.built_in(), state_dir=directory / "state")


class Pod(Namespace):
    """A namespace with an attachment to the network."""

    def __init__(
        self, network: PodNetwork, directory: Path, name: str, ports: Sequence[PortMapping] = (), **more: Any
    ) -> None:
        super().__init__(directory, name)
        self.network, self.id = network, f"sandbox-{name}"
        try:
            self.attachment = attach(network, self, ports, **more)
        except BaseException:
            self.close()
            raise
        self.ip4 = next((address for address in self.attachment.ips if ":" not in address), "")
        self.ip6 = next((address for address in self.attachment.ips if ":" in address), "")

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_: object) -> None:
        self.network.teardown(self.id)
        self.close()


def attach(network: PodNetwork, pod: Namespace, ports: Sequence[PortMapping] = (), **more: Any) -> Attachment:
    return network.setup(
        f"sandbox-{pod.path.name.removeprefix('netns-')}",
        pod.netlink,
        netns_path=pod.path,
        name="web",
        namespace="default",
        uid="u-1",
        port_mappings=ports,
        **more,
    )


def leases(directory: Path) -> set[str]:
    """The leased addresses, read from the file by a second connection."""
    records = Records(directory / "state")
    try:
        return {address for attachment in records.attachments().values() for address in attachment.ips}
    finally:
        records.close()
