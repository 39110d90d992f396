"""The registry client against servers that do all they should not."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from crio_native.errors import DeadlineExceeded, NotFound, PermissionRefused, Unavailable
from crio_native.images import registry as client
from crio_native.images import transport
from crio_native.images.manifests import OCI_MANIFEST, Descriptor
from crio_native.images.model import Credentials
from crio_native.images.references import parse
from crio_native.images.registry import Repository
from crio_native.images.work import Stop

from ..images_support import Answer, HostileRegistry, free_port, in_turn, picture, reply, sha256
from ..images_support import hostile as hostile

BLOB = bytes(range(256)) * 4096
DESCRIPTOR = Descriptor("", sha256(BLOB), len(BLOB))
BLOB_PATH = f"/v2/app/blobs/{DESCRIPTOR.digest}"
MANIFEST_PATH = "/v2/app/manifests/latest"
MANIFEST = reply(200, b"{}", {"Content-Type": OCI_MANIFEST + "; charset=utf-8"})


@contextlib.contextmanager
def repository(address: str, credentials: Credentials | None = None, stop: Stop | None = None) -> Iterator[Repository]:
    made = Repository(parse(f"{address}/app"), stop or Stop("test"), credentials=credentials, backoff=0.01)
    with contextlib.closing(made):
        yield made


def get_blob(address: str, stop: Stop | None = None) -> bytes:
    with repository(address, stop=stop) as source:
        return b"".join(source.blob(DESCRIPTOR))


def cut(body: bytes, at: int, status: int = 200, **headers: str) -> Answer:
    """Promise all of a body and hang up after a part of it."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        reply(status, body[:at], {"Content-Length": str(len(body)), "Connection": "close", **headers})(request)
        request.close_connection = True

    return answer


