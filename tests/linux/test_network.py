"""The pod network on a real kernel: traffic, leases, failures, restarts, and nothing left behind."""

from __future__ import annotations

import errno
import functools
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crio_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    StepFailed,
)
from crio_native.network import PodNetwork, PortMapping, links, nftables

from .network_lab import NODE_IPS, OUTSIDE_IPS, Namespace, Outside, Server, ask, ip, on_a_node, ping
from .network_lab import links as link_names
from .pod_lab import Pod, attach, leases, open_network, small_network

pytestmark = pytest.mark.root


# What a pod has.


@on_a_node
def test_a_pod_has_what_its_attachment_says(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Pod(network, tmp_path, "a") as pod:
        found = pod.attachment
        assert found == network.attachment("sandbox-a")
        assert found.ips == ("10.87.0.2", "fd63:7269:6f6e::2")
        assert found.gateways == ("10.87.0.1", "fd63:7269:6f6e::1")
        result = network.result("sandbox-a")
        assert result is not None and result["interfaces"][2]["sandbox"] == str(pod.path)
        assert [item["gateway"] for item in result["ips"]] == list(found.gateways)
        lo, eth0 = pod.run(lambda: ip("addr show"))
        assert (lo["ifname"], eth0["ifname"], eth0["address"]) == ("lo", "eth0", found.mac)
        assert "UP" in lo["flags"] and "LOWER_UP" in eth0["flags"]
        inside = {f"{item['local']}/{item['prefixlen']}" for item in eth0["addr_info"] if item["scope"] == "global"}
        assert inside == set(found.addresses)
        assert not any(item.get("tentative") for item in eth0["addr_info"] if item["scope"] == "global")
        (route,) = pod.run(lambda: ip("-4 route show default"))
        assert (route["gateway"], route["dev"]) == ("10.87.0.1", "eth0")
        (route6,) = pod.run(lambda: ip("-6 route show default"))
        assert route6["gateway"] == "fd63:7269:6f6e::1"
        (port,) = ip(f"-d link show {found.host_interface}")
        assert port["master"] == "crio0" and port["linkinfo"]["info_slave_data"]["hairpin"]
        assert len(found.host_interface) <= 15
    network.shutdown(remove=True)


@on_a_node
def test_pods_reach_each_other_and_the_node_in_both_families(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Pod(network, tmp_path, "a") as a, Pod(network, tmp_path, "b") as b:
        for target in (b.ip4, b.ip6, "10.87.0.1", "fd63:7269:6f6e::1", "127.0.0.1", "::1"):
            a.run(functools.partial(ping, target))
        with Server(b, "0.0.0.0", 80, "b4"), Server(b, "::", 81, "b6"), Server(None, "::", 82, "node"):
            assert a.run(lambda: ask(b.ip4, 80)) == ("b4", a.ip4)
            assert a.run(lambda: ask(b.ip6, 81)) == ("b6", a.ip6)
            assert a.run(lambda: ask("fd63:7269:6f6e::1", 82)) == ("node", a.ip6)
            assert ask(b.ip4, 80) == ("b4", "10.87.0.1")
    network.shutdown(remove=True)


@on_a_node
def test_pods_leave_under_the_nodes_address(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a") as pod:
        with Server(outside, "0.0.0.0", 80, "out4"), Server(outside, "::", 81, "out6"):
            assert pod.run(lambda: ask(OUTSIDE_IPS[4], 80)) == ("out4", NODE_IPS[4])
            assert pod.run(lambda: ask(OUTSIDE_IPS[6], 81)) == ("out6", NODE_IPS[6])
        pod.run(lambda: ping(OUTSIDE_IPS[4]))
    network.shutdown(remove=True)


@on_a_node
def test_without_masquerading_the_world_sees_the_pods_address(tmp_path: Path) -> None:
    """Shows that the test above proves masquerading, not luck."""
    network = open_network(tmp_path, small_network(ipMasq=False))
    with Outside(tmp_path) as outside, Pod(network, tmp_path, "a") as pod:
        outside.run(lambda: ip(f"route add 10.99.0.0/29 via {NODE_IPS[4]}"))
        with Server(outside, "0.0.0.0", 80, "out"):
            assert pod.run(lambda: ask(OUTSIDE_IPS[4], 80)) == ("out", pod.ip4)
    network.shutdown(remove=True)


@on_a_node
def test_mtu_and_a_route_with_its_own_gateway(tmp_path: Path) -> None:
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "198.51.100.0/24", "gw": "10.99.0.4"}]
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/29"}]], "routes": routes}
    network = open_network(tmp_path, small_network(mtu=1400, ipam=ipam))
    with Pod(network, tmp_path, "a") as pod:
        (link,) = pod.run(lambda: ip("link show eth0"))
        assert link["mtu"] == 1400
        assert ip("link show test0")[0]["mtu"] == 1400
        (route,) = pod.run(lambda: ip("route show 198.51.100.0/24"))
        assert route["gateway"] == "10.99.0.4"
    network.shutdown(remove=True)


# Leases.


@on_a_node
def test_an_address_is_leased_again_only_after_all_others(tmp_path: Path) -> None:
    network = open_network(tmp_path, small_network())
    seen = []
    for number in range(7):
        with Pod(network, tmp_path, f"p{number}") as pod:
            seen.append(pod.ip4)
    assert seen == ["10.99.0.2", "10.99.0.3", "10.99.0.4", "10.99.0.5", "10.99.0.6", "10.99.0.2", "10.99.0.3"]
    network.shutdown(remove=True)


@on_a_node
def test_exhaustion_names_the_subnet_and_leaves_nothing(tmp_path: Path) -> None:
    network = open_network(tmp_path, small_network())
    pods = [Pod(network, tmp_path, f"p{number}") for number in range(5)]
    before = link_names()
    with pytest.raises(ResourceExhausted, match=r"10\.99\.0\.0/29 \(5 leased\)"):
        Pod(network, tmp_path, "late")
    assert link_names() == before and network.attachment("sandbox-late") is None
    network.teardown(pods[2].id)
    with Pod(network, tmp_path, "later") as later:
        assert later.ip4 == pods[2].ip4
    for pod in pods:
        network.teardown(pod.id)
        pod.close()
    assert leases(tmp_path) == set()
    network.shutdown(remove=True)


# Failures.


@on_a_node
def test_a_link_that_is_no_bridge_has_the_bridges_name(tmp_path: Path) -> None:
    ip("link add crio0 type veth peer name other")
    before = link_names()
    network = open_network(tmp_path)
    ready, reason = network.status()
    assert not ready and "link 'crio0' exists and is no bridge (veth)" in reason
    with pytest.raises(FailedPrecondition, match="give the network another name of a bridge"):
        Pod(network, tmp_path, "a")
    assert link_names() == before and leases(tmp_path) == set()
    assert network.shutdown(remove=True)
    assert "crio0" in link_names(), "what others made stays"


@on_a_node
def test_a_bridge_that_was_there_before_stays(tmp_path: Path) -> None:
    ip("link add crio0 type bridge")
    network = open_network(tmp_path)
    with Pod(network, tmp_path, "a"), nftables.open_netlink() as netlink:
        assert nftables.exists(netlink, "crio_native_crio0")
    assert network.shutdown(remove=True)
    assert "crio0" in link_names()
    with nftables.open_netlink() as netlink:
        assert not nftables.exists(netlink, "crio_native_crio0")


@on_a_node
def test_a_link_that_has_the_name_of_the_pods_link_is_left_alone(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    name = links.host_interface("sandbox-a")
    ip(f"link add {name} type veth peer name other")
    with pytest.raises(StepFailed) as caught:
        Pod(network, tmp_path, "a")
    assert (caught.value.step, caught.value.number, caught.value.path) == ("create-veth", errno.EEXIST, name)
    assert {name, "other"} <= link_names() and "master" not in ip(f"link show {name}")[0]
    assert leases(tmp_path) == set()


@on_a_node
@pytest.mark.parametrize("what", ["missing", "no namespace", "symlink"])
def test_a_path_that_is_no_namespace(tmp_path: Path, what: str) -> None:
    network = open_network(tmp_path)
    path = tmp_path / "path"
    if what == "no namespace":
        path.touch()
    with Namespace(tmp_path, "a") as pod:
        if what == "symlink":
            path.symlink_to(pod.path)
        expected = {"missing": errno.ENOENT, "no namespace": errno.EINVAL, "symlink": errno.ELOOP}
        with pytest.raises(StepFailed) as caught:
            network.setup("a", pod.netlink, netns_path=path, name="", namespace="", uid="")
        assert caught.value.number == expected[what]
    assert link_names() == {"lo", "crio0"} and leases(tmp_path) == set()


@on_a_node
def test_a_socket_of_another_namespace_is_noticed_and_undone(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Namespace(tmp_path, "a") as pod, Namespace(tmp_path, "b") as other:
        with pytest.raises(StepFailed, match=r"find-link.*eth0.*not in the namespace"):
            network.setup("a", other.netlink, netns_path=pod.path, name="", namespace="", uid="")
        assert link_names() == {"lo", "crio0"} and leases(tmp_path) == set()
        assert pod.run(link_names) == {"lo"}


@on_a_node
def test_the_kernels_own_words_are_in_the_error(tmp_path: Path) -> None:
    """A next hop that no address of the pod reaches; found by the last step, so all the others are undone."""
    routes = [{"dst": "198.51.100.0/24", "gw": "203.0.113.1"}]
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/29"}]], "routes": routes}
    network = open_network(tmp_path, small_network(ipam=ipam))
    with pytest.raises(StepFailed, match="invalid gateway") as caught:
        Pod(network, tmp_path, "a")
    assert caught.value.step == "add-route" and caught.value.path == "198.51.100.0/24 via 203.0.113.1"
    assert link_names() == {"lo", "test0"} and leases(tmp_path) == set()


@on_a_node
def test_a_socket_that_is_no_netlink_is_refused(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Namespace(tmp_path, "a") as pod, socket.socket() as wrong:
        with pytest.raises(InvalidArgument, match="netlink"):
            network.setup("a", wrong, netns_path=pod.path, name="", namespace="", uid="")
    assert link_names() == {"lo"} and leases(tmp_path) == set()


@on_a_node
def test_bad_arguments_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Namespace(tmp_path, "a") as pod:
        for sandbox_id in ("", "../x", "a/b", "a b", "a\n", "x" * 129, "-a"):
            with pytest.raises(InvalidArgument, match="sandbox_id"):
                network.setup(sandbox_id, pod.netlink, netns_path=pod.path, name="", namespace="", uid="")
        with pytest.raises(InvalidArgument, match=r"port_mappings\[0\]\.protocol"):
            attach(network, pod, [PortMapping(1, 1, "icmp")])
    assert link_names() == {"lo"} and leases(tmp_path) == set()


@on_a_node
def test_a_sandbox_is_attached_once(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    with Pod(network, tmp_path, "a") as pod:
        with pytest.raises(AlreadyExists, match="sandbox-a"):
            attach(network, pod)
        pod.run(lambda: ping("10.87.0.1"))
    network.shutdown(remove=True)


@on_a_node
def test_a_network_whose_configuration_is_wrong_still_tears_down(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    pod = Pod(network, tmp_path, "a")
    network.shutdown()
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d/10-x.conflist").write_text('{"name": "x", "plugins": [{"type": "calico"}]}')
    network = PodNetwork.from_directory(network_dir=tmp_path / "net.d", state_dir=tmp_path / "state")
    ready, reason = network.status()
    assert not ready and "plugins[0].type: 'calico' is not built in" in reason
    with pytest.raises(FailedPrecondition, match="calico"):
        Pod(network, tmp_path, "b")
    network.teardown("sandbox-a")
    pod.close()
    assert network.shutdown(remove=True) and link_names() == {"lo"}


# Tearing down, restarts, leaks.


@on_a_node
def test_teardown_is_idempotent_and_needs_no_namespace(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    pod = Pod(network, tmp_path, "a", [PortMapping(8080, 80)])
    pod.close()
    deadline = time.monotonic() + 10
    while pod.attachment.host_interface in link_names() and time.monotonic() < deadline:
        time.sleep(0.01)  # the kernel takes the namespace and with it the pair away, in its own time
    for _ in range(2):
        network.teardown("sandbox-a")
    assert network.attachment("sandbox-a") is None and leases(tmp_path) == set()
    network.teardown("never-was")
    assert network.shutdown(remove=True) and link_names() == {"lo"}


@on_a_node
def test_a_new_daemon_knows_the_pods_and_collects_those_that_are_gone(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    kept = Pod(network, tmp_path, "kept", [PortMapping(8080, 80)])
    gone = Pod(network, tmp_path, "gone", [PortMapping(8081, 80)])
    network.shutdown()
    network = open_network(tmp_path)
    assert network.attachment("sandbox-kept") == kept.attachment
    network.collect({"sandbox-kept"})
    assert network.attachment("sandbox-gone") is None
    assert gone.attachment.host_interface not in link_names()
    assert not network.shutdown(remove=True), "a pod is attached: nothing is removed"
    network = open_network(tmp_path)
    with Server(kept, "0.0.0.0", 80, "web"), Pod(network, tmp_path, "new", [PortMapping(8081, 80)]):
        assert ask("127.0.0.1", 8080)[0] == "web"
    network.teardown(kept.id)
    kept.close()
    gone.close()
    assert network.shutdown(remove=True) and link_names() == {"lo"}


KILLED = """
import os, signal, socket, sys
from pathlib import Path
from crio_native.network import NetworkList, PodNetwork, links, nftables
step, state, netns, fd = sys.argv[1:]
module = nftables if step == "map_ports" else links
real = getattr(module, step)
def killed(*args, **kwargs):
    real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, step, killed)
from crio_native.network import PortMapping
network = PodNetwork(networks=NetworkList.built_in, state_dir=Path(state))
network.setup("a", socket.socket(fileno=int(fd)), netns_path=Path(netns), name="", namespace="", uid="",
              port_mappings=[PortMapping(8080, 80)])
"""


@on_a_node
@pytest.mark.parametrize("step", ["create_bridge", "create_veth", "bring_up_port", "configure_inside", "map_ports"])
def test_kill_9_after_any_step_leaves_nothing_after_the_next_start(tmp_path: Path, step: str) -> None:
    with Namespace(tmp_path, "a") as pod:
        fd = pod.netlink.fileno()
        arguments = [sys.executable, "-c", KILLED, step, str(tmp_path / "state"), str(pod.path), str(fd)]
        assert subprocess.run(arguments, pass_fds=[fd], check=False).returncode == -signal.SIGKILL
        network = open_network(tmp_path)
        assert network.attachment("a") is not None
        network.collect(())
        assert network.attachment("a") is None and leases(tmp_path) == set()
        assert link_names() == {"lo", "crio0"} and pod.run(link_names) == {"lo"}
        with Pod(network, tmp_path, "b", [PortMapping(8080, 80)]) as other, Server(other, "0.0.0.0", 80, "web"):
            assert ask("127.0.0.1", 8080)[0] == "web"
        assert network.shutdown(remove=True) and link_names() == {"lo"}


@on_a_node
def test_the_nodes_settings_are_as_before_after_removal(tmp_path: Path) -> None:
    ip("link add up0 type veth peer name other")
    names = ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/up0/accept_ra"]
    settings = [Path("/proc/sys/net") / name for name in names]
    for setting, value in zip(settings, "001", strict=True):
        setting.write_text(value)  # a new namespace begins with the machine's own
    network = open_network(tmp_path)
    with Pod(network, tmp_path, "a"):
        assert [setting.read_text().strip() for setting in settings] == ["1", "1", "2"]
        assert Path("/proc/sys/net/ipv6/conf/crio0/accept_ra").read_text().strip() == "0"
    network.shutdown()
    network = open_network(tmp_path)  # another daemon remembers
    assert network.shutdown(remove=True)
    assert [setting.read_text().strip() for setting in settings] == ["0", "0", "1"]


@on_a_node
def test_forwarding_stays_on_while_another_bridge_may_need_it(tmp_path: Path) -> None:
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    forwarding.write_text("0")
    network = open_network(tmp_path)
    with Pod(network, tmp_path, "a"):
        ip("link add other0 type bridge")
    assert network.shutdown(remove=True)
    assert link_names() == {"lo", "other0"} and forwarding.read_text().strip() == "1"


def settled_descriptors() -> int:
    """How many are open when the threads that delete links are done: when for half a second no more were closed."""
    gc.collect()
    least, quiet = len(os.listdir("/proc/self/fd")), 0
    while quiet < 10:
        time.sleep(0.05)
        now = len(os.listdir("/proc/self/fd"))
        least, quiet = min(least, now), 0 if now < least else quiet + 1
    return least


@on_a_node
def test_two_hundred_pods_twenty_at_a_time_leave_nothing(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    setups, teardowns = [], []

    def live(number: int) -> str:
        pod = Namespace(tmp_path, str(number))
        start = time.perf_counter()
        found = attach(network, pod, [PortMapping(20000 + number, 80)] if number % 4 == 0 else [])
        setups.append(time.perf_counter() - start)
        pod.run(lambda: ping("10.87.0.1"))
        start = time.perf_counter()
        network.teardown(f"sandbox-{number}")
        teardowns.append(time.perf_counter() - start)
        pod.close()
        return found.ips[0]

    addresses = [live(number) for number in range(30)]
    best, fastest_teardown = min(setups) * 1e3, min(teardowns) * 1e3
    descriptors = settled_descriptors()
    with ThreadPoolExecutor(20) as workers:
        addresses += workers.map(live, range(30, 230))
    assert len(set(addresses)) == len(addresses), "no address is leased again while there are fresh ones"
    assert settled_descriptors() == descriptors
    assert link_names() == {"lo", "crio0"} and leases(tmp_path) == set()
    print(f"setup {best:.2f} ms, teardown {fastest_teardown:.2f} ms (the fastest of 30 in sequence)")
    assert best < 20, "a set-up takes 2 to 4 ms; much more means that something waits"
    assert network.shutdown(remove=True) and link_names() == {"lo"}


@on_a_node
def test_threads_attach_at_once_to_a_bridge_that_is_not_there_yet(tmp_path: Path) -> None:
    network = open_network(tmp_path)
    barrier = threading.Barrier(8)

    def live(number: int) -> Pod:
        barrier.wait()
        return Pod(network, tmp_path, str(number), [PortMapping(8000 + number, 80)])

    with ThreadPoolExecutor(8) as workers:
        pods = list(workers.map(live, range(8)))
    assert len({pod.ip4 for pod in pods}) == len({pod.ip6 for pod in pods}) == 8
    for number, pod in enumerate(pods):
        with Server(pod, "0.0.0.0", 80, f"web{number}"):
            assert ask("127.0.0.1", 8000 + number)[0] == f"web{number}"
    network.collect(())
    for pod in pods:
        pod.close()
    assert network.shutdown(remove=True) and link_names() == {"lo"}


MEMORY = """
import asyncio, grpc.aio, sqlite3, ipaddress, json, sys
def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss"))
before = resident()
from pathlib import Path
from crio_native.network import NetworkList, PodNetwork
network = PodNetwork(networks=NetworkList.built_in, state_dir=Path(sys.argv[1]))
network.status()
from crio_native.network.netlink import messages
messages.nftables, messages.address, messages.route, messages.link_head, messages.error
assert "pyroute2.ndb" not in sys.modules and "pyroute2.iproute" not in sys.modules
print(resident() - before)
"""


@on_a_node
def test_memory_stays_small(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    print(f"the pod network takes {int(done.stdout) / 1024:.1f} MiB beside grpc")
    assert int(done.stdout) < 10 * 1024
