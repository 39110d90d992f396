"""ttrpc against a peer of a few lines, on a socket pair: what a call gets for each thing that the peer can do."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from crio_native.api.shim.v1 import task_pb2, ttrpc_pb2
from crio_native.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    StepFailed,
    Unavailable,
    Unimplemented,
)
from crio_native.oci.shim import frames
from crio_native.oci.shim.client import CALLS_MAX, STREAM_MAX, Client, Session
from crio_native.oci.shim.loop import Loop
from crio_native.oci.shim.task import Streams, Tasks

HEADER = struct.Struct(">IIBB")


class Peer:
    """The server's end, to be used by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(5)

    def request(self) -> tuple[int, ttrpc_pb2.Request]:
        length, stream, kind, _ = HEADER.unpack(self.exactly(HEADER.size))
        assert kind == 1 and stream % 2 == 1
        return stream, ttrpc_pb2.Request.FromString(self.exactly(length))

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.sock.recv(size - len(data))
        return data

    def frame(self, stream: int, message: bytes, kind: int = 2, flags: int = 0) -> None:
        self.sock.sendall(HEADER.pack(len(message), stream, kind, flags) + message)

    def answer(self, stream: int, payload: bytes = b"", code: int = 0, words: str = "") -> None:
        response = ttrpc_pb2.Response(payload=payload, status=ttrpc_pb2.Status(code=code, message=words))
        self.frame(stream, response.SerializeToString())


@pytest.fixture
def pair() -> Iterator[tuple[Client, Peer]]:
    ours, theirs = socket.socketpair()
    loop = Loop()
    client = Client(ours, "the peer", loop)
    yield client, Peer(theirs)
    client.close()
    theirs.close()
    loop.stop()


def calling(client: Client, timeout: float | None = 5) -> Any:
    """A call in a thread; `.result()` gives its answer or raises its error."""
    from concurrent.futures import Future

    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(client.call("a.Service", "Method", b"payload", timeout))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_calls_are_answered_in_any_order(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    waiting = [calling(client) for _ in range(5)]
    requests = [peer.request() for _ in range(5)]
    assert len({stream for stream, _ in requests}) == 5
    assert {(r.service, r.method, r.payload, r.timeout_nano) for _, r in requests} == {
        ("a.Service", "Method", b"payload", 5 * 10**9)
    }
    for stream, _ in reversed(requests):
        peer.answer(stream, b"%d" % stream)
    assert sorted(int(future.result(5)) for future in waiting) == [stream for stream, _ in sorted(requests)][:5]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (2, StepFailed),
        (3, InvalidArgument),
        (4, DeadlineExceeded),
        (5, NotFound),
        (6, AlreadyExists),
        (8, ResourceExhausted),
        (9, FailedPrecondition),
        (12, Unimplemented),
        (14, Unavailable),
        (99, StepFailed),
    ],
)
def test_a_status_is_an_error_with_the_peer_s_words(pair: tuple[Client, Peer], code: int, error: type) -> None:
    client, peer = pair
    future = calling(client)
    stream, _ = peer.request()
    peer.answer(stream, code=code, words="no such luck" + "!" * 100_000)
    with pytest.raises(error, match="no such luck") as caught:
        future.result(5)
    assert len(str(caught.value)) < 3000


def test_a_time_limit_and_the_late_answer(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    future = calling(client, 0.1)
    stream, request = peer.request()
    assert request.timeout_nano == 10**8
    with pytest.raises(DeadlineExceeded, match=r"the peer did not answer Method within 0\.1 s"):
        future.result(5)
    peer.answer(stream, b"late")
    again = calling(client)
    stream, _ = peer.request()
    peer.answer(stream, b"in time")
    assert again.result(5) == b"in time"


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "closed the connection$"),
        (b"\0\0\0\x09", "in the middle of a message"),
        (HEADER.pack(100, 1, 2, 0) + b"half", "in the middle of a message"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak ttrpc"),
        (HEADER.pack(0, 1, 9, 0), "type 9"),
        (HEADER.pack(0, 1, 1, 0), "type 1"),
        (HEADER.pack(0, 2, 2, 0), "on stream 2, which nobody opened"),
        (HEADER.pack(0, 77, 2, 0), "on stream 77, which nobody opened"),
    ],
)
def test_an_end_of_the_connection_ends_every_call(pair: tuple[Client, Peer], sent: bytes, words: str) -> None:
    client, peer = pair
    waiting = [calling(client, None) for _ in range(3)]
    for _ in waiting:
        peer.request()
    peer.sock.sendall(sent)
    peer.sock.shutdown(socket.SHUT_RDWR)
    for future in waiting:
        with pytest.raises(Unavailable, match=words):
            future.result(5)
    with pytest.raises(Unavailable, match=words):
        client.call("a.Service", "Method", b"", 1)
    assert not client.is_open


