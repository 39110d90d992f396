"""Ports of the node and masquerading on a real kernel: from everywhere, by nf_tables and by iptables."""

from __future__ import annotations

import socket
import struct
import subprocess
from pathlib import Path

import pytest

from crio_native.errors import (
    FailedPrecondition,
)
from crio_native.network import PodNetwork, PortMapping, iptables, nftables

from .network_lab import NODE_IPS, OUTSIDE_IPS, Outside, Server, ask, ip, on_a_node, ping
from .network_lab import links as link_names
from .pod_lab import Pod, open_network, small_network

pytestmark = pytest.mark.root


@on_a_node
def test_a_port_of_the_node_leads_to_the_pod_from_everywhere(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    ports = [PortMapping(8080, 80), PortMapping(8053, 53, "udp")]
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a", ports) as a, Pod(network, tmp_path, "b") as b:
        with (
            Server(a, "0.0.0.0", 80, "web4"),
            Server(a, a.ip6, 80, "web6"),
            Server(a, "0.0.0.0", 53, "dns", socket.SOCK_DGRAM),
        ):
            assert outside.run(lambda: ask(NODE_IPS[4], 8080)) == ("web4", OUTSIDE_IPS[4])
            assert outside.run(lambda: ask(NODE_IPS[6], 8080)) == ("web6", OUTSIDE_IPS[6])
            assert outside.run(lambda: ask(NODE_IPS[4], 8053, socket.SOCK_DGRAM)) == ("dns", OUTSIDE_IPS[4])
            assert ask(NODE_IPS[4], 8080)[0] == "web4"
            assert ask(NODE_IPS[6], 8080)[0] == "web6"
            assert ask("127.0.0.1", 8080) == ("web4", "10.87.0.1")
            assert b.run(lambda: ask(NODE_IPS[4], 8080))[0] == "web4"
            assert b.run(lambda: ask("10.87.0.1", 8080))[0] == "web4"
            assert a.run(lambda: ask(NODE_IPS[4], 8080))[0] == "web4"  # hairpin
            with pytest.raises(OSError):
                outside.run(lambda: ask(NODE_IPS[4], 8081))
            network.teardown("sandbox-a")
            with pytest.raises(ConnectionRefusedError):
                outside.run(lambda: ask(NODE_IPS[4], 8080))
    network.shutdown(remove=True)


@on_a_node
def test_pods_from_before_a_change_of_the_network_go_on(tmp_path: Path) -> None:
    """The same bridge with other addresses, while the daemon runs."""
    current = [small_network()]
    network = PodNetwork(networks=lambda: current[0], state_dir=tmp_path / "state")
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a", [PortMapping(8080, 80)]) as a:
        current[0] = small_network("10.98.0.0/24")
        with Pod(network, tmp_path, "b") as b, Server(outside, "0.0.0.0", 80, "out"), Server(a, "0.0.0.0", 80, "a"):
            assert (a.ip4, b.ip4) == ("10.99.0.2", "10.98.0.2")
            for pod in (a, b):
                assert pod.run(lambda: ask(OUTSIDE_IPS[4], 80)) == ("out", NODE_IPS[4])
            assert outside.run(lambda: ask(NODE_IPS[4], 8080))[0] == "a"
            assert b.run(lambda: ask(a.ip4, 80))[0] == "a"
    network.shutdown(remove=True)


@on_a_node
def test_a_port_for_sctp(tmp_path: Path) -> None:
    """The beginning of an association; this kernel need not have SCTP sockets for that."""
    network = open_network(tmp_path)
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a", [PortMapping(8080, 80, "sctp")]) as pod:
        Path("/proc/sys/net/netfilter/nf_conntrack_checksum").write_text("0")  # ours has none
        receiver = pod.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 132))
        receiver.settimeout(5)
        init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 1500, 1, 1, 1)
        packet = struct.pack("!HHII", 5000, 8080, 0, 0) + init
        sender = outside.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 132))
        sender.sendto(packet, (NODE_IPS[4], 0))
        data = receiver.recv(1500)
        header = data[(data[0] & 15) * 4 :]
        assert struct.unpack_from("!HH", header) == (5000, 80)
        assert socket.inet_ntoa(data[16:20]) == pod.ip4
        for sock in (sender, receiver):
            sock.close()
    network.shutdown(remove=True)


