"""Masquerading and ports of the node: one nf_tables table for each network, by netlink.

    table inet crio_native_BRIDGE   (the built-in bridge)      table inet crio_cni_NETWORK   (plugin programs)
        map  port4, port6        protocol . port            -> pod address . pod port
        map  port4_at, port6_at  address . protocol . port  -> pod address . pod port
        set  pod4, pod6          the pods' addresses (plugin programs: nobody else knows them)
        chain guard         (filter, prerouting)   nothing from a pod may address the node's 127.0.0.0/8
        chain port_in       (nat, prerouting)      ports of the node, asked for from outside and by pods
        chain port_out      (nat, output)          the same, asked for by the node itself
        chain masquerade    (nat, postrouting)     pods leave the bridge under the node's address; pods and the node's
                                                   loopback reach ports of the node under it

A pod's ports are elements of the maps, so setting them up and taking them away never changes a rule, and what to take
away follows from the attachment's record alone.  All changes of one call are one transaction of the kernel's.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from crio_native.errors import StepFailed
from crio_native.network.config import Network
from crio_native.network.model import PROTOCOLS, Attachment, PortMapping
from crio_native.network.netlink import CREATE, Netlink, Request, is_missing, messages

NETLINK_NETFILTER = 12
_APPEND = 0x800
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE, _DELRULE, _NEWSET, _NEWSETELEM, _DELSETELEM = (
    _SUBSYSTEM << 8 | kind for kind in (0, 1, 2, 3, 6, 8, 9, 12, 14)
)
_GETGEN = _SUBSYSTEM << 8 | 16
_INET, _IPV4, _IPV6 = 1, 2, 10  # NFPROTO_*
_PREROUTING, _OUTPUT, _POSTROUTING = 0, 3, 4  # NF_INET_*
_RAW_PRIORITY, _DNAT_PRIORITY, _SNAT_PRIORITY = -300, -100, 100
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META_MARK, _META_OIFNAME, _META_IIFNAME, _META_NFPROTO, _META_L4PROTO = 3, 7, 6, 15, 16
_EQUAL, _DIFFERENT = 0, 1
_RTN_LOCAL = 2
_CT_STATUS, _IPS_DST_NAT = 2, 1 << 5
_NF_DROP = 0
_NFT_NAT_DNAT = 1
_IFNAMSIZ = 16
# The mark of a packet that asks for a port of the node: the bit that the CNI plugin portmap has always used for it.
_MARK = struct.pack("=I", 0x2000)
# Registers of four bytes; a looked-up key lies in consecutive ones.  A map's answer overwrites it.
_REG32 = 8
_LAST_REG32 = 23
# Types of keys and values, as the nft program prints them: six bits for each part (linux: opaque numbers).
_IPV4_ADDR, _IPV6_ADDR, _INET_PROTO, _INET_SERVICE = 7, 8, 12, 13

Expression = tuple[str, Sequence[tuple[str, object]]]


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between IPv4 and IPv6: header offsets are of the network header, in bytes."""

    name: str
    protocol: int
    address_type: int
    address_length: int
    source_offset: int
    destination_offset: int


_FAMILIES = (_Family("4", _IPV4, _IPV4_ADDR, 4, 12, 16), _Family("6", _IPV6, _IPV6_ADDR, 16, 8, 24))


@dataclass(frozen=True, slots=True)
class Table:
    """A network's table.

    bridge: the built-in bridge, "" for plugin programs.  subnets: whose traffic is masqueraded when it leaves the
    bridge; none when empty.
    """

    name: str
    bridge: str = ""
    subnets: Sequence[Network] = ()


def open_netlink() -> Netlink:
    """Raises StepFailed when the kernel has no netfilter netlink."""
    return Netlink.open(NETLINK_NETFILTER)


def problem() -> str:
    """Why this kernel's nf_tables cannot be used, "" when it answers."""
    try:
        with open_netlink() as netlink:
            request = Request("probe-nftables", "", messages.netfilter, _GETGEN, 0, {"nfgen_family": socket.AF_UNSPEC})
            netlink.get(request, messages.netfilter)
    except StepFailed as error:
        return str(error)
    return ""


def exists(netlink: Netlink, name: str) -> bool:
    """Whether the table is there."""
    attributes = [("NFTA_TABLE_NAME", name)]
    request = _request("find-table", name, messages.nftables.nft_table_msg, _GETTABLE, 0, attributes)
    return netlink.get(request, messages.netfilter) is not None


