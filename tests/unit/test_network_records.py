"""Leases and records: which address comes next, what is refused, and what survives."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crio_native.errors import (
    AlreadyExists,
    CrioError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from crio_native.linux import syscalls
from crio_native.network.config import Range
from crio_native.network.conflist import NetworkList
from crio_native.network.keys import Address
from crio_native.network.model import Attachment, PortMapping, checked_port_mappings
from crio_native.network.records import FILE_NAME, Records


def ranges(*sets: list[dict[str, str]]) -> tuple[tuple[Range, ...], ...]:
    ipam = {"type": "host-local", "ranges": list(sets)}
    bridge = NetworkList.parse({"name": "x", "type": "bridge", "ipam": ipam}, "x").bridge
    assert bridge is not None
    return bridge.range_sets


SMALL = ranges([{"subnet": "10.0.0.0/29"}])


def build(*ports: PortMapping) -> Callable[[Sequence[tuple[Address, Range]]], Attachment]:
    def attachment(leases: Sequence[tuple[Address, Range]]) -> Attachment:
        addresses = tuple(f"{address}/{found.subnet.prefixlen}" for address, found in leases)
        gateways = tuple(str(found.gateway) for _, found in leases)
        return Attachment("eth0", "02:00:00:00:00:01", addresses, gateways, (), "veth0", "crio0", port_mappings=ports)

    return attachment


def lease(records: Records, name: str, sets: tuple[tuple[Range, ...], ...] = SMALL, *ports: PortMapping) -> str:
    return records.attach(name, sets, build(*ports), {}).ips[0]


def test_leases_go_round(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert lease(records, "a") == "10.0.0.2"
    assert lease(records, "b") == "10.0.0.3"
    records.release("a")
    assert [lease(records, name) for name in "cde"] == ["10.0.0.4", "10.0.0.5", "10.0.0.6"]
    assert lease(records, "f") == "10.0.0.2", "released, and now the only free one"
    with pytest.raises(ResourceExhausted, match=r"no free pod address in 10\.0\.0\.0/29 \(5 leased\)"):
        lease(records, "g")
    records.release("d")
    records.close()
    assert lease(Records(tmp_path), "g") == "10.0.0.5", "after a restart too"


def test_one_address_from_each_set_and_the_next_range_when_one_is_full(tmp_path: Path) -> None:
    records = Records(tmp_path)
    sets = ranges(
        [{"subnet": "10.0.0.0/30"}, {"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.250"}], [{"subnet": "fd00::/120"}]
    )
    found = [records.attach(name, sets, build(), {}).ips for name in "abc"]
    assert found == [("10.0.0.2", "fd00::2"), ("10.1.0.250", "fd00::3"), ("10.1.0.251", "fd00::4")]


def test_a_set_without_addresses_takes_none_from_the_others(tmp_path: Path) -> None:
    records = Records(tmp_path)
    sets = (*SMALL, *ranges([{"subnet": "10.9.0.0/30"}]))
    records.attach("a", sets, build(), {})
    with pytest.raises(ResourceExhausted, match=r"10\.9\.0\.0/30"):
        records.attach("b", sets, build(), {})
    assert lease(records, "c") == "10.0.0.3"


def test_a_gateway_in_the_middle_is_never_leased(tmp_path: Path) -> None:
    records = Records(tmp_path)
    sets = ranges([{"subnet": "10.0.0.0/29", "gateway": "10.0.0.3"}])
    assert [lease(records, name, sets) for name in "abcde"] == [f"10.0.0.{n}" for n in (1, 2, 4, 5, 6)]


def test_a_large_range_is_not_walked(tmp_path: Path) -> None:
    records = Records(tmp_path)
    sets = ranges([{"subnet": "fd00::/32"}])
    start = time.monotonic()
    assert len({lease(records, f"p{number}", sets) for number in range(300)}) == 300
    assert time.monotonic() - start < 5


def test_threads_get_different_addresses(tmp_path: Path) -> None:
    records = Records(tmp_path)
    sets = ranges([{"subnet": "10.0.0.0/24"}])
    with ThreadPoolExecutor(16) as workers:
        addresses = list(workers.map(lambda number: lease(records, f"p{number}", sets), range(253)))
    assert len(set(addresses)) == 253


def test_a_sandbox_is_recorded_once_and_released_often(tmp_path: Path) -> None:
    records = Records(tmp_path)
    lease(records, "a")
    with pytest.raises(AlreadyExists, match="pod sandbox a is attached"):
        lease(records, "a")
    for _ in range(2):
        records.release("a")
    assert records.attachment("a") is None and records.attachments() == {}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    port = PortMapping(8080, 80, "udp", "10.1.1.1")
    attachment = Records(tmp_path).attach("a", SMALL, build(port), {"name": "web"})
    again = Records(tmp_path)
    assert again.attachment("a") == attachment == again.attachments()["a"]


@pytest.mark.parametrize("second", [PortMapping(80, 1), PortMapping(80, 1, host_ip="10.1.1.1")])
def test_a_port_that_is_taken_leases_nothing(tmp_path: Path, second: PortMapping) -> None:
    records = Records(tmp_path)
    lease(records, "a", SMALL, PortMapping(80, 80))
    with pytest.raises(FailedPrecondition, match=r"taken by pod .* \(sandbox a\)"):
        lease(records, "b", SMALL, second)
    assert lease(records, "c", SMALL, PortMapping(80, 80, "udp")) == "10.0.0.3"
    records.release("a")
    lease(records, "b", SMALL, second)
    lease(records, "d", SMALL, PortMapping(81, 80, host_ip="10.1.1.1"))
    lease(records, "e", SMALL, PortMapping(81, 80, host_ip="10.1.1.2"))


def test_a_wildcard_after_one_address(tmp_path: Path) -> None:
    records = Records(tmp_path)
    lease(records, "a", SMALL, PortMapping(80, 80, host_ip="10.1.1.1"))
    with pytest.raises(FailedPrecondition, match="port tcp :80 of the node"):
        lease(records, "b", SMALL, PortMapping(80, 80))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.test_network_records import Records, lease
records = Records(Path(sys.argv[1]))
lease(records, "committed")
records._db.execute("BEGIN IMMEDIATE")
records._lease("half", __import__("tests.unit.test_network_records", fromlist=["SMALL"]).SMALL[0])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_keeps_what_was_committed_and_nothing_else(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), root], check=False)
    assert done.returncode == -signal.SIGKILL
    records = Records(tmp_path)
    assert records.attachments().keys() == {"committed"}
    assert lease(records, "next") == "10.0.0.3"


def test_a_damaged_file_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(Internal, match=rf"{FILE_NAME}.*the file is damaged: stop all pods, remove it"):
        Records(tmp_path)


def test_a_file_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as newer:
        newer.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(FailedPrecondition, match="has version 99"):
        Records(tmp_path)


@pytest.mark.root
def test_a_full_disk(tmp_path: Path) -> None:
    syscalls.mount("tmpfs", str(tmp_path), "tmpfs", 0, "size=256k")
    try:
        records = Records(tmp_path)
        lease(records, "a")
        with open(tmp_path / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        sets = ranges([{"subnet": "10.5.0.0/16"}])
        with pytest.raises(ResourceExhausted, match="free space on its file system"):
            for number in range(1000):
                lease(records, f"p{number}", sets)
        (tmp_path / "filler").unlink()
        assert lease(records, "b") == "10.0.0.3", "works again when there is space"
        records.close()
    finally:
        syscalls.umount2(str(tmp_path), 2)


def test_state_is_for_its_owner_only(tmp_path: Path) -> None:
    Records(tmp_path / "state")
    assert os.stat(tmp_path / "state").st_mode & 0o777 == 0o700


def test_the_first_previous_value_of_a_change_is_kept(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.note_change("sysctl", "ipv4/ip_forward", "0")
    records.note_change("sysctl", "ipv4/ip_forward", "1")
    assert records.changes("sysctl") == [("ipv4/ip_forward", "0")]
    records.forget_change("sysctl", "ipv4/ip_forward")
    assert records.changes("sysctl") == []


# Port mappings, as `setup` takes them.


def test_mappings_without_a_port_of_the_node_are_dropped() -> None:
    given = [PortMapping(0, 80), PortMapping(8080, 80, host_ip="0.0.0.0"), PortMapping(8080, 80, host_ip="::")]
    assert checked_port_mappings(given) == (PortMapping(8080, 80),)


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (PortMapping(1, 1, "TCP"), r"port_mappings\[0\]\.protocol: must be one of tcp, udp, sctp"),
        (PortMapping(-1, 1), r"port_mappings\[0\]\.host_port"),
        (PortMapping(65536, 1), r"port_mappings\[0\]\.host_port"),
        (PortMapping(1, 0), r"port_mappings\[0\]\.container_port"),
        (PortMapping(1, 1, "tcp", "localhost"), r"port_mappings\[0\]\.host_ip"),
        (PortMapping(1, 1, "tcp", "fe80::1%lo"), r"port_mappings\[0\]\.host_ip"),
        (PortMapping(1, 1, "tcp", "::1"), r"port_mappings\[0\]\.host_ip: the kernel leads nothing from ::1"),
    ],
)
def test_a_wrong_mapping_is_named(mapping: PortMapping, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        checked_port_mappings([mapping])


def test_an_address_of_a_family_that_pods_do_not_have() -> None:
    with pytest.raises(InvalidArgument, match="the pod network has no IPv6 address to lead to"):
        checked_port_mappings([PortMapping(80, 80, host_ip="2001:db8::1")], {4})


def test_a_pod_cannot_map_a_port_twice_nor_too_many() -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        checked_port_mappings([PortMapping(80, 80), PortMapping(80, 81)])
    with pytest.raises(CrioError, match="at most 1024"):
        checked_port_mappings([PortMapping(0, 80)] * 1025)
