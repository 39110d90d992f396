"""The control socket against clients that are not the daemon, or not well."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from pathlib import Path

import pytest

from crio_native.errors import NotFound, StepFailed
from crio_native.monitor import client
from tests.linux.monitor_harness import Container

INVALID = [
    b"\0",
    b"start\0",
    b"START",
    b"starts",
    b" start",
    b"start ",
    b"start 1",
    b"attach everything",
    b"kill",
    b"kill ",
    b"kill x",
    b"kill -1",
    b"kill +9",
    b"kill  9",
    b"kill 9 9",
    b"kill 0",
    b"kill 65",
    b"kill 65536",
    b"kill 4294967305",
    b"kill 18446744073709551625",
    b"kill " + b"9" * 59,
    b"resize 1",
    b"resize 1 2 3",
    b"resize 65536 1",
    b"resize 1 65536",
    b"\xff\xfe",
    b"x" * 64,
    b"x" * 65,
    b"x" * 100_000,
]


def test_invalid_requests_are_refused_and_the_next_is_served(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        with container.create().raw() as sock:
            for request in INVALID:
                sock.send(request)
                verb, _, body = sock.recv(10_000).partition(b" ")
                assert verb == b"error", request
                assert json.loads(body)["errno"] in (22, 90), request
                sock.send(b"reopen")
                assert sock.recv(100) == b"ok"
        container.start()
        with container.raw(b"kill 9"):
            assert container.wait().code == 137


def test_all_requests_on_one_connection(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100", stdin=True) as container:
        with container.create().connection() as connection:
            connection.start()
            connection.reopen_log()
            connection.close_stdin()
            connection.close_stdin()
            with pytest.raises(StepFailed, match="ENOTTY"):
                connection.resize(24, 80)
            connection.kill(9)
            assert container.wait().code == 137
            with pytest.raises(NotFound):
                connection.kill(9)


def test_client_that_does_not_read_its_answers_is_dropped(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.run()
        with container.raw() as sock:
            sock.settimeout(5)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(10_000):
                    sock.send(b"reopen")
        with container.raw(b"kill 9"):
            assert container.wait().code == 137


def test_descriptors_that_a_client_sends_do_not_stay(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        with container.run().raw() as sock:
            before = len(os.listdir(f"/proc/{container.monitor}/fd"))
            for _ in range(20):
                socket.send_fds(sock, [b"reopen"], [0, 1, 2])
                assert sock.recv(100) == b"ok"
            assert len(os.listdir(f"/proc/{container.monitor}/fd")) == before


def test_socket_is_for_its_owner(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.create()
        info = os.stat(container.run_dir / "control")
        assert stat.S_ISSOCK(info.st_mode)
        assert stat.S_IMODE(info.st_mode) == 0o600


@pytest.mark.root
def test_another_user_is_refused_even_where_the_mode_lets_him_in(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.create()
        container.run_dir.chmod(0o755)
        (container.run_dir / "control").chmod(0o777)
        directory = os.open(container.run_dir, os.O_PATH)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sock.settimeout(5)
                sock.connect(f"/proc/self/fd/{directory}/control")
                answer = sock.recv(1000)
                refused = answer.startswith(b'error {"step":"connect","errno":1,') and sock.recv(1000) == b""
                code = 0 if refused else 2
            finally:
                os._exit(code)
        os.close(directory)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        with container.raw(b"reopen") as sock:
            assert sock.recv(10) == b"ok"


def test_client_that_connects_and_says_nothing(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "sleep 0.2; exit 2") as container:
        with container.create().raw() as silent:
            container.start()
            assert container.wait().code == 2
            assert silent.recv(10) == b""


def test_watch_and_attach_of_the_same_end(tmp_path: Path) -> None:
    """Every client hears of the end after the last output is in the log."""
    with Container(tmp_path / "c", "seq 1000; exit 11") as container:
        container.create()
        watch = client.watch(container.run_dir)
        container.start()
        status = client.read_exit(watch)
        assert status is not None
        assert status.code == 11
        assert len(container.log()) == 1000
        assert client.read_exit_file(container.run_dir) == status
        watch.close()


def test_idle_monitor_sleeps(tmp_path: Path) -> None:
    def switches() -> int:
        status = Path(f"/proc/{container.monitor}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:\t")[1].split()[0])

    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.run()
        time.sleep(0.05)
        before = switches()
        time.sleep(0.5)
        assert switches() == before