def test_nonsense_in_an_answer_is_only_that_call_s(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    first, second = calling(client), calling(client)
    streams = [peer.request()[0], peer.request()[0]]
    peer.frame(streams[0], b"\xff\xff\xff")
    peer.answer(streams[1], b"fine")
    errors = [future.exception(5) for future in (first, second)]
    assert [type(error) for error in errors if error] == [Internal]
    assert errors.count(None) == 1


def test_too_large_an_answer_is_dropped(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    future = calling(client)
    stream, _ = peer.request()
    sending = threading.Thread(target=peer.frame, args=(stream, bytes(frames.MESSAGE_MAX + 1)))
    sending.start()
    with pytest.raises(ResourceExhausted, match="answered Method with too much"):
        future.result(5)
    sending.join()
    again = calling(client)
    stream, _ = peer.request()
    peer.answer(stream, b"ok")
    assert again.result(5) == b"ok"


def test_too_large_a_request_is_not_sent(pair: tuple[Client, Peer]) -> None:
    client, _ = pair
    with pytest.raises(ResourceExhausted, match="Method: a request of"):
        client.call("a.Service", "Method", bytes(frames.MESSAGE_MAX), 1)


def test_a_peer_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crio_native.oci.shim.client.SEND_SECONDS", 0.3)
    ours, theirs = socket.socketpair()
    loop = Loop()
    ended = threading.Event()
    client = Client(ours, "the peer", loop, ended.set)
    with pytest.raises(Unavailable, match="took no request"):
        for _ in range(4):
            client.begin("a.Service", "Method", bytes(1 << 20)).exception(0)
            time.sleep(0)
    assert ended.wait(5)
    theirs.close()
    loop.stop()


def test_calls_at_once_are_bounded() -> None:
    session = Session("the peer")
    for _ in range(CALLS_MAX):
        session.call("s", "m", b"", None)
    with pytest.raises(ResourceExhausted, match=str(CALLS_MAX)):
        session.call("s", "m", b"", None)


def test_a_stream(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    stream = client.stream("a.Service", "Events", b"ask")
    number, request = peer.request()
    assert request.payload == b"ask"
    peer.frame(number, b"one", kind=3)
    peer.frame(number, b"two", kind=3)
    peer.frame(number, b"", kind=3, flags=frames.REMOTE_CLOSED | frames.NO_DATA)
    assert [stream.receive(5) for _ in range(3)] == [b"one", b"two", None]


def test_a_stream_that_is_refused(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    stream = client.stream("a.Service", "Events", b"")
    number, _ = peer.request()
    peer.answer(number, code=12, words="no events here")
    with pytest.raises(Unimplemented, match="no events here"):
        stream.receive(5)
    with pytest.raises(DeadlineExceeded):
        stream.receive(0.01)


def test_a_stream_that_nobody_reads_is_ended(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    stream = client.stream("a.Service", "Events", b"")
    number, _ = peer.request()
    for _ in range(STREAM_MAX + 10):
        peer.frame(number, b"x", kind=3)
    future = calling(client)
    peer.answer(peer.request()[0])
    future.result(5)
    for _ in range(STREAM_MAX):
        assert stream.receive(5) == b"x"
    with pytest.raises(ResourceExhausted, match="were not read"):
        stream.receive(5)


def test_a_stream_that_is_left(pair: tuple[Client, Peer]) -> None:
    client, peer = pair
    stream = client.stream("a.Service", "Events", b"")
    number, _ = peer.request()
    stream.close()
    peer.frame(number, b"x", kind=3)
    future = calling(client)
    peer.answer(peer.request()[0], b"on")
    assert future.result(5) == b"on"


def test_every_method_of_the_task_service(pair: tuple[Client, Peer]) -> None:
    """The bytes on the wire say what the caller meant: read back by the messages themselves."""
    client, peer = pair
    tasks = Tasks(client, 3)
    seen: dict[str, Any] = {}
    answers = {
        "Create": task_pb2.CreateTaskResponse(pid=42).SerializeToString(),
        "Start": task_pb2.StartResponse(pid=43).SerializeToString(),
    }

    def serve() -> None:
        methods = task_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name
        while True:
            try:
                stream, request = peer.request()
            except (OSError, struct.error):
                return
            assert request.service == "containerd.task.v3.Task"
            kind = methods[request.method].input_type.name
            seen[request.method] = getattr(task_pb2, kind).FromString(request.payload)
            peer.answer(stream, answers.get(request.method, b""))

    threading.Thread(target=serve, daemon=True).start()
    assert tasks.create("c", "/b", Streams("i", "o", "e"), config_path="/etc/kata.toml", timeout=5) == 42
    assert tasks.start("c", "x") == 43
    tasks.exec("c", "x", {"args": ["true"]}, Streams(terminal=True))
    tasks.wait("c").result(5)
    tasks.kill("c", 9, everyone=True)
    tasks.resize("c", 24, 80)
    tasks.close_stdin("c").result(5)
    assert tasks.pids("c") == []
    tasks.pause("c")
    tasks.resume("c")
    tasks.checkpoint("c", "/p")
    tasks.update("c", {"memory": {"limit": 1}})
    assert tasks.stats("c") == ("", b"")
    assert tasks.state("c").status == 0
    assert tasks.delete("c", "x").code == 0
    assert tasks.connect("c") == 0
    tasks.shutdown("c")
    assert set(seen) == {method.name for method in task_pb2.DESCRIPTOR.services_by_name["Task"].methods}
    assert (seen["Create"].stdin, seen["Create"].stdout, seen["Create"].stderr) == ("i", "o", "e")
    assert b"/etc/kata.toml" in seen["Create"].options.value
    assert seen["Exec"].terminal and seen["Exec"].spec.value == b'{"args": ["true"]}'
    assert (seen["ResizePty"].height, seen["ResizePty"].width) == (24, 80)
    assert seen["Kill"].all and seen["Kill"].signal == 9
    assert seen["Update"].resources.type_url.endswith("LinuxResources")
