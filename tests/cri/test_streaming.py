"""Exec, Attach and PortForward over SPDY, by a real daemon and real containers."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.ctl.streams import Link
from crio_native.errors import Unavailable

from ..waiting import wait_for
from .conftest import Client, refused
from .streams import Forward, Spdy, attach_url, exec_url, exit_code, http_get

pytestmark = pytest.mark.root
Code = grpc.StatusCode
MIB = 1 << 20


@pytest.fixture
def container(cri: Client) -> Iterator[str]:
    yield cri.start(cri.pod(), "sleep", "600")


def processes(cri: Client, container: str) -> str:
    return str(cri.exec(container, "ps", "-o", "args").stdout.decode())


def test_output_and_exit_code(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "sh", "-c", "echo out; echo err >&2; exit 9"), "stdout", "stderr")
    assert exit_code(session.rest()) == 9
    assert session.output["stdout"] == b"out\n" and session.output["stderr"] == b"err\n"
    assert session.ended == {"error", "stdout", "stderr"}


def test_success_is_told_too(cri: Client, container: str) -> None:
    assert Spdy(exec_url(cri, container, "true"), "stdout", "stderr").rest()["status"] == "Success"


def test_input_and_its_end(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "sh", "-c", "cat; echo end", stdin=True), "stdin", "stdout", "stderr")
    session.send("stdin", b"one ")
    session.until(lambda: session.output["stdout"] == b"one ")
    session.send("stdin", b"two ")
    session.end()
    assert exit_code(session.rest()) == 0 and session.output["stdout"] == b"one two end\n"


def test_a_command_that_does_not_exist(cri: Client, container: str) -> None:
    status = Spdy(exec_url(cri, container, "/no/such"), "stdout", "stderr").rest()
    assert status["reason"] == "InternalError" and "/no/such" in status["message"] and "ENOENT" in status["message"]


def test_much_output_arrives_whole(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "sh", "-c", "head -c 50000000 /dev/zero | tr '\\0' x"), "stdout", "stderr")
    session.rest()
    assert session.output["stdout"] == b"x" * 50_000_000


def test_the_output_of_a_client_that_waits_is_held_back_and_then_whole(cri: Client, container: str) -> None:
    """And the daemon keeps none of it."""
    assert cri.daemon.process is not None
    session = Spdy(exec_url(cri, container, "head", "-c", "200000000", "/dev/zero"), "stdout", "stderr")
    session.until(lambda: session.output["stdout"])
    before = resident(cri)
    time.sleep(1.5)
    assert resident(cri) - before < 4 * MIB
    assert "head -c" in processes(cri, container), "the command must be waiting"
    session.rest()
    assert len(session.output["stdout"]) == 200_000_000


def test_input_that_the_command_does_not_read_is_held_back(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "sleep", "5", stdin=True), "stdin", "stdout", "stderr")
    session.until(lambda: True)
    before = resident(cri)
    session.link._socket.settimeout(1)
    with pytest.raises(TimeoutError):
        for _ in range(2000):
            session.send("stdin", bytes(65536))
    assert resident(cri) - before < 4 * MIB
    session.link.close()


def resident(cri: Client) -> int:
    assert cri.daemon.process is not None
    status = Path(f"/proc/{cri.daemon.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.parametrize("pids", [pb.POD, pb.CONTAINER])
def test_a_terminal(cri: Client, pids: int) -> None:
    """An exec is born in its session, or comes to it late where it shares its PID namespace."""
    container = cri.start(cri.pod(namespaces={"pid": pids}), "sleep", "600")
    url = exec_url(cri, container, "sh", "-c", "tty; echo $TERM; read x; stty size; exit 3", stdin=True, tty=True)
    session = Spdy(url, "stdin", "stdout", "resize")
    session.until(lambda: b"xterm" in session.output["stdout"])
    session.send("resize", b'{"Width":1,"Height":2}{"Width":123,')
    session.send("resize", b'"Height":45}\n')
    session.send("stdin", b"\n")
    assert exit_code(session.rest()) == 3
    assert b"/dev/pts/" in session.output["stdout"] and b"45 123" in session.output["stdout"]


def test_a_terminal_that_loses_its_client_hangs_up(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "sleep", "411", stdin=True, tty=True), "stdin", "stdout", "resize")
    session.until(lambda: "error" in session.numbers)
    wait_for(lambda: "sleep 411" in processes(cri, container))
    session.link.close()
    wait_for(lambda: "sleep 411" not in processes(cri, container))


def test_a_command_that_loses_its_client_sees_the_end_of_its_streams(cri: Client, container: str) -> None:
    """What other runtimes do: no kill, but end of input, and SIGPIPE for who goes on writing."""
    reader = Spdy(exec_url(cri, container, "sh", "-c", "cat; exec sleep 1", stdin=True), "stdin", "stdout", "stderr")
    writer = Spdy(exec_url(cri, container, "yes", "no"), "stdout", "stderr")
    quiet = Spdy(exec_url(cri, container, "sleep", "412"), "stdout", "stderr")
    wait_for(lambda: {"cat", "yes no", "sleep 412"} <= set(processes(cri, container).splitlines()))
    for session in (reader, writer, quiet):
        session.link.close()
    wait_for(lambda: not {"cat", "yes no"} & set(processes(cri, container).splitlines()))
    assert "sleep 412" in processes(cri, container)


def test_a_grandchild_that_keeps_the_streams_does_not_hold_the_session(cri: Client, container: str) -> None:
    start = time.monotonic()
    session = Spdy(exec_url(cri, container, "sh", "-c", "echo done; sleep 413 & exit 4"), "stdout", "stderr")
    assert exit_code(session.rest()) == 4 and session.output["stdout"] == b"done\n"
    assert time.monotonic() - start < 5


def test_what_was_written_before_the_end_reaches_a_slow_client(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "sh", "-c", "head -c 60000 /dev/zero"), "stdout", "stderr")
    time.sleep(1.5)  # the command has long ended
    session.rest()
    assert len(session.output["stdout"]) == 60000


@pytest.mark.parametrize("protocol", ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"])
def test_older_protocols_tell_only_an_error_as_text(cri: Client, container: str, protocol: str) -> None:
    session = Spdy(exec_url(cri, container, "sh", "-c", "exit 5"), "stdout", "stderr", protocol=protocol)
    session.rest()
    assert session.output["error"] == b"command terminated with non-zero exit code: exit code 5"
    session = Spdy(exec_url(cri, container, "true"), "stdout", "stderr", protocol=protocol)
    session.rest()
    assert session.output["error"] == b""


def test_the_client_chooses_the_protocol(cri: Client, container: str) -> None:
    offer = "v9.channel.k8s.io, v3.channel.k8s.io,v4.channel.k8s.io"
    upgrade = f"Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {offer}"
    parts = exec_url(cri, container, "true").removeprefix("http://").split("/", 1)
    host, port = parts[0].split(":")
    with socket.create_connection((host, int(port)), 10) as sock:
        sock.sendall(f"GET /{parts[1]} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n\r\n".encode())
        answer = sock.recv(4096).decode().lower()
    assert answer.startswith("http/1.1 101") and "x-stream-protocol-version: v3.channel.k8s.io" in answer


def test_a_url_is_good_once(cri: Client, container: str) -> None:
    url = exec_url(cri, container, "true")
    Spdy(url, "stdout", "stderr").rest()
    with pytest.raises(Unavailable, match="was used already"):
        Link(url, "v4.channel.k8s.io")
    with pytest.raises(Unavailable, match="was used already"):
        Link(exec_url(cri, container, "true").replace("/exec/", "/attach/"), "v4.channel.k8s.io")


def test_urls_cannot_be_guessed(cri: Client, container: str) -> None:
    tokens = {exec_url(cri, container, "true").rsplit("/", 1)[1] for _ in range(20)}
    assert len(tokens) == 20 and all(re.fullmatch(r"[\w-]{24}", token) for token in tokens)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Connection: close", b"400"),
        ("Connection: Upgrade\r\nUpgrade: SPDY/3.1", b"400"),
        ("Connection: Upgrade\r\nUpgrade: h2c", b"400"),
        ("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9.channel.k8s.io", b"403"),
        ("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 3\r\n\r\nabc", b"400"),
        ("Connection: Upgrade\r\nUpgrade: websocket", b"400"),
        ("X: " + "y" * 100_000, b"431"),
    ],
)
def test_requests_that_are_refused(cri: Client, container: str, headers: str, status: bytes) -> None:
    answer = http_get(exec_url(cri, container, "true"), headers)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    if status == b"403":
        assert b"x-accepted-stream-protocol-versions: v4.channel.k8s.io" in answer.lower()


def test_other_paths_and_methods(cri: Client, container: str) -> None:
    url = exec_url(cri, container, "true")
    base = url.rsplit("/", 2)[0]
    for path in ("/", "/exec", "/exec/", "/exec/../exec", "/nothing/here", f"/exec/{'x' * 24}"):
        assert http_get(base + path).startswith(b"HTTP/1.1 404")
    assert http_get(url, method="PUT").startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize("noise", [b"\0" * 100, b"SSH-2.0-x\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET"])
def test_noise_at_the_door(cri: Client, container: str, noise: bytes) -> None:
    host, port = exec_url(cri, container, "true").split("/")[2].split(":")
    with socket.create_connection((host, int(port)), 10) as sock:
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)
        answer = sock.recv(4096)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer


def test_noise_after_the_upgrade_ends_the_session_and_its_command_is_let_go(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "cat", stdin=True), "stdin", "stdout", "stderr")
    wait_for(lambda: "cat" in processes(cri, container).splitlines())
    session.link._socket.sendall(b"\xff" * 1000)
    wait_for(lambda: "cat" not in processes(cri, container).splitlines())


def test_a_stream_that_nobody_asked_for_is_reset(cri: Client, container: str) -> None:
    session = Spdy(exec_url(cri, container, "sleep", "1"), "stdin", "stdout", "stderr", "stdout2")
    session.rest()
    assert session.reset == {"stdin", "stdout2"}


def test_bad_requests_at_the_door(cri: Client, container: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "stderr"):
        cri.call("Exec", container_id=container, cmd=["true"], tty=True, stdout=True, stderr=True)
    with refused(Code.INVALID_ARGUMENT, "stdout"):
        cri.call("Exec", container_id=container, cmd=["true"])
    with refused(Code.INVALID_ARGUMENT, "cmd"):
        cri.call("Exec", container_id=container, stdout=True)
    with refused(Code.INVALID_ARGUMENT, "stdout"):
        cri.call("Attach", container_id=container)
    with refused(Code.NOT_FOUND, "nobody"):
        cri.call("Exec", container_id="nobody", cmd=["true"], stdout=True)
    with refused(Code.NOT_FOUND, "nobody"):
        cri.call("PortForward", pod_sandbox_id="nobody")
    pod = cri.status(container) and cri.containers(id=container)[0].pod_sandbox_id
    with refused(Code.INVALID_ARGUMENT, "port[1]"):
        cri.call("PortForward", pod_sandbox_id=pod, port=[80, 70000])
    cri.call("StopContainer", container_id=container, timeout=0)
    with refused(Code.FAILED_PRECONDITION, "exited"):
        cri.call("Exec", container_id=container, stdout=True, cmd=["true"])
    with refused(Code.FAILED_PRECONDITION, "exited"):
        cri.call("Attach", container_id=container, stdout=True)
    cri.call("StopPodSandbox", pod_sandbox_id=pod)
    with refused(Code.FAILED_PRECONDITION, "ready"):
        cri.call("PortForward", pod_sandbox_id=pod)


def test_a_container_that_ends_before_its_client_comes(cri: Client, container: str) -> None:
    urls = exec_url(cri, container, "true"), attach_url(cri, container)
    cri.call("StopContainer", container_id=container, timeout=0)
    for url in urls:
        status = Spdy(url, "stdout", "stderr").rest()
        assert status["reason"] == "InternalError" and "exited" in status["message"]


def test_unused_urls_are_bounded(fresh: Client) -> None:
    container = fresh.start(fresh.pod(), "sleep", "600")
    with refused(Code.RESOURCE_EXHAUSTED, "1000 streaming URLs"):
        for _ in range(1001):
            attach_url(fresh, container)
    exec_url(fresh, container, "true")  # each kind has its own bound


def test_attach_many_and_late(cri: Client) -> None:
    container = cri.start(cri.pod(), "sh", "-c", "read x; echo one; read x; echo two >&2", stdin=True)
    first = [Spdy(attach_url(cri, container), "stdout", "stderr") for _ in range(5)]
    writer = Spdy(attach_url(cri, container, stdin=True), "stdin", "stdout", "stderr")
    time.sleep(0.3)
    writer.send("stdin", b"\n")
    writer.until(lambda: writer.output["stdout"] == b"one\n")
    late = Spdy(attach_url(cri, container), "stdout", "stderr")
    time.sleep(0.3)
    writer.send("stdin", b"\n")
    for session in (*first, writer, late):
        assert session.rest()["status"] == "Success"
        assert session.output["stderr"] == b"two\n"
        assert bytes(session.output["stdout"]) == (b"" if session is late else b"one\n")


def test_stdin_once(cri: Client) -> None:
    container = cri.start(cri.pod(), "sh", "-c", "cat; echo end", stdin=True, stdin_once=True)
    session = Spdy(attach_url(cri, container, stdin=True), "stdin", "stdout", "stderr")
    session.send("stdin", b"x")
    session.end()
    assert session.rest()["status"] == "Success" and session.output["stdout"] == b"xend\n"


def test_stdin_stays_open_for_the_next_without_stdin_once(cri: Client) -> None:
    container = cri.start(cri.pod(), "cat", stdin=True)
    for word in (b"one", b"two"):
        session = Spdy(attach_url(cri, container, stdin=True), "stdin", "stdout", "stderr")
        session.send("stdin", word)
        session.until(functools.partial(session.output["stdout"].endswith, word))
        assert bytes(session.output["stdout"]) == word
        session.end()
        session.link.close()
    assert cri.status(container).state == pb.CONTAINER_RUNNING


def test_attach_with_a_terminal(cri: Client) -> None:
    container = cri.start(cri.pod(), "sh", stdin=True, tty=True)
    session = Spdy(attach_url(cri, container, stdin=True, tty=True), "stdin", "stdout", "resize")
    session.send("resize", b'{"Width":77,"Height":33}')
    time.sleep(0.3)
    session.send("stdin", b"stty size; exit\n")
    assert session.rest()["status"] == "Success" and b"33 77" in session.output["stdout"]


def test_attach_before_the_start_misses_nothing(cri: Client) -> None:
    container = cri.create(cri.pod(), "echo", "at once")
    session = Spdy(attach_url(cri, container), "stdout", "stderr")
    session.until(lambda: "stdout" in session.output)  # the empty message that says: it has begun
    cri.call("StartContainer", container_id=container)
    session.rest()
    assert session.output["stdout"] == b"at once\n"


def test_attach_under_endless_output_does_not_grow(cri: Client) -> None:
    container = cri.start(cri.pod(), "yes", log_path="")
    session = Spdy(attach_url(cri, container), "stdout", "stderr")
    sizes = []
    for mebibytes in (20, 40, 60, 80):
        while len(session.output["stdout"]) < MIB:
            session.until(lambda: len(session.output["stdout"]) >= MIB)
        for _ in range(mebibytes):
            session.output.clear()
            session.until(lambda: len(session.output["stdout"]) >= MIB)
        sizes.append(resident(cri))
    session.link.close()
    assert sizes[-1] - sizes[0] < 2 * MIB, sizes


def test_the_daemon_keeps_no_descriptor_of_a_session(cri: Client, container: str) -> None:
    assert cri.daemon.process is not None
    directory = Path(f"/proc/{cri.daemon.process.pid}/fd")
    Spdy(exec_url(cri, container, "true"), "stdout", "stderr").rest()
    before = len(os.listdir(directory))
    for number in range(30):
        session = Spdy(
            exec_url(cri, container, "cat", stdin=True, tty=number % 2 == 1, stderr=False), "stdin", "stdout"
        )
        if number % 3:
            session.link.close()
        else:
            session.send("stdin", b"\x04" if number % 2 else b"")
            session.end()
            session.link.close()
    wait_for(lambda: len(os.listdir(directory)) <= before + 2)


@pytest.fixture
def web(cri: Client) -> Iterator[str]:
    """A pod with an HTTP server on 127.0.0.1:8080, and one that echoes on 9000."""
    pod = cri.pod()
    script = (
        "mkdir /tmp/w; echo hello > /tmp/w/index.html; httpd -p 127.0.0.1:8080 -h /tmp/w; exec nc -ll -p 9000 -e cat"
    )
    container = cri.start(pod, "sh", "-c", script)
    wait_for(lambda: b":2328 " in cri.exec(container, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout)  # 9000
    yield pod


def test_port_forward(cri: Client, web: str) -> None:
    forward = Forward(cri, web)
    for _ in range(3):
        data, error = forward.open(8080)
        forward.link.send(data, b"GET /index.html HTTP/1.0\r\n\r\n")
        forward.until(functools.partial(forward.ended.issuperset, (data, error)))
        assert forward.output[data].startswith(b"HTTP/1.1 200") and forward.output[data].endswith(b"hello\n")
        assert forward.output[error] == b""


def test_port_forward_half_close_and_many_at_once(cri: Client, web: str) -> None:
    forward = Forward(cri, web)
    content: dict[int, bytes] = {}
    for _ in range(8):
        stream, _ = forward.open(9000)
        content[stream] = os.urandom(4_000)  # little enough for one who sends all, then reads
        # One after the other: busybox nc listens for two, and of more that wait the kernel's SYN cookies lose some.
        forward.link.send(stream, content[stream][:1])
        forward.until(functools.partial(forward.output.get, stream))
    for stream in content:
        forward.link.send(stream, content[stream][1:])
    for stream in content:
        forward.link.end(stream)
    forward.until(lambda: set(content) <= forward.ended)
    assert all(forward.output[stream] == sent for stream, sent in content.items())


def test_port_forward_to_a_port_that_nobody_has(cri: Client, web: str) -> None:
    forward = Forward(cri, web)
    data, error = forward.open(81)
    forward.until(lambda: data in forward.reset and error in forward.ended)
    assert b"cannot connect to port 81" in forward.output[error] and b"127.0.0.1" in forward.output[error]
    for wrong in ("0", "70000", "eighty", "", "-1", "99999999999999999999"):
        data, error = forward.open(wrong)
        forward.until(functools.partial(forward.reset.issuperset, (data,)))
        forward.until(functools.partial(forward.ended.issuperset, (error,)))
        assert b"must be 1 to 65535" in forward.output[error]
    data, _ = forward.open(9000)  # the connection goes on
    forward.link.send(data, b"still here")
    forward.until(lambda: forward.output[data] == b"still here")


def test_port_forward_that_is_reset_by_its_client(cri: Client, web: str) -> None:
    forward = Forward(cri, web)
    data, _ = forward.open(9000)
    forward.link.send(data, b"x")
    forward.until(lambda: forward.output[data] == b"x")
    container = cri.containers(pod_sandbox_id=web)[0].id
    assert "cat" in processes(cri, container).splitlines()
    forward.link.reset(data)
    wait_for(lambda: "cat" not in processes(cri, container).splitlines())


def test_port_forwards_end_with_their_client(cri: Client, web: str) -> None:
    forward = Forward(cri, web)
    for _ in range(5):
        data, _ = forward.open(9000)
        forward.link.send(data, b"x")
        forward.until(functools.partial(forward.output[data].endswith, b"x"))
    container = cri.containers(pod_sandbox_id=web)[0].id
    forward.link.close()
    wait_for(lambda: "cat" not in processes(cri, container).splitlines())


def test_streams_without_a_request_id(cri: Client, web: str) -> None:
    """As clients before Kubernetes 1.2 open them: the error stream, then its data stream."""
    forward = Forward(cri, web)
    error = forward.link.open({"streamtype": "error", "port": "9000"})
    data = forward.link.open({"streamtype": "data", "port": "9000"})
    forward.link.send(data, b"old")
    forward.until(lambda: forward.output[data] == b"old")
    strange = forward.link.open({"streamtype": "video", "port": "9000"})
    forward.until(lambda: strange in forward.reset)
    assert error not in forward.reset


def test_port_forward_into_the_hosts_network(cri: Client) -> None:
    pod = cri.pod(namespaces={"network": pb.NODE})
    with socket.create_server(("127.0.0.1", 0)) as server:
        forward = Forward(cri, pod)
        data, _ = forward.open(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            forward.link.send(data, b"to the node")
            assert connection.recv(100) == b"to the node"


def test_port_forward_to_ipv6(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "httpd", "-f", "-p", "[::1]:8081")
    wait_for(lambda: b":1F91 " in cri.exec(container, "cat", "/proc/net/tcp6").stdout)
    forward = Forward(cri, pod)
    data, _ = forward.open(8081)
    forward.link.send(data, b"GET / HTTP/1.0\r\n\r\n")
    forward.until(lambda: forward.output[data].startswith(b"HTTP/1.1 404"))


def test_a_pod_that_goes_away_ends_its_forwards(cri: Client, web: str) -> None:
    forward = Forward(cri, web)
    data, _ = forward.open(9000)
    forward.link.send(data, b"x")
    forward.until(lambda: forward.output[data] == b"x")
    cri.call("StopPodSandbox", pod_sandbox_id=web)
    forward.until(lambda: data in forward.ended | forward.reset)
    late, late_error = forward.open(9000)
    forward.until(lambda: late in forward.reset)
    assert b"ready" in forward.output[late_error]


def test_stopping_the_daemon_ends_sessions_and_their_commands(fresh: Client) -> None:
    container = fresh.start(fresh.pod(), "sleep", "600")
    session = Spdy(exec_url(fresh, container, "sleep", "415"), "stdout", "stderr")
    wait_for(lambda: "sleep 415" in processes(fresh, container))
    start = time.monotonic()
    fresh.restart()
    assert time.monotonic() - start < 15
    assert session.rest() == {}
    assert "sleep 415" not in processes(fresh, container)
    assert Spdy(exec_url(fresh, container, "true"), "stdout", "stderr").rest()["status"] == "Success"


def test_an_idle_session_is_closed_and_pings_do_not_keep_it(fresh: Client) -> None:
    configure(fresh, 'stream_idle_timeout = "2s"')
    container = fresh.start(fresh.pod(), "sleep", "600")
    idle = Spdy(exec_url(fresh, container, "sleep", "416"), "stdout", "stderr")
    busy = Spdy(
        exec_url(fresh, container, "sh", "-c", "for i in 1 2 3 4 5 6 7; do sleep 1; echo; done"), "stdout", "stderr"
    )
    start = time.monotonic()
    while time.monotonic() - start < 1.5:
        idle.link._socket.sendall(idle.link._spdy.ping(1))
        time.sleep(0.1)
    assert idle.rest() == {} and time.monotonic() - start < 6.5
    assert exit_code(busy.rest()) == 0


def configure(cri: Client, *lines: str) -> None:
    """Add to [crio.api] and start the daemon again."""
    drop_in = cri.daemon.directory / "crio.conf.d/streams.conf"
    drop_in.write_text("\n".join(("[crio.api]", *lines)) + "\n")
    cri.restart()


def test_a_port_that_is_taken_is_said_at_the_start(fresh: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        drop_in = fresh.daemon.directory / "crio.conf.d/streams.conf"
        drop_in.write_text(f'[crio.api]\nstream_port = "{taken.getsockname()[1]}"\n')
        fresh.stop_daemon()
        program = Path(sys.executable).with_name("crio-native")
        directory = fresh.daemon.directory
        done = subprocess.run(
            [program, "--config", directory / "crio.conf", "--config-dir", directory / "crio.conf.d"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 1 and "stream_port" in done.stderr and "in use" in done.stderr
        drop_in.unlink()
    fresh.start_daemon()


def test_status_objects_are_json_that_old_clients_read() -> None:
    from crio_native.streaming.remotecommand import _exit_status

    assert json.loads(json.dumps(_exit_status(0))) == {"metadata": {}, "status": "Success"}


def test_an_attached_client_that_takes_nothing_is_let_go_and_told(cri: Client) -> None:
    container = cri.start(cri.pod(), "yes")
    session = Spdy(attach_url(cri, container), "stdout", "stderr")
    other = Spdy(attach_url(cri, container), "stdout", "stderr")
    other.until(lambda: other.output["stdout"])
    deadline = time.monotonic() + 9
    while time.monotonic() < deadline:  # the container's output is held back for a while, and then goes on
        other.output.clear()
        other.until(lambda: other.output["stdout"])
    status = session.rest()
    assert status["reason"] == "InternalError" and "not taken for 5 s" in status["message"]
    other.until(lambda: len(other.output["stdout"]) > 100_000)
    other.link.close()


def test_a_client_that_vanishes_behind_unread_input_is_noticed(fresh: Client) -> None:
    assert fresh.daemon.process is not None
    container = fresh.start(fresh.pod(), "sleep", "600")
    Spdy(exec_url(fresh, container, "true"), "stdout", "stderr").rest()
    directory = Path(f"/proc/{fresh.daemon.process.pid}/fd")
    before = len(os.listdir(directory))
    session = Spdy(exec_url(fresh, container, "sleep", "417", stdin=True), "stdin", "stdout", "stderr")
    session.link._socket.settimeout(1)
    with pytest.raises(TimeoutError):
        for _ in range(1000):
            session.send("stdin", bytes(65536))
    assert len(os.listdir(directory)) > before + 3
    session.link._socket.close()
    wait_for(lambda: len(os.listdir(directory)) <= before + 1, seconds=25)  # one is the command's, which lives on
    assert "sleep 417" in processes(fresh, container)
