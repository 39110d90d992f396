"""Random output, requests and packets of the init, against real monitors."""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crio_native.errors import Internal, StepFailed
from tests.linux.monitor_harness import Container, Record, content

NUMBERS = itertools.count()

# Pieces of output, each written at once: around the buffer's size, with and without newlines.
PIECES = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.integers(8180, 8200).map(lambda size: b"x" * size),
        st.integers(0, 3000).map(lambda size: b"\n" * size),
        st.lists(st.sampled_from([b"\n", b"a" * 4000, b"b" * 8191, b"\0"]), max_size=6).map(b"".join),
    ),
    max_size=8,
)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def logged(place: Path, pieces: list[bytes], limit: int) -> tuple[list[Record], int]:
    """The log of a container that writes these, and the size of the log's file."""
    run_dir = place / str(next(NUMBERS))
    run_dir.mkdir()
    for number, piece in enumerate(pieces):
        (run_dir / f"piece{number:02}").write_bytes(piece)
    command = f"for f in {run_dir}/piece*; do [ -e $f ] && dd if=$f bs=64k status=none; done; true"
    with Container(run_dir, command, log_size_max=limit) as container:
        assert container.run().wait().code == 0
        return container.log(), os.stat(str(container.log_path)).st_size


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, limit=st.sampled_from([-1, 1 << 30]))
def test_log_says_what_was_written(place: Path, pieces: list[bytes], limit: int) -> None:
    records, _ = logged(place, pieces, limit)
    assert content(records, "stdout") == b"".join(pieces)
    assert all(record.tag == "F" or record.content for record in records)
    assert all(len(record.content) <= 8192 for record in records)


@settings(max_examples=25, deadline=None)
@given(pieces=PIECES, limit=st.integers(100, 20_000))
def test_limited_log_is_an_end_of_what_was_written(place: Path, pieces: list[bytes], limit: int) -> None:
    records, size = logged(place, pieces, limit)
    assert b"".join(pieces).endswith(content(records, "stdout"))
    assert size <= limit or len(records) == 1


REQUESTS = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=80),
        st.sampled_from([b"start", b"watch", b"reopen", b"close-stdin", b"attach", b"attach output"]),
        st.builds(lambda h, w: b"resize %d %d" % (h, w), st.integers(-5, 70_000), st.integers(-5, 70_000)),
        st.sampled_from([b"kill 0", b"kill 17", b"kill 28", b"kill 100"]),  # none that ends a sleep
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(clients=st.lists(REQUESTS, min_size=1, max_size=6), hang_up=st.booleans())
def test_monitor_survives_any_requests(place: Path, clients: list[list[bytes]], hang_up: bool) -> None:
    with Container(place / str(next(NUMBERS)), "exec sleep 100", stdin=True) as container:
        container.create()
        socks = [container.raw() for _ in clients]
        for requests in itertools.zip_longest(*clients):
            for sock, request in zip(socks, requests, strict=True):
                if request is not None:
                    sock.send(request)
        if hang_up:
            for sock in socks:
                sock.close()
        with container.raw(b"reopen") as sock:
            assert sock.recv(100) == b"ok"
        with container.raw(b"kill 9"):
            assert container.wait().code in (137, 128)  # 128: killed between `start` and its execve
        for sock in socks:
            sock.close()


@settings(max_examples=60, deadline=None)
@given(
    packets=st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.sampled_from([b"R", b"E{}", b"C"])), max_size=3)
)
def test_monitor_survives_any_init(place: Path, packets: list[bytes]) -> None:
    """Whatever an init says: the daemon gets an answer, and the init does not outlive a failure."""

    def init(sync: socket.socket) -> None:
        for packet in packets:
            sync.send(packet)
        os._exit(5)

    with Container(place / str(next(NUMBERS)), init) as container:
        try:
            container.create()
        except StepFailed:
            assert container.reap() == 1
        except Internal:  # what followed R or E is not an object, which only the daemon looks at
            container.reap()
        else:
            assert packets[0][:1] == b"R"
            assert container.wait().code == 5
            assert json.loads((container.run_dir / "exit").read_text())["signal"] == 0
