"""The daemon's side of the monitor, where no monitor is needed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.errors import DeadlineExceeded, Internal, NotFound, StepFailed
from crio_native.monitor import client
from crio_native.oci.runtime import ExitStatus


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_arguments() -> None:
    assert client.arguments(container_id="abc") == ["--id", "abc"]
    assert client.arguments(
        container_id="abc",
        tty=True,
        stdin=True,
        stdin_once=True,
        log_path="/l",
        log_size_max=9000,
        oom_file="/sys/fs/cgroup/x/memory.events",
    ) == [
        *("--id", "abc", "--tty", "--stdin", "--stdin-once", "--log", "/l", "--log-size-max", "9000"),
        *("--oom-file", "/sys/fs/cgroup/x/memory.events"),
    ]
    assert "--log-size-max" not in client.arguments(container_id="abc", log_path="/l", log_size_max=-1)


def test_program_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "monitor"
    monkeypatch.setenv("CRIO_NATIVE_MONITOR", str(program))
    with pytest.raises(NotFound, match="CRIO_NATIVE_MONITOR must name an executable file"):
        client.binary_path()
    program.touch(mode=0o755)
    assert client.binary_path() == program


def test_program_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRIO_NATIVE_MONITOR", raising=False)
    monkeypatch.setattr(client, "_REPOSITORY", tmp_path)
    monkeypatch.setattr(client, "_INSTALLED", tmp_path / "installed")
    with pytest.raises(NotFound, match="make -C helpers"):
        client.binary_path()
    (tmp_path / "installed").touch(mode=0o755)
    assert client.binary_path() == tmp_path / "installed"
    (tmp_path / "build").mkdir()
    (tmp_path / "build/crio-monitor").touch(mode=0o755)
    assert client.binary_path() == tmp_path / "build/crio-monitor"


def test_reply_created(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.send(b'{"created":{"pid":5,"monitor":4,"init":{"user":{"uid":0}}}}')
    assert client.read_reply(ours, 1) == {"pid": 5, "monitor": 4, "init": {"user": {"uid": 0}}}


def test_reply_error(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.send(b'{"error":{"step":"mount","errno":2,"path":"/a\xff","detail":"d"}}')
    with pytest.raises(StepFailed) as caught:
        client.read_reply(ours, 1)
    assert caught.value.to_dict() == {"step": "mount", "errno": 2, "path": "/a\ufffd", "detail": "d"}


@pytest.mark.parametrize(
    "packet", [b"nonsense", b"[]", b"{}", b'{"created":5}', b'{"error":{}}', b'{"error":5}', b"\xff", b"x" * 60_000]
)
def test_reply_that_is_none(pair: tuple[socket.socket, socket.socket], packet: bytes) -> None:
    ours, theirs = pair
    theirs.send(packet)
    with pytest.raises(Internal):
        client.read_reply(ours, 1)


def test_reply_that_does_not_come(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
        client.read_reply(ours, 0.05)
    theirs.close()
    with pytest.raises(Internal, match="without saying why"):
        client.read_reply(ours, 1)


def test_exit_file(tmp_path: Path) -> None:
    assert client.read_exit_file(tmp_path) is None
    status = ExitStatus(code=137, signal=9, oom_killed=True, finished_at=1_700_000_000_000_000_001)
    (tmp_path / "exit").write_text(
        json.dumps({"code": 137, "signal": 9, "oom_killed": True, "finished_at": status.finished_at})
    )
    assert client.read_exit_file(tmp_path) == status
    for text in ("", "{", "[]", '{"code":1}', '{"code":"x","signal":0,"oom_killed":false,"finished_at":1}'):
        (tmp_path / "exit").write_text(text)
        with pytest.raises(Internal):
            client.read_exit_file(tmp_path)


def test_exit_that_was_watched(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.send(b'exit {"code":1,"signal":0,"oom_killed":false,"finished_at":3}')
    assert client.read_exit(ours) == ExitStatus(1, 0, False, 3)
    theirs.close()
    assert client.read_exit(ours) is None


def test_nobody_serves(tmp_path: Path) -> None:
    for run_dir in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NotFound, match="the container has ended"):
            client.Connection.connect(run_dir)


def test_socket_of_a_dead_monitor(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind("control")
    os.chdir(here)
    with pytest.raises(NotFound):
        client.watch(tmp_path)
