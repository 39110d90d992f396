"""Registries and images that go for the daemon itself: its memory, its log, the terminals of those who read it."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.images.chunked import SPLIT_AT, TOC_AT, TOC_DIGEST

from ..cri.conftest import Client
from ..cri.conftest import cri as cri
from ..cri.conftest import shared as shared
from ..cri.images import variant
from ..images_support import BASE, HostileRegistry, reply, sha256
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


# -- the log, and terminals --------------------------------------------------------------------------------------

FORGED = "2026-01-01 00:00:00,000 ERROR [-] crio_native.daemon: forged"
FOREIGN = f"\n{FORGED} \x1b[31mred\x1b]0;title\x07"


@contextlib.contextmanager
def nothing_forged(cri: Client) -> Iterator[None]:
    """A call is refused with words of the attacker's, which forge no line of the log and tell no terminal anything."""
    before = cri.daemon.log.stat().st_size
    with pytest.raises(grpc.RpcError) as refused:
        yield
    assert "forged" in refused.value.details() and refused.value.details().isprintable()
    with cri.daemon.log.open("rb") as log:
        log.seek(before)
        written = log.read().decode()
    assert "forged" in written
    assert all(line.isprintable() and not line.startswith(FORGED) for line in written.split("\n"))


def test_a_registry_writes_no_lines_into_the_log(cri: Client, hostile: HostileRegistry) -> None:
    complaint = {"errors": [{"code": "DENIED", "message": f"no{FOREIGN}"}]}
    hostile.routes["/v2/app/manifests/latest"] = reply(403, json.dumps(complaint).encode())
    with nothing_forged(cri):
        pull(cri, f"{hostile.address}/app:latest")


@pytest.mark.parametrize(
    "config",
    [
        {"Cmd": [f"/none{FOREIGN}"]},
        {"WorkingDir": f"/etc/passwd/{FOREIGN}"},
        {"StopSignal": f"x{FOREIGN}"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_an_image_writes_no_lines_into_the_log(cri: Client, config: dict[str, Any]) -> None:
    image = variant(cri, f"forging{next(iter(config))}", Entrypoint=[], **({"Cmd": ["true"]} | config))
    pod = cri.pod()
    with nothing_forged(cri):
        cri.start(pod, image=image)


def test_a_commands_name_writes_no_lines_into_the_log(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "100")
    with nothing_forged(cri):
        cri.exec(container, f"/none{FOREIGN}")
