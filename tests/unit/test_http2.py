"""HTTP/2 without I/O: beside a client that the project did not write, and against clients that break the rules."""

from __future__ import annotations

from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crio_native.cri import http2
from crio_native.cri.http2 import Connection, ConnectionFailed, ErrorCode, Kind, Request, Reset, packed

PATH = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), (":authority", "x"), ("te", "trailers")]
HEADERS = packed([(b":status", b"200"), (b"content-type", b"application/grpc")])
TRAILERS = packed([(b"grpc-status", b"0"), (b"grpc-message", b"said in full")])
BODY_MAX = 1 << 20


class Talk:
    """A server's connection and h2's client, wire to wire.  step: bytes that arrive at once."""

    def __init__(self, step: int = 1 << 20) -> None:
        self.step = step
        self.server = Connection(body_max=BODY_MAX)
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.client.initiate_connection()
        self.heard: list[h2.events.Event] = []
        self.events: list[http2.Event] = []
        self.exchange()

    def exchange(self, acknowledge: bool = True) -> None:
        """Until both are quiet."""
        while True:
            up, down = self.client.data_to_send(), self.server.take()
            if not up and not down:
                return
            for part in _parts(up, self.step):
                self.events += self.server.receive(part)
            for part in _parts(down, self.step):
                for event in self.client.receive_data(part):
                    self.heard.append(event)
                    if acknowledge and isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                        self.client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def ask(self, body: bytes = b"", **options: int) -> int:
        """Begin a request and send as much of the body as may be sent; its stream."""
        stream: int = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, PATH, end_stream=not body, **options)
        sent = 0
        while body and sent < len(body):
            self.exchange()
            size = min(self.client.local_flow_control_window(stream), 16384, len(body) - sent)
            assert size > 0, "the server gives no credit"
            self.client.send_data(stream, body[sent : sent + size], end_stream=sent + size == len(body))
            sent += size
        self.exchange()
        return stream

    def answer(self, stream: int, body: bytes) -> None:
        self.server.headers(stream, HEADERS)
        self.server.data(stream, body)
        self.server.finish(stream, TRAILERS)

    def received(self, stream: int) -> bytes:
        mine = (e for e in self.heard if isinstance(e, h2.events.DataReceived) and e.stream_id == stream)
        return b"".join(e.data for e in mine)

    def ended(self, stream: int) -> bool:
        return any(isinstance(e, h2.events.StreamEnded) and e.stream_id == stream for e in self.heard)


