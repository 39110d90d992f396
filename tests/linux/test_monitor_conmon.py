"""The monitor beside conmon, the field's own: the same records for the same output, and far less memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.linux.monitor_harness import Container, content
from tests.waiting import wait_for

MEMORY_GOAL = 0.15  # of conmon's proportional set size

# conmon starts a container by its runtime; this one starts a shell command in no container at all.
RUNTIME = """#!/bin/sh
case " $* " in
*" create "*)
    while [ "$1" != --pid-file ]; do shift; done
    sh "$COMMAND_FILE" </dev/null &
    echo $! > "$2"
esac
"""


@dataclass
class Peer:
    pid: int
    log: Path


class Conmon:
    """Starts conmon as an engine does: a pipe for its word, a log in the k8s-file format."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.peers: list[Peer] = []

    def run(self, name: str, command: str) -> Peer:
        place = self.place / name
        place.mkdir()
        (place / "command").write_text(command)
        runtime = place / "runtime"
        runtime.write_text(RUNTIME)
        runtime.chmod(0o755)
        log = place / "log"
        reader, writer = os.pipe()
        words = ["conmon", "--cid", name, "--cuuid", name, "--name", name, "--bundle", str(place), "--runtime"]
        words += [str(runtime), "--log-path", f"k8s-file:{log}", "--socket-dir-path", str(place)]
        words += ["--container-pidfile", str(place / "pid"), "--conmon-pidfile", str(place / "conmon-pid")]
        words += ["--exit-dir", str(place)]
        environment = {**os.environ, "_OCI_SYNCPIPE": str(writer), "COMMAND_FILE": str(place / "command")}
        environment.pop("_OCI_STARTPIPE", None)
        subprocess.run(words, env=environment, pass_fds=[writer], check=True, timeout=20)
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert json.loads(pipe.readline())["pid"] > 0
        peer = Peer(int((place / "conmon-pid").read_text()), log)
        self.peers.append(peer)
        return peer

    def wait(self, peer: Peer) -> None:
        wait_for(lambda: self._ended(peer), "conmon's end")

    def _ended(self, peer: Peer) -> bool:
        try:
            return os.waitpid(peer.pid, os.WNOHANG)[0] == peer.pid
        except ChildProcessError:  # not re-parented to us
            return not Path(f"/proc/{peer.pid}").exists()

    def close(self) -> None:
        for peer in self.peers:
            if not self._ended(peer):
                os.kill(int((peer.log.parent / "pid").read_text()), signal.SIGKILL)
                self.wait(peer)


@pytest.fixture
def conmon(tmp_path: Path) -> Iterator[Conmon]:
    if not shutil.which("conmon"):
        pytest.skip("conmon is not installed")
    peer = Conmon(tmp_path)
    yield peer
    peer.close()


def records_of_conmon(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """(stream, tag, content); its times have an offset instead of Z."""
    return [(f[1], f[2], f[3]) for f in (line.split(b" ", 3) for line in data.split(b"\n")[:-1])]


def test_same_records_as_conmon(tmp_path: Path, conmon: Conmon) -> None:
    pieces = [b"one\ntwo", b"\n", b"x" * 8191, b"y" * 8192, b"\n", b"z" * 8193 + b"\n", b"\n" * 300, b"\0\xff\r\n"]
    pieces += [b"a\n" + b"b" * 8192 + b"\nc\n", b"d" * 20_000, b"e\n", b"no newline"]
    for number, piece in enumerate(pieces):
        (tmp_path / f"piece{number:02}").write_bytes(piece)
    # Each piece is written at once, and read before the next.
    command = f"for f in {tmp_path}/piece*; do dd if=$f bs=64k status=none; sleep 0.05; done"
    peer = conmon.run("peer", command)
    with Container(tmp_path / "c", command) as container:
        assert container.run().wait().code == 0
        ours = [(r.stream.encode(), r.tag.encode(), r.content) for r in container.log()]
        assert content(container.log(), "stdout") == b"".join(pieces)
    conmon.wait(peer)
    assert ours == records_of_conmon(peer.log.read_bytes())


def proportional_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.split("\nPss:")[1].split()[0])


@pytest.mark.root
@pytest.mark.parametrize("count", [1, 10])
def test_memory_beside_conmon(tmp_path: Path, conmon: Conmon, count: int) -> None:
    """After both have logged a full buffer, on a machine with `count` of each."""
    command = "head -c 100000 /dev/zero; exec sleep 100"
    peers = [conmon.run(f"peer{number}", command) for number in range(count)]
    ours = [Container(tmp_path / f"c{number}", command) for number in range(count)]
    try:
        for container in ours:
            container.run()
        wait_for(lambda: all(os.stat(str(c.log_path)).st_size > 100_000 for c in ours), "our output is logged")
        wait_for(lambda: all(os.stat(p.log).st_size > 100_000 for p in peers), "conmon's output is logged")
        time.sleep(0.1)
        our_size = sum(proportional_kib(c.monitor) for c in ours) / count
        peer_size = sum(proportional_kib(p.pid) for p in peers) / count
    finally:
        for container in ours:
            container.close()
    print(f"proportional set size of {count}: ours {our_size:.0f} KiB, conmon {peer_size:.0f} KiB each")
    assert our_size <= MEMORY_GOAL * peer_size, (our_size, peer_size)
