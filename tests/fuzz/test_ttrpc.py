"""Whatever a peer sends, in whatever pieces: frames come out whole, or the connection is refused; memory is bounded."""

from __future__ import annotations

import contextlib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as some

from crio_native.api.shim.v1 import ttrpc_pb2
from crio_native.errors import CrioError, StepFailed, Unimplemented
from crio_native.oci.shim import bootstrap, frames, statistics
from crio_native.oci.shim.client import Session
from crio_native.oci.shim.frames import Frame, FrameReader, ProtocolError

FRAMES = some.builds(
    Frame,
    some.integers(0, 2**32 - 1),
    some.sampled_from([frames.REQUEST, frames.RESPONSE, frames.DATA]),
    some.integers(0, 255),
    some.binary(max_size=300),
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


@given(some.lists(FRAMES, max_size=8), some.lists(some.integers(0, 10_000), max_size=12))
def test_frames_survive_any_cutting(sent: list[Frame], cuts: list[int]) -> None:
    reader = FrameReader()
    data = b"".join(map(frames.pack, sent))
    got = [frame for piece in pieces(data, cuts) for frame in reader.feed(piece)]
    assert got == sent
    assert reader.between


@given(FRAMES, some.integers(frames.MESSAGE_MAX + 1, frames.MESSAGE_MAX + 1000), some.lists(some.integers(0, 2**23)))
def test_a_frame_after_one_that_is_too_large(after: Frame, length: int, cuts: list[int]) -> None:
    reader = FrameReader()
    data = frames.HEADER.pack(length, 7, frames.RESPONSE, 0) + bytes(length) + frames.pack(after)
    got = []
    for piece in pieces(data, cuts):
        got += list(reader.feed(piece))
    assert got == [Frame(7, frames.RESPONSE, 0, b"", length), after]


@given(some.lists(some.binary(max_size=200), max_size=20))
def test_anything_is_read_or_refused(chunks: list[bytes]) -> None:
    reader = FrameReader()
    with contextlib.suppress(ProtocolError):
        for chunk in chunks:
            for frame in reader.feed(chunk):
                assert len(frame.payload) <= frames.MESSAGE_MAX
    assert len(reader._buffer) <= sum(map(len, chunks))


@given(some.lists(some.tuples(some.integers(0, 12), some.sampled_from([2, 3]), some.integers(0, 7), some.binary())))
def test_a_session_gives_each_call_at_most_one_answer(answers: list[tuple[int, int, int, bytes]]) -> None:
    session = Session("the peer")
    futures = [session.call("s", "m", b"", None)[2] for _ in range(3)]
    stream, _ = session.stream("s", "m", b"")
    with contextlib.suppress(ProtocolError):
        for number, kind, flags, payload in answers:
            session.receive(frames.pack(Frame(number, kind, flags, payload)))
    session.end(StepFailed("end"))
    for future in futures:
        assert future.done()
        assert isinstance(future.exception(0), CrioError | None)
    for _ in range(200):
        try:
            if stream.receive(0.001) is None:
                break
        except CrioError:
            break
    else:
        raise AssertionError("the stream does not end")


@given(some.binary(max_size=300), some.integers(-(2**31), 2**31 - 1), some.text(max_size=50))
def test_a_response_of_any_status(payload: bytes, code: int, words: str) -> None:
    session = Session("the peer")
    number, _, future = session.call("s", "m", b"", None)
    status = ttrpc_pb2.Status(code=code, message=words.encode("utf-8", "replace").decode())
    response = ttrpc_pb2.Response(payload=payload, status=status)
    session.receive(frames.pack(Frame(number, frames.RESPONSE, 0, response.SerializeToString())))
    assert (future.exception(0) is None) == (code == 0)
    assert code or future.result(0) == payload


@given(some.binary(max_size=300) | some.text().map(lambda text: text.encode("utf-8", "replace")))
def test_any_answer_to_start(answer: bytes) -> None:
    try:
        address = bootstrap.parse_answer(answer, "shim")
    except (StepFailed, Unimplemented):
        return
    path = address.address.removeprefix("unix://")
    assert 0 < len(path.encode("utf-8", "replace")) <= 107 and "\0" not in path and not any(map(str.isspace, path))


@given(some.sampled_from(["io.containerd.cgroups.v1.Metrics", "io.containerd.cgroups.v2.Metrics", "x"]), some.binary())
def test_any_statistics(kind: str, message: bytes) -> None:
    try:
        read = statistics.read(kind, message)
    except CrioError:
        return
    assert read.memory_working_set is not None and read.memory_working_set >= 0