def _parts(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("size", [0, 1, 16384, 40000])
def test_a_request_is_told_when_it_is_whole(size: int, step: int) -> None:
    talk = Talk(step)
    body = bytes(size % 251 for _ in range(size))
    stream = talk.ask(body)
    [request] = talk.events
    assert request == Request(stream, {k.encode(): v.encode() for k, v in PATH}, body)
    talk.answer(stream, b"answer")
    talk.exchange()
    assert talk.received(stream) == b"answer" and talk.ended(stream)
    [trailers] = [e for e in talk.heard if isinstance(e, h2.events.TrailersReceived)]
    assert [tuple(each) for each in trailers.headers] == [(b"grpc-status", b"0"), (b"grpc-message", b"said in full")]


def test_padding_and_priority_are_taken_off() -> None:
    talk = Talk()
    stream = talk.client.get_next_available_stream_id()
    talk.client.send_headers(stream, PATH, priority_weight=200, priority_depends_on=0, priority_exclusive=True)
    talk.client.send_data(stream, b"body", end_stream=True, pad_length=77)
    talk.exchange()
    assert [event.body for event in talk.events if isinstance(event, Request)] == [b"body"]


@settings(deadline=None, max_examples=50)
@given(
    window=st.integers(0, 70000),
    then=st.integers(0, 70000),
    frame=st.integers(16384, 60000),
    sizes=st.lists(st.integers(0, 200000), min_size=1, max_size=4),
)
def test_an_answer_respects_the_clients_windows(window: int, then: int, frame: int, sizes: list[int]) -> None:
    """h2 raises when more comes than it has allowed."""
    talk = Talk()
    code = h2.settings.SettingCodes
    talk.client.update_settings({code.INITIAL_WINDOW_SIZE: window, code.MAX_FRAME_SIZE: frame})
    talk.exchange()
    streams = [talk.ask() for _ in sizes]
    for stream, size in zip(streams, sizes, strict=True):
        talk.answer(stream, b"x" * size)
        talk.exchange(acknowledge=False)
    talk.client.update_settings({code.INITIAL_WINDOW_SIZE: then})
    talk.exchange(acknowledge=False)
    for stream, size in zip(streams, sizes, strict=True):
        if not talk.ended(stream):
            assert talk.server.unsent(stream)
            talk.client.increment_flow_control_window(size + 70000, stream)
    talk.client.increment_flow_control_window(1 << 20)
    talk.exchange(acknowledge=False)
    for stream, size in zip(streams, sizes, strict=True):
        assert len(talk.received(stream)) == size and talk.ended(stream)


def test_a_body_beyond_its_bound_is_not_kept_and_the_next_one_is_served() -> None:
    talk = Talk()
    first = talk.ask(b"x" * (BODY_MAX + 1))
    second = talk.ask(b"x" * BODY_MAX)
    assert [(e.stream, e.body and len(e.body)) for e in talk.events if isinstance(e, Request)] == [
        (first, None),
        (second, BODY_MAX),
    ]


def test_bodies_beyond_all_windows_in_sum() -> None:
    talk = Talk()
    talk.client.outbound_flow_control_window = 1 << 20  # as though the rest had been used up
    for _ in range(8):
        talk.ask(b"x" * (1 << 19))
    assert len(talk.events) == 8


def test_an_answer_that_needs_no_body_stops_it() -> None:
    talk = Talk()
    stream = talk.client.get_next_available_stream_id()
    talk.client.send_headers(stream, PATH)
    talk.exchange()
    talk.server.finish(stream, packed([(b":status", b"200"), (b"grpc-status", b"12")]))
    talk.exchange()
    assert any(isinstance(e, h2.events.StreamReset) and e.error_code == 0 for e in talk.heard)
    assert talk.ask() and len(talk.events) == 1


def test_a_reset_is_told_once_and_nothing_more_is_sent() -> None:
    talk = Talk()
    stream = talk.ask()
    talk.client.reset_stream(stream)
    talk.exchange()
    assert talk.events[1:] == [Reset(stream)]
    talk.answer(stream, b"late")
    talk.server.reset(stream, ErrorCode.CANCEL)
    assert talk.server.take() == b""


def test_streams_are_refused_beyond_their_number_and_after_going_away() -> None:
    talk = Talk()
    for _ in range(http2.STREAMS_MAX):
        talk.ask()
    raw = _frame(Kind.HEADERS, 5, 2 * http2.STREAMS_MAX + 1, packed([(b":method", b"POST")]))
    assert talk.server.receive(raw) == []
    assert talk.server.take() == _frame(Kind.RST_STREAM, 0, 2 * http2.STREAMS_MAX + 1, (7).to_bytes(4, "big"))
    going = Talk()
    first = going.ask()
    going.server.go_away()
    going.server.take()
    assert going.server.receive(_frame(Kind.HEADERS, 5, first + 2, b"\x83")) == []
    assert going.server.take() == _frame(Kind.RST_STREAM, 0, first + 2, (7).to_bytes(4, "big"))
    going.answer(first, b"goes on")
    going.exchange()
    assert going.received(first) == b"goes on"


def test_pings_and_settings_are_acknowledged() -> None:
    talk = Talk()
    talk.client.ping(b"12345678")
    talk.exchange()
    kinds = [type(event) for event in talk.heard]
    assert h2.events.PingAckReceived in kinds and h2.events.SettingsAcknowledged in kinds


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


OPEN = _frame(Kind.HEADERS, 4, 1, b"\x83")
BROKEN = {
    "not HTTP/2": (b"GET / HTTP/1.1\r\n\r\n", ErrorCode.PROTOCOL_ERROR),
    "too long a frame": (b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", ErrorCode.FRAME_SIZE_ERROR),
    "data of no stream": (_frame(Kind.DATA, 0, 1, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data of stream 0": (_frame(Kind.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data after the end": (
        _frame(Kind.HEADERS, 5, 1, b"\x83") + _frame(Kind.DATA, 0, 1, b"x"),
        ErrorCode.STREAM_CLOSED,
    ),
    "all padding": (OPEN + _frame(Kind.DATA, 8, 1, b"\x01"), ErrorCode.PROTOCOL_ERROR),
    "no room for padding": (OPEN + _frame(Kind.DATA, 8, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "a server's stream": (_frame(Kind.HEADERS, 5, 2, b"\x83"), ErrorCode.PROTOCOL_ERROR),
    "headers twice": (OPEN + OPEN, ErrorCode.PROTOCOL_ERROR),
    "headers without priority": (_frame(Kind.HEADERS, 0x24, 1, b"\x83"), ErrorCode.FRAME_SIZE_ERROR),
    "interrupted headers": (
        _frame(Kind.HEADERS, 0, 1, b"\x83") + _frame(Kind.PING, 0, 0, b"8" * 8),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a stray continuation": (_frame(Kind.CONTINUATION, 4, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "another's continuation": (
        _frame(Kind.HEADERS, 0, 1, b"\x83") + _frame(Kind.CONTINUATION, 4, 3, b""),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "endless headers": (
        _frame(Kind.HEADERS, 0, 1, b"\x83") + _frame(Kind.CONTINUATION, 0, 1, b"") * 100,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "large headers": (
        _frame(Kind.HEADERS, 0, 1, b"\x83") + _frame(Kind.CONTINUATION, 0, 1, b"x" * 16384) * 5,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "no headers": (_frame(Kind.HEADERS, 5, 1, b"\xff\xff\xff\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
    "headers that unpack to much": (
        # One large entry for the table, and then its index over and over.
        _frame(Kind.HEADERS, 5, 1, b"\x40\x01a\x7f\x81\x1e" + b"b" * 4000 + b"\xbe" * 12000),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a reset of nothing": (_frame(Kind.RST_STREAM, 0, 1, b"1234"), ErrorCode.PROTOCOL_ERROR),
    "a short reset": (OPEN + _frame(Kind.RST_STREAM, 0, 1, b"123"), ErrorCode.FRAME_SIZE_ERROR),
    "a short ping": (_frame(Kind.PING, 0, 0, b"1234567"), ErrorCode.FRAME_SIZE_ERROR),
    "short settings": (_frame(Kind.SETTINGS, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR),
    "settings of a stream": (_frame(Kind.SETTINGS, 0, 1, b""), ErrorCode.FRAME_SIZE_ERROR),
    "a huge window": (_frame(Kind.SETTINGS, 0, 0, b"\0\4\x80\0\0\0"), ErrorCode.FLOW_CONTROL_ERROR),
    "tiny frames": (_frame(Kind.SETTINGS, 0, 0, b"\0\5\0\0\0\1"), ErrorCode.PROTOCOL_ERROR),
    "window of nothing": (_frame(Kind.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), ErrorCode.PROTOCOL_ERROR),
    "no more window": (_frame(Kind.WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), ErrorCode.FLOW_CONTROL_ERROR),
    "window beyond bounds": (_frame(Kind.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), ErrorCode.FLOW_CONTROL_ERROR),
    "a push": (_frame(Kind.PUSH_PROMISE, 0, 1, b"1234"), ErrorCode.PROTOCOL_ERROR),
    "a short priority": (_frame(Kind.PRIORITY, 0, 1, b"1234"), ErrorCode.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("name", BROKEN)
def test_who_breaks_the_protocol_is_told_how(name: str) -> None:
    data, code = BROKEN[name]
    connection = Connection(body_max=BODY_MAX)
    connection.take()
    with pytest.raises(ConnectionFailed) as failure:
        connection.receive(data if name == "not HTTP/2" else http2.PREFACE + data)
    assert failure.value.code == code
    connection.go_away(failure.value.code, str(failure.value))
    assert connection.take()[3] == Kind.GOAWAY


@pytest.mark.parametrize("more", [b"\0\0\0\0", b"\x7f\xff\xff\xff"])
def test_a_streams_window_out_of_bounds_ends_the_stream_alone(more: bytes) -> None:
    connection = Connection(body_max=BODY_MAX)
    opened = _frame(Kind.HEADERS, 5, 1, b"\x83")
    events = connection.receive(http2.PREFACE + opened + _frame(Kind.WINDOW_UPDATE, 0, 1, more))
    assert events[1:] == [Reset(1)]
    assert connection.receive(_frame(Kind.HEADERS, 5, 3, b"\x83"))


frames = st.builds(
    _frame,
    st.integers(0, 12),
    st.sampled_from([0, 1, 4, 5, 8, 0x0D, 0x20, 0x2D]),
    st.sampled_from([0, 1, 2, 3, 5]),
    st.one_of(
        st.binary(max_size=64), st.sampled_from([b"\x83", b"\0\4\0\0\0\0", b"\0\0\0\1", b"\0" * 8, b"\x3f\xe1\xff"])
    ),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(frames, max_size=12), st.integers(1, 40))
def test_whatever_comes_is_served_or_refused_however_it_is_cut(sent: list[bytes], step: int) -> None:
    data = http2.PREFACE + b"".join(sent)
    assert _outcome([data]) == _outcome(list(_parts(data, step)))


def _outcome(parts: list[bytes]) -> tuple[list[http2.Event], ErrorCode | None]:
    connection = Connection(body_max=100)
    events: list[http2.Event] = []
    try:
        for part in parts:
            new = connection.receive(part)
            for event in new:
                connection.headers(event.stream, HEADERS)
                connection.data(event.stream, b"x" * 100)
            events += new
    except ConnectionFailed as error:
        return [], error.code
    assert all(event.body is None or len(event.body) <= 100 for event in events if isinstance(event, Request))
    return events, None
