"""The built-in plugin `bridge`: a pod's veth pair to the node's bridge, which is made and repaired as needed."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from crio_native.errors import StepFailed
from crio_native.network import links, nftables
from crio_native.network.config import BridgeConfig, Network, Range
from crio_native.network.keys import Address
from crio_native.network.model import Attachment, PortMapping
from crio_native.network.netlink import Netlink
from crio_native.network.nftables import Table
from crio_native.network.records import Records
from crio_native.network.rules import Rules
from crio_native.network.sysctl import Sysctls

log = logging.getLogger(__name__)

_DELETIONS = 8  # at a time; more than that wait for each other
_TABLE = "crio_native_{}"
_FIRST_LOOK, _LAST_LOOK = 0.0005, 0.008  # seconds between looks whether a link is gone


class Bridges:
    """The bridges that this program makes on the node.  Thread-safe."""

    def __init__(self, records: Records, rules: Rules) -> None:
        self._records = records
        self._rules = rules
        self._sysctls = Sysctls(records)
        self._lock = threading.Lock()
        self._prepared: dict[BridgeConfig, int] = {}  # by this object; the bridge's index
        self._deletions = ThreadPoolExecutor(_DELETIONS, "unlink")

    @staticmethod
    def check(config: BridgeConfig) -> None:
        """Raises FailedPrecondition when the bridge cannot be had.  Changes nothing."""
        with Netlink.open() as netlink:
            links.check_bridge(netlink, config)

    def prepare(self, netlink: Netlink, config: BridgeConfig) -> int:
        """The index of the bridge, made or repaired when it or the rules are not there (any more)."""
        index = self._prepared.get(config)
        if index and index == _link_index(config.bridge) and self._rules.in_place(_table_name(config)):
            return index
        with self._lock:
            index = links.check_bridge(netlink, config)
            if not index:
                self._records.note_change("link", config.bridge)
                links.create_bridge(netlink, config)
                index = links.check_bridge(netlink, config)
            self._sysctls.prepare(config)
            links.set_up_bridge(netlink, config, index)
            self._rules.prepare(self._table(config))
            others = {other: at for other, at in self._prepared.items() if other.bridge != config.bridge}
            self._prepared = {**others, config: index}
        return index

    def connect(
        self,
        netlink: Netlink,
        inside: Netlink,
        config: BridgeConfig,
        attachment: Attachment,
        netns_path: Path,
        port: int,
    ) -> None:
        """Make the pod's link to the bridge of index `port`, and its inside.  After an error nothing stays."""
        links.create_veth(netlink, attachment, netns_path, port)
        try:
            links.bring_up_port(netlink, attachment, hairpin=config.hairpin)
            links.configure_inside(inside, attachment)
        except BaseException:  # not before the link is ours: it is found by its name
            links.delete(netlink, attachment.host_interface)
            raise

    def disconnect(self, attachment: Attachment) -> None:
        """The inverse.  Idempotent.

        The kernel shuts a link, takes it from its tables, and then waits, still in the same system call, for readers
        that may have seen it (RCU): 1 ms until the link is gone for everybody, 10 to 25 more until the call returns.
        Those are for a thread that nobody waits for; the kernel completes the call even when this process is killed.
        """
        deletion = self._deletions.submit(_delete, attachment.host_interface)
        pause = _FIRST_LOOK
        while not _done(deletion, pause) and _link_index(attachment.host_interface):
            pause = min(2 * pause, _LAST_LOOK)

    def let_loopback_out(self, names: Sequence[str]) -> None:
        """For the node's links of pods that plugin programs attached: 127.0.0.1:PORT leads to the pod."""
        for name in names:
            try:
                self._sysctls.let_loopback_out(name)
            except StepFailed as error:  # a link that its plugin names but has moved or removed
                log.debug("%s", error)

    def _table(self, config: BridgeConfig) -> Table:
        """Also for pods that are there from before the configuration was changed: they keep their addresses."""
        subnets: dict[Network, None] = {}
        if config.ip_masq:
            subnets = dict.fromkeys(item.subnet for item in config.ranges())
            for attached in self._records.attachments().values():
                if attached.bridge == config.bridge:
                    subnets |= dict.fromkeys(ipaddress.ip_interface(address).network for address in attached.addresses)
        return Table(_table_name(config), config.bridge, tuple(subnets))

    def remove_all(self) -> None:
        """Take back the bridges and the settings of the node."""
        with self._lock, Netlink.open() as netlink:
            for bridge, _ in self._records.changes("link"):
                links.delete(netlink, bridge)
                self._records.forget_change("link", bridge)
            self._prepared.clear()
            others = links.bridges(netlink)
        if others:  # whoever made them may by now rely on the forwarding that was switched on for us
            self._sysctls.forget(", ".join(sorted(others)))
        else:
            self._sysctls.restore()


def attachment(
    config: BridgeConfig, sandbox_id: str, leases: Sequence[tuple[Address, Range]], ports: tuple[PortMapping, ...]
) -> Attachment:
    """What a pod with these leases will have."""
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
        network=config.name,
    )


def remove(name: str) -> None:
    """A bridge of ours and its table by name alone, where the records of them are lost.  Idempotent."""
    _delete(name)
    with contextlib.suppress(StepFailed):  # a kernel without nf_tables has no table of ours
        with nftables.open_netlink() as netlink:
            nftables.remove(netlink, _TABLE.format(name))


def _delete(name: str) -> None:
    with Netlink.open() as netlink:
        links.delete(netlink, name)


def _done(deletion: Future[None], seconds: float) -> bool:
    """Whether it ends within that time.  Raises what it failed with."""
    wait([deletion], seconds)
    return deletion.done() and deletion.result() is None


def _table_name(config: BridgeConfig) -> str:
    return _TABLE.format(config.bridge)


def _link_index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
