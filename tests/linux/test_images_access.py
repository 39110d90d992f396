"""Debian's registry behind passwords, tokens and TLS."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PermissionRefused,
    Unavailable,
)
from crio_native.images import Credentials
from crio_native.images.credentials import Keychain

from ..images_support import (
    BASE,
    TOP,
    HostileRegistry,
    Registry,
    deaf,
    picture,
    reply,
    running_registry,
    sha256,
    store_with,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry

pytestmark = pytest.mark.root


USER = Credentials("me", "pass")


BCRYPT = "$2b$04$abcdefghijklmnopqrstuufznL8bkzdtHwLhca4To/v9Lo9bA7fR6"  # of "pass"


BASIC = {"Authorization": "Basic " + base64.b64encode(b"me:pass").decode()}


def run(*command: object, cwd: Path | None = None, given: bytes = b"") -> bytes:
    line = [*map(str, command)]
    return subprocess.run(line, check=True, capture_output=True, timeout=30, cwd=cwd, input=given).stdout


# Passwords


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "htpasswd").write_text(f"me:{BCRYPT}\n")
    with running_registry(directory, auth=f"{{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}") as made:
        made.headers = BASIC
        made.push("team/app", "v1", picture(BASE, TOP))
        yield made


def test_the_callers_credentials_open_a_registry(tmp_path: Path, guarded: Registry) -> None:
    with store_with(tmp_path) as store:
        assert store.pull(f"{guarded.address}/team/app:v1", credentials=USER).layers == (sha256(BASE), sha256(TOP))


@pytest.mark.parametrize(
    ("credentials", "words"),
    [
        (None, "wants Basic authentication .* no credentials for it were given"),
        (Credentials("me", "wrong"), "refused access to team/app .HTTP 401"),
        (Credentials(identity_token="t0k"), "wants Basic authentication"),
        (Credentials(registry_token="t0k"), "refused the registry token"),
        (dataclasses.replace(USER, server="https://other.example"), "no credentials for it were given"),
    ],
)
def test_other_credentials_do_not(
    tmp_path: Path, guarded: Registry, credentials: Credentials | None, words: str
) -> None:
    with store_with(tmp_path) as store, pytest.raises(PermissionRefused, match=words):
        store.pull(f"{guarded.address}/team/app:v1", credentials=credentials)


def test_a_file_opens_a_registry_and_the_caller_wins(tmp_path: Path, guarded: Registry) -> None:
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {f"{guarded.address}/team": {"auth": BASIC["Authorization"][6:]}}}))
    with store_with(tmp_path, keychain=Keychain(auth)) as store:
        store.pull(f"{guarded.address}/team/app:v1")
        with pytest.raises(PermissionRefused):
            store.pull(f"{guarded.address}/team/app:v1", credentials=Credentials("me", "wrong"))


def test_a_helper_that_hangs_ends_the_pull(tmp_path: Path, guarded: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker-credential-slow"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    keychain = Keychain(files=(), helper_timeout=0.5)
    with (
        store_with(tmp_path, 'credential-helpers = ["slow"]', keychain=keychain) as store,
        pytest.raises(DeadlineExceeded, match="docker-credential-slow did not answer"),
    ):
        store.pull(f"{guarded.address}/team/app:v1")


# Tokens


class TokenServer:
    """Issues tokens that Debian's registry believes: signed, by openssl, with a key whose certificate it knows."""

    def __init__(self, directory: Path, server: HostileRegistry) -> None:
        self.key, self.certificate = directory / "token.key", directory / "token.crt"
        run(
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=issuer"),
            *("-keyout", self.key, "-out", self.certificate),
        )
        self.asked: list[dict[str, list[str]]] = []
        server.routes["/token"] = self.answer

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        form = getattr(request, "body", b"").decode()
        query = parse_qs(form or urlsplit(request.path).query)
        self.asked.append(query)
        known = request.headers.get("Authorization") == BASIC["Authorization"]
        if not known and query.get("refresh_token") != ["refresh"]:
            reply(401, b'{"errors":[{"code":"DENIED","message":"who?"}]}')(request)
            return
        _, name, actions = query["scope"][0].split(":")
        token = self.token(name, actions.split(","))
        reply(200, json.dumps({"access_token" if form else "token": token}).encode())(request)

    def token(self, name: str, actions: list[str]) -> str:
        der = base64.b64encode(run("openssl", "x509", "-in", self.certificate, "-outform", "DER")).decode()
        now = int(time.time())
        claims = {
            "iss": "issuer",
            "aud": "test",
            "sub": "me",
            "jti": "1",
            "iat": now,
            "nbf": now - 5,
            "exp": now + 60,
            "access": [{"type": "repository", "name": name, "actions": actions}],
        }
        header = {"typ": "JWT", "alg": "RS256", "x5c": [der]}
        signed = ".".join(_unpadded(json.dumps(part).encode()) for part in (header, claims))
        return f"{signed}.{_unpadded(run('openssl', 'dgst', '-sha256', '-sign', self.key, given=signed.encode()))}"


