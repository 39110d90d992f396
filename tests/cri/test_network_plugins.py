"""A daemon whose pods are connected by plugin programs, on a node of its own: what a kubelet sees of it."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import ScratchDaemon
from tests.linux.cni_lab import DEBIAN, Lab
from tests.linux.network_lab import on_a_node

from .conftest import Client, refused

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package containernetworking-plugins"),
]

PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}


class PluginDaemon(ScratchDaemon):
    """Its networks and plugins are a Lab's."""

    def __init__(self, lab: Lab, settings: str) -> None:
        super().__init__()
        self._lab, self._settings = lab, settings

    def _write_config(self) -> None:
        super()._write_config()
        network = f'network_dir = "{self._lab.network_dir}"\nplugin_dirs = ["{self._lab.programs}"]\n{self._settings}'
        (self.directory / "crio.conf.d/10-network.conf").write_text(f"[crio.network]\n{network}")


@contextmanager
def running(lab: Lab, settings: str = "") -> Iterator[Client]:
    daemon = PluginDaemon(lab, settings)
    try:
        daemon.start()
        client = Client(daemon)
        yield client
        client.channel.close()
    finally:
        print(daemon.log_tail(60))
        problems = daemon.close()
    assert not problems


def with_lab(test: Callable[[Lab], None]) -> Callable[[], None]:
    """The test on a node of its own, with a lab whose path is short enough for the daemon's sockets."""

    @on_a_node
    def run() -> None:
        directory = Path(tempfile.mkdtemp(prefix="cni-", dir="/var/tmp"))
        try:
            test(Lab(directory))
        finally:
            shutil.rmtree(directory)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def network_condition(client: Client) -> Any:
    return next(item for item in client.call("Status").status.conditions if item.type == "NetworkReady")


def ready(client: Client) -> bool:
    return bool(network_condition(client).status)


@with_lab
def test_a_pod_by_debians_plugins_lives_through_a_kill_of_the_daemon(lab: Lab) -> None:
    lab.debian(cni_bridge="bridge")
    bridge = {"type": "cni-bridge", "bridge": "br9", "isGateway": True, "hairpinMode": True}
    ipam = lab.ipam("10.55.0.0/24", "fd55::/64")
    lab.write({**bridge, "ipam": ipam}, {"type": "bandwidth", "capabilities": {"bandwidth": True}}, PORTMAP)
    with running(lab) as client:
        client.until(lambda: ready(client))
        told = json.loads(client.call("Status", verbose=True).info["network"])
        assert (told["name"], told["builtIn"], told["programs"]) == ("test", ["portmap"], ["cni-bridge", "bandwidth"])
        client.load_image()
        port = pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=8080)
        rates = {f"kubernetes.io/{direction}-bandwidth": "100M" for direction in ("ingress", "egress")}
        pod = client.pod(name="web", annotations=rates, port_mappings=[port])
        network = client.call("PodSandboxStatus", pod_sandbox_id=pod).status.network
        info = json.loads(client.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"])
        assert [item["address"] for item in info["cniResult"]["ips"]] == ["10.55.0.2/24", "fd55::2/64"]
        assert network.ip == "10.55.0.2" and [item.ip for item in network.additional_ips] == ["fd55::2"]
        queues = subprocess.run(["tc", "qdisc", "show"], capture_output=True, text=True, check=True).stdout
        assert queues.count("rate 100Mbit") == 2
        client.start(pod, "httpd", "-f", "-p", "80", "-h", "/")
        client.until(lambda: answers("127.0.0.1", 8080))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "tcp :8080", "default/web"):
            client.pod(name="other", port_mappings=[port])
        client.restart(signal.SIGKILL)
        assert client.call("PodSandboxStatus", pod_sandbox_id=pod).status.network == network
        assert answers("127.0.0.1", 8080) and answers("10.55.0.2", 80)
        client.remove_pod(pod)
        assert lab.leased() == set()
        results = client.daemon.directory / "root/cni/results"
        assert list(results.iterdir()) == []
        assert not answers("127.0.0.1", 8080)


