"""Clients on the container's streams: output to many, slow and vanishing ones, stdin, and the terminal."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from crio_native.errors import ResourceExhausted, StepFailed
from crio_native.monitor import client
from tests.linux.monitor_harness import Container, content
from tests.waiting import wait_for


def read_all(sock: socket.socket) -> tuple[bytes, bytes]:
    """What comes on (stdout, stderr) up to the end."""
    sock.settimeout(20)
    streams = {2: bytearray(), 3: bytearray()}
    while packet := sock.recv(client.OUTPUT_PACKET_MAX + 1):
        assert len(packet) <= client.OUTPUT_PACKET_MAX
        streams[packet[0]] += packet[1:]
    sock.close()
    return bytes(streams[2]), bytes(streams[3])


def read_until(sock: socket.socket, wanted: bytes) -> bytes:
    sock.settimeout(10)
    data = b""
    while wanted not in data:
        packet = sock.recv(client.OUTPUT_PACKET_MAX)
        assert packet, f"the end came before {wanted!r}: {data!r}"
        data += packet[1:]
    return data


class Reader(threading.Thread):
    def __init__(self, sock: socket.socket, delay: float = 0) -> None:
        super().__init__()
        self.sock, self.delay = sock, delay
        self.start()

    def run(self) -> None:
        time.sleep(self.delay)
        self.result = read_all(self.sock)

    def streams(self) -> tuple[bytes, bytes]:
        self.join(30)
        return self.result


def test_output_goes_to_all_and_to_the_log(tmp_path: Path) -> None:
    data = os.urandom(500_000)
    (tmp_path / "data").write_bytes(data)
    with Container(tmp_path / "c", f"cat {tmp_path}/data; echo no >&2; echo last") as container:
        container.create()
        readers = [Reader(client.attach(container.run_dir)) for _ in range(8)]
        container.start().wait()
        for reader in readers:
            assert reader.streams() == (data + b"last\n", b"no\n")
        assert content(container.log(), "stdout") == data + b"last\n"


def test_late_client_gets_what_comes_later(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "echo early; read x; echo late", stdin=True) as container:
        container.run()
        wait_for(lambda: container.log(), "the first line")
        sock = client.attach(container.run_dir)
        sock.send(b"go\n")
        assert read_all(sock) == (b"late\n", b"")


def test_client_that_pauses_loses_nothing(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "seq 1 200000") as container:
        container.create()
        slow = Reader(client.attach(container.run_dir), delay=0.7)
        quick = Reader(client.attach(container.run_dir))
        container.start().wait()
        wanted = b"".join(b"%d\n" % i for i in range(1, 200_001))
        assert slow.streams() == quick.streams() == (wanted, b"")


@pytest.mark.slow
def test_client_that_never_reads_is_dropped_and_holds_up_nobody_else(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "seq 1 200000") as container:
        container.create()
        stuck = client.attach(container.run_dir)
        quick = Reader(client.attach(container.run_dir))
        begun = time.monotonic()
        container.start()
        assert container.wait(20).code == 0
        assert 4.5 < time.monotonic() - begun < 10
        wanted = b"".join(b"%d\n" % i for i in range(1, 200_001))
        assert quick.streams() == (wanted, b"")
        assert content(container.log(), "stdout") == wanted
        got, _ = read_all(stuck)  # what it was sent before is still there, then the end
        assert wanted.startswith(got)
        assert 0 < len(got) < len(wanted)


def test_client_that_never_reads_does_not_hold_the_end(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "seq 1 200000 & sleep 0.2; kill -9 $$") as container:
        container.create()
        with client.attach(container.run_dir):
            container.start()
            assert container.wait(3).code == 137
        out = content(container.log(), "stdout")  # all that the pipe held
        assert out.startswith(b"1\n2\n")


def test_client_that_vanishes_is_forgotten(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "seq 1 300000") as container:
        container.create()
        socks = [client.attach(container.run_dir) for _ in range(10)]
        container.start()
        for sock in socks:
            sock.recv(100)
            sock.close()
        assert container.wait().code == 0
        assert content(container.log(), "stdout").endswith(b"\n300000\n")


def test_too_many_clients(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.run()
        attached = [client.attach(container.run_dir) for _ in range(32)]
        with pytest.raises(ResourceExhausted, match="32 clients are attached"):
            client.attach(container.run_dir)
        others = [container.raw() for _ in range(32)]
        with container.connection() as connection, pytest.raises(ResourceExhausted, match="64 clients"):
            connection.reopen_log()
        for sock in (attached.pop(), others.pop()):
            sock.close()

        def another_can() -> bool:
            try:
                attached.append(client.attach(container.run_dir))
            except ResourceExhausted:
                return False
            return True

        wait_for(another_can, "a place is free again")
        with container.raw(b"kill 9"):
            assert container.wait().code == 137
        for sock in attached + others:
            sock.close()


def test_stdin_reaches_the_container(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    with Container(tmp_path / "c", f"cat > {tmp_path}/got", stdin=True, stdin_once=True) as container:
        container.run()
        with client.attach(container.run_dir) as sock:
            for at in range(0, len(data), client.PACKET_MAX):
                sock.send(data[at : at + client.PACKET_MAX])
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(10) == b""
        assert container.wait().code == 0
    assert (tmp_path / "got").read_bytes() == data


def test_stdin_of_a_slow_container_holds_its_client_back(tmp_path: Path) -> None:
    command = f"while ! [ -e {tmp_path}/go ]; do sleep 0.01; done; wc -c"
    with Container(tmp_path / "c", command, stdin=True, stdin_once=True) as container:
        container.run()
        with client.attach(container.run_dir) as sock, client.attach(container.run_dir, stdin=False) as other:
            sock.setblocking(False)
            sent = 0
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    sent += sock.send(b"x" * 8192)
                except BlockingIOError:
                    break
            assert 65_536 < sent < 1_000_000
            with container.connection() as connection:  # the monitor itself waits for nobody
                connection.reopen_log()
            (tmp_path / "go").touch()
            sock.setblocking(True)
            sock.shutdown(socket.SHUT_WR)
            assert read_all(other) == (b"%d\n" % sent, b"")
        assert container.wait().code == 0


def test_client_that_vanishes_with_input_unread_frees_its_place(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100", stdin=True) as container:
        container.run()
        before = cpu_ticks(container.monitor)
        for _ in range(40):  # more than there are places
            with client.attach(container.run_dir) as sock:
                sock.setblocking(False)
                try:
                    while True:
                        sock.send(b"x" * 8192)
                except BlockingIOError:
                    pass
            time.sleep(0.005)
        time.sleep(0.3)
        assert cpu_ticks(container.monitor) - before < 20  # it does not spin on them


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_stdin_stays_open_without_once(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "read a; read b; echo $a $b", stdin=True) as container:
        container.run()
        with client.attach(container.run_dir) as first:
            first.send(b"one\n")
        second = client.attach(container.run_dir)
        second.send(b"two\n")
        assert read_all(second) == (b"one two\n", b"")


@pytest.mark.parametrize("leave", ["close", "shutdown", "empty packet"])
def test_stdin_once(tmp_path: Path, leave: str) -> None:
    with Container(tmp_path / "c", "cat; echo end", stdin=True, stdin_once=True) as container:
        container.run()
        with client.attach(container.run_dir, stdin=False):
            pass  # one that only looks on does not close stdin when it leaves
        sock = client.attach(container.run_dir)
        sock.send(b"one\n")
        assert read_until(sock, b"one\n") == b"one\n"
        if leave == "close":
            sock.close()
        elif leave == "shutdown":
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.send(b"")
        if leave != "close":
            assert read_all(sock) == (b"end\n", b"")
        assert container.wait().code == 0
        assert content(container.log(), "stdout") == b"one\nend\n"


def test_close_stdin(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "cat; echo end", stdin=True) as container:
        container.run()
        sock = client.attach(container.run_dir)
        sock.send(b"one\n")
        read_until(sock, b"one\n")
        with container.connection() as connection:
            connection.close_stdin()
        assert read_all(sock) == (b"end\n", b"")


def test_without_stdin_there_is_none(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "cat; while ! [ -e /proc/self/fd/9 ]; do exec sleep 100; done") as container:
        container.run()
        with client.attach(container.run_dir) as sock:
            for _ in range(100):
                sock.send(b"x" * 8192)  # taken, and dropped
        with container.connection() as connection:
            connection.kill(signal.SIGKILL)


def test_container_that_closed_its_stdin(tmp_path: Path) -> None:
    with Container(tmp_path / "c", f"exec <&-; touch {tmp_path}/closed; exec sleep 100", stdin=True) as container:
        container.run()
        wait_for(lambda: (tmp_path / "closed").exists(), "stdin is closed")
        with client.attach(container.run_dir) as sock, container.connection() as connection:
            for _ in range(20):
                sock.send(b"x" * 8192)
            connection.kill(signal.SIGKILL)
            assert read_all(sock) == (b"", b"")
        assert container.wait().code == 137


def test_oversized_input_drops_the_client(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100", stdin=True) as container:
        container.run()
        with client.attach(container.run_dir) as sock:
            sock.send(b"x" * (client.PACKET_MAX + 1))
            assert read_all(sock) == (b"", b"")
        assert "more than 8192 bytes" in container.messages()
        with container.connection() as connection:
            connection.kill(signal.SIGKILL)


def test_terminal(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "echo name?; read x; echo hello $x; exit 4", tty=True, stdin=True) as container:
        container.create()
        sock = client.attach(container.run_dir)
        container.start()
        assert read_until(sock, b"name?") == b"name?\r\n"  # ONLCR, the terminal's own default
        sock.send(b"you\n")
        out, err = read_all(sock)
        assert (out, err) == (b"you\r\nhello you\r\n", b"")
        assert container.wait().code == 4
        assert content(container.log(), "stdout") == b"name?\r\nyou\r\nhello you\r\n"


def test_resize(tmp_path: Path) -> None:
    command = 'trap "stty size; exit 0" WINCH; echo on; while :; do sleep 0.01; done'
    with Container(tmp_path / "c", command, tty=True) as container:
        container.create()
        sock = client.attach(container.run_dir)
        container.start()
        read_until(sock, b"on")
        with container.connection() as connection:
            connection.resize(40, 133)
        assert b"40 133\r\n" in read_until(sock, b"133\r\n")
        assert container.wait().code == 0
        sock.close()


def test_interrupt_from_the_keyboard(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "trap 'exit 42' INT; echo on; while :; do sleep 0.01; done", tty=True) as container:
        container.create()
        with client.attach(container.run_dir) as sock:
            container.start()
            read_until(sock, b"on")
            sock.send(b"\x03")
            assert container.wait().code == 42


def test_terminal_input_has_no_end(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "cat; echo end", tty=True, stdin=True, stdin_once=True) as container:
        container.run()
        with container.connection() as connection, pytest.raises(StepFailed, match="end-of-file character"):
            connection.close_stdin()
        with client.attach(container.run_dir) as first:
            first.send(b"one\n")
            read_until(first, b"one\r\none\r\n")
        with client.attach(container.run_dir) as second:
            second.send(b"\x04")
            read_until(second, b"end")
        assert container.wait().code == 0


def test_terminal_that_everyone_closed_and_opened_again(tmp_path: Path) -> None:
    command = "t=$(tty); exec </dev/null >/dev/null 2>&1; sleep 0.4; echo back >$t; sleep 0.4; exit 5"
    with Container(tmp_path / "c", command, tty=True) as container:
        container.run()
        before = cpu_ticks(container.monitor)
        assert container.wait().code == 5
        assert before < 20
        assert content(container.log(), "stdout") == b"back\r\n"


def test_much_output_on_a_terminal(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "stty -onlcr; seq 1 50000", tty=True) as container:
        container.create()
        reader = Reader(client.attach(container.run_dir), delay=0.2)
        container.start().wait()
        wanted = b"".join(b"%d\n" % i for i in range(1, 50_001))
        assert reader.streams() == (wanted, b"")
        assert content(container.log(), "stdout") == wanted
