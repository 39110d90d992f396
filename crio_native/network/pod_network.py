"""The pod network: what `pods/` calls to attach a sandbox to the node's network and to detach it again.

Here is the order of things and what undoes them.  A network is the built-in bridge, or plugin programs, or both one
after the other, and ports of the node at the end.  The order is always: record, then make; and: take away, then forget.
The kernel's side is in `bridges`, `rules` and below, the programs' in `cni`, the durable side in `records` and
`cni.attachment`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, StepFailed, Unavailable
from crio_native.network import bridges, links
from crio_native.network.bridges import Bridges
from crio_native.network.cni import results
from crio_native.network.cni.attachment import Attachments, CniAttachment, Subject
from crio_native.network.cni.chores import FIRST_PAUSE, Chores
from crio_native.network.cni.plugins import Limits, Plugins
from crio_native.network.cni.readiness import Readiness
from crio_native.network.config import Range
from crio_native.network.conflist import NetworkList
from crio_native.network.directory import NetworkDirectory
from crio_native.network.keys import Address
from crio_native.network.model import Attachment, PortMapping, check_sandbox_id, checked_port_mappings
from crio_native.network.netlink import Netlink
from crio_native.network.nftables import Table
from crio_native.network.records import Records
from crio_native.network.rules import Rules

log = logging.getLogger(__name__)


class PodNetwork:
    """Thread-safe for different sandboxes; the calls for one sandbox are the caller's to put in order.

    This process enters no namespace.  The node is not touched before the first `setup`.
    """

    def __init__(
        self,
        *,
        networks: Callable[[], NetworkList],
        state_dir: Path,
        cache_dir: Path | None = None,
        plugin_dirs: Sequence[str] = (),
        status_grace: float = 0.0,
        limits: Limits | None = None,
    ) -> None:
        """Open the records in `state_dir` (made if missing, 0700).

        networks: the network as it is now; while it raises a CrioError, `status` tells it, `setup` raises it, and
        everything that was set up before can still be torn down.  cache_dir: where attachments by plugin programs are
        recorded, which a reboot does not undo; below state_dir by default.  status_grace: seconds, see `Readiness`.
        Raises Internal when the records are damaged.
        """
        self._networks = networks
        self._records = Records(state_dir)
        self._rules = Rules(self._records)
        self._bridges = Bridges(self._records, self._rules)
        self._plugins = Plugins(plugin_dirs, limits)
        self._attachments = Attachments((cache_dir or state_dir) / "results")
        self._readiness = Readiness(self._plugins, status_grace)
        self._chores = Chores()
        self._leftovers: set[str] = set()  # sandboxes whose programs' DEL is a chore
        self._gc_lock = threading.Lock()  # a program must not begin an ADD of which its GC has not heard
        self._started = time.monotonic()
        self._starting = True  # until `collect`

    @classmethod
    def from_directory(
        cls, *, network_dir: str | Path, default_network: str = "", plugin_dirs: Sequence[str] = (), **others: Any
    ) -> PodNetwork:
        """The network that the files of `network_dir` define, as they are at each time."""
        networks = NetworkDirectory(network_dir, default_network, plugin_dirs)
        return cls(networks=networks, plugin_dirs=plugin_dirs, **others)

    def status(self) -> tuple[bool, str]:
        """Whether pods can be attached, and why not; or what is limited, "" when nothing is.  Changes nothing."""
        try:
            network = self._networks()
            if network.bridge is not None:
                self._bridges.check(network.bridge)
        except CrioError as error:
            return False, str(error)
        if network.programs and (problem := self._readiness.problem(network)):
            return False, problem
        skipped = self._skipped()
        return True, "; ".join(filter(None, (self._rules.limit(), skipped and f"not used: {skipped}")))

    def told(self) -> dict[str, Any]:
        """The network for people: its name, its file, and what of its list is built in; or why there is none."""
        try:
            network = self._networks()
        except CrioError as error:
            return {"error": str(error)}
        built_in = [network.bridge and "bridge", network.maps_ports and "portmap"]
        return {
            "name": network.name,
            "source": network.source,
            "cniVersions": network.versions,
            "builtIn": list(filter(None, built_in)),
            "programs": [program.kind for program in network.programs],
            "skipped": self._skipped(),
            "config": network.data,
        }

    def _skipped(self) -> str:
        return self._networks.skipped if isinstance(self._networks, NetworkDirectory) else ""

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
        map_ports: bool = True,
        capabilities: Mapping[str, Any] | None = None,
    ) -> Attachment:
        """Attach a sandbox: lease its addresses, make its interface, addresses and routes, and map its ports.

        netlink: a NETLINK_ROUTE socket opened inside the pod's network namespace; it remains the caller's.
        netns_path: the namespace's bind mount.  name, namespace, uid: the pod's, kept with the record, and told to
        plugin programs.  map_ports: False leaves ports of the node to the network's plugins.  capabilities: what
        plugin programs may ask for beside the ports, by the CNI conventions' names (`bandwidth`, `dns`, ...).
        Raises InvalidArgument for a wrong field, AlreadyExists, ResourceExhausted when a range has no address left,
        FailedPrecondition when a port of the node is taken or the network is not ready, StepFailed when the kernel
        refuses a step, and what `Plugins` raises.  After an error nothing is left.
        """
        network = self._usable_network()
        check_sandbox_id(sandbox_id)
        ports = checked_port_mappings(port_mappings, network.ip_versions)
        if netlink.family != socket.AF_NETLINK:
            raise InvalidArgument("netlink", netlink.family.name, "must be a netlink socket of the pod's namespace")
        pod = {"name": name, "namespace": namespace, "uid": uid, "netns": str(netns_path)}
        cni = self._begin_cni(network, sandbox_id, pod, ports, capabilities or {})
        ours = network.maps_ports or (map_ports and not network.programs_map_ports)

        def build(leases: Sequence[tuple[Address, Range]]) -> Attachment:
            if network.bridge is not None:
                base = bridges.attachment(network.bridge, sandbox_id, leases, ports)
            else:
                base = results.expected(network.name, ports)
            return dataclasses.replace(base, maps_ports=ours)

        with contextlib.ExitStack() as undo:
            range_sets = network.bridge.range_sets if network.bridge else ()
            attachment = self._records.attach(sandbox_id, range_sets, build, pod)
            undo.callback(self._records.release, sandbox_id)
            self._make_link(network, attachment, netlink, netns_path)
            undo.pop_all()
            undo.callback(self.teardown, sandbox_id)
            if cni is not None:
                attachment = self._run_programs(cni, attachment, netns_path)
                self._records.replace(sandbox_id, attachment)
            self._rules.map_ports(attachment)
            undo.pop_all()
        return attachment

    def teardown(self, sandbox_id: str) -> None:
        """Detach a sandbox.  Idempotent; needs neither its namespace nor the network that attached it.

        Plugin programs that fail do not hold it: their DEL is tried again later, and by a later start.  Before
        `collect` they are not waited for at all.  Raises StepFailed when the kernel refuses; then the record remains,
        and another call tries again.
        """
        self._detach_by_programs(sandbox_id)
        attachment = self._records.attachment(sandbox_id)
        if attachment is None:
            return
        if attachment.bridge:
            self._bridges.disconnect(attachment)
        self._rules.release(sandbox_id, attachment)

    def check(self, sandbox_id: str) -> None:
        """Ask the plugin programs whether the sandbox's network is as they made it; raises what they say."""
        cni = self._attachments.get(sandbox_id)
        if cni is not None:
            self._plugins.check(cni)

    def set_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """What a kubelet says this node's pods have for addresses: told to plugin programs that take `ipRanges`."""
        self._records.set_pod_cidrs(cidrs)

    def attachment(self, sandbox_id: str) -> Attachment | None:
        """Where the sandbox is attached, None when it is not."""
        return self._records.attachment(sandbox_id)

    def result(self, sandbox_id: str) -> Mapping[str, Any] | None:
        """The sandbox's network as the result of a CNI ADD of the newest version; None when it is not attached."""
        cni = self._attachments.get(sandbox_id)
        if cni is not None and cni.result is not None:
            return cni.result
        attachment, netns = self._records.attachment(sandbox_id), self._records.netns(sandbox_id)
        return results.of_bridge(attachment, netns) if attachment and attachment.bridge else None

    def collect(self, live: Collection[str]) -> None:
        """Tear down every sandbox that is not in `live`: what a daemon that was killed, or a reboot, left behind.

        A failure is logged and does not keep the others from being torn down.  Plugin programs follow in the
        background: DEL for what is gone, GC, and CHECK of what lives.
        """
        recorded = self._attachments.all()
        for sandbox_id in recorded.keys() - set(live):
            self._delete_later(sandbox_id)
        for sandbox_id in self._records.attachments().keys() - set(live):
            try:
                self.teardown(sandbox_id)
            except CrioError as error:
                log.error(
                    "the network of pod sandbox %s is not torn down, a later start tries again: %s", sandbox_id, error
                )
        if self._may_have_programs():
            self._chores.add("the plugins' own clean-up (GC)", self._collect_by_programs)
        self._starting = False
        self._restore_rules()
        for sandbox_id in recorded.keys() & set(live):
            self._chores.add(f"the check of pod sandbox {sandbox_id}", partial(self._report_check, sandbox_id))

    def interrupt(self) -> None:
        """Give up what plugin programs are doing, because the daemon stops; the next start undoes it."""
        self._chores.stop()
        self._plugins.stop()

    def shutdown(self, *, remove: bool = False) -> bool:
        """Close the records.  With `remove`, first take back what was made and changed on the node, unless a pod is
        attached.  Returns whether that was done."""
        self._chores.stop()
        removed = remove and not self._records.attachments()
        if removed:
            self._rules.remove_all()
            self._bridges.remove_all()
        self._records.close()
        return removed

    def _usable_network(self) -> NetworkList:
        try:
            return self._networks()
        except CrioError as error:
            raise FailedPrecondition(f"the pod network is not ready: {error}") from error

    def _restore_rules(self) -> None:
        """While the daemon was away, a firewall's restart may have taken the rules that its pods live by."""
        try:
            network = self._networks()
            attached = self._records.attachments().values()
            if network.bridge is not None and any(item.bridge == network.bridge.bridge for item in attached):
                with Netlink.open() as node:
                    self._bridges.prepare(node, network.bridge)
            for name in {item.table for item in attached if not item.bridge and item.maps_ports}:
                self._rules.prepare(Table(name))
        except CrioError as error:
            log.error("the rules for the pods that there are could not be restored: %s", error)

    def _may_have_programs(self) -> bool:
        """A network that is waited for may have some."""
        try:
            return bool(self._networks().programs)
        except CrioError:
            return True

    def _make_link(self, network: NetworkList, attachment: Attachment, netlink: socket.socket, netns: Path) -> None:
        """What is built in of an attachment, and the rules for its ports."""
        with Netlink.open() as node:
            if network.bridge is not None:
                port = self._bridges.prepare(node, network.bridge)
                self._require_rules(attachment)
                self._bridges.connect(node, Netlink(netlink), network.bridge, attachment, netns, port)
                return
        if attachment.maps_ports:
            if not self._rules.in_place(attachment.table):
                self._rules.prepare(Table(attachment.table))
            self._require_rules(attachment)
        links.bring_up_loopback(Netlink(netlink))

    def _require_rules(self, attachment: Attachment) -> None:
        if attachment.maps_ports:
            self._rules.require(attachment.port_mappings)

    # Plugin programs.

    def _begin_cni(
        self,
        network: NetworkList,
        sandbox_id: str,
        pod: Mapping[str, str],
        ports: Sequence[PortMapping],
        capabilities: Mapping[str, Any],
    ) -> CniAttachment | None:
        """The attachment by the network's programs, if it has any."""
        if not network.programs:
            return None
        args = results.arguments(sandbox_id, pod)
        wanted = {**results.range_capability(self._records.pod_cidrs()), **capabilities}
        wanted |= results.port_capability(ports)
        subject = Subject(sandbox_id, pod["netns"], links.POD_INTERFACE, args, wanted)
        return CniAttachment.begin(network, self._plugins.negotiate(network), subject)

    def _run_programs(self, cni: CniAttachment, attachment: Attachment, netns: Path) -> Attachment:
        with self._gc_lock:
            self._attachments.put(cni)
        previous = results.of_bridge(attachment, str(netns)) if attachment.bridge else None
        with self._attachments.lock(cni) as lock:
            result = self._plugins.add(cni, previous, lock)
        self._attachments.put(dataclasses.replace(cni, result=result))
        found = results.merge(attachment, result, cni)
        if found.maps_ports and found.port_mappings and not found.bridge:
            self._bridges.let_loopback_out(results.host_links(result))
        return found

    def _detach_by_programs(self, sandbox_id: str) -> None:
        """DEL now; or in the background, while the daemon starts, and after a failure."""
        if sandbox_id in self._leftovers or self._attachments.get(sandbox_id) is None:
            return
        if self._starting:
            self._delete_later(sandbox_id)
            return
        try:
            self._delete_by_programs(sandbox_id)
        except (CrioError, OSError) as error:
            log.warning("plugins did not detach pod sandbox %s, they are asked again later: %s", sandbox_id, error)
            self._delete_later(sandbox_id, FIRST_PAUSE)

    def _delete_by_programs(self, sandbox_id: str) -> None:
        """DEL, and forget.  Raises what the first program that fails says; then the record remains."""
        cni = self._attachments.get(sandbox_id)
        if cni is None:
            return
        failures = self._plugins.delete(cni)
        if failures:
            raise failures[0]
        self._attachments.remove(cni)
        self._leftovers.discard(sandbox_id)

    def _delete_later(self, sandbox_id: str, pause: float = 0.0) -> None:
        self._leftovers.add(sandbox_id)
        what = f"the plugins' DEL for pod sandbox {sandbox_id}"
        self._chores.add(what, partial(self._delete_leftover, sandbox_id), pause=pause)

    def _delete_leftover(self, sandbox_id: str) -> None:
        """As above, but what a daemon that was killed had started gets the time to end that it would have had."""
        cni = self._attachments.get(sandbox_id)
        age = time.monotonic() - self._started
        if cni is not None and age < self._plugins.limits.add and self._attachments.is_locked(cni):
            raise Unavailable("the ADD that an earlier daemon started still runs")
        self._delete_by_programs(sandbox_id)

    def _collect_by_programs(self) -> None:
        network = self._networks()
        if not network.programs:
            return
        with self._gc_lock:
            valid = [(id_, cni.subject.interface) for id_, cni in self._attachments.all().items()]
            self._plugins.collect(network, self._plugins.negotiate(network), valid)

    def _report_check(self, sandbox_id: str) -> None:
        try:
            self.check(sandbox_id)
        except StepFailed as error:
            log.warning("the network of pod sandbox %s is not as its plugins made it: %s", sandbox_id, error)