def prepare(netlink: Netlink, table: Table, attachments: Iterable[Attachment]) -> None:
    """Make the table, or bring an existing one to what it has to be, with the elements of `attachments` only."""
    name = table.name
    requests = [
        _request("create-table", name, messages.nftables.nft_table_msg, _NEWTABLE, CREATE, [("NFTA_TABLE_NAME", name)])
    ]
    for number, (set_name, key, value) in enumerate(_sets(table)):
        requests += _set(name, set_name, number, key, value)
    requests += _chain(name, "guard", "filter", _PREROUTING, _RAW_PRIORITY, [_guard(table.bridge)])
    ports = [rule for family in _FAMILIES for rule in _port_rules(family, mark=not table.bridge)]
    requests += _chain(name, "port_in", "nat", _PREROUTING, _DNAT_PRIORITY, ports)
    requests += _chain(name, "port_out", "nat", _OUTPUT, _DNAT_PRIORITY, ports)
    requests += _chain(name, "masquerade", "nat", _POSTROUTING, _SNAT_PRIORITY, _masquerade(table))
    for attachment in attachments:
        requests += _elements(attachment, _NEWSETELEM, CREATE)
    _commit(netlink, requests)


def map_ports(netlink: Netlink, attachment: Attachment) -> None:
    """Lead the attachment's ports of the node to the pod; and know it, if its network is of plugin programs."""
    _commit(netlink, _elements(attachment, _NEWSETELEM, CREATE))


def unmap_ports(netlink: Netlink, attachment: Attachment) -> None:
    """The inverse.  Idempotent."""
    elements = _elements(attachment, _DELSETELEM, 0)
    try:
        _commit(netlink, elements)
    except StepFailed as error:
        if not is_missing(error):
            raise
        for element in elements:  # a transaction fails as a whole, and some may be there
            _commit_unless_missing(netlink, element)


def remove(netlink: Netlink, table: str) -> None:
    """Remove the table and all in it.  Idempotent."""
    attributes = [("NFTA_TABLE_NAME", table)]
    request = _request("delete-table", table, messages.nftables.nft_table_msg, _DELTABLE, 0, attributes)
    _commit_unless_missing(netlink, request)


# The maps and sets.

Parts = Sequence[tuple[int, int]]
"""Of a key or a value: each (type, length in bytes before padding to four)."""


def _sets(table: Table) -> list[tuple[str, Parts, Parts]]:
    """Name, key and value of each map; a set has no value."""
    sets: list[tuple[str, Parts, Parts]] = []
    for family in _FAMILIES:
        address, port = (family.address_type, family.address_length), [(_INET_PROTO, 4), (_INET_SERVICE, 4)]
        value = [address, (_INET_SERVICE, 4)]
        sets += [(f"port{family.name}", port, value), (f"port{family.name}_at", [address, *port], value)]
        if not table.bridge:
            sets.append((f"pod{family.name}", [address], []))
    return sets


def _set(table: str, name: str, number: int, key: Parts, value: Parts) -> list[Request]:
    """Make the map, or the set if it has no value, and empty it."""
    attributes = [
        ("NFTA_SET_TABLE", table),
        ("NFTA_SET_NAME", name),
        ("NFTA_SET_KEY_TYPE", _concatenated(key)),
        ("NFTA_SET_KEY_LEN", sum(length for _, length in key)),
        ("NFTA_SET_ID", number + 1),
    ]
    if value:
        attributes += [
            ("NFTA_SET_FLAGS", {"NFT_SET_MAP"}),
            ("NFTA_SET_DATA_TYPE", _concatenated(value)),
            ("NFTA_SET_DATA_LEN", sum(length for _, length in value)),
        ]
    which = [("NFTA_SET_ELEM_LIST_TABLE", table), ("NFTA_SET_ELEM_LIST_SET", name)]
    return [
        _request("create-set", name, messages.nftables.nft_set_msg, _NEWSET, CREATE, attributes),
        _request("empty-set", name, messages.nftables.nft_set_elem_list_msg, _DELSETELEM, 0, which),
    ]


def _concatenated(parts: Parts) -> int:
    number = 0
    for kind, _length in parts:
        number = number << 6 | kind
    return number


