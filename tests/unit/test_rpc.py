"""gRPC by our own server, asked by the library that the project did not write."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.cri import http2, rpc
from crio_native.cri.rpc import Code, Connection, Method, Refused, time_limit

MAX = 8 << 20


class Service:
    """What the methods do, and what happened to them."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.yielded = 0

    def methods(self) -> dict[bytes, Method]:
        def text(data: bytes) -> bytes:
            if data == b"no message":
                raise ValueError("it is none")
            return data

        return {
            b"/test.Test/Echo": Method(text, self.echo),
            b"/test.Test/Fill": Method(text, self.fill),
            b"/test.Test/Left": Method(text, self.left),
            b"/test.Test/Hang": Method(text, self.hang),
            b"/test.Test/Refuse": Method(text, self.refuse),
            b"/test.Test/Count": Method(text, stream=self.count),
        }

    async def echo(self, request: bytes, deadline: float | None) -> bytes:
        return request

    async def fill(self, request: bytes, deadline: float | None) -> bytes:
        return b"x" * int(request)

    async def left(self, request: bytes, deadline: float | None) -> bytes:
        return b"ever" if deadline is None else b"%.1f" % (deadline - asyncio.get_running_loop().time())

    async def hang(self, request: bytes, deadline: float | None) -> bytes:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    async def refuse(self, request: bytes, deadline: float | None) -> bytes:
        raise Refused(Code.FAILED_PRECONDITION, request.decode())

    async def count(self, request: bytes, deadline: float | None) -> AsyncGenerator[bytes, None]:
        """As many messages as asked for, of so many bytes; then a refusal where one is asked for."""
        count, size, refusal = request.decode().split(",")
        try:
            for self.yielded in range(1, int(count) + 1):
                yield b"y" * int(size)
        finally:
            self.cancelled.set()
        if refusal:
            raise Refused(Code.UNAVAILABLE, refusal)


class Served:
    """A server on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.service = path, Service()
        self.connections: set[Connection] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        methods = self.service.methods()

        async def open_() -> None:
            self._server = await self.loop.create_unix_server(
                lambda: Connection(methods, self.connections, receive_max=MAX, send_max=MAX), str(path)
            )

        self.run(open_())

    def run(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(20)

    def close(self) -> None:
        async def hang_up() -> None:
            self._server.close()
            for connection in list(self.connections):
                connection.abort()
            await asyncio.sleep(0)

        self.run(hang_up())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path / "sock")
    yield server
    server.close()


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", 2 * MAX), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix://{served.path}", options=options) as opened:
        yield opened


def call(channel: grpc.Channel, name: str) -> Callable[..., Any]:
    method: Callable[..., Any] = channel.unary_unary(f"/test.Test/{name}")
    return method


@pytest.mark.parametrize("size", [0, 1, 16379, 16384, 1 << 20, MAX])
def test_messages_of_all_sizes(channel: grpc.Channel, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    assert call(channel, "Echo")(data, timeout=20) == data


def test_many_at_once(channel: grpc.Channel) -> None:
    echo = call(channel, "Echo")
    futures = [echo.future(b"%d" % number * 1000, timeout=20) for number in range(300)]
    assert [future.result() for future in futures] == [b"%d" % number * 1000 for number in range(300)]


def test_statuses_and_their_texts(channel: grpc.Channel) -> None:
    text = 'a\nb "100 %" \N{GREEK SMALL LETTER ALPHA}~'
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "Refuse")(text.encode(), timeout=20)
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, text)
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "Refuse")("\N{GREEK SMALL LETTER ALPHA}".encode() * 100000, timeout=20)
    assert refused.value.details() == "\N{GREEK SMALL LETTER ALPHA}" * (rpc.TEXT_MAX // 6)
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "Refuse")(b"a" * 100000, timeout=20)
    assert refused.value.details() == "a" * rpc.TEXT_MAX


@pytest.mark.parametrize(
    ("name", "request_", "code", "details"),
    [
        ("Nothing", b"", "UNIMPLEMENTED", "/test.Test/Nothing"),
        ("Echo", b"no message", "INTERNAL", "it is none"),
        ("Echo", b"x" * (MAX + 1), "RESOURCE_EXHAUSTED", f"larger than {MAX} bytes"),
        ("Fill", b"%d" % (MAX + 1), "RESOURCE_EXHAUSTED", "grpc_max_send_msg_size"),
    ],
)
def test_what_is_refused(channel: grpc.Channel, name: str, request_: bytes, code: str, details: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, name)(request_, timeout=20)
    assert refused.value.code().name == code and details in refused.value.details()
    assert call(channel, "Echo")(b"next", timeout=20) == b"next"


def test_compressed_messages_are_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "Echo")(b"x" * 10000, timeout=20, compression=grpc.Compression.Gzip)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_deadline_is_known_and_ends_the_call(channel: grpc.Channel, served: Served) -> None:
    assert call(channel, "Left")(b"", timeout=7.5) in (b"7.5", b"7.4")
    assert call(channel, "Left")(b"") == b"ever"
    with pytest.raises(grpc.RpcError) as late:
        call(channel, "Hang")(b"", timeout=0.2)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.service.cancelled.wait(5)


def test_a_server_ends_a_call_at_its_deadline_though_its_client_forgets_to(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(served.path))
        sock.sendall(_request(b"/test.Test/Hang", (b"grpc-timeout", b"100m")))
        assert b"4" in _trailers(sock)[b"grpc-status"]
    assert served.service.cancelled.is_set()


def test_a_client_that_cancels_or_goes_ends_its_call(channel: grpc.Channel, served: Served) -> None:
    future = call(channel, "Hang").future(b"")  # type: ignore[attr-defined]
    time.sleep(0.1)
    future.cancel()
    assert served.service.cancelled.wait(5)
    served.service.cancelled.clear()
    future = call(channel, "Hang").future(b"")  # type: ignore[attr-defined]
    time.sleep(0.1)
    channel.close()
    assert served.service.cancelled.wait(5)


def test_a_stream_comes_in_order_and_says_how_it_ended(channel: grpc.Channel) -> None:
    count = channel.unary_stream("/test.Test/Count")
    assert [len(each) for each in count(b"50,20000,", timeout=20)] == [20000] * 50
    found = []
    with pytest.raises(grpc.RpcError) as ended:
        for each in count(b"3,10,out of numbers", timeout=20):
            found.append(each)
    assert found == [b"y" * 10] * 3
    assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.UNAVAILABLE, "out of numbers")


def test_a_stream_waits_for_a_slow_client(served: Served) -> None:
    """One that gives no more windows holds the producer up; with its end the producer's finally runs."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(served.path))
        sock.sendall(_request(b"/test.Test/Count", body=b"1000,20000,"))
        time.sleep(0.3)
        assert 1 <= served.service.yielded <= 5  # 65,535 bytes are allowed without an update
    assert served.service.cancelled.wait(5)


