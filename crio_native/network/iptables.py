"""The rules of `nftables` for a kernel that has no nf_tables but iptables: by the programs of that name.

For a network NAME whose hash is H:

    nat   CRIO-DN-H  from PREROUTING and OUTPUT: a rule for each port of the node
          CRIO-SN-H  from CRIO-MQ-H: a rule for each pod that plugin programs attached
          CRIO-MQ-H  from POSTROUTING: masquerading, as in `nftables`
    raw   CRIO-GD-H  from PREROUTING: the guard of the node's loopback services

The chains of ports and pods are written anew, each time as a whole, from the records: slower than a map's element, and
right whatever was there.  The kernel replaces a table at once, so no packet sees half of a change.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Iterable, Sequence

from crio_native.errors import StepFailed
from crio_native.network import process
from crio_native.network.model import Attachment
from crio_native.network.nftables import Table

DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin")
_SECONDS = 20.0  # in which another program may hold the lock of iptables
_WAIT = ("-w", "10")
_FAMILIES = {4: "iptables", 6: "ip6tables"}
_MARK = "0x2000/0x2000"
_LOOPBACK = "127.0.0.0/8"


def problem() -> str:
    """Why iptables cannot be used here, "" when it can."""
    try:
        _run(4, ["-t", "nat", "-S", "POSTROUTING"])
    except StepFailed as error:
        return str(error)
    return ""


def exists(table: Table) -> bool:
    """Whether the network's chains and the way into them are there."""
    return all(_succeeds(version, ["-t", kind, "-C", *jump]) for version in _versions() for kind, jump in _jumps(table))


def prepare(table: Table, attachments: Iterable[Attachment]) -> None:
    """Make the network's chains, or bring them to what they have to be.  Raises StepFailed."""
    attached = list(attachments)
    for version in _versions():
        chains = {_chain("MQ", table.name): _masquerade(table, version)} | _of_pods(table.name, attached, version)
        _restore(version, "nat", chains)
        _restore(version, "raw", {_chain("GD", table.name): _guard(table, version)})
        for kind, jump in _jumps(table):
            if not _succeeds(version, ["-t", kind, "-C", *jump]):
                _run(version, ["-t", kind, "-A", *jump])


def update(name: str, attachments: Iterable[Attachment]) -> None:
    """Bring the chains of ports and pods to what `attachments` have, and nobody else."""
    attached = list(attachments)
    for version in _versions():
        _restore(version, "nat", _of_pods(name, attached, version))


def remove(name: str) -> None:
    """Remove the network's chains.  Idempotent."""
    table = Table(name)
    for version in _versions():
        for kind, jump in _jumps(table):
            while _succeeds(version, ["-t", kind, "-D", *jump]):
                pass
        for kind, words in (("nat", ("MQ", "DN", "SN")), ("raw", ("GD",))):
            for word in words:
                _succeeds(version, ["-t", kind, "-F", _chain(word, name)])
                _succeeds(version, ["-t", kind, "-X", _chain(word, name)])


def _chain(word: str, name: str) -> str:
    """The kernel allows 28 bytes, fewer than a network's name may have."""
    return f"CRIO-{word}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _jumps(table: Table) -> list[tuple[str, list[str]]]:
    to_node = ["-m", "addrtype", "--dst-type", "LOCAL", "-j", _chain("DN", table.name)]
    return [
        ("nat", ["PREROUTING", *to_node]),
        ("nat", ["OUTPUT", *to_node]),
        ("nat", ["POSTROUTING", "-j", _chain("MQ", table.name)]),
        ("raw", ["PREROUTING", "-j", _chain("GD", table.name)]),
    ]


def _masquerade(table: Table, version: int) -> list[str]:
    rules = [f"-j {_chain('SN', table.name)}"]
    for subnet in table.subnets:
        if subnet.version == version:
            rules.append(f"-s {subnet} ! -o {table.bridge} -j MASQUERADE")
            rules.append(f"-s {subnet} -o {table.bridge} -m conntrack --ctstate DNAT -j MASQUERADE")
    if version == 4:
        where = f"-o {table.bridge}" if table.bridge else "-m conntrack --ctstate DNAT"
        rules.append(f"-s {_LOOPBACK} {where} -j MASQUERADE")
    return rules


def _guard(table: Table, version: int) -> list[str]:
    link = f"-i {table.bridge}" if table.bridge else "! -i lo"
    return [f"{link} -d {_LOOPBACK} -j DROP"] if version == 4 else []


def _of_pods(name: str, attachments: Sequence[Attachment], version: int) -> dict[str, list[str]]:
    ports: list[str] = []
    pods: list[str] = []
    for attachment in attachments:
        ips = [ip for ip in attachment.ips if ipaddress.ip_address(ip).version == version]
        if ips:
            ports += _port_rules(attachment, ips[0], version)
        if not attachment.bridge:
            pods += [f"-s {ip} -m mark --mark {_MARK} -m conntrack --ctstate DNAT -j MASQUERADE" for ip in ips]
    return {_chain("DN", name): ports, _chain("SN", name): pods}


def _port_rules(attachment: Attachment, ip: str, version: int) -> list[str]:
    rules = []
    target = f"[{ip}]" if version == 6 else ip
    # ::1 is left alone, as in `nftables`.
    elsewhere = "! -d ::1 " if version == 6 else ""
    for mapping in attachment.port_mappings:
        if mapping.host_ip and ipaddress.ip_address(mapping.host_ip).version != version:
            continue
        where = f"-d {mapping.host_ip} " if mapping.host_ip else elsewhere
        packet = f"{where}-p {mapping.protocol} -m {mapping.protocol} --dport {mapping.host_port}"
        if not attachment.bridge:
            rules.append(f"{packet} -j MARK --set-xmark {_MARK}")
        rules.append(f"{packet} -j DNAT --to-destination {target}:{mapping.container_port}")
    return rules


def _restore(version: int, kind: str, chains: dict[str, list[str]]) -> None:
    """Write the chains as a whole; others are left alone."""
    lines = [f"*{kind}", *(f":{chain} - [0:0]" for chain in chains)]
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    _run(version, ["--noflush"], "\n".join([*lines, "COMMIT", ""]), "-restore")


def _versions() -> list[int]:
    """The families of this kernel."""
    return [4, 6] if os.path.exists("/proc/net/if_inet6") else [4]


def _succeeds(version: int, arguments: Sequence[str]) -> bool:
    try:
        _run(version, arguments)
    except StepFailed:
        return False
    return True


def _run(version: int, arguments: Sequence[str], stdin: str = "", suffix: str = "") -> None:
    name = _FAMILIES[version]
    # Where both are installed the plain name is often the one that needs nf_tables.
    path = _find(f"{name}-legacy{suffix}") or _find(f"{name}{suffix}")
    if path is None:
        raise StepFailed("iptables", 0, f"{name}{suffix}", f"not installed in {', '.join(DIRECTORIES) or 'any place'}")
    ended = process.run("iptables", path, stdin.encode(), os.environ, _SECONDS, arguments=(*_WAIT, *arguments))
    if ended.code:
        said = process.text(ended.messages or ended.output)
        raise StepFailed("iptables", 0, f"{path} {' '.join(arguments)}", said)


def _find(name: str) -> str | None:
    paths = (os.path.join(directory, name) for directory in DIRECTORIES)
    return next((path for path in paths if os.access(path, os.X_OK)), None)