@on_a_node
def test_a_port_on_one_address_of_the_node(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    ports = [PortMapping(8080, 80, host_ip=NODE_IPS[4]), PortMapping(8080, 80, host_ip="2001:DB8:0::1")]
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a", ports) as pod:
        assert [mapping.host_ip for mapping in pod.attachment.port_mappings] == list(NODE_IPS.values())
        with Server(pod, "0.0.0.0", 80, "web4"), Server(pod, pod.ip6, 80, "web6"):
            assert outside.run(lambda: ask(NODE_IPS[4], 8080))[0] == "web4"
            assert outside.run(lambda: ask(NODE_IPS[6], 8080))[0] == "web6"
            with pytest.raises(ConnectionRefusedError):
                ask("10.87.0.1", 8080)
    network.shutdown(remove=True)


@on_a_node
def test_two_pods_cannot_have_one_port_of_the_node(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Pod(network, tmp_path, "a", [PortMapping(8080, 80)]):
        with pytest.raises(
            FailedPrecondition, match=r"port tcp 127\.0\.0\.1:8080 of the node is taken by .* sandbox-a"
        ):
            Pod(network, tmp_path, "b", [PortMapping(8080, 80, host_ip="127.0.0.1")])
        assert network.attachment("sandbox-b") is None
        with Pod(network, tmp_path, "c", [PortMapping(8080, 80, "udp")]):
            pass
    network.shutdown(remove=True)


@on_a_node
def test_a_pod_cannot_reach_the_nodes_loopback_services(tmp_path: Path) -> None:
    """CVE-2020-8558: a pod with NET_ADMIN and NET_RAW sends to 127.0.0.1 over its link."""
    network = open_network(tmp_path)

    def aim_at_node() -> None:
        Path("/proc/sys/net/ipv4/conf/all/route_localnet").write_text("1")
        ip("route del local 127.0.0.0/8 dev lo table local")
        ip("route del local 127.0.0.1 dev lo table local")
        ip("route add 127.0.0.1/32 via 10.87.0.1 dev eth0 src 10.87.0.2")

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"attack", ("127.0.0.1", 9000))

    with Pod(network, tmp_path, "a") as pod, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 9000))
        service.settimeout(0.3)
        pod.run(aim_at_node)
        pod.run(send)
        with pytest.raises(TimeoutError):
            service.recv(100)
        remove_rules("crio0", "guard")
        pod.run(send)
        assert service.recv(100) == b"attack", "without the guard it works, so the guard is what stops it"
    network.shutdown(remove=True)


def remove_rules(bridge: str, chain: str) -> None:
    with nftables.open_netlink() as netlink:
        nftables._commit(netlink, nftables._chain(f"crio_native_{bridge}", chain, "filter", 0, -300, []))


