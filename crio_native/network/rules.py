"""The node's rules for pods: masquerading and ports of the node, made when first needed and kept in step with records.

The kernel's side is in `nftables`; here is when: a firewall's restart may have flushed all tables of the node.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence

from crio_native.errors import FailedPrecondition, StepFailed
from crio_native.network import nftables
from crio_native.network.model import Attachment, PortMapping
from crio_native.network.records import Records

log = logging.getLogger(__name__)


class Rules:
    """The tables of this node that are ours.  Thread-safe."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._lock = threading.Lock()
        self._prepared: set[str] = set()  # tables, by this object
        self._problem = ""

    def limit(self) -> str:
        """What pods do without on this kernel, "" for nothing.  Changes nothing."""
        problem = self._problem or nftables.problem()
        return f"no masquerading and no host ports, nf_tables is unusable: {problem}" if problem else ""

    def in_place(self, name: str) -> bool:
        """Whether the table that was prepared is there still; what failed once is tried again."""
        if self._problem or name not in self._prepared:
            return False
        with nftables.open_netlink() as netlink:
            return nftables.exists(netlink, name)

    def prepare(self, table: nftables.Table) -> None:
        """Make the table as it has to be, with the ports of all its pods.

        Pods work without the rules as far as they can, on a kernel that lacks what the rules need.
        """
        with self._lock:
            attached = [item for item in self._records.attachments().values() if item.table == table.name]
            self._records.note_change("nftables", table.name)
            problem = ""
            try:
                with nftables.open_netlink() as netlink:
                    nftables.prepare(netlink, table, [item for item in attached if item.maps_ports])
                self._prepared.add(table.name)
            except StepFailed as error:
                problem = str(error)
            if problem and problem != self._problem:
                log.warning("pods get no masquerading and no host ports, nf_tables is unusable: %s", problem)
            self._problem = problem

    def require(self, ports: Sequence[PortMapping]) -> None:
        """Raise FailedPrecondition when ports of the node are wanted and there can be none."""
        if ports and self._problem:
            wanted = ", ".join(str(mapping) for mapping in ports)
            raise FailedPrecondition(
                f"the pod wants ports of the node ({wanted}), which need nf_tables with NAT: {self._problem}"
            )

    def map_ports(self, attachment: Attachment) -> None:
        """Lead the attachment's ports of the node to the pod."""
        if attachment.maps_ports and not self._problem and (attachment.port_mappings or not attachment.bridge):
            # Not between another's look at the records and its act.
            with self._lock, nftables.open_netlink() as netlink:
                nftables.map_ports(netlink, attachment)

    def release(self, sandbox_id: str, attachment: Attachment) -> None:
        """Take the ports back, and forget the sandbox: as one, or rules made anew meanwhile would get them again."""
        if not attachment.maps_ports or (attachment.bridge and not attachment.port_mappings):
            self._records.release(sandbox_id)
            return
        with self._lock:
            try:
                with nftables.open_netlink() as netlink:
                    nftables.unmap_ports(netlink, attachment)
            except StepFailed:
                if not nftables.problem():
                    raise
            self._records.release(sandbox_id)

    def remove_all(self) -> None:
        """Take back all tables."""
        with self._lock:
            for name, _ in self._records.changes("nftables"):
                with contextlib.suppress(StepFailed):  # a kernel without nf_tables has no table of ours
                    with nftables.open_netlink() as netlink:
                        nftables.remove(netlink, name)
                self._records.forget_change("nftables", name)
            self._prepared.clear()
