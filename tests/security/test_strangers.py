"""Whoever reaches one of our sockets can connect and say nothing: others are served all the same."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ..cri.conftest import Client
from ..cri.streams import Spdy, exec_url

pytestmark = pytest.mark.root

MANY = 1100
KEPT = 128  # of strangers, at most, by any of our servers
METRICS = """
[crio.metrics]
enable_metrics = true
metrics_port = 0
metrics_socket = "{directory}/metrics.sock"
metrics_collectors = ["default_runtime"]
"""


@pytest.fixture(scope="module")
def cri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    directory = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    new_key = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*new_key, *subject], cwd=directory, check=True, capture_output=True)
    files = f'metrics_cert = "{directory}/cert.pem"\nmetrics_key = "{directory}/key.pem"\n'
    with Client.serving(METRICS + files) as client:
        yield client


@pytest.fixture
def crowd() -> Iterator[Callable[[Callable[[], socket.socket], int], None]]:
    """Makes connections that say nothing, and holds them to the test's end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with contextlib.ExitStack() as stack:

        def come(connect: Callable[[], socket.socket], count: int) -> None:
            for _ in range(count):
                stack.enter_context(connect())

        yield come
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


Crowd = Callable[[Callable[[], socket.socket], int], None]


def descriptors(cri: Client) -> int:
    assert cri.daemon.process is not None
    return len(os.listdir(f"/proc/{cri.daemon.process.pid}/fd"))


def metrics_port(cri: Client) -> int:
    [line] = [line for line in cri.daemon.log.read_text().splitlines() if "serving metrics on" in line]
    return int(line.rpartition(":")[2])


def behind(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))  # where a queue is full, only a socket that may block waits for a place
    sock.settimeout(20)
    return sock


def get(sock: socket.socket, path: str) -> bytes:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = sock
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read()


def test_who_has_no_token_keeps_nobody_from_an_exec(cri: Client, crowd: Crowd) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sleep", "600")
    address = urlsplit(exec_url(cri, container, "true"))
    before, told = descriptors(cri), len(cri.daemon.log.read_text().splitlines())
    crowd(lambda: socket.create_connection((address.hostname, address.port), 20), MANY)
    session = Spdy(exec_url(cri, container, "echo", "served"), "stdout", "stderr")
    assert session.rest()["status"] == "Success" and session.output["stdout"] == b"served\n"
    assert descriptors(cri) <= before + KEPT + 16
    lines = cri.daemon.log.read_text().splitlines()[told:]
    assert len(lines) < 50 and not any("ERROR" in line for line in lines)
    cri.remove_pod(pod)


def test_who_asks_nothing_keeps_nobody_from_the_metrics(cri: Client, crowd: Crowd) -> None:
    """By TLS: they do not even begin its handshake."""
    before, port = descriptors(cri), metrics_port(cri)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), 20)

    crowd(connect, MANY)
    assert b"default_runtime" in get(context.wrap_socket(connect()), "/metrics")
    cri.until(lambda: descriptors(cri) <= before + KEPT + 16)


def test_who_takes_no_answers_goes_for_others(cri: Client, crowd: Crowd) -> None:
    path = cri.daemon.directory / "metrics.sock"
    before = descriptors(cri)

    def ask() -> socket.socket:
        sock = behind(path)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 900)
        return sock

    crowd(ask, 8)
    crowd(lambda: behind(path), KEPT)
    assert b"default_runtime" in get(behind(path), "/metrics")
    cri.until(lambda: descriptors(cri) <= before + KEPT // 2 + 16)


def test_who_says_nothing_keeps_nobody_from_the_cri(cri: Client, crowd: Crowd) -> None:
    before = descriptors(cri)
    crowd(lambda: behind(cri.daemon.socket), MANY)
    assert b"storage_root" in get(behind(cri.daemon.socket), "/info")
    cri.channel.close()
    cri.connect()
    cri.call("Version")
    cri.until(lambda: descriptors(cri) <= before + KEPT + 16)


@contextlib.contextmanager
def without_descriptors(cri: Client) -> Iterator[None]:
    """The daemon can open none meanwhile."""
    assert cri.daemon.process is not None
    pid = cri.daemon.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_who_comes_while_no_descriptor_is_left_waits_and_fills_no_log(cri: Client) -> None:
    container = cri.start(pod := cri.pod(), "sleep", "600")
    address = urlsplit(exec_url(cri, container, "true"))
    told = len(cri.daemon.log.read_text().splitlines())
    with contextlib.ExitStack() as stack:
        with without_descriptors(cri):
            clients = [behind(cri.daemon.socket), behind(cri.daemon.directory / "metrics.sock")]
            clients.append(socket.create_connection((address.hostname, address.port), 20))
            for client in clients:
                stack.enter_context(client)
            cri.until(lambda: cri.daemon.log.read_text().count("can be accepted: Too many open files") >= 3)
            time.sleep(0.5)
        assert b"storage_root" in get(clients[0], "/info")
        assert b"default_runtime" in get(clients[1], "/metrics")
        assert b"used already" in get(clients[2], "/exec/none")
    assert len(cri.daemon.log.read_text().splitlines()) < told + 20
    cri.remove_pod(pod)
