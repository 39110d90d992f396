"""gRPC, the server's side of one connection: calls, their messages, deadlines and statuses, over `http2`.

On the daemon's own event loop, without a thread: a short call costs a third of what it does in gRPC's own library for
Python (docs/decisions).  Requests are single messages, as all of the CRI's are; answers are one message or a stream.
Messages are not compressed: the client is on the same machine.  What a call does is its `Method`'s.
"""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from crio_native.cri import http2

log = logging.getLogger(__name__)

CALLS_MAX = http2.STREAMS_MAX  # of one connection that run, whether or not anybody still wants their answers
TEXT_MAX = 6000  # bytes of a status's text, escaped; some clients take no more than 8 KiB of headers
_HEAD = 5  # bytes before a message: whether it is compressed, its length
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}  # units of a time limit
_SECONDS_MAX = 1e8  # a loop's clock is no calendar
_TEXT = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"  # what a status's text has as it is, beside letters and digits


class Code(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class Refused(Exception):
    """A call that ends with this status."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Method:
    """parse: raises ValueError or its like for what is no message.

    serve: given the request and the loop's time at which its client gives up (None: never); makes bytes, or, for a
    stream, yields them.  It raises Refused.
    """

    parse: Callable[[bytes], Any]
    serve: Callable[[Any, float | None], Awaitable[bytes]] | None = None
    stream: Callable[[Any, float | None], AsyncGenerator[bytes, None]] | None = None


@dataclass(slots=True)
class _Running:
    """A call.  late: its time was over before it was.  more: done when the client has taken what was sent."""

    task: asyncio.Task[None]
    timer: asyncio.TimerHandle | None = None
    late: bool = False
    more: asyncio.Event = field(default_factory=asyncio.Event)


_ANSWER = http2.packed([(b":status", b"200"), (b"content-type", b"application/grpc")])
_DONE = http2.packed([(b"grpc-status", b"0")])


class Connection(asyncio.Protocol):
    """One client.  Its calls end with it."""

    def __init__(
        self, methods: Mapping[bytes, Method], everybody: set[Connection], *, receive_max: int, send_max: int
    ) -> None:
        """methods: by their paths.  everybody: the connections that there are.  receive_max, send_max: bytes of a
        message."""
        self._methods, self._everybody = methods, everybody
        self._receive_max, self._send_max = receive_max, send_max
        self._loop = asyncio.get_running_loop()
        self._http = http2.Connection(body_max=receive_max + _HEAD)
        self._calls: dict[int, _Running] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._full = False

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._everybody.add(self)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._http.receive(data):
                if isinstance(event, http2.Request):
                    self._begin(event)
                else:
                    self._cancel(event.stream)
        except http2.ConnectionFailed as error:
            log.warning("a client of the CRI socket is cut off: %s", error)
            self._http.go_away(error.code, str(error))
            self._flush()
            self._transport.close()
            return
        self._flush()
        self._wake()

    def pause_writing(self) -> None:
        """A client that takes nothing is not listened to either: what it asks for would only pile up."""
        self._full = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._full = False
        self._transport.resume_reading()
        self._wake()

    def eof_received(self) -> bool:
        return False  # nobody who has hung up waits for an answer

    def connection_lost(self, error: Exception | None) -> None:
        self._everybody.discard(self)
        for stream in list(self._calls):
            self._cancel(stream)

    # ---- for the server ----

    def go_away(self) -> None:
        """Begin no more calls."""
        self._http.go_away()
        self._flush()

    def working(self) -> set[asyncio.Task[None]]:
        """The calls that still run."""
        return set(self._working)

    def close(self) -> None:
        """Hang up when what was said has been taken; with it end the calls."""
        self._transport.close()

    def abort(self) -> None:
        """Hang up."""
        self._transport.abort()

    # ---- calls ----

    def _begin(self, request: http2.Request) -> None:
        stream, headers = request.stream, request.headers
        if len(self._working) >= CALLS_MAX:
            self._http.reset(stream, http2.ErrorCode.REFUSED_STREAM)
            return
        if not headers.get(b"content-type", b"").startswith(b"application/grpc") or headers.get(b":method") != b"POST":
            self._http.finish(stream, http2.packed([(b":status", b"415")]))
            return
        try:
            seconds = time_limit(headers.get(b"grpc-timeout"))
            method = self._methods.get(headers.get(b":path", b""))
            if method is None:
                raise Refused(Code.UNIMPLEMENTED, f"there is no method {headers.get(b':path', b'')!r}")
            message = self._message(method, request.body)
        except Refused as refusal:
            self._refuse(stream, refusal, begun=False)
            return
        deadline = None if seconds is None else self._loop.time() + seconds
        task = self._loop.create_task(self._answer(stream, method, message, deadline))
        call = self._calls[stream] = _Running(task)
        if deadline is not None:
            call.timer = self._loop.call_at(deadline, self._expire, stream, call)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    def _message(self, method: Method, body: bytes | None) -> Any:
        if body is None or len(body) - _HEAD > self._receive_max:
            raise Refused(Code.RESOURCE_EXHAUSTED, f"the request is larger than {self._receive_max} bytes")
        if body[:1] == b"\1":
            raise Refused(Code.UNIMPLEMENTED, "compressed messages are not accepted")
        if len(body) < _HEAD or int.from_bytes(body[1:_HEAD], "big") != len(body) - _HEAD:
            raise Refused(Code.INTERNAL, "the request is not one message")
        try:
            return method.parse(body[_HEAD:])
        except Exception as error:  # protobuf's own, which is no part of its interface
            raise Refused(Code.INTERNAL, f"the request cannot be parsed: {error}") from None

    async def _answer(self, stream: int, method: Method, message: Any, deadline: float | None) -> None:
        begun = False
        try:
            if method.serve is not None:
                answer = self._framed(await method.serve(message, deadline))
                self._http.headers(stream, _ANSWER)
                begun = True
                self._http.data(stream, answer)
            elif method.stream is not None:
                self._http.headers(stream, _ANSWER)
                begun = True
                self._flush()
                # Closed here and now, whatever ends it: what it holds is not left to the garbage collector.
                async with aclosing(method.stream(message, deadline)) as answers:
                    async for each in answers:
                        self._http.data(stream, self._framed(each))
                        await self._taken(stream)
            self._http.finish(stream, _DONE)
            await self._taken(stream)
        except Refused as refusal:
            self._refuse(stream, refusal, begun=begun)
        except asyncio.CancelledError:
            call = self._calls.get(stream)
            if begun or call is None or not call.late:
                self._http.reset(stream, http2.ErrorCode.CANCEL)
                raise
            self._refuse(stream, Refused(Code.DEADLINE_EXCEEDED, "the call's time is over"), begun=False)
        finally:
            finished = self._calls.pop(stream, None)
            if finished is not None and finished.timer is not None:
                finished.timer.cancel()
            self._flush()

    def _framed(self, message: bytes) -> bytes:
        if len(message) > self._send_max:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"the answer has {len(message)} bytes, more than {self._send_max} (crio.api.grpc_max_send_msg_size)",
            )
        return b"\0" + len(message).to_bytes(4, "big") + message

    async def _taken(self, stream: int) -> None:
        """Send, and wait until the client has taken it: one message of a stream is kept, and no answer is cut off."""
        self._flush()
        call = self._calls.get(stream)
        while call is not None and (self._full or self._http.unsent(stream)):
            call.more.clear()
            await call.more.wait()

    def _refuse(self, stream: int, refusal: Refused, *, begun: bool) -> None:
        status = [(b"grpc-status", b"%d" % refusal.code), (b"grpc-message", escaped(str(refusal)))]
        first = [] if begun else [(b":status", b"200"), (b"content-type", b"application/grpc")]
        self._http.finish(stream, http2.packed([*first, *status]))

    def _expire(self, stream: int, call: _Running) -> None:
        call.late = True
        call.task.cancel()

    def _cancel(self, stream: int) -> None:
        call = self._calls.pop(stream, None)
        if call is not None:
            if call.timer is not None:
                call.timer.cancel()
            call.task.cancel()

    def _flush(self) -> None:
        data = self._http.take()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def _wake(self) -> None:
        for call in self._calls.values():
            call.more.set()


def escaped(text: str) -> bytes:
    """A status's text as it travels; one that is too long is cut off."""
    said = text.encode(errors="replace")
    for size in (TEXT_MAX, TEXT_MAX // 3):  # an escape takes three bytes for one
        sent = urllib.parse.quote(said[:size].decode(errors="ignore"), safe=_TEXT)
        if len(sent) <= TEXT_MAX:
            break
    return sent.encode()


def time_limit(text: bytes | None) -> float | None:
    """Seconds of a grpc-timeout header; None without one.  Raises Refused."""
    if text is None:
        return None
    unit = _SECONDS.get(text[-1:])
    if unit is None or not text[:-1].isdigit() or len(text) > 9:
        raise Refused(Code.INTERNAL, f"grpc-timeout {text[:20]!r} is none")
    return min(int(text[:-1]) * unit, _SECONDS_MAX)
