"""CNI plugins that are programs: Debian's, one that delegates, what they are told, and when they are ready."""

from __future__ import annotations

import base64
import functools
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from crio_native.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from crio_native.network import PortMapping, nftables
from crio_native.network.cni.chores import FIRST_PAUSE
from crio_native.network.cni.protocol import PluginFailed

from ..waiting import wait_for
from .cni_lab import DEBIAN, SHORT, Lab, processes_of
from .network_lab import OUTSIDE_IPS, Namespace, Outside, Server, ask, ip, on_a_node, ping
from .network_lab import links as link_names
from .pod_lab import Pod

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package containernetworking-plugins"),
]

PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
DUAL = ("10.55.0.0/24", "fd55::/64")
BANDWIDTH = {"ingressRate": 8_000_000, "ingressBurst": 17_179_869_176}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def rate_limited() -> bool:
    """Whether some link of the node has a token bucket, as the plugin bandwidth makes."""
    done = subprocess.run(["tc", "qdisc", "show"], capture_output=True, text=True, check=True)
    return "tbf" in done.stdout


# Debian's plugins.


@pytest.mark.parametrize("rules", ["nf_tables", "iptables"])
@on_a_node
def test_ptp_with_the_built_in_portmap(lab: Lab, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rules == "iptables":  # an unknown netlink protocol: the kernel's own refusal
        monkeypatch.setattr(nftables, "NETLINK_NETFILTER", 31)
    lab.debian()
    lab.write({"type": "ptp", "ipMasq": True, "ipam": lab.ipam(*DUAL)}, PORTMAP)
    network = lab.opened()
    assert network.status() == (True, "")
    with Outside(lab.directory) as outside, Pod(network, lab.directory, "a", ports=[PortMapping(8080, 80)]) as a:
        assert a.attachment.ips == ("10.55.0.2", "fd55::2") and a.attachment.bridge == ""
        assert lab.leased() == set(a.attachment.ips)
        inside = {item["local"]: item["prefixlen"] for item in a.run(lambda: ip("addr show"))[1]["addr_info"]}
        assert inside["10.55.0.2"] == 24
        with Server(outside, "0.0.0.0", 80, "out"):
            assert a.run(lambda: ask(OUTSIDE_IPS[4], 80))[0] == "out"
        network.check("sandbox-a")
        with Pod(network, lab.directory, "b") as b, Server(a, "0.0.0.0", 80, "a4"):
            assert b.run(lambda: ask(a.ip4, 80)) == ("a4", b.ip4)
            for where in (None, outside, a, b):
                addresses = ["192.0.2.1"] if where is outside else ["192.0.2.1", "10.55.0.1"]
                for address in addresses if where else [*addresses, "127.0.0.1"]:
                    asked = (lambda address=address: ask(address, 8080)) if where else None
                    answer = where.run(asked) if where and asked else ask(address, 8080)
                    assert answer[0] == "a4", f"{address} from {where and where.path}"
        with Server(a, "::", 80, "a6"):
            assert outside.run(lambda: ask("2001:db8::1", 8080)) == ("a6", OUTSIDE_IPS[6])
            assert a.run(lambda: ask("fd55::1", 8080))[0] == "a6"
    assert lab.leased() == set() and lab.results() == {}
    assert network.shutdown(remove=True) and link_names() <= {"lo", "up0"}


@on_a_node
def test_a_list_that_only_programs_run(lab: Lab) -> None:
    """bridge, portmap, bandwidth, tuning and firewall, all by Debian's programs."""
    lab.debian(cni_bridge="bridge", cni_portmap="portmap")
    lab.write(
        {"type": "cni-bridge", "bridge": "br9", "isGateway": True, "ipMasq": True, "ipam": lab.ipam(DUAL[0])},
        {"type": "cni-portmap", "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}, "mtu": 1400},
        {"type": "firewall"},
        disableCheck=True,  # this portmap's CHECK looks for IPv6 rules that its ADD does not make for an IPv4 pod
    )
    network = lab.opened()
    ports = [PortMapping(8080, 80), PortMapping(8081, 80, "udp")]
    with Outside(lab.directory) as outside:
        with Pod(network, lab.directory, "a", ports=ports, capabilities={"bandwidth": BANDWIDTH}) as a:
            assert not a.attachment.maps_ports
            assert rate_limited()
            sysctl = Path("/proc/sys/net/ipv4/conf/eth0/log_martians")
            assert a.run(lambda: (sysctl.read_text().strip(), ip("link show eth0")[0]["mtu"])) == ("1", 1400)
            assert "10.55.0.2" in subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
            with Server(a, "0.0.0.0", 80, "web"), Server(a, "0.0.0.0", 80, "dns", socket.SOCK_DGRAM):
                assert outside.run(lambda: ask("192.0.2.1", 8080))[0] == "web"
                assert outside.run(lambda: ask("192.0.2.1", 8081, socket.SOCK_DGRAM))[0] == "dns"
            network.check("sandbox-a")
            with pytest.raises(FailedPrecondition, match=r"port tcp :8080 of the node is taken by pod default/web"):
                Pod(network, lab.directory, "b", ports=[PortMapping(8080, 80)])
            assert lab.leased() == set(a.attachment.ips)
    assert lab.leased() == set() and not rate_limited()
    saved = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    assert "10.55.0.2" not in saved and "8080" not in saved
    network.shutdown(remove=True)


@on_a_node
def test_programs_after_the_built_in_bridge(lab: Lab) -> None:
    lab.debian()
    ranges = [[{"subnet": subnet}] for subnet in DUAL]
    lab.write(
        {"type": "bridge", "bridge": "br8", "isGateway": True, "ipam": {"type": "host-local", "ranges": ranges}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        {"type": "tuning", "mtu": 1400},
        PORTMAP,
    )
    network = lab.opened()
    with Pod(network, lab.directory, "a", ports=[PortMapping(8080, 80)], capabilities={"bandwidth": BANDWIDTH}) as a:
        assert a.attachment.bridge == "br8" and a.attachment.ips == ("10.55.0.2", "fd55::2")
        assert a.attachment == network.attachment("sandbox-a")
        assert rate_limited() and a.run(lambda: ip("link show eth0"))[0]["mtu"] == 1400
        with Server(a, "0.0.0.0", 80, "web"):
            assert ask("127.0.0.1", 8080)[0] == "web"
        network.check("sandbox-a")
    assert not rate_limited() and lab.results() == {}
    assert network.shutdown(remove=True) and link_names() == {"lo"}


@on_a_node
def test_a_pod_on_the_nodes_own_link(lab: Lab) -> None:
    lab.debian()
    ipam = {"type": "static", "addresses": [{"address": "192.0.2.77/24"}]}
    lab.write({"type": "macvlan", "master": "up0", "ipam": ipam})
    network = lab.opened()
    with Outside(lab.directory) as outside, Pod(network, lab.directory, "a") as a:
        assert a.attachment.addresses == ("192.0.2.77/24",)
        a.run(lambda: ping(OUTSIDE_IPS[4]))
        outside.run(lambda: ping("192.0.2.77"))
    assert network.shutdown(remove=True)


@on_a_node
def test_an_old_single_plugin_file(lab: Lab) -> None:
    """No list and no version: the plugin is run at 0.2.0, whose results look different."""
    lab.debian()
    ipam = {"type": "host-local", "subnet": "10.5.0.0/24", "dataDir": str(lab.ipam_dir)}
    data = {"name": "old", "type": "ptp", "ipam": ipam}
    (lab.network_dir / "10-old.conf").write_text(json.dumps(data))
    network = lab.opened()
    with Pod(network, lab.directory, "a") as a:
        assert a.attachment.addresses == ("10.5.0.2/24",) and a.attachment.gateways == ("10.5.0.1",)
        a.run(lambda: ping("10.5.0.1"))
        network.check("sandbox-a")
    assert lab.leased() == set()
    network.shutdown(remove=True)


@on_a_node
def test_an_error_of_a_plugin_keeps_its_words(lab: Lab) -> None:
    """Two addresses, the third pod gets none; what the first plugin made is undone, and the next pod finds the same."""
    lab.debian(cni_bridge="bridge")
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.5.0.0/30"}]], "dataDir": str(lab.ipam_dir)}
    lab.write({"type": "cni-bridge", "bridge": "br9", "isGateway": True, "ipam": ipam})
    network = lab.opened()
    with Pod(network, lab.directory, "a"):
        before = link_names()
        for _ in range(2):
            with pytest.raises(PluginFailed) as caught:
                Pod(network, lab.directory, "b")
            assert caught.value.step == "cni ADD plugins[0]" and caught.value.path == "cni-bridge"
            assert "no IP addresses available in range set" in str(caught.value)
        assert link_names() == before and len(lab.leased()) == 1 and len(lab.results()) == 1
    network.shutdown(remove=True)


# What a plugin is told.


@on_a_node
def test_a_plugin_that_delegates(lab: Lab) -> None:
    """The way of flannel and others: their plugin makes a bridge's configuration and runs that one."""
    lab.debian()
    lab.delegating("meta")
    bridge = {"type": "bridge", "bridge": "br9", "isGateway": True, "hairpinMode": True, "ipam": lab.ipam(*DUAL)}
    inner = {"cniVersion": "1.0.0", **bridge}
    takes = {"capabilities": {"bandwidth": True, "dns": True, "aliases": False}}
    lab.write({"type": "meta", "delegate": inner, **takes}, PORTMAP, cniVersion="1.1.0")
    network = lab.opened()
    assert network.status() == (True, "")
    wanted = {"bandwidth": BANDWIDTH, "dns": {"servers": ["10.0.0.10"]}, "aliases": ["web"], "cgroupPath": "/x"}
    with Pod(network, lab.directory, "a", ports=[PortMapping(8080, 80)], capabilities=wanted) as a:
        (added,) = lab.calls("ADD")
        assert added["env"] == {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "sandbox-a",
            "CNI_NETNS": str(a.path),
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;"
            "K8S_POD_INFRA_CONTAINER_ID=sandbox-a;K8S_POD_UID=u-1",
            "CNI_PATH": str(lab.programs),
        }
        assert (added["config"]["name"], added["config"]["cniVersion"]) == ("test", "1.1.0")
        assert added["config"]["runtimeConfig"] == {key: wanted[key] for key in ("bandwidth", "dns")}
        assert "prevResult" not in added["config"]
        with Server(a, "0.0.0.0", 80, "web"):
            assert ask("127.0.0.1", 8080)[0] == "web" and a.run(lambda: ask("10.55.0.1", 8080))[0] == "web"
        network.check("sandbox-a")
        ((name, recorded),) = lab.results().items()
        assert name == "test-sandbox-a-eth0"
        assert (recorded["kind"], recorded["containerId"], recorded["ifName"]) == ("cniCacheV1", "sandbox-a", "eth0")
        assert json.loads(base64.b64decode(recorded["config"]))["plugins"][0]["type"] == "meta"
        assert recorded["result"]["ips"][0]["address"] == "10.55.0.2/24"
        assert ["K8S_POD_NAME", "web"] in recorded["cniArgs"]
    for command in ("CHECK", "DEL"):
        (call,) = lab.calls(command)
        assert call["config"]["prevResult"]["ips"][0]["address"] == "10.55.0.2/24"
        assert call["config"]["prevResult"]["cniVersion"] == "1.1.0"
    assert lab.leased() == set()
    network.shutdown(remove=True)


@on_a_node
def test_the_result_goes_from_plugin_to_plugin_in_the_lists_version(lab: Lab) -> None:
    lab.debian()
    lab.delegating("meta")
    inner = {"cniVersion": "0.4.0", "type": "tuning", "sysctl": {}}
    ranges = [[{"subnet": "10.55.0.0/24"}]]
    lab.write(
        {"type": "bridge", "bridge": "br8", "isGateway": True, "ipam": {"type": "host-local", "ranges": ranges}},
        {"type": "meta", "delegate": {**inner, "cniVersion": "0.4.0"}},
        cniVersion="0.4.0",
        cniVersions=["0.3.0", "0.4.0"],
    )
    network = lab.opened()
    # The delegate's ADD needs a result too; this one hands ADD's on only by its own words.
    lab.shell(
        "meta",
        'cat >>"$here/stdin"; echo "$ok"',
        version="""
if [ "$CNI_COMMAND" = VERSION ]; then echo '{"supportedVersions":["0.3.0","0.3.1","0.4.0"]}'; exit 0; fi
""",
    )
    with Pod(network, lab.directory, "a") as a:
        config = json.loads((lab.programs / "stdin").read_text())
        assert config["cniVersion"] == config["prevResult"]["cniVersion"] == "0.4.0"
        (address,) = config["prevResult"]["ips"]
        assert (address["version"], address["address"], address["gateway"]) == ("4", "10.55.0.2/24", "10.55.0.1")
        assert config["prevResult"]["interfaces"][address["interface"]]["sandbox"] == str(a.path)
        assert a.attachment.ips == ("10.1.2.3",), "the last plugin's result is the pod's"
    network.shutdown(remove=True)


@on_a_node
def test_a_plugin_has_nothing_of_ours_but_its_streams_and_a_lock(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNI_IFNAME", "evil0")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("KUBECONFIG", "/etc/kube")
    lab.shell(
        "own",
        'files=$(readlink /proc/$$/fd/*); echo "$files" >"$here/fds"; env >"$here/env"; pwd >"$here/pwd"; echo "$ok"',
    )
    lab.write({"type": "own"})
    network = lab.opened()
    leaked = os.open("/", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    with Pod(network, lab.directory, "a"):
        files = set((lab.programs / "fds").read_text().splitlines())
        lock = str(lab.directory / "cni/results/test-sandbox-a-eth0")
        others = {name for name in files if not name.startswith("pipe:")}
        assert others == {"/memfd:stdin (deleted)", lock, str(lab.programs / "own")}
        env = dict(line.split("=", 1) for line in (lab.programs / "env").read_text().splitlines())
        assert env["CNI_IFNAME"] == "eth0" and env["KUBECONFIG"] == "/etc/kube" and "NOTIFY_SOCKET" not in env
        assert (lab.programs / "pwd").read_text() == "/\n"
    os.close(leaked)
    network.shutdown(remove=True)


@on_a_node
def test_a_network_of_ipv6_only(lab: Lab) -> None:
    lab.debian()
    lab.write({"type": "ptp", "ipam": lab.ipam("fd55::/64")}, PORTMAP)
    network = lab.opened()
    ports = [PortMapping(8080, 80), PortMapping(8081, 80, "tcp", "2001:db8::1")]
    with Outside(lab.directory) as outside, Pod(network, lab.directory, "a", ports) as a:
        assert a.attachment.ips == ("fd55::2",)
        with Server(a, "::", 80, "a6"):
            for port in (8080, 8081):
                assert outside.run(functools.partial(ask, "2001:db8::1", port)) == ("a6", OUTSIDE_IPS[6])
            assert a.run(lambda: ask("2001:db8::1", 8080))[0] == "a6"
            with pytest.raises(OSError):
                a.run(lambda: ask("fd55::1", 8081))
    assert lab.leased() == set()
    network.shutdown(remove=True)


def test_a_name_that_the_arguments_cannot_carry(lab: Lab) -> None:
    lab.shell("own", 'echo "$ok"')
    lab.write({"type": "own"})
    network = lab.opened()
    with Namespace(lab.directory, "a") as pod:
        with pytest.raises(InvalidArgument, match=r"config\.metadata\.name: must not contain ';'"):
            network.setup("a", pod.netlink, netns_path=pod.path, name="x;K8S_POD_UID=0", namespace="", uid="")
    assert lab.called() == []
    network.shutdown()


# Readiness and changes of the directory.


@on_a_node
def test_readiness_follows_the_plugins_status(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crio_native.network.cni.readiness.FRESH_SECONDS", 0.05)
    lab.delegating("meta")
    lab.write({"type": "meta", "delegate": {}}, cniVersion="1.1.0")
    network = lab.opened()
    assert network.status() == (True, "")
    (lab.programs / "not-ready").write_text("the controller has no route")
    wait_for(lambda: not network.status()[0])
    assert "cni STATUS plugins[0]" in network.status()[1] and "the controller has no route" in network.status()[1]
    (lab.programs / "not-ready").unlink()
    wait_for(lambda: network.status() == (True, ""))
    network.shutdown()


@on_a_node
def test_a_grace_period_bridges_a_short_unreadiness(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crio_native.network.cni.readiness.FRESH_SECONDS", 0.05)
    lab.delegating("meta")
    lab.write({"type": "meta", "delegate": {}}, cniVersion="1.1.0")
    network = lab.opened(status_grace=1.0)
    assert network.status()[0]
    (lab.programs / "not-ready").write_text("restarting")
    began = time.monotonic()
    wait_for(lambda: not network.status()[0])
    assert time.monotonic() - began > 0.8
    network.shutdown()


@on_a_node
def test_a_plugin_that_hangs_does_not_hold_the_status(lab: Lab) -> None:
    lab.shell("own", '[ "$CNI_COMMAND" = STATUS ] && sleep 1000; echo "$ok"')
    lab.write({"type": "own"}, cniVersion="1.1.0")
    network = lab.opened(limits=SHORT)
    began = time.monotonic()
    ready, reason = network.status()
    assert time.monotonic() - began < 1.5
    assert not ready and "plugins of network 'test' have not told their state" in reason
    wait_for(lambda: "cni STATUS plugins[0]" in network.status()[1])
    assert processes_of(lab.directory) == []
    network.shutdown()


@on_a_node
def test_a_running_daemon_takes_another_network(lab: Lab) -> None:
    """A named network is waited for, appears, loses its plugin, and gives way to another; pods stay what they are."""
    lab.debian()
    network = lab.opened(default_network="mine")
    assert network.status()[0] is False and "'mine' not found" in network.status()[1]
    with pytest.raises(FailedPrecondition, match=r"the pod network is not ready.*'mine'"):
        Pod(network, lab.directory, "a")
    lab.write({"type": "ptp", "ipam": lab.ipam("10.55.0.0/24")}, name="mine")
    wait_for(lambda: network.status()[0])
    a = Pod(network, lab.directory, "a")
    (lab.programs / "ptp").unlink()
    assert "'ptp' is not built in here, and no directory" in network.status()[1]
    (lab.programs / "ptp").symlink_to(DEBIAN / "ptp")
    ranges = [[{"subnet": "10.56.0.0/24"}]]
    own = {"type": "bridge", "bridge": "br7", "isGateway": True, "ipam": {"type": "host-local", "ranges": ranges}}
    lab.write(own, name="mine")
    with Pod(network, lab.directory, "b") as b:
        assert (a.ip4, b.ip4) == ("10.55.0.2", "10.56.0.2")
        a.run(lambda: ping("10.55.0.1"))
        network.teardown("sandbox-a")
        a.close()
    assert lab.leased() == set() and lab.results() == {}
    assert network.shutdown(remove=True) and link_names() == {"lo"}


@on_a_node
def test_eight_pods_at_once(lab: Lab) -> None:
    lab.debian(cni_bridge="bridge")
    lab.write({"type": "cni-bridge", "bridge": "br9", "isGateway": True, "ipam": lab.ipam(*DUAL)}, PORTMAP)
    network = lab.opened()
    pods: list[Pod] = []

    def live(number: int) -> None:
        pods.append(Pod(network, lab.directory, str(number), ports=[PortMapping(8000 + number, 80)]))

    threads = [threading.Thread(target=live, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({pod.ip4 for pod in pods}) == len({pod.ip6 for pod in pods}) == 8
    for pod in pods:
        number = int(pod.id.removeprefix("sandbox-"))
        with Server(pod, "0.0.0.0", 80, pod.id):
            assert ask("127.0.0.1", 8000 + number)[0] == pod.id
        network.teardown(pod.id)
        pod.close()
    descriptors = os.listdir("/proc/self/fd")
    assert not any(
        "memfd" in os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors if os.path.exists(f"/proc/self/fd/{fd}")
    )
    assert lab.leased() == set() and lab.results() == {}
    network.shutdown(remove=True)


def test_the_first_retry_is_soon_but_not_at_once() -> None:
    assert 1 <= FIRST_PAUSE <= 30


def test_no_program_for_a_network_that_is_chosen(lab: Lab) -> None:
    """Between the look at the directories and the run somebody removes the plugin."""
    lab.shell("own", 'echo "$ok"')
    lab.write({"type": "own"})
    network = lab.opened()
    listed = network._networks()
    (lab.programs / "own").unlink()
    with pytest.raises(NotFound, match=r"CNI plugin 'own' not found: it is in none of crio\.network\.plugin_dirs"):
        network._plugins.negotiate(listed)
    network.shutdown()
