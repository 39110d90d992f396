"""netDevices: links of the host that move into the container's network namespace."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, StepFailed

from ..machine import Machine
from .conftest import Box, Container
from .test_builtin_userns import in_user_namespace

pytestmark = pytest.mark.root

_numbers = itertools.count()


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def inside(container: Container, *arguments: str) -> str:
    command = ["nsenter", f"--net=/proc/{container.process.pid}/ns/net", "ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def links() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@pytest.fixture
def link(box: Box) -> Iterator[str]:
    """A link of the host's, with addresses.  Its other end stays, and goes with it."""
    name = f"crn{os.getpid() % 100000}x{next(_numbers)}"
    ip("link", "add", name, "mtu", "1400", "address", "02:00:00:00:00:07", "type", "veth", "peer", "name", f"{name}p")
    ip("link", "set", f"{name}p", "up")
    ip("link", "set", name, "up")
    ip("address", "add", "198.51.100.7/24", "broadcast", "198.51.100.255", "dev", name)
    ip("address", "add", "2001:db8::7/64", "nodad", "dev", name)
    ip("address", "add", "192.0.2.9/32", "scope", "link", "dev", name)
    yield name
    box.remove_containers()
    for end in {name, f"{name}p"} & links():
        subprocess.run(["ip", "link", "delete", end], capture_output=True)


@pytest.mark.parametrize("name", [None, "eth7"])
@pytest.mark.parametrize("own_user", [False, True])
def test_a_link_moves_with_its_addresses_and_is_up(box: Box, link: str, name: str | None, own_user: bool) -> None:
    spec = in_user_namespace(box) if own_user else box.spec()
    spec["linux"]["netDevices"] = {link: {"name": name} if name else {}}
    container = box.create(spec)
    assert link not in links()
    shown = inside(container, "address", "show", "dev", name or link)
    assert "mtu 1400" in shown and "02:00:00:00:00:07" in shown and ",UP" in shown
    assert "inet 198.51.100.7/24 brd 198.51.100.255 scope global" in shown and "2001:db8::7/64 scope global" in shown
    assert "192.0.2.9" not in shown  # of link scope


def test_into_a_namespace_that_is_joined(box: Box, link: str) -> None:
    pod = box.create(box.spec())
    spec = box.spec()
    spec["linux"]["namespaces"] = [
        entry if entry["type"] != "network" else {**entry, "path": f"/proc/{pod.process.pid}/ns/net"}
        for entry in spec["linux"]["namespaces"]
    ]
    spec["linux"]["netDevices"] = {link: {"name": "net%d"}}
    box.create(spec)
    assert "198.51.100.7" in inside(pod, "address", "show", "dev", "net0")


def test_the_kernel_completes_a_template(box: Box, link: str) -> None:
    spec = box.spec("ls", "/sys/class/net")
    spec["linux"]["netDevices"] = {link: {"name": "net%d"}}
    assert box.run(spec=spec).output().split() == ["lo", "net0"]


def test_all_or_none_move(box: Box, link: str, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["netDevices"] = {link: {"name": "eth0"}, "crn-no-such": {}}
    with pytest.raises(StepFailed, match=r"step 'move_net_devices' failed on crn-no-such with ENODEV"):
        box.create(spec)
    shown = ip("address", "show", "dev", link)
    assert "198.51.100.7/24" in shown and "2001:db8::7/64" in shown and ",UP" in shown


def test_a_name_that_is_taken(box: Box, link: str, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["netDevices"] = {link: {"name": "lo"}}
    with pytest.raises(StepFailed, match=rf"move_net_devices.*{link} with EEXIST.*a link 'lo' already"):
        box.create(spec)
    assert link in links()


def test_a_link_that_cannot_move(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["netDevices"] = {"lo": {"name": "lo1"}}
    with pytest.raises(StepFailed, match=r"move_net_devices.*lo with EINVAL"):
        box.create(spec)


def test_a_failure_after_the_move(box: Box, link: str) -> None:
    """The kernel ends a virtual link with its namespace; nothing else stays."""
    spec = box.spec()
    spec["linux"]["netDevices"] = {link: {}}
    spec["mounts"].append({"destination": "/x", "type": "nosuchfs", "source": "x"})
    with pytest.raises(StepFailed, match="nosuchfs"):
        box.create(spec)
    assert Path("/proc/self/ns/net").exists() and "lo" in links()


@pytest.mark.parametrize(
    ("devices", "field"),
    [
        ({"a/b": {}}, r"linux.netDevices\['a/b'\]"),
        ({"": {}}, r"linux.netDevices\[''\]"),
        ({"x" * 16: {}}, r"linux.netDevices\['x{16}'\]"),
        ({"eth0": {"name": "x" * 16}}, r"linux.netDevices\['eth0'\].name"),
        ({"eth0": {"name": ".."}}, r"linux.netDevices\['eth0'\].name"),
        ({"eth0": {"name": "a b"}}, r"linux.netDevices\['eth0'\].name"),
        ({"eth0": {"name": "%d%d"}}, r"linux.netDevices\['eth0'\].name"),
        ({"eth0": {"name": "%s"}}, r"linux.netDevices\['eth0'\].name"),
        ({"eth0": {"name": 7}}, r"linux.netDevices\['eth0'\].name"),
        ({"eth0": {"name": "a"}, "eth1": {"name": "a"}}, r"linux.netDevices\['eth1'\].name"),
    ],
)
def test_devices_that_cannot_be(box: Box, devices: dict[str, Any], field: str) -> None:
    spec = box.spec()
    spec["linux"]["netDevices"] = devices
    with pytest.raises(InvalidArgument, match=f"^{field}:"):
        box.create(spec)


def test_the_hosts_network_takes_none(box: Box) -> None:
    spec = box.spec()
    spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "network"]
    spec["linux"]["netDevices"] = {"eth9": {}}
    with pytest.raises(InvalidArgument, match=r"^linux.netDevices: needs a network namespace"):
        box.create(spec)