@on_a_node
def test_a_flushed_table_comes_back_with_the_ports_of_all_pods(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a", [PortMapping(8080, 80)]) as a:
        with nftables.open_netlink() as netlink:
            nftables.remove(netlink, "crio_native_crio0")
        with Server(a, "0.0.0.0", 80, "web"):
            with pytest.raises(OSError):
                outside.run(lambda: ask(NODE_IPS[4], 8080))
            with Pod(network, tmp_path, "b"):
                assert outside.run(lambda: ask(NODE_IPS[4], 8080))[0] == "web"
    network.shutdown(remove=True)


@on_a_node
def test_a_start_brings_back_what_was_flushed_meanwhile(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a", [PortMapping(8080, 80)]) as a:
        network.shutdown()
        with nftables.open_netlink() as netlink:
            nftables.remove(netlink, "crio_native_crio0")
        a.network = network = open_network(tmp_path)
        network.collect({"sandbox-a"})
        with Server(a, "0.0.0.0", 80, "web"), Server(outside, "0.0.0.0", 80, "out"):
            assert outside.run(lambda: ask(NODE_IPS[4], 8080))[0] == "web"
            assert a.run(lambda: ask(OUTSIDE_IPS[4], 80)) == ("out", NODE_IPS[4])
    network.shutdown(remove=True)


@on_a_node
def test_a_kernel_without_nf_tables_and_a_host_without_iptables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown netlink protocol stands for it: the kernel's answer to opening the socket is real."""
    monkeypatch.setattr(nftables, "NETLINK_NETFILTER", 31)
    monkeypatch.setattr(iptables, "DIRECTORIES", ())
    network = open_network(tmp_path)
    ready, limit = network.status()
    assert ready and "no masquerading and no host ports" in limit and "EPROTONOSUPPORT" in limit
    with Pod(network, tmp_path, "a") as a, Pod(network, tmp_path, "b") as b:
        a.run(lambda: ping(b.ip4))
        with pytest.raises(
            FailedPrecondition, match=r"ports of the node \(tcp :8080\), which need nf_tables or iptables"
        ):
            Pod(network, tmp_path, "c", [PortMapping(8080, 80)])
    assert network.shutdown(remove=True) and link_names() == {"lo"}


@on_a_node
def test_a_kernel_with_iptables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports from everywhere, masquerading, a restart of the daemon, a flush by somebody else; and nothing is left."""
    monkeypatch.setattr(nftables, "NETLINK_NETFILTER", 31)
    network = open_network(tmp_path)
    assert network.status() == (True, "")
    ports = [PortMapping(8080, 80), PortMapping(8081, 81, "udp"), PortMapping(8082, 80, "tcp", NODE_IPS[4])]
    with Outside(tmp_path) as outside:
        with Pod(network, tmp_path, "a", ports) as a, Pod(network, tmp_path, "b", [PortMapping(8090, 80)]) as b:
            with Server(outside, "0.0.0.0", 80, "out"):
                assert a.run(lambda: ask(OUTSIDE_IPS[4], 80)) == ("out", NODE_IPS[4])
            with Server(a, "0.0.0.0", 80, "a4"), Server(a, "0.0.0.0", 81, "udp", socket.SOCK_DGRAM):
                assert outside.run(lambda: ask(NODE_IPS[4], 8080)) == ("a4", OUTSIDE_IPS[4])
                assert outside.run(lambda: ask(NODE_IPS[4], 8081, socket.SOCK_DGRAM))[0] == "udp"
                assert ask("127.0.0.1", 8080) == ("a4", "10.87.0.1") and ask(NODE_IPS[4], 8082)[0] == "a4"
                for pod in (a, b):
                    assert pod.run(lambda: ask(NODE_IPS[4], 8080))[0] == "a4"
                with pytest.raises(OSError):
                    ask("127.0.0.1", 8082)
            with Server(a, "::", 80, "a6"):
                assert outside.run(lambda: ask(NODE_IPS[6], 8080)) == ("a6", OUTSIDE_IPS[6])
                assert a.run(lambda: ask(NODE_IPS[6], 8080))[0] == "a6"
            subprocess.run(["iptables-legacy", "-t", "nat", "-F", "PREROUTING"], check=True)
            network.shutdown()
            b.network = network = open_network(tmp_path)
            b.network.teardown("sandbox-b")
            assert "--dport 8090" not in saved_by_iptables() and "--dport 8080" in saved_by_iptables()
            with Pod(network, tmp_path, "c"), Server(a, "0.0.0.0", 80, "a4"):
                assert outside.run(lambda: ask(NODE_IPS[4], 8080)) == ("a4", OUTSIDE_IPS[4])
            a.network = network
        assert "--dport" not in saved_by_iptables()
    assert network.shutdown(remove=True) and "CRIO" not in saved_by_iptables()


def saved_by_iptables() -> str:
    commands = ("iptables-legacy-save", "ip6tables-legacy-save")
    return "".join(subprocess.run([it], capture_output=True, text=True, check=True).stdout for it in commands)
