"""Registries and images that go for the daemon itself: its memory, its log, the terminals of those who read it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.images.chunked import SPLIT_AT, TOC_AT, TOC_DIGEST

from ..cri.conftest import Client
from ..cri.conftest import cri as cri
from ..cri.conftest import shared as shared
from ..images_support import BASE, HostileRegistry, sha256
from ..images_support import hostile as hostile
from ..linux.test_images_chunked import serve

pytestmark = pytest.mark.root

MIB = 1 << 20
HUGE = 63 * MIB  # just below what a table of contents may have
NO_SPLIT = b'],"tarSplitDigest":"sha256:%s"}' % (b"0" * 64)


def pull(cri: Client, name: str) -> str:
    return str(cri.call("PullImage", image=pb.ImageSpec(image=name), seconds=90).image_ref)


# -- memory ------------------------------------------------------------------------------------------------------


def regular(size: int) -> bytes:
    """Lists, nothing else: a few kilobytes, compressed."""
    return b"[]," * (size // 3)


def irregular(size: int) -> bytes:
    """Lists and objects that no compression makes much smaller, as a real table is none."""
    block = b"".join(random.Random(1).choices((b"[],", b"{},"), k=MIB // 3))
    return (block * (size // len(block) + 1))[: size // 3 * 3]


def in_an_entry(size: int) -> bytes:
    return b'{"type":"dir","name":"d","x":[' + irregular(size) + b"0]},"


def in_many_entries(size: int) -> bytes:
    entry = in_an_entry(48 << 10)
    return entry * (size // len(entry))


def in_members(size: int) -> bytes:
    """Of the table itself, each with a name of its own."""
    members = [b'"%d":[%s0]' % (number, irregular(48 << 10)) for number in range(size // (48 << 10))]
    return b'{"type":"dir","name":"d"}],' + b",".join(members) + b',"entries":['


def squeezed(data: bytes) -> bytes:
    """With a window too small to find a block's copy."""
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(1, window_log=15)
    ).compress(data)


def blob_of(toc: bytes, split: bytes) -> tuple[bytes, dict[str, str]]:
    """A layer whose archive is honest, and its tables; with the annotations that lead to them."""
    blob, tables = zstandard.compress(BASE), [squeezed(toc), squeezed(split)]
    places = []
    for table, whole in zip(tables, (toc, split), strict=True):
        blob += b"\x50\x2a\x4d\x18" + len(table).to_bytes(4, "little")
        places.append(f"{len(blob)}:{len(table)}:{len(whole)}")
        blob += table
    return blob, {TOC_AT: places[0] + ":1", TOC_DIGEST: sha256(tables[0]), SPLIT_AT: places[1]}


@pytest.mark.parametrize("shape", [regular, irregular, in_an_entry, in_many_entries, in_members])
def test_a_table_of_contents_does_not_fill_the_memory(
    cri: Client, hostile: HostileRegistry, shape: Callable[[int], bytes]
) -> None:
    """Parsed at once, 64 MiB of brackets are 1.7 GB of lists, and no call is served meanwhile."""
    toc = b'{"entries":[' + shape(HUGE) + b"[]" + NO_SPLIT
    assert memory_of_a_pull(cri, hostile, shape.__name__, toc, b"") < 200 * MIB


def test_a_line_of_a_tar_split_does_not_fill_the_memory(cri: Client, hostile: HostileRegistry) -> None:
    split = b'{"type":2,"payload":"","x":[' + irregular(HUGE) + b"0]}\n"
    entry = {"type": "reg", "name": "f", "size": 1, "digest": sha256(b"f"), "offset": 0, "endOffset": 9}
    toc = json.dumps({"entries": [entry], "tarSplitDigest": sha256(squeezed(split))}).encode()
    assert memory_of_a_pull(cri, hostile, "split", toc, split) < 200 * MIB


def memory_of_a_pull(cri: Client, hostile: HostileRegistry, name: str, toc: bytes, split: bytes) -> int:
    """Bytes by which the daemon was ever larger than before; the pull succeeds, as the layer's archive is honest."""
    assert cri.daemon.process
    process = Path(f"/proc/{cri.daemon.process.pid}")
    (process / "clear_refs").write_text("5")  # which sets the peak to what it has now
    before = peak_of(process)
    blob, notes = blob_of(toc, split)
    pull(cri, serve(hostile, name.replace("_", ""), BASE, blob, notes))
    assert any("Range" in headers for _, headers in hostile.requests), "nobody asked for the table"
    cri.call("RemoveImage", image=pb.ImageSpec(image=f"{hostile.address}/{name.replace('_', '')}:latest"))
    return peak_of(process) - before


def peak_of(process: Path) -> int:
    return int((process / "status").read_text().partition("VmHWM:")[2].split()[0]) << 10