def _unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.mark.parametrize("credentials", [USER, Credentials(identity_token="refresh")], ids=["password", "identity"])
def test_a_real_registry_takes_our_tokens(tmp_path: Path, hostile: HostileRegistry, credentials: Credentials) -> None:
    server = TokenServer(tmp_path, hostile)
    settings = f"realm: 'http://{hostile.address}/token', service: test, issuer: issuer"
    (tmp_path / "registry").mkdir()
    auth = f"{{token: {{{settings}, rootcertbundle: {server.certificate}}}}}"
    with running_registry(tmp_path / "registry", auth=auth) as real, store_with(tmp_path) as store:
        real.headers = {"Authorization": f"Bearer {server.token('team/app', ['pull', 'push'])}"}
        name = real.push("team/app", "v1", picture(BASE, TOP))
        assert store.pull(name, credentials=credentials).layers == (sha256(BASE), sha256(TOP))
        assert server.asked[0]["scope"] == ["repository:team/app:pull"]
        assert server.asked[0]["service"] == ["test"]
        assert len(server.asked) <= 3  # once, or once more for each layer that asked at the same moment
        token = Credentials(registry_token=server.token("team/app", ["pull"]))
        assert store.pull(name, credentials=token).names == (name,)
        with pytest.raises(PermissionRefused, match="HTTP 401 by its token service DENIED: who"):
            store.pull(name, credentials=Credentials("me", "wrong"))


def test_a_registry_token_is_never_sent_elsewhere(tmp_path: Path, hostile: HostileRegistry) -> None:
    other = HostileRegistry()
    try:
        image = picture(BASE)
        name = hostile.serve("app", image)
        other.serve("app", image)
        for path in [path for path in hostile.routes if "/blobs/" in path]:
            hostile.routes[path] = reply(307, headers={"Location": f"http://{other.address}{path}"})
        with store_with(tmp_path) as store:
            store.pull(name, credentials=Credentials(registry_token="t0k"))
        assert all(headers["Authorization"] == "Bearer t0k" for _, headers in hostile.requests)
        assert other.requests and not any("Authorization" in headers for _, headers in other.requests)
    finally:
        other.close()


# TLS


@dataclasses.dataclass
class Authority:
    """A certificate authority, and a registry whose certificate is by it."""

    directory: Path

    def make(self) -> None:
        subject = ("-subj", "/CN=test authority", "-addext", "basicConstraints=critical,CA:TRUE")
        self._openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, "-keyout", "ca.key", "-out", "ca.crt")

    def issue(self, name: str, extension: str) -> None:
        self._openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "r"
        )
        (self.directory / "ext").write_text(extension)
        by = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext")
        self._openssl("x509", "-req", "-in", "r", *by, "-days", "2", "-out", f"{name}.cert")

    def _openssl(self, *arguments: str) -> None:
        run("openssl", *arguments, cwd=self.directory)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.make()
    made.issue("server", "subjectAltName=IP:127.0.0.1")
    made.issue("client", "extendedKeyUsage=clientAuth")
    return made


