"""The same sessions by WebSocket: numbered channels, close signals, and SPDY inside messages."""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Iterator

import pytest

from crio_native.streaming import spdy

from ..waiting import wait_for
from .conftest import Client
from .streams import WebSocket, attach_url, exec_url, exit_code

pytestmark = pytest.mark.root
V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
TUNNEL = "SPDY/3.1+portforward.k8s.io"
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255


@pytest.fixture
def container(cri: Client) -> Iterator[str]:
    yield cri.start(cri.pod(), "sleep", "600")


@pytest.mark.parametrize("protocol", [V5, V4])
def test_output_and_status(cri: Client, container: str, protocol: str) -> None:
    session = WebSocket(exec_url(cri, container, "sh", "-c", "echo out; echo err >&2; exit 9"), protocol)
    assert session.protocol == protocol
    session.rest()
    assert session.channel(STDOUT) == b"out\n" and session.channel(STDERR) == b"err\n"
    assert exit_code(json.loads(session.channel(ERROR))) == 9
    assert session.messages[0] == bytes([STDOUT]), "an empty message says that it has begun"


@pytest.mark.parametrize("protocols", [(), ("channel.k8s.io",)])
def test_the_oldest_protocol_tells_an_error_as_text(cri: Client, container: str, protocols: tuple[str, ...]) -> None:
    session = WebSocket(exec_url(cri, container, "sh", "-c", "exit 9"), *protocols)
    session.rest()
    assert session.channel(ERROR) == b"command terminated with non-zero exit code: exit code 9"


def test_an_input_ends_by_a_close_signal_in_v5(cri: Client, container: str) -> None:
    session = WebSocket(exec_url(cri, container, "sh", "-c", "cat; echo end", stdin=True), V5)
    session.send(STDIN, b"one")
    session.until(lambda: session.channel(STDOUT) == b"one")
    session.send(CLOSE, bytes([STDIN]))
    session.rest()
    assert session.channel(STDOUT) == b"oneend\n"


def test_v4_has_no_close_signal(cri: Client, container: str) -> None:
    session = WebSocket(exec_url(cri, container, "cat", stdin=True), V4)
    session.send(CLOSE, bytes([STDIN]))
    session.send(STDIN, b"still open")
    session.until(lambda: session.channel(STDOUT) == b"still open")
    session.socket.close()
    wait_for(lambda: b"cat" not in cri.exec(container, "ps", "-o", "comm").stdout.split())


def test_base64(cri: Client, container: str) -> None:
    session = WebSocket(exec_url(cri, container, "head", "-c", "4", stdin=True), "v4.base64.channel.k8s.io")
    session.send_text("0" + base64.b64encode(b"\0\xff").decode())
    session.send_text("0" + base64.b64encode(b"ab").decode())
    session.rest()
    output = b"".join(base64.b64decode(m[1:]) for m in session.messages if m[:1] == b"1")
    assert output == b"\0\xffab"
    status = b"".join(base64.b64decode(m[1:]) for m in session.messages if m[:1] == b"3")
    assert json.loads(status)["status"] == "Success"


@pytest.mark.parametrize("text", ["0!!!!", "0" + "A" * (2 << 20)], ids=["not-base64", "too-long"])
def test_bad_base64_ends_the_session(cri: Client, container: str, text: str) -> None:
    session = WebSocket(exec_url(cri, container, "cat", stdin=True), "v4.base64.channel.k8s.io")
    try:
        session.send_text(text)
        session.socket.settimeout(10)
        while session.socket.recv(65536):
            pass
    except ConnectionError:
        pass
    wait_for(lambda: b"cat" not in cri.exec(container, "ps", "-o", "comm").stdout.split())