def answers(address: str, port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(2)
        return sock.connect_ex((address, port)) == 0


@with_lab
def test_bad_bandwidth_is_refused_at_the_door(lab: Lab) -> None:
    lab.shell("own", 'echo "$ok"')
    lab.write({"type": "own"})
    with running(lab) as client:
        for value in ("fast", "", "-1M", "10", "2P", "1" * 100, "1e99", "10MB"):
            words = "config.annotations[kubernetes.io/egress-bandwidth]"
            with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
                client.pod(annotations={"kubernetes.io/egress-bandwidth": value})
        assert lab.called() == []


@with_lab
def test_what_plugins_are_told_of_a_pod(lab: Lab) -> None:
    lab.shell("own", '[ "$CNI_COMMAND" = ADD ] && cat >"$here/config" && echo "$CNI_ARGS" >"$here/args"; echo "$ok"')
    names = [
        "portMappings",
        "bandwidth",
        "dns",
        "aliases",
        "cgroupPath",
        "ipRanges",
        "io.kubernetes.cri.pod-annotations",
    ]
    lab.write({"type": "own", "capabilities": dict.fromkeys(names, True)})
    with running(lab) as client:
        cidr = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.7.0.0/24,fd07::/64"))
        client.call("UpdateRuntimeConfig", runtime_config=cidr)
        client.restart()
        annotations = {"kubernetes.io/ingress-bandwidth": "1.5M", "other": "x"}
        dns = pb.DNSConfig(servers=["10.0.0.10"], searches=["svc"], options=["ndots:5"])
        port = pb.PortMapping(protocol=pb.SCTP, container_port=80, host_port=8080, host_ip="192.0.2.1")
        unmapped = pb.PortMapping(protocol=pb.TCP, container_port=81)
        pod = client.pod(name="web", uid="u-7", annotations=annotations, dns_config=dns, port_mappings=[port, unmapped])
        runtime = json.loads((lab.programs / "config").read_text())["runtimeConfig"]
        mapping = {"hostPort": 8080, "containerPort": 80, "protocol": "sctp", "hostIP": "192.0.2.1"}
        assert runtime == {
            "portMappings": [mapping],
            "bandwidth": {"ingressRate": 1_500_000, "ingressBurst": (2**31 - 1) * 8},
            "dns": {"servers": ["10.0.0.10"], "searches": ["svc"], "options": ["ndots:5"]},
            "aliases": ["web"],
            "cgroupPath": client.daemon.cgroup_parent,
            "ipRanges": [[{"subnet": "10.7.0.0/24"}], [{"subnet": "fd07::/64"}]],
            "io.kubernetes.cri.pod-annotations": annotations,
        }
        assert (lab.programs / "args").read_text().strip() == (
            f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID={pod};K8S_POD_UID=u-7"
        )
        client.remove_pod(pod)


@with_lab
def test_more_pods_than_workers_hang_in_a_plugin_and_nothing_else_waits(lab: Lab) -> None:
    """Lists, states, containers of other pods; and the daemon stops in its time, and the next one undoes them."""
    lab.shell("own", 'while [ "$CNI_COMMAND" = ADD ] && [ -e "$here/hang" ]; do sleep 0.05; done; echo "$ok"')
    lab.write({"type": "own"})
    with running(lab) as client:
        client.load_image()
        good = client.pod()
        container = client.start(good, "sleep", "1000")
        (lab.programs / "hang").touch()
        seen: list[str] = []

        def hang(number: int) -> None:
            try:
                client.pod(name=f"stuck{number}", seconds=8)
            except grpc.RpcError as error:
                seen.append(f"{error.code().name} {error.details()}")

        threads = [threading.Thread(target=hang, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        client.until(lambda: len([line for line in lab.called() if line.startswith("ADD")]) > 20, 20)
        slowest = 0.0
        for _ in range(3):
            for act in (
                client.pods,
                client.containers,
                lambda: network_condition(client),
                lambda: client.exec(container, "true"),
                lambda: client.call("ContainerStats", container_id=container),
            ):
                began = time.monotonic()
                act()
                slowest = max(slowest, time.monotonic() - began)
        began = time.monotonic()
        client.call("StopContainer", container_id=container, timeout=0)
        slowest = max(slowest, time.monotonic() - began)
        for thread in threads:
            thread.join()
        assert slowest < 6, f"{slowest:.2f} s: a plugin has 150"
        assert len(seen) == 40 and all(line.startswith("DEADLINE_EXCEEDED") for line in seen)
        assert sum("is still setting the network up after" in line for line in seen) > 10
        began = time.monotonic()
        assert client.stop_daemon() == 0
        assert time.monotonic() - began < 19, "it does not wait for the plugins"
        (lab.programs / "hang").unlink()
        client.start_daemon()
        client.until(lambda: [pod.id for pod in client.pods()] == [good])
        results = client.daemon.directory / "root/cni/results"
        client.until(lambda: [path.name for path in results.iterdir()] == [f"test-{good}-eth0"], 20)
        client.remove_pod(good)


@with_lab
def test_network_ready_tells_why_not(lab: Lab) -> None:
    with running(lab, 'cni_default_network = "mine"') as client:
        assert "'mine' not found" in network_condition(client).message
        assert network_condition(client).reason == "NetworkPluginNotReady"
        lab.write({"type": "own"}, name="mine", cniVersion="1.1.0")
        assert "'own' is not built in here, and no directory of" in network_condition(client).message
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "the pod network is not ready", "'own'"):
            client.pod()
        host = client.pod(namespaces={"network": pb.NODE})
        lab.shell(
            "own", """[ "$CNI_COMMAND" = STATUS ] && echo '{"code":50,"msg":"no peers"}' && exit 1; echo "$ok" """
        )
        client.until(lambda: "no peers" in network_condition(client).message)
        lab.shell("own", 'echo "$ok"')
        client.until(lambda: ready(client))
        pod = client.pod()
        assert client.call("PodSandboxStatus", pod_sandbox_id=pod).status.network.ip == "10.1.2.3"
        for each in (pod, host):
            client.remove_pod(each)


@with_lab
def test_without_host_ports_of_ours_the_networks_plugins_have_them(lab: Lab) -> None:
    lab.debian()
    ipam = lab.ipam("10.55.0.0/24")
    lab.write({"type": "ptp", "ipam": ipam})
    port = pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=8080)
    with running(lab) as client:
        client.load_image()
        for disabled in (False, True):
            if disabled:
                path = client.daemon.directory / "crio.conf.d/20-ports.conf"
                path.write_text("[crio.runtime]\ndisable_hostport_mapping = true\n")
                client.restart()
            pod = client.pod(port_mappings=[port])
            client.start(pod, "httpd", "-f", "-p", "80", "-h", "/")
            address = client.call("PodSandboxStatus", pod_sandbox_id=pod).status.network.ip
            client.until(functools.partial(answers, address, 80))
            assert answers("127.0.0.1", 8080) is not disabled
            client.remove_pod(pod)