def _elements(attachment: Attachment, kind: int, flags: int) -> list[Request]:
    """One request for each port and family: a port leads to the pod's first address of the family."""
    table = attachment.table
    targets: dict[int, str] = {}
    for ip in attachment.ips:
        targets.setdefault(ipaddress.ip_address(ip).version, ip)
    requests = []
    for mapping in attachment.port_mappings:
        for version, target in targets.items():
            if not mapping.host_ip or ipaddress.ip_address(mapping.host_ip).version == version:
                requests.append(_port_element(table, mapping, version, target, kind, flags))
    if not attachment.bridge:
        for ip in attachment.ips:
            address = ipaddress.ip_address(ip)
            requests.append(_element(f"pod {ip}", table, f"pod{address.version}", address.packed, b"", kind, flags))
    return requests


def _port_element(table: str, mapping: PortMapping, version: int, target: str, kind: int, flags: int) -> Request:
    key = struct.pack("!B3xH2x", PROTOCOLS[mapping.protocol], mapping.host_port)
    name = f"port{version}"
    if mapping.host_ip:
        key, name = ipaddress.ip_address(mapping.host_ip).packed + key, f"{name}_at"
    value = ipaddress.ip_address(target).packed + struct.pack("!H2x", mapping.container_port)
    return _element(str(mapping), table, name, key, value, kind, flags)


def _element(subject: str, table: str, name: str, key: bytes, value: bytes, kind: int, flags: int) -> Request:
    element: list[tuple[str, object]] = [("NFTA_SET_ELEM_KEY", _data(key))]
    if value and kind == _NEWSETELEM:
        element.append(("NFTA_SET_ELEM_DATA", _data(value)))
    attributes = [
        ("NFTA_SET_ELEM_LIST_TABLE", table),
        ("NFTA_SET_ELEM_LIST_SET", name),
        ("NFTA_SET_ELEM_LIST_ELEMENTS", [{"attrs": element}]),
    ]
    step = "map-port" if kind == _NEWSETELEM else "unmap-port"
    return _request(step, subject, messages.nftables.nft_set_elem_list_msg, kind, flags, attributes)


# The rules.


