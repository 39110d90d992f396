"""How an image comes: in ranges, slowly, or with lies."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    InvalidArgument,
    Unavailable,
)
from crio_native.images import registry as client

from ..images_support import (
    BASE,
    Answer,
    HostileRegistry,
    assert_nothing_left,
    member,
    picture,
    reply,
    sha256,
    store_with,
    tar,
)
from ..images_support import hostile as hostile
from ..images_support import registry as registry

pytestmark = pytest.mark.root


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