def test_a_client_that_reads_nothing_is_not_listened_to(served: Served) -> None:
    """What it makes us answer would otherwise be kept without a bound."""
    ping = b"\0\0\x08\x06\0\0\0\0\0" + b"8" * 8
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(served.path))
        sock.sendall(http2.PREFACE)
        sock.settimeout(0.5)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64 << 20:
                sent += sock.send(ping * 10000)
        assert sent < 16 << 20


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", http2.PREFACE + b"\0\0\x01\x06\0\0\0\0\0x"])
def test_who_breaks_the_protocol_is_cut_off_with_a_reason(served: Served, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(served.path))
        sock.sendall(said)
        heard = b""
        while part := sock.recv(65536):
            heard += part
    assert b"HTTP/2" in heard or b"instead of 8" in heard


def test_what_is_no_grpc_gets_415(served: Served) -> None:
    fields = [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http")]
    block = http2.packed(fields)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(served.path))
        sock.sendall(http2.PREFACE + len(block).to_bytes(3, "big") + b"\1\5\0\0\0\1" + block)
        assert _trailers(sock) == {b":status": b"415"}


def test_calls_that_go_on_after_their_reset_count(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open and reset streams starts no more work than there may be at once (CVE-2023-44487)."""
    monkeypatch.setattr(rpc, "CALLS_MAX", 2)
    with grpc.insecure_channel(f"unix://{served.path}") as opened, ThreadPoolExecutor(4) as workers:
        hang = opened.unary_unary("/test.Test/Hang")

        def tried(_: int) -> str:
            with pytest.raises(grpc.RpcError) as ended:
                hang(b"", timeout=1)
            return ended.value.code().name

        assert set(workers.map(tried, range(4))) <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
        assert len(served.connections) == 1


def test_going_away_lets_calls_end(channel: grpc.Channel, served: Served) -> None:
    count = channel.unary_stream("/test.Test/Count")(b"200,20000,", timeout=20)
    next(count)
    [connection] = served.connections
    served.loop.call_soon_threadsafe(connection.go_away)
    assert len(list(count)) == 199


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, None), (b"1S", 1.0), (b"2M", 120.0), (b"3H", 10800.0), (b"5m", 0.005), (b"99999999H", 1e8)],
)
def test_time_limits(text: bytes | None, seconds: float | None) -> None:
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", [b"", b"S", b"1", b"1s", b"-1S", b"1.5S", b"999999999S"])
def test_time_limits_that_are_none(text: bytes) -> None:
    with pytest.raises(Refused):
        time_limit(text)


def _request(path: bytes, *more: tuple[bytes, bytes], body: bytes = b"") -> bytes:
    """A client's first bytes, with the call as stream 1."""
    fields = [(b":method", b"POST"), (b":path", path), (b"content-type", b"application/grpc"), *more]
    block, message = http2.packed(fields), b"\0" + len(body).to_bytes(4, "big") + body
    headers = len(block).to_bytes(3, "big") + b"\1\4\0\0\0\1" + block
    return http2.PREFACE + headers + len(message).to_bytes(3, "big") + b"\0\1\0\0\0\1" + message


def _trailers(sock: socket.socket) -> dict[bytes, bytes]:
    """What ends stream 1."""
    import hpack

    decoder, buffer = hpack.Decoder(), b""
    while True:
        size = int.from_bytes(buffer[:3], "big")
        if len(buffer) < 9 or len(buffer) < 9 + size:
            buffer += sock.recv(65536)
            continue
        kind, flags, payload, buffer = buffer[3], buffer[4], buffer[9 : 9 + size], buffer[9 + size :]
        if kind == http2.Kind.HEADERS:
            fields = dict(decoder.decode(payload, raw=True))
            if flags & 1:
                return fields
