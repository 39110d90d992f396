"""zstd:chunked layers: only what is not here is fetched, and what lies is fetched whole and judged as ever."""

from __future__ import annotations

import base64
import collections
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import zstandard

from crio_native.errors import InvalidArgument
from crio_native.images import Image, ImageStore
from crio_native.images import chunked as chunked_layers
from crio_native.images.chunked import SPLIT_AT, TOC_AT, TOC_DIGEST
from crio_native.images.manifests import Descriptor

from ..images_support import (
    Answer,
    HostileRegistry,
    Picture,
    assert_nothing_left,
    layers_of,
    member,
    picture,
    reply,
    sha256,
    tar,
)
from ..images_support import hostile as hostile
from ..images_support import store as store

pytestmark = pytest.mark.root

ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
Change = Callable[[dict[str, Any]], Any]


def chunked(layer: bytes, change_toc: Change = lambda toc: None) -> tuple[bytes, dict[str, str]]:
    """A layer's archive as a zstd:chunked blob, and its annotations."""
    blob, at = io.BytesIO(), 0
    split: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []

    def segment(end: int) -> None:
        nonlocal at
        blob.write(zstandard.compress(layer[at:end]))
        split.append({"type": 2, "payload": base64.b64encode(layer[at:end]).decode(), "position": len(split)})
        at = end

    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        for entry in archive:
            segment(entry.offset_data)
            split.append({"type": 1, "name": entry.name, "size": entry.size, "position": len(split)})
            described: dict[str, Any] = {"type": "reg" if entry.isreg() else "dir", "name": entry.name}
            if entry.isreg() and entry.size:
                data = layer[at : at + entry.size]
                described |= {"size": entry.size, "digest": sha256(data), "offset": blob.tell()}
                blob.write(zstandard.compress(data))
                described["endOffset"] = blob.tell()
                at += entry.size
            entries.append(described)
    segment(len(layer))
    lines = "".join(json.dumps(line) + "\n" for line in split).encode()
    packed = zstandard.compress(lines)
    toc = {"version": 1, "entries": entries, "tarSplitDigest": sha256(packed)}
    change_toc(toc)
    raw = json.dumps(toc).encode()
    annotations = {
        TOC_AT: _skippable(blob, zstandard.compress(raw)) + f":{len(raw)}:1",
        TOC_DIGEST: sha256(zstandard.compress(raw)),
        SPLIT_AT: _skippable(blob, packed) + f":{len(lines)}",
    }
    return blob.getvalue(), annotations


def _skippable(blob: io.BytesIO, data: bytes) -> str:
    """Write a frame that decompressors pass over; OFFSET:LENGTH of what is in it."""
    blob.write(b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little"))
    offset = blob.tell()
    blob.write(data)
    return f"{offset}:{len(data)}"


def serve(hostile: HostileRegistry, name: str, layer: bytes, blob: bytes, annotations: dict[str, str]) -> str:
    image: Picture = picture(layer)
    document = json.loads(image.blobs[image.manifest["digest"]])
    document["layers"] = [image.put(ZSTD, blob) | {"annotations": annotations}]
    image.manifest = image.put(document["mediaType"], json.dumps(document).encode())
    reference = hostile.serve(name, image)
    hostile.routes[f"/v2/{name}/blobs/{sha256(blob)}"] = ranged(blob)
    return reference


def ranged(body: bytes) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        first, _, last = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(body)
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        reply(206 if "Range" in request.headers else 200, body[start:end], headers)(request)

    return answer


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def version(number: int) -> bytes:
    """Layers that differ in one file of twenty."""
    files = [member(f"d/file{at}", data=noise(at if at != 7 else 1000 + number, 100_000)) for at in range(20)]
    return tar(member("d", tarfile.DIRTYPE), *files, member("empty"), member("l", tarfile.SYMTYPE, linkname="d"))


def fetched(hostile: HostileRegistry, name: str, size: int) -> int:
    """Bytes of the layer that were asked for."""
    total = 0
    for path, headers in hostile.requests:
        if path.startswith(f"/v2/{name}/blobs/") and "Range" in headers:
            first, _, last = headers["Range"].removeprefix("bytes=").partition("-")
            total += (int(last) + 1 if last else size) - int(first)
    return total


def test_only_what_is_not_here_is_fetched(store: ImageStore, hostile: HostileRegistry, tmp_path: Path) -> None:
    first, first_notes = chunked(version(1))
    second, second_notes = chunked(version(2))
    one = store.pull(serve(hostile, "one", version(1), first, first_notes))
    two = store.pull(serve(hostile, "two", version(2), second, second_notes))
    assert (one.layers, two.layers) == ((sha256(version(1)),), (sha256(version(2)),))
    assert fetched(hostile, "one", len(first)) > 1_900_000
    assert 100_000 < fetched(hostile, "two", len(second)) < 150_000
    assert whole_requests(hostile) == 0
    assert (layers_of(store, two, tmp_path / "c")[0] / "d/file7").read_bytes() == noise(1002, 100_000)


def whole_requests(hostile: HostileRegistry) -> int:
    blobs = [headers for path, headers in hostile.requests if "/blobs/" in path]
    return sum("Range" not in headers for headers in blobs) - hostile.count("/manifests/")  # each has one config


def test_a_local_file_that_was_changed_is_not_used(store: ImageStore, hostile: HostileRegistry, tmp_path: Path) -> None:
    one = store.pull(serve(hostile, "one", version(1), *chunked(version(1))))
    for at in (3, 4):
        path = layers_of(store, one, tmp_path / str(at))[0] / f"d/file{at}"
        data = path.read_bytes()
        path.unlink()
        if at == 3:
            path.write_bytes(data[::-1])
        else:
            path.symlink_to("/etc/passwd")
    blob, notes = chunked(version(2))
    two = store.pull(serve(hostile, "two", version(2), blob, notes))
    assert (layers_of(store, two, tmp_path / "c")[0] / "d/file3").read_bytes() == noise(3, 100_000)
    assert (layers_of(store, two, tmp_path / "d")[0] / "d/file4").read_bytes() == noise(4, 100_000)
    assert fetched(hostile, "two", len(blob)) > 300_000


def spoil_entry(**changes: Any) -> Change:
    return lambda toc: toc["entries"][3].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        spoil_entry(digest=sha256(b"another")),
        spoil_entry(digest="sha256:../../x"),
        spoil_entry(offset=10),
        spoil_entry(offset=-5),
        spoil_entry(endOffset=1 << 60),
        spoil_entry(size=5),
        spoil_entry(size="x"),
        spoil_entry(name=5),
        spoil_entry(type="chunk", name="nobody"),
        lambda toc: toc.update(entries=5),
        lambda toc: toc.update(tarSplitDigest="x"),
        lambda toc: toc.update(tarSplitDigest=sha256(b"another")),
        lambda toc: toc["entries"].reverse(),
    ],
)
def test_a_table_that_lies_costs_a_whole_pull_and_nothing_else(
    store: ImageStore, hostile: HostileRegistry, tmp_path: Path, change: Change
) -> None:
    pulled = pull_with(store, hostile, change)
    assert pulled.layers == (sha256(version(1)),)
    assert {path.name for path in (tmp_path / "store/tmp").iterdir()} == set()


