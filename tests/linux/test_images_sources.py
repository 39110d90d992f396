"""Where images come from: Debian's registry behind passwords, tokens and TLS; mirrors, proxies, short names; ranges."""

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
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
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
from crio_native.images import Credentials, ImageStore, Settings, transport
from crio_native.images import registry as client
from crio_native.images.credentials import Keychain
from crio_native.images.registries_conf import Paths

from ..images_support import (
    BASE,
    TOP,
    Answer,
    HostileRegistry,
    Registry,
    assert_nothing_left,
    deaf,
    free_port,
    member,
    picture,
    reply,
    running_registry,
    sha256,
    tar,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry

pytestmark = pytest.mark.root

USER = Credentials("me", "pass")
BCRYPT = "$2b$04$abcdefghijklmnopqrstuufznL8bkzdtHwLhca4To/v9Lo9bA7fR6"  # of "pass"
BASIC = {"Authorization": "Basic " + base64.b64encode(b"me:pass").decode()}


@contextlib.contextmanager
def store_with(tmp_path: Path, conf: str = "", **settings: Any) -> Iterator[ImageStore]:
    """A store whose registries.conf says this."""
    file = tmp_path / "registries.conf"
    file.write_text(conf)
    made = Settings(Paths(file, tmp_path / "none", tmp_path / "none"), **{"certificate_directories": (), **settings})
    with contextlib.closing(ImageStore(tmp_path / "store", settings=made)) as store:
        yield store


def run(*command: object, **options: Any) -> bytes:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=30, **options).stdout


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
        return f"{signed}.{_unpadded(run('openssl', 'dgst', '-sha256', '-sign', self.key, input=signed.encode()))}"


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
    ("names", "words"),
    [
        (["client.cert", "client.key"], "(?i)certificate verify failed.*certs.d"),
        (["ca.crt"], "(?i)certificate required|tls|ssl"),
    ],
)
def test_a_failed_handshake_is_told(
    tmp_path: Path, tls_registry: Registry, authority: Authority, names: list[str], words: str
) -> None:
    directory = certificates(tmp_path, tls_registry, authority, *names)
    with (
        store_with(tmp_path, certificate_directories=(directory,)) as store,
        pytest.raises(Unavailable, match=words),
    ):
        store.pull(f"{tls_registry.address}/team/app:v1")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ca.crt", "client.cert"], r"client\.cert: it cannot|client\.cert: its other half"),
        (["ca.crt", "client.key"], r"client\.key: its other half"),
    ],
)
def test_half_a_certificate_is_named(
    tmp_path: Path, tls_registry: Registry, authority: Authority, names: list[str], words: str
) -> None:
    directory = certificates(tmp_path, tls_registry, authority, *names)
    with (
        store_with(tmp_path, certificate_directories=(directory,)) as store,
        pytest.raises(InvalidArgument, match=words),
    ):
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


# Mirrors and names


def mirrored(*mirrors: str, registry: str = "primary.invalid", more: str = "") -> str:
    tables = "".join(f'[[registry.mirror]]\nlocation = "{mirror}"\n{more}\n' for mirror in mirrors)
    return f'[[registry]]\nlocation = "{registry}"\n{tables}'


def test_a_mirror_serves_under_the_images_own_name(tmp_path: Path, registry: Registry) -> None:
    image = picture(BASE)
    registry.push("cache/team/app", "v1", image)
    with store_with(tmp_path, mirrored(f"{registry.address}/cache")) as store:
        pulled = store.pull("primary.invalid/team/app:v1")
        assert pulled.names == ("primary.invalid/team/app:v1",)
        assert pulled.digests == (f"primary.invalid/team/app@{image.manifest['digest']}",)


def test_mirrors_that_fail_are_passed_over(tmp_path: Path, registry: Registry, hostile: HostileRegistry) -> None:
    name = registry.push("team/mirrored", "v1", picture(BASE))
    down = f"127.0.0.1:{free_port()}"
    with store_with(tmp_path, mirrored(down, hostile.address, registry=registry.address)) as store:
        began = time.monotonic()
        assert store.pull(name).names == (name,)
        assert time.monotonic() - began < 30
    assert hostile.count("/manifests/v1") == 1


