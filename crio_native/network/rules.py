"""The node's rules for pods: masquerading and ports of the node, made when first needed and kept in step with records.

The kernel's side is in `nftables`, or in `iptables` on a kernel that has only that; here is which, and when: a
firewall's restart may have flushed all tables of the node.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence

from crio_native.errors import CrioError, FailedPrecondition, StepFailed
from crio_native.network import iptables, nftables
from crio_native.network.model import Attachment, PortMapping
from crio_native.network.records import Records

log = logging.getLogger(__name__)


class Rules:
    """The tables of this node that are ours.  Thread-safe."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._lock = threading.Lock()
        self._prepared: dict[str, nftables.Table] = {}  # by this object
        self._by_iptables = bool(records.changes("iptables"))
        self._problem = ""

    def limit(self) -> str:
        """What pods do without on this kernel, "" for nothing.  Changes nothing."""
        problem = self._problem or _unusable()
        return f"no masquerading and no host ports: {problem}" if problem else ""

    def in_place(self, name: str) -> bool:
        """Whether the table that was prepared is there still; what failed once is tried again."""
        if self._problem or name not in self._prepared:
            return False
        if self._by_iptables:
            return iptables.exists(self._prepared[name])
        with nftables.open_netlink() as netlink:
            return nftables.exists(netlink, name)

    def prepare(self, table: nftables.Table) -> None:
        """Make the table as it has to be, with the ports of all its pods.

        Pods work without the rules as far as they can, on a kernel that lacks what the rules need.
        """
        with self._lock:
            problem = self._prepare(table)
            if problem and problem != self._problem:
                log.warning("pods get no masquerading and no host ports: %s", problem)
            self._problem = problem

    def _prepare(self, table: nftables.Table) -> str:
        """By nf_tables, and if that is not to be had by iptables; why neither did."""
        try:
            self._records.note_change("nftables", table.name)
            with nftables.open_netlink() as netlink:
                nftables.prepare(netlink, table, self._mapped(table.name))
            self._by_iptables = False
        except StepFailed as error:
            if unusable := iptables.problem():
                return f"nf_tables is unusable: {error}; and so is iptables: {unusable}"
            try:
                self._records.note_change("iptables", table.name)
                iptables.prepare(table, self._mapped(table.name))
            except CrioError as second:
                return f"nf_tables is unusable: {error}; and so is iptables: {second}"
            self._by_iptables = True
        self._prepared[table.name] = table
        return ""

    def _mapped(self, name: str) -> list[Attachment]:
        """Whose ports the table has."""
        return [item for item in self._records.attachments().values() if item.table == name and item.maps_ports]

    def require(self, ports: Sequence[PortMapping]) -> None:
        """Raise FailedPrecondition when ports of the node are wanted and there can be none."""
        if ports and self._problem:
            wanted = ", ".join(str(mapping) for mapping in ports)
            raise FailedPrecondition(
                f"the pod wants ports of the node ({wanted}), which need nf_tables or iptables: {self._problem}"
            )

    def map_ports(self, attachment: Attachment) -> None:
        """Lead the ports of the node to the pod whose attachment was just recorded."""
        if self._problem or not _has_rules(attachment):
            return
        with self._lock:  # not between another's look at the records and its act
            if self._by_iptables:
                iptables.update(attachment.table, self._mapped(attachment.table))
                return
            with nftables.open_netlink() as netlink:
                nftables.map_ports(netlink, attachment)

    def release(self, sandbox_id: str, attachment: Attachment) -> None:
        """Take the ports back, and forget the sandbox: as one, or rules made anew meanwhile would get them again."""
        if not _has_rules(attachment):
            self._records.release(sandbox_id)
            return
        with self._lock:
            if self._by_iptables:
                others = [item for item in self._mapped(attachment.table) if item != attachment]
                iptables.update(attachment.table, others)
            elif not self._problem:
                with nftables.open_netlink() as netlink:
                    nftables.unmap_ports(netlink, attachment)
            self._records.release(sandbox_id)

    def remove_all(self) -> None:
        """Take back all tables."""
        with self._lock:
            for name, _ in self._records.changes("nftables"):
                with contextlib.suppress(StepFailed):  # a kernel without nf_tables has no table of ours
                    with nftables.open_netlink() as netlink:
                        nftables.remove(netlink, name)
                self._records.forget_change("nftables", name)
            for name, _ in self._records.changes("iptables"):
                iptables.remove(name)
                self._records.forget_change("iptables", name)
            self._prepared.clear()


def _has_rules(attachment: Attachment) -> bool:
    """Pods of plugin programs are known to the rules also without ports: they may ask for others'."""
    return attachment.maps_ports and bool(attachment.port_mappings or not attachment.bridge)


def _unusable() -> str:
    """Why there can be no rules, "" when there can."""
    problem = nftables.problem()
    if problem and (second := iptables.problem()):
        return f"nf_tables is unusable: {problem}; and so is iptables: {second}"
    return ""