def pull_with(store: ImageStore, hostile: HostileRegistry, change: Change) -> Image:
    blob, notes = chunked(version(1), change)
    return store.pull(serve(hostile, "app", version(1), blob, notes))


@pytest.mark.parametrize(
    "notes",
    [
        {TOC_AT: "1:2"},
        {TOC_AT: "x:y:z:1"},
        {TOC_AT: "0:99999999999:5:1"},
        {TOC_AT: "0:5:99999999999:1"},
        {TOC_DIGEST: "x"},
        {TOC_DIGEST: sha256(b"another")},
        {SPLIT_AT: "0:10:10"},
    ],
)
def test_annotations_that_lie_do_not_matter(
    store: ImageStore, hostile: HostileRegistry, tmp_path: Path, notes: dict[str, str]
) -> None:
    blob, honest = chunked(version(1))
    assert store.pull(serve(hostile, "app", version(1), blob, honest | notes)).layers == (sha256(version(1)),)
    assert_nothing_left(tmp_path / "store", layers=1)


def test_a_table_of_a_hundred_thousand_entries_is_read(store: ImageStore, hostile: HostileRegistry) -> None:
    """As Go writes them; the tables of the largest images have some tens of megabytes."""
    times = dict.fromkeys(("modtime", "accesstime", "changetime"), "2024-01-01T00:00:00Z")
    more = [
        {"type": "symlink", "name": f"usr/lib/{name}", "mode": 0o777, "linkName": name, **times}
        for name in (sha256(str(number).encode()) for number in range(100_000))
    ]
    pull_with(store, hostile, lambda toc: toc["entries"].extend(more))
    assert whole_requests(hostile) == 0


def test_a_table_in_another_order_and_with_spaces_is_read(store: ImageStore, hostile: HostileRegistry) -> None:
    def change(toc: dict[str, Any]) -> None:
        entries = toc.pop("entries")
        toc["unknown"] = {"nested": [1, {"entries": "]}"}]}
        toc["entries"] = entries

    pull_with(store, hostile, change)
    assert whole_requests(hostile) == 0


def test_a_file_that_a_tar_split_repeats_ends(tmp_path: Path) -> None:
    """What comes out of a few lines is bounded as what comes out of a compressed layer, not by the disk."""
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 1 << 28)
    line = json.dumps({"type": 1, "name": "f"}).encode()
    descriptor = Descriptor(ZSTD, sha256(b""), 1000)
    files = {"f": chunked_layers._File(sha256(b"f"), 1 << 28, 0, 10)}

    def here(digest: str, size: int) -> int:
        return os.open(tmp_path / "file", os.O_RDONLY)

    nobody: Any = None
    layer = chunked_layers.Chunked(descriptor, nobody, files, [line] * 10, here)
    with pytest.raises(InvalidArgument, match="tar-split"):
        collections.deque(layer.archive(), maxlen=0)


def test_a_registry_without_ranges_gives_it_whole(store: ImageStore, hostile: HostileRegistry) -> None:
    blob, notes = chunked(version(1))
    name = serve(hostile, "app", version(1), blob, notes)
    hostile.routes[f"/v2/app/blobs/{sha256(blob)}"] = reply(200, blob)
    assert store.pull(name).layers == (sha256(version(1)),)


def test_our_blobs_are_what_the_zstd_library_reads() -> None:
    """The tests' own generator makes archives as the format's description has them: valid zstd, table passed over."""
    blob, _ = chunked(version(1))
    with zstandard.ZstdDecompressor().stream_reader(blob, read_across_frames=True) as reader:
        assert hashlib.sha256(reader.read()).digest() == hashlib.sha256(version(1)).digest()