@pytest.fixture(scope="module")
def tls_registry(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Registry]:
    """Wants a client's certificate."""
    at = authority.directory
    tls = f"{{certificate: {at}/server.cert, key: {at}/server.key, clientcas: [{at}/ca.crt]}}"
    directory = tmp_path_factory.mktemp("tls")
    with running_registry(directory, tls=tls) as made:
        yield made


def certificates(tmp_path: Path, registry: Registry, authority: Authority, *names: str) -> Path:
    """A certs.d with these files for the registry."""
    directory = tmp_path / "certs.d" / registry.address
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_bytes((authority.directory / name).read_bytes())
    return tmp_path / "certs.d"


def test_certificates_of_a_registry_are_used(tmp_path: Path, tls_registry: Registry, authority: Authority) -> None:
    directory = certificates(tmp_path, tls_registry, authority, "ca.crt", "client.cert", "client.key")
    with store_with(tmp_path, certificate_directories=(tmp_path / "none", directory)) as store:
        with pytest.raises(NotFound, match="UNKNOWN"):  # so the handshake was done
            store.pull(f"{tls_registry.address}/team/app:v1")


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["client.cert", "client.key"], Unavailable, "(?i)certificate verify failed.*certs.d"),
        (["ca.crt"], Unavailable, "(?i)certificate required|tls|ssl"),
        (["ca.crt", "client.cert"], InvalidArgument, r"client\.cert: it cannot|client\.cert: its other half"),
        (["ca.crt", "client.key"], InvalidArgument, r"client\.key: its other half"),
    ],
)
def test_a_failed_handshake_is_told_and_half_a_certificate_named(
    tmp_path: Path,
    tls_registry: Registry,
    authority: Authority,
    names: list[str],
    error: type[CrioError],
    words: str,
) -> None:
    directory = certificates(tmp_path, tls_registry, authority, *names)
    with store_with(tmp_path, certificate_directories=(directory,)) as store, pytest.raises(error, match=words):
        store.pull(f"{tls_registry.address}/team/app:v1")


def test_a_broken_authority_is_named(tmp_path: Path, tls_registry: Registry, authority: Authority) -> None:
    directory = certificates(tmp_path, tls_registry, authority)
    (directory / tls_registry.address / "ca.crt").write_text("nonsense")
    with (
        store_with(tmp_path, certificate_directories=(directory,)) as store,
        pytest.raises(InvalidArgument, match=r"ca\.crt: it cannot be used for TLS"),
    ):
        store.pull(f"{tls_registry.address}/team/app:v1")


def test_an_insecure_registry_with_tls_is_spoken_to_with_tls(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, authority: Authority
) -> None:
    at = authority.directory
    directory = tmp_path_factory.mktemp("insecure")
    with running_registry(directory, tls=f"{{certificate: {at}/server.cert, key: {at}/server.key}}") as real:
        conf = f'[[registry]]\nlocation = "{real.address}"\ninsecure = true'
        with store_with(tmp_path, conf) as store, pytest.raises(NotFound, match="UNKNOWN"):
            store.pull(f"{real.address}/team/app:v1")


def test_an_insecure_registry_without_tls_is_spoken_to_without(tmp_path: Path, registry: Registry) -> None:
    name = registry.push("team/plain", "v1", picture(BASE))
    with store_with(tmp_path, insecure=frozenset({registry.address})) as store:
        assert store.pull(name).names == (name,)


@pytest.mark.parametrize("silent_at", ["name", "connection", "tls"])
def test_who_still_connects_does_not_hold_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_at: str
) -> None:
    """No descriptor whose end would be found exists yet, or TLS has it to itself."""
    with contextlib.ExitStack() as opened:
        address = opened.enter_context(deaf())
        if silent_at == "tls":
            server = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"127.0.0.1:{server.getsockname()[1]}"
        elif silent_at == "name":
            named = threading.Event()
            opened.callback(named.set)
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: named.wait(20))
        insecure = frozenset({address} if silent_at == "tls" else ())
        store = opened.enter_context(store_with(tmp_path, insecure=insecure))
        threading.Timer(0.5, store.interrupt).start()
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="was cancelled"):
            store.pull(f"{address}/app")
        assert time.monotonic() - began < 1.5