def ranged(body: bytes) -> Answer:
    """What a server that knows ranges answers."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        reply(206 if start else 200, body[start:], headers if start else {})(request)

    return answer


def test_a_manifest_comes_with_its_type_and_digest(hostile: HostileRegistry) -> None:
    image = picture(b"")
    with repository(hostile.serve("app", image).partition("/")[0]) as source:
        raw, media_type, stated = source.manifest("latest")
    assert (sha256(raw), media_type, stated) == (image.manifest["digest"], OCI_MANIFEST, "")
    accepted = hostile.requests[0][1]["Accept"]
    assert all(kind in accepted for kind in ("oci.image.index", "manifest.list.v2", "distribution.manifest.v2"))


def test_a_cut_blob_is_taken_up_where_it_broke(hostile: HostileRegistry) -> None:
    hostile.routes[BLOB_PATH] = in_turn(cut(BLOB, 1000), ranged(BLOB))
    assert get_blob(hostile.address) == BLOB
    assert hostile.requests[1][1]["Range"] == "bytes=1000-"


def test_a_server_that_ignores_ranges_sends_it_all_again(hostile: HostileRegistry) -> None:
    hostile.routes[BLOB_PATH] = in_turn(cut(BLOB, 300_000), cut(BLOB, 500_000), reply(200, BLOB))
    assert get_blob(hostile.address) == BLOB


def test_a_server_that_answers_another_range_is_not_believed(hostile: HostileRegistry) -> None:
    wrong = reply(206, BLOB[2000:], {"Content-Range": f"bytes 2000-{len(BLOB) - 1}/{len(BLOB)}"})
    hostile.routes[BLOB_PATH] = in_turn(cut(BLOB, 1000), wrong)
    with pytest.raises(Unavailable, match="another range"):
        get_blob(hostile.address)


def test_a_blob_that_is_always_cut_is_given_up(hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RESUMES", 3)
    hostile.routes[BLOB_PATH] = cut(BLOB, 1000)
    with pytest.raises(Unavailable, match=f"cut {DESCRIPTOR.digest} of app short at 1000 of 1048576 bytes, 4 times"):
        get_blob(hostile.address)
    assert hostile.count("/blobs/") == 4


def test_a_blob_of_another_length_is_refused_before_its_first_byte(hostile: HostileRegistry) -> None:
    hostile.routes[BLOB_PATH] = reply(200, BLOB + b"x")
    with pytest.raises(Unavailable, match=r"announces 1048577 bytes .* manifest says 1048576"):
        get_blob(hostile.address)


def test_an_endless_document_is_left_at_its_bound(hostile: HostileRegistry) -> None:
    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        request.close_connection = True
        while True:
            request.wfile.write(b" " * 65536)

    hostile.routes[MANIFEST_PATH] = endless
    with repository(hostile.address) as source, pytest.raises(Unavailable, match="larger than 4194304 bytes"):
        source.manifest("latest")


def test_a_cut_manifest_is_asked_for_again(hostile: HostileRegistry) -> None:
    hostile.routes[MANIFEST_PATH] = in_turn(cut(b'{"a": "bcdef"}', 5), MANIFEST)
    with repository(hostile.address) as source:
        assert source.manifest("latest") == (b"{}", OCI_MANIFEST, "")


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_may_pass_is_tried_again(hostile: HostileRegistry, status: int) -> None:
    hostile.routes[MANIFEST_PATH] = in_turn(reply(status), reply(status), MANIFEST)
    with repository(hostile.address) as source:
        source.manifest("latest")
    assert len(hostile.requests) == 3


def test_a_registry_says_how_long_to_wait(hostile: HostileRegistry) -> None:
    hostile.routes[MANIFEST_PATH] = in_turn(reply(429, headers={"Retry-After": "1"}), MANIFEST)
    before = time.monotonic()
    with repository(hostile.address) as source:
        source.manifest("latest")
    assert time.monotonic() - before >= 1


def test_a_registry_that_stays_broken_is_named_with_its_answer(hostile: HostileRegistry) -> None:
    body = json.dumps({"errors": [{"code": "TOOMANYREQUESTS", "message": "slow \x1b down"}]}).encode()
    hostile.routes[MANIFEST_PATH] = reply(503, body)
    words = rf"registry {hostile.address} does not serve app: HTTP 503 TOOMANYREQUESTS: slow .* down; check"
    with repository(hostile.address) as source, pytest.raises(Unavailable, match=words):
        source.manifest("latest")
    assert len(hostile.requests) == transport.ATTEMPTS


def test_a_registry_that_is_down_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    with repository(address) as source, pytest.raises(Unavailable, match=f"registry {address} .*refused"):
        source.manifest("latest")


def test_a_name_that_does_not_resolve_is_named() -> None:
    with repository("nowhere.invalid") as source, pytest.raises(Unavailable, match=r"nowhere\.invalid"):
        source.manifest("latest")


def test_a_server_that_speaks_no_http_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=babble, daemon=True)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with repository(address) as source, pytest.raises(Unavailable, match=address):
            source.manifest("latest")


def test_a_server_that_falls_silent_is_left(hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "READ_TIMEOUT", 0.2)
    monkeypatch.setattr(client, "RESUMES", 1)
    silence = threading.Event()

    def silent(request: BaseHTTPRequestHandler) -> None:
        reply(200, BLOB[:10], {"Content-Length": str(len(BLOB))})(request)
        silence.wait(10)
        request.close_connection = True

    hostile.routes[BLOB_PATH] = silent
    try:
        with pytest.raises(Unavailable, match=r"(?i)timed out"):
            get_blob(hostile.address)
    finally:
        silence.set()


def test_a_server_that_drips_is_left(hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MIN_RATE_AFTER", 0.3)

    def drip(request: BaseHTTPRequestHandler) -> None:
        reply(200, b"", {"Content-Length": str(len(BLOB))})(request)
        while True:
            request.wfile.write(b"x")
            time.sleep(0.02)

    hostile.routes[BLOB_PATH] = drip
    with pytest.raises(Unavailable, match="less than 1024 bytes a second"):
        get_blob(hostile.address)


@pytest.mark.parametrize(("status", "error"), [(404, NotFound), (403, PermissionRefused), (418, Unavailable)])
def test_a_refusal_is_not_repeated_and_says_its_status(
    hostile: HostileRegistry, status: int, error: type[Exception]
) -> None:
    hostile.routes[MANIFEST_PATH] = reply(status)
    with repository(hostile.address) as source, pytest.raises(error, match=rf"{hostile.address}.*HTTP {status}"):
        source.manifest("latest")
    assert len(hostile.requests) == 1


# Redirects


def test_a_redirect_is_followed_without_authorization(hostile: HostileRegistry) -> None:
    other = HostileRegistry()
    try:
        other.routes["/cdn"] = reply(200, BLOB)
        token = {"WWW-Authenticate": 'Basic realm="x"', "Connection": "close"}
        redirect = reply(307, headers={"Location": f"http://{other.address}/cdn?sig=1"})
        hostile.routes[BLOB_PATH] = in_turn(reply(401, headers=token), redirect)
        with repository(hostile.address, Credentials("me", "secret")) as source:
            assert b"".join(source.blob(DESCRIPTOR)) == BLOB
        assert "Authorization" in hostile.requests[1][1]
        assert "Authorization" not in other.requests[0][1]
    finally:
        other.close()


def test_a_redirect_loop_ends(hostile: HostileRegistry) -> None:
    hostile.routes[BLOB_PATH] = reply(302, headers={"Location": BLOB_PATH})
    with pytest.raises(Unavailable, match="more than 5 times"):
        get_blob(hostile.address)


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://h/x", "https:///x", "", "http://[", "http://h:99999/", "http://h:x/", "http://\xff/"],
)
def test_a_redirect_leads_only_to_web_addresses(hostile: HostileRegistry, target: str) -> None:
    hostile.routes[BLOB_PATH] = reply(302, headers={"Location": target})
    with pytest.raises(Unavailable):
        get_blob(hostile.address)


def test_a_redirect_says_where_to(hostile: HostileRegistry) -> None:
    hostile.routes[BLOB_PATH] = reply(302)
    with pytest.raises(Unavailable, match=r"without saying where to \(HTTP 302 without Location\)"):
        get_blob(hostile.address)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "it closed the connection without an answer"),
        (b"garbage garbage\r\n\r\n", "what it answers is no HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500, "what it answers is no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "it closed the connection in the middle of its answer"),
    ],
)
def test_what_broke_is_told_in_words(
    hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    def raw(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(answer)
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    hostile.routes["/v2/app/manifests/latest"] = raw
    with repository(hostile.address) as source, pytest.raises(Unavailable, match=f"does not serve app: {words}; check"):
        source.manifest("latest")


def test_a_redirect_never_leaves_tls() -> None:
    source = Repository(parse("registry.example/app"), Stop("test"))
    with contextlib.closing(source), pytest.raises(Unavailable, match="leaves TLS"):
        source._transport._check_target("https", "http://registry.example/x")


# Authentication


@pytest.mark.parametrize("before", ["", 'Basic realm="other", '])
@pytest.mark.parametrize("after", ["", ', Basic realm="other"'])
def test_an_anonymous_token_is_fetched_once_and_used(hostile: HostileRegistry, before: str, after: str) -> None:
    bearer = f'Bearer realm="http://{hostile.address}/token",service="reg",scope="repository:app:pull"'
    challenge = before + bearer + after

    def guarded(request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Authorization") == "Bearer t0k":
            MANIFEST(request)
        else:
            reply(401, headers={"WWW-Authenticate": challenge})(request)

    hostile.routes[MANIFEST_PATH] = guarded
    hostile.routes["/token"] = reply(200, b'{"token":"t0k"}')
    with repository(hostile.address) as source:
        source.manifest("latest")
        source.manifest("latest")
    paths = [path for path, _ in hostile.requests]
    assert paths.count("/token?scope=repository%3Aapp%3Apull&service=reg") == 1
    assert "Authorization" not in hostile.requests[1][1]


def test_an_expired_token_is_renewed(hostile: HostileRegistry) -> None:
    challenge = f'Bearer realm="http://{hostile.address}/token"'
    refused = reply(401, headers={"WWW-Authenticate": challenge})
    hostile.routes[MANIFEST_PATH] = in_turn(refused, MANIFEST, refused, MANIFEST)
    hostile.routes["/token"] = reply(200, b'{"access_token":"t0k"}')
    with repository(hostile.address) as source:
        source.manifest("latest")
        source.manifest("latest")
    assert hostile.count("/token") == 2


def test_credentials_go_to_the_token_service(hostile: HostileRegistry) -> None:
    challenge = f'Bearer realm="http://{hostile.address}/token"'
    hostile.routes[MANIFEST_PATH] = in_turn(reply(401, headers={"WWW-Authenticate": challenge}), MANIFEST)
    hostile.routes["/token"] = reply(200, b'{"token":"t0k"}')
    with repository(hostile.address, Credentials("me", "p:w")) as source:
        source.manifest("latest")
    assert hostile.requests[1][1]["Authorization"] == "Basic " + base64.b64encode(b"me:p:w").decode()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (reply(200, b"no"), Unavailable, "without a token"),
        (reply(200, b"[]"), Unavailable, "without a token"),
        (reply(200, b'{"token":"a\\r\\nX: y"}'), Unavailable, "without a token"),
        (reply(200, b" " * (2 << 20)), Unavailable, "larger than"),
        (reply(401), PermissionRefused, "HTTP 401 by its token service"),
        (reply(500), Unavailable, "HTTP 500"),
        (reply(302, headers={"Location": "/"}), PermissionRefused, "HTTP 302"),
    ],
)
def test_a_token_service_that_fails_is_named(
    hostile: HostileRegistry, answer: Answer, error: type[Exception], words: str
) -> None:
    challenge = f'Bearer realm="http://{hostile.address}/token"'
    hostile.routes[MANIFEST_PATH] = reply(401, headers={"WWW-Authenticate": challenge})
    hostile.routes["/token"] = answer
    with repository(hostile.address) as source, pytest.raises(error, match=words):
        source.manifest("latest")


@pytest.mark.parametrize(
    "challenge", ["", "Basic realm=x", "Negotiate", 'Bearer realm="file:///etc/passwd"', 'Bearer realm="http://["']
)
def test_a_challenge_that_cannot_be_answered_is_told(hostile: HostileRegistry, challenge: str) -> None:
    hostile.routes[MANIFEST_PATH] = reply(401, headers={"WWW-Authenticate": challenge})
    with repository(hostile.address) as source, pytest.raises((PermissionRefused, Unavailable), match=hostile.address):
        source.manifest("latest")
    assert len(hostile.requests) == 1


def test_wrong_credentials_are_told_and_not_shown(hostile: HostileRegistry) -> None:
    hostile.routes[MANIFEST_PATH] = reply(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
    credentials = Credentials("me", "topsecret")
    with (
        repository(hostile.address, credentials) as source,
        pytest.raises(PermissionRefused, match="HTTP 401") as error,
    ):
        source.manifest("latest")
    assert "topsecret" not in str(error.value) + repr(credentials)


def test_a_stop_ends_the_waiting(hostile: HostileRegistry) -> None:
    hostile.routes[MANIFEST_PATH] = reply(503, headers={"Retry-After": "30"})
    event = threading.Event()
    threading.Timer(0.3, event.set).start()
    before = time.monotonic()
    with (
        repository(hostile.address, stop=Stop("pull of x", event)) as source,
        pytest.raises(DeadlineExceeded, match="pull of x was cancelled"),
    ):
        source.manifest("latest")
    assert time.monotonic() - before < 2