def test_when_all_fail_each_is_named(tmp_path: Path, hostile: HostileRegistry) -> None:
    other = HostileRegistry()
    try:
        other.routes["/v2/team/app/manifests/v1"] = reply(403)
        with (
            store_with(tmp_path, mirrored(other.address, registry=hostile.address)) as store,
            pytest.raises(NotFound, match=rf"{hostile.address}.*HTTP 404.*before that: {other.address}.*HTTP 403"),
        ):
            store.pull(f"{hostile.address}/team/app:v1")
    finally:
        other.close()


def test_a_token_service_that_is_not_there_is_named(
    tmp_path: Path, hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    challenge = 'Bearer realm="http://127.0.0.1:1/token",service="s"'
    hostile.routes["/v2/app/manifests/latest"] = reply(401, headers={"WWW-Authenticate": challenge})
    with (
        store_with(tmp_path) as store,
        pytest.raises(Unavailable, match=r"its token service http://127\.0\.0\.1:1/token.* does not answer: .*refused"),
    ):
        store.pull(f"{hostile.address}/app")


def test_a_mirror_is_not_shown_the_callers_credentials(tmp_path: Path, hostile: HostileRegistry) -> None:
    mirror = HostileRegistry()
    try:
        mirror.routes["/v2/app/manifests/latest"] = reply(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        name = hostile.serve("app", picture(BASE))
        with store_with(tmp_path, mirrored(mirror.address, registry=hostile.address)) as store:
            store.pull(name, credentials=USER)
        assert mirror.requests and not any("Authorization" in headers for _, headers in mirror.requests)
    finally:
        mirror.close()


def test_a_wrong_image_is_not_asked_for_elsewhere(tmp_path: Path, registry: Registry, hostile: HostileRegistry) -> None:
    name = registry.push("team/app", "v1", picture(BASE))
    hostile.routes["/v2/team/app/manifests/v1"] = reply(200, b"{")
    with (
        store_with(tmp_path, mirrored(hostile.address, registry=registry.address)) as store,
        pytest.raises(InvalidArgument, match="not JSON"),
    ):
        store.pull(name)


def test_a_blocked_registry_is_not_asked(tmp_path: Path, hostile: HostileRegistry) -> None:
    conf = f'[[registry]]\nlocation = "{hostile.address}"\nblocked = true'
    with store_with(tmp_path, conf) as store, pytest.raises(PermissionRefused, match="is blocked by"):
        store.pull(f"{hostile.address}/app")
    assert hostile.requests == []


def test_a_short_name_is_pulled_and_found_again(tmp_path: Path, registry: Registry) -> None:
    registry.push("short", "v1", picture(BASE))
    down = f"127.0.0.1:{free_port()}"
    conf = f'unqualified-search-registries = ["{down}", "{registry.address}"]\nshort-name-mode = "permissive"'
    with store_with(tmp_path, conf) as store:
        pulled = store.pull("short:v1")
        assert pulled.names == (f"{registry.address}/short:v1",)
        assert store.get("short:v1") is pulled
    with store_with(tmp_path, conf.replace("permissive", "enforcing")) as store:
        assert store.get("short:v1").id == pulled.id  # never an error of ambiguity
        with pytest.raises(InvalidArgument, match=rf"any of {down}/other:latest, {registry.address}/other:latest"):
            store.pull("other")


def test_short_names_disabled_by_the_daemon_tries_all(tmp_path: Path, registry: Registry) -> None:
    registry.push("short", "v2", picture(BASE))
    down = f"127.0.0.1:{free_port()}"
    conf = f'unqualified-search-registries = ["{down}", "{registry.address}"]'
    with store_with(tmp_path, conf, short_names="disabled") as store:
        assert store.pull("short:v2").names == (f"{registry.address}/short:v2",)


def test_files_are_followed_only_if_that_is_wanted(tmp_path: Path, hostile: HostileRegistry) -> None:
    name = hostile.serve("app", picture(BASE))
    blocked = f'[[registry]]\nlocation = "{hostile.address}"\nblocked = true'
    for follow in (False, True):
        with store_with(tmp_path, "", follow=follow) as store:
            (tmp_path / "registries.conf").write_text(blocked)
            with contextlib.suppress(PermissionRefused) if not follow else pytest.raises(PermissionRefused):
                assert store.pull(name) and not follow
            (tmp_path / "registries.conf").write_text("[[")
            if follow:
                with pytest.raises(InvalidArgument, match="not TOML"):
                    store.pull(name)


def test_a_wrong_file_fails_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="short-name-mode"), store_with(tmp_path, 'short-name-mode = "x"'):
        pass


# Proxies


def test_a_proxy_is_used_where_the_environment_says(
    tmp_path: Path, hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.serve("app", picture(BASE))
    for path, answer in list(hostile.routes.items()):
        hostile.routes[f"http://registry.invalid{path}"] = answer
    monkeypatch.setenv("HTTP_PROXY", hostile.address)
    monkeypatch.setenv("HTTPS_PROXY", hostile.address)
    with store_with(tmp_path, insecure=frozenset({"registry.invalid"})) as store:
        assert store.pull("registry.invalid/app").names == ("registry.invalid/app:latest",)
        assert all(path.startswith("http://registry.invalid/v2/") for path, _ in hostile.requests)
        monkeypatch.setenv("NO_PROXY", "registry.invalid")
        with pytest.raises(Unavailable, match=r"registry\.invalid"):
            store.pull("registry.invalid/app", platform=None)


# Ranges


def ranged(body: bytes, seen: list[tuple[int, int]], hold: threading.Barrier | None = None) -> Answer:
    """A server that knows ranges; hold: so many requests must be there at the same time."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        first, _, last = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(body)
        seen.append((start, end))
        if hold and end - start > 1:
            hold.wait(10)
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        reply(206 if "Range" in request.headers else 200, body[start:end], headers)(request)

    return answer


@pytest.fixture
def large(hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, bytes]:
    """An image whose one layer counts as large: its name, the layer's path, the layer."""
    monkeypatch.setattr(client, "LARGE", 100_000)
    monkeypatch.setattr(client, "RANGE", 50_000)
    image = picture(tar(member("noise", data=os.urandom(299_000))), compress=False)
    name = hostile.serve("app", image)
    blob = max(image.blobs.values(), key=len)
    return name, f"/v2/app/blobs/{sha256(blob)}", blob


def test_a_large_layer_comes_in_ranges_at_once(
    tmp_path: Path, hostile: HostileRegistry, large: tuple[str, str, bytes]
) -> None:
    name, path, blob = large
    seen: list[tuple[int, int]] = []
    hostile.routes[path] = ranged(blob, seen)
    with store_with(tmp_path) as store:
        store.pull(name)
    assert sorted(seen)[1:] == [(at, min(at + 50_000, len(blob))) for at in range(0, len(blob), 50_000)]
    assert seen[0] == (0, 1)


def test_ranges_really_run_at_once(
    tmp_path: Path, hostile: HostileRegistry, large: tuple[str, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers, each of which waits for the two others; a blob of six ranges."""
    name, path, blob = large
    monkeypatch.setattr(client, "RANGE", len(blob) // 6 + 1)
    hostile.routes[path] = ranged(blob, [], threading.Barrier(client.RANGES_AT_ONCE))
    with store_with(tmp_path) as store:
        assert store.pull(name)


def test_a_server_without_ranges_is_asked_once(
    tmp_path: Path, hostile: HostileRegistry, large: tuple[str, str, bytes]
) -> None:
    with store_with(tmp_path) as store:
        assert store.pull(large[0])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda start, data: data if start != 50_000 else data[::-1], "other content"),
        (lambda start, data: data if start != 50_000 else data + b"x", "announces 50001 bytes"),
    ],
    ids=["content", "length"],
)
def test_a_wrong_range_is_seen(
    tmp_path: Path,
    hostile: HostileRegistry,
    large: tuple[str, str, bytes],
    spoil: Callable[[int, bytes], bytes],
    words: str,
) -> None:
    name, path, blob = large

    def answer(request: BaseHTTPRequestHandler) -> None:
        first, _, last = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(blob)
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(blob)}"}
        reply(206, spoil(start, blob[start:end]), headers)(request)

    hostile.routes[path] = answer
    with store_with(tmp_path) as store, pytest.raises(Unavailable, match=words):
        store.pull(name)
    assert_nothing_left(tmp_path / "store")


def test_a_server_that_forgets_ranges_does_not_fill_memory(
    tmp_path: Path, hostile: HostileRegistry, large: tuple[str, str, bytes]
) -> None:
    """It knows the first, and answers the others with the whole."""
    name, path, blob = large

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Range") == "bytes=0-0":
            reply(206, blob[:1], {"Content-Range": f"bytes 0-0/{len(blob)}"})(request)
        else:
            reply(200, blob)(request)
            request.close_connection = True

    hostile.routes[path] = answer
    with store_with(tmp_path) as store:
        assert store.pull(name)


# Progress


def dripping(body: bytes, pause: float, pieces: int) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        reply(200, b"", {"Content-Length": str(len(body))})(request)
        step = len(body) // pieces + 1
        for at in range(0, len(body), step):
            request.wfile.write(body[at : at + step])
            request.wfile.flush()
            time.sleep(pause)

    return answer


@pytest.mark.parametrize(("pause", "fails"), [(2.5, True), (0.2, False)])
def test_a_pull_ends_without_progress_and_not_for_being_long(
    tmp_path: Path, hostile: HostileRegistry, pause: float, fails: bool
) -> None:
    image = picture(BASE, compress=False)
    name = hostile.serve("app", image)
    blob = max(image.blobs.values(), key=len)
    hostile.routes[f"/v2/app/blobs/{sha256(blob)}"] = dripping(blob, pause, 8)
    began = time.monotonic()
    with store_with(tmp_path, patience=1.0) as store:
        if fails:
            with pytest.raises(DeadlineExceeded, match=r"made no progress for 1 s \(pull_progress_timeout\)"):
                store.pull(name)
            assert time.monotonic() - began < 4
            assert_nothing_left(tmp_path / "store")
        else:
            assert store.pull(name)
            assert time.monotonic() - began > 1.2


def flooding(piece: bytes, pause: float) -> Answer:
    """An answer whose head does not end."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        end = time.monotonic() + 15
        while time.monotonic() < end:
            request.wfile.write(piece)
            request.wfile.flush()
            time.sleep(pause)

    return answer


INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(("piece", "pause"), [(INTERIM * 1000, 0.0), (INTERIM, 0.3), (b"H", 0.3)])
def test_an_answer_that_never_begins_ends_the_pull(
    tmp_path: Path, hostile: HostileRegistry, piece: bytes, pause: float
) -> None:
    name = hostile.serve("app", picture(BASE))
    hostile.routes["/v2/app/manifests/latest"] = flooding(piece, pause)
    began = time.monotonic()
    with store_with(tmp_path, patience=1.0) as store, pytest.raises((DeadlineExceeded, Unavailable)):
        store.pull(name)
    assert time.monotonic() - began < 8


# Lies


@pytest.mark.parametrize(
    ("document", "error", "words"),
    [
        ({"layers": [{"size": -1}]}, InvalidArgument, r"layers\[0\]\.size: not a number of bytes"),
        ({"layers": [{"digest": "sha256:../../etc"}]}, InvalidArgument, r"layers\[0\]\.digest: not a digest"),
        ({"layers": [{"digest": "md5:" + "0" * 32}]}, InvalidArgument, r"layers\[0\]\.digest: not a digest"),
        ({"layers": [{}] * 10_000}, InvalidArgument, "more than 127 layers"),
        ({"layers": [{"size": 1}]}, Unavailable, "announces .* manifest says 1"),
        ({"mediaType": "application/vnd.oci.image.index.v1+json"}, InvalidArgument, "mediaType"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    tmp_path: Path, hostile: HostileRegistry, document: dict[str, Any], error: type[CrioError], words: str
) -> None:
    image = picture(BASE)
    name = hostile.serve("app", image)
    honest = json.loads(image.blobs[image.manifest["digest"]])
    lies = honest | document
    if "layers" in document:
        lies["layers"] = [honest["layers"][0] | entry for entry in document["layers"]]
    headers = {"Content-Type": honest["mediaType"]}
    hostile.routes["/v2/app/manifests/latest"] = reply(200, json.dumps(lies).encode(), headers)
    with store_with(tmp_path) as store, pytest.raises(error, match=words):
        store.pull(name)
    assert_nothing_left(tmp_path / "store")


@pytest.mark.parametrize(
    "reference",
    ["", "A", "a b", "a:b:c", "a@sha256:1", "/a", "a/", "http://a/b", "a..b", "a/../b", "a\n", "[::1/a", "a" * 2000],
)
def test_malformed_references_are_refused_before_anybody_is_asked(tmp_path: Path, reference: str) -> None:
    with store_with(tmp_path) as store, pytest.raises(InvalidArgument, match="image"):
        store.pull(reference)
