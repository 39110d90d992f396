"""Streaming by TLS: certificates, those of clients, files that are replaced and files that are no good."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .conftest import Client
from .streams import exec_url

pytestmark = pytest.mark.root
CRIOCTL = [sys.executable, "-m", "crio_native.cli.crioctl"]


def make_certificate(directory: Path, name: str, issuer: str = "") -> None:
    """NAME.pem and NAME.key in the directory; without an issuer an authority of its own."""
    options: list[str | Path] = ["-subj", f"/CN={name}", "-days", "2", "-nodes"]
    options += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    options += ["-keyout", directory / f"{name}.key", "-out", directory / f"{name}.pem"]
    if issuer:
        options += ["-addext", "subjectAltName=IP:127.0.0.1"]
        options += ["-CA", directory / f"{issuer}.pem", "-CAkey", directory / f"{issuer}.key"]
    subprocess.run(["openssl", "req", "-x509", *options], check=True, capture_output=True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    make_certificate(tmp_path, "authority")
    make_certificate(tmp_path, "server", "authority")
    return tmp_path


def configure(cri: Client, files: Path, *lines: str) -> None:
    drop_in = cri.daemon.directory / "crio.conf.d/tls.conf"
    drop_in.write_text(
        f'[crio.api]\nstream_enable_tls = true\nstream_tls_cert = "{files}/server.pem"\n'
        f'stream_tls_key = "{files}/server.key"\n' + "\n".join(lines) + "\n"
    )
    cri.restart()


def crioctl(cri: Client, authority: Path, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CRIO_NATIVE_SOCKET": str(cri.daemon.socket), "SSL_CERT_FILE": str(authority)}
    return subprocess.run([*CRIOCTL, *words], env=environment, input=text, capture_output=True, text=True, timeout=30)


def subject(url: str, context: ssl.SSLContext) -> str:
    """The name in the server's certificate."""
    parts = urlsplit(url)
    assert parts.scheme == "https"
    with socket.create_connection((parts.hostname, parts.port), 10) as sock:
        with context.wrap_socket(sock, server_hostname=parts.hostname) as secured:
            certificate = secured.getpeercert() or {}
            return str(certificate["subject"][0][0][1])


def test_a_session_by_tls(fresh: Client, files: Path) -> None:
    configure(fresh, files)
    container = fresh.start(fresh.pod(), "sleep", "600")
    script = "head -c 3000000 /dev/zero; cat; exit 3"
    done = crioctl(fresh, files / "authority.pem", "exec", "-i", container, "sh", "-c", script, text="x" * 500_000)
    assert (len(done.stdout), done.returncode) == (3_500_000, 3), done.stderr
    untrusted = crioctl(fresh, files / "server.key", "exec", container, "true")
    assert untrusted.returncode == 1 and "SSL_CERT_FILE" in untrusted.stderr


def test_without_tls_there_is_no_answer(fresh: Client, files: Path) -> None:
    configure(fresh, files)
    container = fresh.start(fresh.pod(), "sleep", "600")
    parts = urlsplit(exec_url(fresh, container, "true"))
    with socket.create_connection((parts.hostname, parts.port), 10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            answer = sock.recv(100)
        except ConnectionResetError:
            answer = b""
        assert not answer.startswith(b"HTTP")


def test_a_certificate_that_is_replaced_is_used_without_a_restart(fresh: Client, files: Path) -> None:
    configure(fresh, files)
    container = fresh.start(fresh.pod(), "sleep", "600")
    context = ssl.create_default_context(cafile=files / "authority.pem")
    url = exec_url(fresh, container, "true")
    assert subject(url, context) == "server"
    make_certificate(files, "renewed", "authority")
    (files / "renewed.key").rename(files / "server.key")  # between the two the pair does not fit
    assert subject(url, context) == "server"
    (files / "renewed.pem").rename(files / "server.pem")
    assert subject(url, context) == "renewed"
    (files / "server.pem").write_text("rubbish")
    assert subject(url, context) == "renewed"


def test_clients_need_a_certificate_where_an_authority_is_named(fresh: Client, files: Path) -> None:
    make_certificate(files, "clients")
    make_certificate(files, "client", "clients")
    configure(fresh, files, f'stream_tls_ca = "{files}/clients.pem"', 'tls_min_version = "VersionTLS12"')
    container = fresh.start(fresh.pod(), "sleep", "600")
    url = exec_url(fresh, container, "true")
    context = ssl.create_default_context(cafile=files / "authority.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 the refusal comes after the handshake
    with pytest.raises(OSError):
        subject(url, context)
    context.load_cert_chain(files / "client.pem", files / "client.key")
    assert subject(url, context) == "server"


def test_versions_that_are_too_old_are_refused(fresh: Client, files: Path) -> None:
    configure(fresh, files, 'tls_min_version = "VersionTLS13"')
    container = fresh.start(fresh.pod(), "sleep", "600")
    url = exec_url(fresh, container, "true")
    context = ssl.create_default_context(cafile=files / "authority.pem")
    assert subject(url, context) == "server"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        subject(url, context)


@pytest.mark.parametrize(
    ("content", "field"),
    [("rubbish", "stream_tls_cert"), (None, "stream_tls_cert")],
)
def test_files_that_are_no_good_stop_the_start(fresh: Client, files: Path, content: str | None, field: str) -> None:
    if content is None:
        (files / "server.pem").unlink()
    else:
        (files / "server.pem").write_text(content)
    directory = fresh.daemon.directory
    drop_in = directory / "crio.conf.d/tls.conf"
    drop_in.write_text(
        f'[crio.api]\nstream_enable_tls = true\nstream_tls_cert = "{files}/server.pem"\n'
        f'stream_tls_key = "{files}/server.key"\n'
    )
    fresh.stop_daemon()
    program = Path(sys.executable).with_name("crio-native")
    command = [str(program), "--config", f"{directory}/crio.conf", "--config-dir", f"{directory}/crio.conf.d"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and field in done.stderr and "server.pem" in done.stderr, done.stderr
    drop_in.unlink()
    fresh.start_daemon()
