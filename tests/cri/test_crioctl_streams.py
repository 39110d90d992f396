"""crioctl's interactive commands against a real daemon, with and without a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from functools import partial
from pathlib import Path

import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.pods.host import Host

from ..waiting import wait_for
from .conftest import Client

pytestmark = pytest.mark.root
COMMAND = [sys.executable, "-m", "crio_native.cli.crioctl"]


def crioctl(cri: Client, *words: str, text: str = "", seconds: float = 20) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CRIO_NATIVE_SOCKET": str(cri.daemon.socket)}
    return subprocess.run(
        [*COMMAND, *words], env=environment, input=text, capture_output=True, text=True, timeout=seconds
    )


def succeeds(cri: Client, *words: str) -> bool:
    return crioctl(cri, *words).returncode == 0


def test_the_opening_example_of_the_manual(cri: Client) -> None:
    manual = (Path(__file__).parents[2] / "docs/crioctl.md").read_text()
    said = {}
    for line in re.findall("^    crioctl (.*)", manual, re.MULTILINE)[:5]:
        words = [cri.image if word == "busybox" else word for word in shlex.split(line)]
        if words[0] == "exec":
            wait_for(partial(succeeds, cri, *words), "the server")
        if words[0] == "logs":  # which would go on until the next line
            words.remove("-f")
        done = crioctl(cri, *words)
        assert (done.returncode, done.stderr) == (0, ""), line
        said[words[0]] = done.stdout
    assert (said["exec"], said["rm"]) == ("a page\n", "web\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_the_null_device(cri: Client, closed: str) -> None:
    """Not a descriptor of ours, which would be read and written then."""
    container = cri.start(cri.pod(), "sleep", "60")
    for words in (["exec", "-i", container, "cat"], ["exec", container, "echo", "x"], ["ps"], ["logs", container]):
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, "-r", str(cri.daemon.socket), *words]
        done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), words


class Terminal:
    """crioctl on a terminal of 40 lines and 100 columns."""

    def __init__(self, cri: Client, *words: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["CRIO_NATIVE_SOCKET"] = str(cri.daemon.socket)
            ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
            os.execv(COMMAND[0], [*COMMAND, *words])
        self.output = b""

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def until(self, pattern: bytes, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0], self.output
            self.output += self._read()

    def _read(self) -> bytes:
        try:
            data = os.read(self.master, 65536)
        except OSError:
            data = b""
        assert data, f"it ended: {self.output!r}"
        return data

    def resize(self, lines: int, columns: int) -> None:
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.master)[3] & termios.ICANON

    def end(self) -> int:
        """Wait for crioctl; its exit code."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.master)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.output += os.read(self.master, 65536)
                except OSError:
                    time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it did not end: {self.output!r}")


@pytest.fixture
def container(cri: Client) -> Iterator[str]:
    yield cri.start(cri.pod(name="box"), "sleep", "600", name="main")


def test_exec_streams_output_and_passes_the_exit_code_on(cri: Client, container: str) -> None:
    done = crioctl(cri, "exec", container, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)
    assert crioctl(cri, "exec", "--timeout", "5", container, "sh", "-c", "exit 8").returncode == 8


def test_exec_sends_input_to_its_end(cri: Client, container: str) -> None:
    done = crioctl(cri, "exec", "-i", container, "sh", "-c", "cat; echo end", text="a\nb\n")
    assert (done.stdout, done.returncode) == ("a\nb\nend\n", 0)


def test_exec_of_what_does_not_exist(cri: Client, container: str) -> None:
    done = crioctl(cri, "exec", container, "/no/such")
    assert done.returncode == 1 and "/no/such" in done.stderr and done.stderr.startswith("crioctl: ")
    assert done.stderr.count("\n") == 1


def test_a_capability_that_the_node_lacks_is_told(cri: Client) -> None:
    held = Host.read().bounding
    result = crioctl(cri, "run", "--rm", "--cap-add", "sys_resource", "--cap-add", "NET_RAW", cri.image, "true")
    assert result.returncode == 0, result.stderr
    for name in ("CAP_SYS_RESOURCE", "CAP_NET_RAW"):
        assert (name in result.stderr) == (name not in held), result.stderr


def test_a_registry_that_is_down_is_not_called_the_runtime(cri: Client) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        result = crioctl(cri, "pull", f"127.0.0.1:{free.getsockname()[1]}/x:1")
    assert result.returncode == 1 and "registry 127.0.0.1" in result.stderr and "the runtime at" not in result.stderr


def test_options_that_exclude_each_other(cri: Client, container: str) -> None:
    assert crioctl(cri, "exec", "-i", "--timeout", "5", container, "true").returncode == 2
    done = crioctl(cri, "exec", "-it", container, "true")
    assert done.returncode == 2 and "needs a terminal" in done.stderr


