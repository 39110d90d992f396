"""The pod network: what `pods/` calls to attach a sandbox to the node's network and to detach it again.

Here is the order of things and what undoes them; the kernel's side is in `links.py` and `nftables.py`, the durable side
in `records.py`.  The order is always: record, then make; and: take away, then forget.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, StepFailed
from crio_native.network import links, nftables
from crio_native.network.config import Address, NetworkConfig, Range
from crio_native.network.model import Attachment, PortMapping, check_sandbox_id, checked_port_mappings
from crio_native.network.netlink import Netlink
from crio_native.network.records import Records
from crio_native.network.sysctl import Sysctls

log = logging.getLogger(__name__)


class PodNetwork:
    """The built-in network: a bridge, veth pairs, leased addresses, masquerading, ports of the node.

    Thread-safe for different sandboxes; the calls for one sandbox are the caller's to put in order.  Nothing is exec'ed
    and no namespace is entered.  The node is not touched before the first `setup`.
    """

    def __init__(self, *, config: NetworkConfig | CrioError, state_dir: Path) -> None:
        """Open the records in `state_dir` (made if missing, 0700).

        config: the network, or the error why there is none; then `status` tells it, `setup` raises it, and everything
        that was set up before can still be torn down.  Raises Internal when the records are damaged.
        """
        self._config = config
        self._records = Records(state_dir)
        self._sysctls = Sysctls(self._records)
        self._node_lock = threading.Lock()
        self._bridge_index = 0  # of the bridge that this object has prepared
        self._nftables_problem = ""

    @classmethod
    def from_directory(cls, *, network_dir: str | Path, default_network: str = "", state_dir: Path) -> PodNetwork:
        """The network that `NetworkConfig.load` finds, or one that is not ready and tells why."""
        config: NetworkConfig | CrioError
        try:
            config = NetworkConfig.load(network_dir, default_network)
        except CrioError as error:
            log.error("the pod network is not ready: %s", error)
            config = error
        return cls(config=config, state_dir=state_dir)

    def status(self) -> tuple[bool, str]:
        """Whether pods can be attached, and why not; or what is limited, "" when nothing is.  Changes nothing."""
        if not isinstance(self._config, NetworkConfig):
            return False, str(self._config)
        try:
            with Netlink.open() as netlink:
                links.check_bridge(netlink, self._config)
        except CrioError as error:
            return False, str(error)
        limit = self._nftables_problem or nftables.problem()
        return True, f"no masquerading and no host ports, nf_tables is unusable: {limit}" if limit else ""

    def setup(
        self,
        sandbox_id: str,
        netlink: socket.socket,
        *,
        netns_path: Path,
        name: str,
        namespace: str,
        uid: str,
        port_mappings: Sequence[PortMapping] = (),
    ) -> Attachment:
        """Attach a sandbox: lease its addresses, make its interface, addresses and routes, and map its ports.

        netlink: a NETLINK_ROUTE socket opened inside the pod's network namespace; it remains the caller's.
        netns_path: the namespace's bind mount.  name, namespace, uid: the pod's, kept with the record.
        Raises InvalidArgument for a wrong field, AlreadyExists, ResourceExhausted when a range has no address left,
        FailedPrecondition when a port of the node is taken or the network is not ready, StepFailed when the kernel
        refuses a step.  After an error nothing is left.
        """
        config = self._usable_config()
        check_sandbox_id(sandbox_id)
        ports = checked_port_mappings(port_mappings, {item.subnet.version for item in config.ranges()})
        if netlink.family != socket.AF_NETLINK:
            raise InvalidArgument("netlink", netlink.family.name, "must be a netlink socket of the pod's namespace")
        pod = {"name": name, "namespace": namespace, "uid": uid, "netns": str(netns_path)}

        def build(leases: Sequence[tuple[Address, Range]]) -> Attachment:
            return _attachment(config, sandbox_id, leases, ports)

        with contextlib.ExitStack() as undo:
            attachment = self._records.attach(sandbox_id, config.range_sets, build, pod)
            undo.callback(self._records.release, sandbox_id)
            with Netlink.open() as node:
                bridge = self._prepared_bridge(node, config)
                if ports:
                    self._require_nftables(ports)
                links.create_veth(node, attachment, netns_path, bridge)
                undo.pop_all()  # not before the link is ours: it is found by its name
                undo.callback(self.teardown, sandbox_id)
                links.bring_up_port(node, attachment, hairpin=config.hairpin)
            links.configure_inside(Netlink(netlink), attachment)
            if ports:
                with nftables.open_netlink() as netfilter:
                    nftables.map_ports(netfilter, attachment)
            undo.pop_all()
        return attachment

    def teardown(self, sandbox_id: str) -> None:
        """Detach a sandbox.  Idempotent; needs neither its namespace nor the configuration that attached it.

        Raises StepFailed when the kernel refuses; then the record remains, and another call tries again.
        """
        attachment = self._records.attachment(sandbox_id)
        if attachment is None:
            return
        _delete_link(attachment.host_interface)
        if attachment.port_mappings:
            with self._node_lock:  # or rules made anew meanwhile would get the recorded ports back
                _unmap_ports(attachment)
                self._records.release(sandbox_id)
        else:
            self._records.release(sandbox_id)

    def attachment(self, sandbox_id: str) -> Attachment | None:
        """Where the sandbox is attached, None when it is not."""
        return self._records.attachment(sandbox_id)

    def collect(self, live: Collection[str]) -> None:
        """Tear down every sandbox that is not in `live`: what a daemon that was killed left behind.

        A failure is logged and does not keep the others from being torn down.
        """
        for sandbox_id in self._records.attachments().keys() - set(live):
            try:
                self.teardown(sandbox_id)
            except CrioError as error:
                log.error(
                    "the network of pod sandbox %s is not torn down, a later start tries again: %s", sandbox_id, error
                )

    def shutdown(self, *, remove: bool = False) -> bool:
        """Close the records.  With `remove`, first take back what was made and changed on the node, unless a pod is
        attached.  Returns whether that was done."""
        removed = remove and not self._records.attachments()
        if removed:
            with self._node_lock:
                self._restore_node()
        self._records.close()
        return removed

    def _usable_config(self) -> NetworkConfig:
        if isinstance(self._config, NetworkConfig):
            return self._config
        raise FailedPrecondition(f"the pod network is not ready: {self._config}")

    def _prepared_bridge(self, netlink: Netlink, config: NetworkConfig) -> int:
        """The index of the bridge, made or repaired when it or the rules are not there (any more)."""
        if self._bridge_index and self._bridge_index == _link_index(config.bridge) and self._rules_in_place(config):
            return self._bridge_index
        with self._node_lock:
            index = links.check_bridge(netlink, config)
            if not index:
                self._records.note_change("link", config.bridge)
                links.create_bridge(netlink, config)
                index = links.check_bridge(netlink, config)
            self._sysctls.prepare(config)
            links.set_up_bridge(netlink, config, index)
            self._prepare_rules(config)
            self._bridge_index = index
        return index

    def _rules_in_place(self, config: NetworkConfig) -> bool:
        """A firewall's restart may have flushed all tables of the node; what failed once is tried again."""
        if self._nftables_problem:
            return False
        with nftables.open_netlink() as netlink:
            return nftables.exists(netlink, config.bridge)

    def _prepare_rules(self, config: NetworkConfig) -> None:
        """Pods work without the rules as far as they can, on a kernel that lacks what the rules need."""
        subnets = [item.subnet for item in config.ranges()] if config.ip_masq else []
        attached = [item for item in self._records.attachments().values() if item.bridge == config.bridge]
        self._records.note_change("nftables", config.bridge)
        problem = ""
        try:
            with nftables.open_netlink() as netlink:
                nftables.prepare(netlink, config.bridge, subnets, attached)
        except StepFailed as error:
            problem = str(error)
        if problem and problem != self._nftables_problem:
            log.warning("pods get no masquerading and no host ports, nf_tables is unusable: %s", problem)
        self._nftables_problem = problem

    def _require_nftables(self, ports: Sequence[PortMapping]) -> None:
        if self._nftables_problem:
            wanted = ", ".join(str(mapping) for mapping in ports)
            raise FailedPrecondition(
                f"the pod wants ports of the node ({wanted}), which need nf_tables with NAT: {self._nftables_problem}"
            )

    def _restore_node(self) -> None:
        for bridge, _ in self._records.changes("nftables"):
            with contextlib.suppress(StepFailed):  # a kernel without nf_tables has no table of ours
                with nftables.open_netlink() as netlink:
                    nftables.remove(netlink, bridge)
            self._records.forget_change("nftables", bridge)
        for bridge, _ in self._records.changes("link"):
            _delete_link(bridge)
            self._records.forget_change("link", bridge)
        self._bridge_index = 0
        with Netlink.open() as netlink:
            others = links.bridges(netlink)
        if others:  # whoever made them may by now rely on the forwarding that was switched on for us
            self._sysctls.forget(", ".join(sorted(others)))
        else:
            self._sysctls.restore()


def _attachment(
    config: NetworkConfig, sandbox_id: str, leases: Sequence[tuple[Address, Range]], ports: tuple[PortMapping, ...]
) -> Attachment:
    addresses = tuple(f"{address}/{found.subnet.prefixlen}" for address, found in leases)
    gateways = tuple(str(found.gateway) for _, found in leases)
    return Attachment(
        interface=links.POD_INTERFACE,
        mac=links.random_mac(),
        addresses=addresses,
        gateways=gateways,
        routes=links.routes_for(config, addresses, gateways),
        host_interface=links.host_interface(sandbox_id),
        bridge=config.bridge,
        mtu=config.mtu,
        port_mappings=ports,
    )


def _link_index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _delete_link(name: str) -> None:
    with Netlink.open() as netlink:
        links.delete(netlink, name)


def _unmap_ports(attachment: Attachment) -> None:
    with nftables.open_netlink() as netlink:
        nftables.unmap_ports(netlink, attachment)
