"""SPDY/3.1 against what a client, or an attacker, may send: frames in pieces, wrong frames, noise."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crio_native.streaming import spdy

NAMES = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=20)
VALUES = st.text(st.characters(min_codepoint=1, max_codepoint=0x7E), max_size=40)
HEADERS = st.dictionaries(NAMES, VALUES, max_size=6)


def pieces(data: bytes, cuts: Iterable[int]) -> list[memoryview]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [memoryview(data)[a:b] for a, b in itertools.pairwise(places)]


def take(connection: spdy.Connection, parts: Iterable[memoryview]) -> list[tuple[object, ...]]:
    """What happened, with the data of each stream joined, as parts are a matter of chance."""
    told: list[tuple[object, ...]] = []
    for part in parts:
        for event in connection.receive(part):
            if isinstance(event, spdy.Data):
                if told and told[-1][:2] == ("data", event.stream):
                    told[-1] = ("data", event.stream, bytes(told[-1][2]) + bytes(event.data))  # type: ignore[call-overload]
                else:
                    told.append(("data", event.stream, bytes(event.data)))
            elif isinstance(event, spdy.Opened):
                told.append(("opened", event.stream, dict(event.headers)))
            else:
                told.append((type(event).__name__, getattr(event, "stream", None)))
    return told


@given(st.lists(st.tuples(HEADERS, st.lists(st.binary(max_size=300), max_size=4)), min_size=1, max_size=5), st.data())
def test_what_one_side_sends_the_other_receives_in_any_pieces(
    streams: list[tuple[dict[str, str], list[bytes]]], data: st.DataObject
) -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(client=False)
    wire = b""
    expected: list[tuple[Any, ...]] = []
    for headers, chunks in streams:
        number, frame = client.open(headers)
        wire += frame
        expected.append(("opened", number, headers))
        for chunk in chunks:
            wire += client.data(number, len(chunk)) + chunk
        if chunks:
            expected.append(("data", number, b"".join(chunks)))
        wire += client.end(number)
        expected.append(("Ended", number))
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=20))
    assert take(server, pieces(wire, cuts)) == expected


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=10))
def test_noise_is_refused_or_ignored(noise: bytes, cuts: list[int]) -> None:
    try:
        take(spdy.Connection(client=False), pieces(noise, cuts))
    except spdy.ProtocolError:
        pass


@settings(max_examples=300)
@given(
    kind=st.integers(0, 12),
    flags=st.integers(0, 255),
    body=st.binary(max_size=200),
    begun=st.booleans(),
)
def test_control_frames_with_any_body(kind: int, flags: int, body: bytes, begun: bool) -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(client=False)
    if begun:
        take(server, [memoryview(client.open({"streamtype": "stdin"})[1])])
    frame = struct.pack(">HHI", 0x8003, kind, flags << 24 | len(body)) + body
    try:
        take(server, [memoryview(frame)])
    except spdy.ProtocolError:
        pass


@given(st.binary(max_size=400))
def test_header_blocks_with_any_content(plain: bytes) -> None:
    pack = zlib.compressobj(zdict=spdy.DICTIONARY)
    block = pack.compress(plain) + pack.flush(zlib.Z_SYNC_FLUSH)
    body = struct.pack(">II", 1, 0) + b"\0\0" + block
    try:
        told = take(spdy.Connection(client=False), [memoryview(struct.pack(">HHI", 0x8003, 1, len(body)) + body)])
    except spdy.ProtocolError:
        return
    assert [entry[0] for entry in told] == ["opened"]


def syn_stream(block: bytes, stream: int = 1) -> memoryview:
    body = struct.pack(">II", stream, 0) + b"\0\0" + block
    return memoryview(struct.pack(">HHI", 0x8003, 1, len(body)) + body)


def block_of(plain: bytes) -> bytes:
    pack = zlib.compressobj(zdict=spdy.DICTIONARY)
    return pack.compress(plain) + pack.flush(zlib.Z_SYNC_FLUSH)


def test_a_bomb_in_a_header_block_is_not_unpacked() -> None:
    bomb = block_of(struct.pack(">II", 1, 1) + b"a" + struct.pack(">I", 32 << 20) + bytes(32 << 20))
    assert len(bomb) < spdy.CONTROL_MAX
    with pytest.raises(spdy.ProtocolError, match="more than"):
        take(spdy.Connection(client=False), [syn_stream(bomb)])


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (struct.pack(">I", 1000000), "1000000 headers"),
        (struct.pack(">II", 1, 50) + b"short", "longer than its block"),
        (struct.pack(">I", 1), "ends too early"),
        (struct.pack(">I", 2) + (struct.pack(">I", 1) + b"a") * 4, "comes twice"),
        (struct.pack(">III", 1, 0, 0), "is empty"),
    ],
)
def test_header_blocks_that_lie(plain: bytes, words: str) -> None:
    with pytest.raises(spdy.ProtocolError, match=words):
        take(spdy.Connection(client=False), [syn_stream(block_of(plain))])


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (struct.pack(">HHI", 0x8003, 1, 1 << 20), "1048576 bytes"),
        (struct.pack(">HHI", 0x8002, 6, 4) + bytes(4), "version 2"),
        (struct.pack(">HHI", 0x8003, 3, 2) + bytes(2), "RST_STREAM frame that is too short"),
        (bytes(syn_stream(b"not zlib")), "cannot be unpacked"),
        (bytes(syn_stream(block_of(bytes(4)), stream=2)), "stream number 2 does not follow 0"),
    ],
)
def test_frames_that_end_the_connection(frame: bytes, words: str) -> None:
    with pytest.raises(spdy.ProtocolError, match=words):
        take(spdy.Connection(client=False), [memoryview(frame)])


def test_streams_are_numbered_upwards() -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(client=False)
    take(server, [memoryview(client.open({})[1])])
    client._next = 1
    with pytest.raises(spdy.ProtocolError, match="stream number 1 does not follow 1"):
        take(server, [memoryview(client.open({})[1])])


def test_more_streams_than_there_may_be_are_refused_one_by_one() -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(client=False)
    for _ in range(spdy.STREAMS_MAX):
        assert take(server, [memoryview(client.open({})[1])])[0][0] == "opened"
    answers = list(server.receive(memoryview(client.open({})[1])))
    assert [type(answer) for answer in answers] == [spdy.Answer]
    told = take(client, [memoryview(answers[0].data)])  # type: ignore[union-attr]
    assert told == [("Reset", 2 * spdy.STREAMS_MAX + 1)]


def test_pings_are_echoed_and_our_own_are_not() -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(client=False)
    (answer,) = server.receive(memoryview(client.ping(7)))
    assert isinstance(answer, spdy.Answer) and answer.data == client.ping(7)
    assert list(client.receive(memoryview(answer.data))) == []


def test_data_for_a_stream_that_was_reset_is_dropped() -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(client=False)
    number, frame = client.open({})
    take(server, [memoryview(frame)])
    assert server.reset(number) and not server.reset(number)
    assert take(server, [memoryview(client.data(number, 3) + b"abc" + client.end(number))]) == []
    assert not server.may_send(number) and server.end(number) == b""


def test_a_large_frame_is_handed_on_as_it_comes_and_never_collected() -> None:
    client, server = spdy.Connection(client=True), spdy.Connection(client=False)
    number, frame = client.open({})
    take(server, [memoryview(frame + client.data(number, spdy.DATA_MAX))])
    buffer = memoryview(bytearray(100_000))
    got = 0
    while got < spdy.DATA_MAX:
        part = buffer[: min(len(buffer), spdy.DATA_MAX - got)]
        (event,) = server.receive(part)
        assert isinstance(event, spdy.Data) and event.data.obj is buffer.obj
        got += len(event.data)
    assert got == spdy.DATA_MAX