def _port_rules(family: _Family, *, mark: bool) -> list[list[Expression]]:
    """If the packet is for this node itself, look its port up, with the address first and then without.

    mark: also mark what was found, for the chain `masquerade`.
    """
    to_node = [*_is_family(family), *_fib_is_local()]
    if family.protocol == _IPV6:
        # The kernel routes nothing from ::1 to another link (there is no route_localnet for IPv6): leave it alone.
        to_node += [_payload(_NETWORK_HEADER, family.destination_offset, 16), _compare(bytes(15) + b"\1", _DIFFERENT)]
    destination = _payload(_NETWORK_HEADER, family.destination_offset, family.address_length, _REG32)
    at_address = [destination, *_port(_REG32 + family.address_length // 4)]
    name = f"port{family.name}"
    found = [*_set_mark(), _dnat(family)] if mark else [_dnat(family)]
    return [
        [*to_node, *at_address, _lookup(f"{name}_at", answer=True), *found],
        [*to_node, *_port(_REG32), _lookup(name, answer=True), *found],
    ]


def _port(register: int) -> list[Expression]:
    """Protocol and port of the destination, into this register and the next."""
    protocol = _load("meta", register, NFTA_META_KEY=_META_L4PROTO)
    return [protocol, _payload(_TRANSPORT_HEADER, 2, 2, register + 1)]


def _masquerade(table: Table) -> list[list[Expression]]:
    if table.bridge:
        rules = [rule for subnet in table.subnets for rule in _masquerade_rules(table.bridge, subnet)]
        return [*rules, _from_loopback(table.bridge)]
    return [*map(_masquerade_pods, _FAMILIES), _from_loopback("")]


def _masquerade_pods(family: _Family) -> list[Expression]:
    """A pod that asked for a port of the node may be the neighbour of the pod that it leads to, or that pod itself:
    the answer must come back by the node, which alone can undo the change of the destination."""
    marked = [_load("meta", NFTA_META_KEY=_META_MARK), _and(_MARK), _compare(bytes(4), _DIFFERENT)]
    source = _payload(_NETWORK_HEADER, family.source_offset, family.address_length)
    return [*_is_family(family), *marked, *_is_dnat(), source, _lookup(f"pod{family.name}", answer=False), ("masq", [])]


def _masquerade_rules(bridge: str, subnet: Network) -> list[list[Expression]]:
    """Pods that leave the bridge, and pods that come back to it by a port of the node: their answer must come back
    the same way, not directly from pod to pod."""
    family = _FAMILIES[0] if subnet.version == 4 else _FAMILIES[1]
    from_pod = [*_is_family(family), *_source_in(family, subnet)]
    return [
        [*from_pod, *_interface(_META_OIFNAME, bridge, _DIFFERENT), ("masq", [])],
        [*from_pod, *_interface(_META_OIFNAME, bridge), *_is_dnat(), ("masq", [])],
    ]


def _from_loopback(bridge: str) -> list[Expression]:
    """The node asked for 127.0.0.1:PORT: the pod must see an address that it can answer to."""
    loopback = ipaddress.ip_network("127.0.0.0/8")
    source = [*_is_family(_FAMILIES[0]), *_source_in(_FAMILIES[0], loopback)]
    target = _interface(_META_OIFNAME, bridge) if bridge else _is_dnat()
    return [*source, *target, ("masq", [])]


def _guard(bridge: str) -> list[Expression]:
    """route_localnet lets answers to 127.0.0.1:PORT in, and would let pods reach the node's loopback services
    (CVE-2020-8558).  Real answers still carry the node's address here: this chain runs before NAT is undone.  Plugin
    programs' links have any name, so there it is for all but the loopback link."""
    family = _FAMILIES[0]
    destination = [_payload(_NETWORK_HEADER, family.destination_offset, 1), _compare(b"\x7f")]
    verdict = {"attrs": [("NFTA_VERDICT_CODE", _NF_DROP)]}
    drop = [("NFTA_IMMEDIATE_DREG", 0), ("NFTA_IMMEDIATE_DATA", {"attrs": [("NFTA_DATA_VERDICT", verdict)]})]
    link = _interface(_META_IIFNAME, bridge) if bridge else _interface(_META_IIFNAME, "lo", _DIFFERENT)
    return [*link, *_is_family(family), *destination, ("immediate", drop)]


def _is_family(family: _Family) -> list[Expression]:
    return [_load("meta", NFTA_META_KEY=_META_NFPROTO), _compare(bytes([family.protocol]))]


def _fib_is_local() -> list[Expression]:
    """The destination is an address of this node (fib daddr type local)."""
    # pyroute2 takes the result for flags; these two "flags" make NFT_FIB_RESULT_ADDRTYPE, 3.
    address_type = {"NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF"}
    daddr = 2  # NFTA_FIB_F_DADDR
    return [
        _load("fib", NFTA_FIB_RESULT=address_type, NFTA_FIB_FLAGS=daddr),
        _compare(struct.pack("=I", _RTN_LOCAL)),
    ]


def _source_in(family: _Family, subnet: Network) -> list[Expression]:
    mask = subnet.netmask.packed
    return [
        _payload(_NETWORK_HEADER, family.source_offset, family.address_length),
        _and(mask),
        _compare(subnet.network_address.packed),
    ]


def _is_dnat() -> list[Expression]:
    """The connection's destination was changed (ct status dnat)."""
    status = struct.pack("=I", _IPS_DST_NAT)
    return [_load("ct", NFTA_CT_KEY=_CT_STATUS), _and(status), _compare(bytes(4), _DIFFERENT)]


def _interface(key: int, name: str, operator: int = _EQUAL) -> list[Expression]:
    return [_load("meta", NFTA_META_KEY=key), _compare(name.encode().ljust(_IFNAMSIZ, b"\0"), operator)]


def _load(name: str, register: int = _REG32, **attributes: object) -> Expression:
    return name, [(f"NFTA_{name.upper()}_DREG", register), *attributes.items()]


def _payload(base: int, offset: int, length: int, register: int = _REG32) -> Expression:
    where = {"NFTA_PAYLOAD_BASE": base, "NFTA_PAYLOAD_OFFSET": offset, "NFTA_PAYLOAD_LEN": length}
    return _load("payload", register, **where)


def _compare(value: bytes, operator: int = _EQUAL) -> Expression:
    attributes = [("NFTA_CMP_SREG", _REG32), ("NFTA_CMP_OP", operator), ("NFTA_CMP_DATA", _data(value))]
    return "cmp", attributes


def _and(mask: bytes) -> Expression:
    attributes = [
        ("NFTA_BITWISE_SREG", _REG32),
        ("NFTA_BITWISE_DREG", _REG32),
        ("NFTA_BITWISE_LEN", len(mask)),
        ("NFTA_BITWISE_MASK", _data(mask)),
        ("NFTA_BITWISE_XOR", _data(bytes(len(mask)))),
    ]
    return "bitwise", attributes


def _lookup(name: str, *, answer: bool) -> Expression:
    """The rule ends here for a key that the map does not have; a set has no answer."""
    registers = [("NFTA_LOOKUP_SREG", _REG32), *([("NFTA_LOOKUP_DREG", _REG32)] if answer else [])]
    return "lookup", [("NFTA_LOOKUP_SET", name), *registers]


def _set_mark() -> list[Expression]:
    """Add our bit to the packet's mark, in a register that the answer of a map does not reach."""
    register = _LAST_REG32
    keep = bytes(byte ^ 0xFF for byte in _MARK)
    change = [
        ("NFTA_BITWISE_SREG", register),
        ("NFTA_BITWISE_DREG", register),
        ("NFTA_BITWISE_LEN", len(_MARK)),
        ("NFTA_BITWISE_MASK", _data(keep)),
        ("NFTA_BITWISE_XOR", _data(_MARK)),
    ]
    store = [("NFTA_META_KEY", _META_MARK), ("NFTA_META_SREG", register)]
    return [_load("meta", register, NFTA_META_KEY=_META_MARK), ("bitwise", change), ("meta", store)]


def _dnat(family: _Family) -> Expression:
    attributes = [
        ("NFTA_NAT_TYPE", _NFT_NAT_DNAT),
        ("NFTA_NAT_FAMILY", family.protocol),
        ("NFTA_NAT_REG_ADDR_MIN", _REG32),
        ("NFTA_NAT_REG_PROTO_MIN", _REG32 + family.address_length // 4),
    ]
    return "nat", attributes


def _data(value: bytes) -> dict[str, object]:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


# The transaction.


def _chain(
    table: str, name: str, kind: str, hook: int, priority: int, rules: Sequence[Sequence[Expression]]
) -> list[Request]:
    """Make the base chain, and replace its rules by these."""
    where = {"attrs": [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]}
    chain = [
        ("NFTA_CHAIN_TABLE", table),
        ("NFTA_CHAIN_NAME", name),
        ("NFTA_CHAIN_HOOK", where),
        ("NFTA_CHAIN_TYPE", kind),
    ]
    which: list[tuple[str, object]] = [("NFTA_RULE_TABLE", table), ("NFTA_RULE_CHAIN", name)]
    rule_message = messages.nftables.nft_rule_msg
    requests = [
        _request("create-chain", name, messages.nftables.nft_chain_msg, _NEWCHAIN, CREATE, chain),
        _request("empty-chain", name, rule_message, _DELRULE, 0, which),
    ]
    for rule in rules:
        expressions = [
            {"attrs": [("NFTA_EXPR_NAME", expression), ("NFTA_EXPR_DATA", {"attrs": list(attributes)})]}
            for expression, attributes in rule
        ]
        attributes = [*which, ("NFTA_RULE_EXPRESSIONS", expressions)]
        requests.append(_request("add-rule", name, rule_message, _NEWRULE, CREATE | _APPEND, attributes))
    return requests


def _request(step: str, subject: str, message: Any, kind: int, flags: int, attributes: Sequence[object]) -> Request:
    return Request(step, subject, message, kind, flags, {"nfgen_family": _INET, "attrs": list(attributes)})


def _commit(netlink: Netlink, requests: Sequence[Request]) -> None:
    """All of the requests or none: between two marks they are one transaction."""
    if not requests:
        return
    mark = {"nfgen_family": socket.AF_UNSPEC, "version": 0, "res_id": _SUBSYSTEM}
    begin, end = (
        Request("change-nftables", "", messages.netfilter, kind, 0, mark) for kind in (_BATCH_BEGIN, _BATCH_END)
    )
    netlink.run_batch(begin, requests, end)


def _commit_unless_missing(netlink: Netlink, request: Request) -> None:
    try:
        _commit(netlink, [request])
    except StepFailed as error:
        if not is_missing(error):
            raise