def test_a_terminal(cri: Client, container: str) -> None:
    url = exec_url(cri, container, "sh", "-c", "read x; stty size; exit 3", stdin=True, tty=True)
    session = WebSocket(url, V5)
    session.send(RESIZE, b'{"Width":99,"Height":11}')
    session.send(STDIN, b"\n")
    session.rest()
    assert b"11 99" in session.channel(STDOUT) and exit_code(json.loads(session.channel(ERROR))) == 3


def test_much_input_and_output(cri: Client, container: str) -> None:
    session = WebSocket(exec_url(cri, container, "sha256sum", stdin=True), V5)
    for _ in range(50):
        session.send(STDIN, b"x" * 300_000)
    session.send(CLOSE, bytes([STDIN]))
    session.rest()
    import hashlib

    assert session.channel(STDOUT).split()[0].decode() == hashlib.sha256(b"x" * 15_000_000).hexdigest()


def test_messages_for_channels_that_there_are_not(cri: Client, container: str) -> None:
    session = WebSocket(exec_url(cri, container, "sh", "-c", "read x; echo $x", stdin=True), V5)
    for channel in (1, 2, 3, 77, 254):
        session.send(channel, b"noise")
    session.send(CLOSE, bytes([77, 200]))
    session.send(CLOSE, b"")
    session.send(STDIN, b"fine\n")
    session.rest()
    assert session.channel(STDOUT) == b"fine\n"


def test_none_of_the_protocols_is_known(cri: Client, container: str) -> None:
    assert WebSocket(exec_url(cri, container, "true"), "v9.channel.k8s.io").refusal == 403
    assert WebSocket(exec_url(cri, container, "true"), "v9.channel.k8s.io", V4).protocol == V4


def test_attach(cri: Client) -> None:
    container = cri.start(cri.pod(), "sh", "-c", "read x; echo got $x", stdin=True)
    session = WebSocket(attach_url(cri, container, stdin=True), V5)
    session.until(lambda: session.messages)
    session.send(STDIN, b"it\n")
    session.rest()
    assert session.channel(STDOUT) == b"got it\n" and json.loads(session.channel(ERROR))["status"] == "Success"


@pytest.fixture
def echo(cri: Client) -> Iterator[str]:
    """A pod that echoes on 9000."""
    pod = cri.pod()
    container = cri.start(pod, "nc", "-ll", "-p", "9000", "-e", "cat")
    wait_for(lambda: b":2328 " in cri.exec(container, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout)
    yield pod


def test_port_forward_by_channels(cri: Client, echo: str) -> None:
    url = cri.call("PortForward", pod_sandbox_id=echo, port=[9000, 9]).url
    session = WebSocket(url, V4)
    session.until(lambda: len(session.messages) >= 5)
    ports = [struct.unpack("<H", session.channel(channel)[:2])[0] for channel in range(4)]
    assert ports == [9000, 9000, 9, 9]
    assert b"cannot connect to port 9 in the pod" in session.channel(3)
    session.send(0, b"hello")
    session.until(lambda: session.channel(0)[2:] == b"hello")
    session.socket.close()


def test_port_forward_by_spdy_inside_messages(cri: Client, echo: str) -> None:
    session = WebSocket(cri.call("PortForward", pod_sandbox_id=echo).url, TUNNEL, V4)
    assert session.protocol == TUNNEL
    client = spdy.Connection(client=True)
    content = os.urandom(300_000)
    frames = b""
    for kind in ("error", "data"):
        data, frame = client.open({"streamtype": kind, "port": "9000", "requestid": "1"})
        frames += frame
    frames += client.data(data, len(content)) + content + client.end(data)
    for start in range(0, len(frames), 77_777):
        session.send(frames[start], frames[start + 1 : start + 77_777])
    got, ended = bytearray(), False
    while not ended:
        session.until(lambda: session.messages)
        for message in session.messages:
            for event in client.receive(memoryview(message)):
                if isinstance(event, spdy.Data) and event.stream == data:
                    got += event.data
                ended = ended or (isinstance(event, spdy.Ended) and event.stream == data)
        session.messages.clear()
    assert got == content
