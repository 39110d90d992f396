"""The whole streaming server against noise: at its door, and inside SPDY and WebSocket sessions.

Its connections lead to a real server on the loopback, which echoes.  After any noise the server must have let go of
the session, have logged no defect, and serve the next client.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crio_native.cli.ctl.streams import FORWARD, Link
from crio_native.streaming import spdy
from crio_native.streaming.portforward import Ports
from crio_native.streaming.server import StreamServer
from crio_native.streaming.settings import Settings

from ..waiting import wait_for

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455, section 1.3


class Served:
    """A server, and the port behind it."""

    def __init__(self) -> None:
        self.server = StreamServer(Settings())
        self.echo = socket.create_server(("127.0.0.1", 0))
        self.port = self.echo.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.echo.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(client,), daemon=True).start()

    @staticmethod
    def _echo(client: socket.socket) -> None:
        with client:
            try:
                while data := client.recv(65536):
                    client.sendall(data)
            except OSError:
                pass

    def url(self) -> str:
        return self.server.url("portforward", Ports((self.port,), lambda: [socket.socket()]))

    def connect(self, url: str) -> socket.socket:
        host, port = url.split("/")[2].split(":")
        return socket.create_connection((host, int(port)), 10)

    def upgraded(self, headers: str) -> socket.socket:
        url = self.url()
        sock = self.connect(url)
        path = "/" + url.split("/", 3)[3]
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n{headers}\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += sock.recv(1)
        assert answer.startswith(b"HTTP/1.1 101"), answer
        return sock

    def noise(self, sock: socket.socket, data: bytes) -> None:
        """Send it, say that this is all, and read to the end: the server's or ours."""
        with sock:
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
            except ConnectionError:
                pass
        self.check()

    def check(self) -> None:
        link = Link(self.url(), FORWARD)
        headers = {"port": str(self.port), "requestid": "1"}
        link.open({**headers, "streamtype": "error"})
        data = link.open({**headers, "streamtype": "data"})
        content = os.urandom(1000)
        link.send(data, content)
        link.end(data)
        got = b"".join(bytes(e.data) for e in _to_end(link, data))
        link.close()
        assert got == content

    def sessions(self) -> int:
        assert self.server._service is not None
        return len(self.server._service._reception)

    def close(self) -> None:
        wait_for(lambda: not self.sessions(), "the end of its sessions")
        self.server.close()
        self.echo.close()


def _to_end(link: Link, stream: int) -> Iterator[spdy.Data]:
    for event in link.events():
        if isinstance(event, spdy.Data) and event.stream == stream:
            yield event
        elif isinstance(event, spdy.Ended) and event.stream == stream:
            return


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


@pytest.fixture(autouse=True)
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR):
        yield
    assert not caplog.records, caplog.text


HEADER = st.sampled_from(
    ["GET / HTTP/1.1\r\n", "Upgrade: SPDY/3.1\r\n", "Host: x\r\n", "\r\n", "X-Stream: \0", ": \r\n"]
)


@QUICK
@given(st.one_of(st.binary(max_size=500), st.lists(HEADER, max_size=8).map(lambda lines: "".join(lines).encode())))
def test_noise_at_the_door(served: Served, data: bytes) -> None:
    served.noise(served.connect(served.url()), data)


FRAMES = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(0, 3), st.binary(max_size=40)).map(
        lambda f: spdy._control_frame(f[0], f[2])[:4] + bytes([f[1]]) + spdy._control_frame(f[0], f[2])[5:]
    ),
    st.tuples(st.integers(0, 9), st.binary(max_size=40)).map(
        lambda f: f[0].to_bytes(4, "big") + len(f[1]).to_bytes(4, "big") + f[1]
    ),
)
KIND = st.sampled_from(["data", "error", "stdin", ""])
REQUEST = st.sampled_from(["1", "2", ""])


@QUICK
@given(st.lists(st.tuples(KIND, REQUEST, st.booleans()), max_size=5), st.lists(FRAMES, max_size=8))
def test_noise_in_spdy(served: Served, streams: list[tuple[str, str, bool]], frames: list[bytes]) -> None:
    """Some streams that are right, some that are not, then frames of any kind for any stream."""
    client = spdy.Connection(client=True)
    data = b""
    for kind, request, ends in streams:
        number, frame = client.open({"streamtype": kind, "port": str(served.port), "requestid": request})
        data += frame + (client.end(number) if ends else b"")
    sock = served.upgraded(f"Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {FORWARD}")
    served.noise(sock, data + b"".join(frames))


@QUICK
@given(
    st.sampled_from(["SPDY/3.1+portforward.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"]),
    st.lists(st.tuples(st.sampled_from([0x81, 0x82, 0x01, 0x80, 0x88, 0x89, 0x8A, 0xC2]), st.binary(max_size=100))),
    st.binary(max_size=50),
)
def test_noise_in_websocket(served: Served, protocol: str, frames: list[tuple[int, bytes]], rest: bytes) -> None:
    """Masked frames of every kind in any order, then bytes that are none."""
    data = b"".join(bytes([first, 0x80 | len(body)]) + bytes(4) + body for first, body in frames)
    headers = f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}"
    sock = served.upgraded(f"{headers}\r\nSec-WebSocket-Protocol: {protocol}")
    served.noise(sock, data + rest)