def test_exec_on_a_terminal(cri: Client, container: str) -> None:
    terminal = Terminal(cri, "exec", "-it", container, "sh")
    terminal.until(rb"# ")
    assert terminal.is_raw()
    terminal.type(b"stty size\n")
    terminal.until(rb"40 100")
    terminal.resize(33, 77)
    os.kill(terminal.pid, signal.SIGWINCH)
    terminal.type(b"sleep 0.3; stty size\n")
    terminal.until(rb"33 77")
    terminal.type(b"sleep 300\n")
    time.sleep(0.3)
    terminal.type(b"\x03")  # goes to the command, not to crioctl
    terminal.type(b"exit 5\n")
    assert terminal.end() == 5


def test_ctrl_c_ends_an_exec_without_a_terminal(cri: Client, container: str) -> None:
    environment = {**os.environ, "CRIO_NATIVE_SOCKET": str(cri.daemon.socket)}
    running = subprocess.Popen([*COMMAND, "exec", "-i", container, "cat"], env=environment, stdin=subprocess.PIPE)
    wait_for(lambda: b"cat" in cri.exec(container, "ps", "-o", "comm").stdout.split())
    running.send_signal(signal.SIGINT)
    assert running.wait(10) == 130
    wait_for(lambda: b"cat" not in cri.exec(container, "ps", "-o", "comm").stdout.split())


def test_attach_shows_output_until_the_end(cri: Client) -> None:
    container = cri.start(cri.pod(), "sh", "-c", "for i in 1 2 3 4 5 6; do sleep 0.5; echo $i; done; exit 3")
    done = crioctl(cri, "attach", container)
    assert done.returncode == 0 and done.stdout.endswith("5\n6\n")


def test_attach_with_input(cri: Client) -> None:
    container = cri.start(cri.pod(), "sh", "-c", "read x; echo got $x", stdin=True)
    assert crioctl(cri, "attach", "-i", container, text="this\n").stdout == "got this\n"


def test_run_with_input(cri: Client) -> None:
    done = crioctl(cri, "run", "--rm", "-i", cri.image, "sh", "-c", "echo first; cat; exit 4", text="second\n")
    assert (done.stdout, done.returncode) == ("first\nsecond\n", 4), done.stderr
    assert cri.pods() == []


def test_run_on_a_terminal(cri: Client) -> None:
    terminal = Terminal(cri, "run", "--rm", "-it", cri.image, "sh")
    terminal.until(rb"# ")  # the first prompt is there without a key
    terminal.type(b"tty; exit 6\n")
    assert terminal.end() == 6 and b"/dev/pts/0" in terminal.output
    assert cri.pods() == []


def test_a_terminal_is_given_back_when_the_container_is_killed(cri: Client) -> None:
    terminal = Terminal(cri, "run", "-it", "--name", "victim", cri.image, "sh")
    terminal.until(rb"# ")
    (container,) = (c.id for c in cri.containers() if c.state == pb.CONTAINER_RUNNING)
    cri.call("StopContainer", container_id=container, timeout=0)
    wait_for(lambda: not terminal.is_raw())
    assert terminal.end() == 137
    assert crioctl(cri, "rm", "victim").returncode == 0  # its logs too


def test_port_forward(cri: Client) -> None:
    pod = cri.pod(name="web")
    script = "mkdir /tmp/w; echo hello > /tmp/w/index.html; exec httpd -f -p 8080 -h /tmp/w"
    container = cri.start(pod, "sh", "-c", script)
    wait_for(lambda: b":1F90 " in cri.exec(container, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout)
    environment = {**os.environ, "CRIO_NATIVE_SOCKET": str(cri.daemon.socket)}
    running = subprocess.Popen(
        [*COMMAND, "port-forward", "web", "0:8080", "0:81"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None and running.stderr is not None
    ports = [int(running.stdout.readline().split(" ")[0].rsplit(":", 1)[1]) for _ in range(2)]
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", ports[0]), 10) as sock:
            sock.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
            answer = b""
            while data := sock.recv(4096):
                answer += data
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"hello\n")
    with socket.create_connection(("127.0.0.1", ports[1]), 10) as sock:
        sock.settimeout(10)
        assert sock.recv(100) == b""
    assert "cannot connect to port 81" in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    assert running.wait(10) == 130


def test_port_forward_to_a_pod_that_is_not_there(cri: Client) -> None:
    done = crioctl(cri, "port-forward", "nobody", "80")
    assert done.returncode == 1 and "nobody" in done.stderr
    assert crioctl(cri, "port-forward", "nobody", "eighty").returncode == 2
