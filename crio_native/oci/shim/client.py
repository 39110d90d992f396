"""A ttrpc client: calls and streams over one connection, from any thread.

The state of the conversation is `Session`, which does no I/O; `Client` joins it to a socket, which the loop's thread
reads.  ttrpc has no word for "cancelled": a call that is given up is forgotten, and its late answer dropped.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Final

from google.protobuf.message import DecodeError

from crio_native.api.shim.v1 import ttrpc_pb2
from crio_native.errors import (
    AlreadyExists,
    CrioError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionRefused,
    ResourceExhausted,
    StepFailed,
    Unavailable,
    Unimplemented,
    printable,
)
from crio_native.oci.shim import frames
from crio_native.oci.shim.loop import Loop

SEND_SECONDS = 10.0  # for a peer to take a request; one that does not has stopped reading
STREAM_MAX = 64  # messages of a stream that wait for their reader
CALLS_MAX = 4096  # calls at once
WORDS_MAX = 2000  # characters of the peer's own words in an error

_READ = 65536
_BY_CODE: Final[dict[int, type[CrioError]]] = {
    4: DeadlineExceeded,
    6: AlreadyExists,
    7: PermissionRefused,
    8: ResourceExhausted,
    9: FailedPrecondition,
    12: Unimplemented,
    14: Unavailable,
}


def refusal(peer: str, method: str, code: int, words: str) -> CrioError:
    """The error for a status that is not OK (google.rpc.Code); the peer's own words are kept."""
    words = printable(words.strip())[:WORDS_MAX]
    if code == 5:
        return NotFound("task or process", method, words)
    if code == 3:
        return InvalidArgument(method, words, f"{peer} refuses it")
    if code in _BY_CODE:
        return _BY_CODE[code](f"{peer} refuses {method}: {words or f'status {code}'}")
    return StepFailed(method, 0, "", f"{peer} says: {words or f'status {code}'}")


class Stream:
    """A call that has more than one answer.  Leaving it behind ends it."""

    def __init__(self, session: Session, number: int, method: str) -> None:
        self._session, self.number, self._method = session, number, method
        self._messages: queue.Queue[bytes | CrioError | None] = queue.Queue(STREAM_MAX + 1)

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next message; None at the stream's end.  Raises what the peer refuses it with, DeadlineExceeded."""
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            raise DeadlineExceeded(f"nothing within {timeout:g} s on the stream {self._method}") from None
        if isinstance(message, CrioError):
            raise message
        return message

    def close(self) -> None:
        self._session.forget(self.number)

    def put(self, message: bytes | CrioError | None) -> bool:
        """False when its reader is too slow; then the stream must be ended."""
        if isinstance(message, bytes) and self._messages.qsize() >= STREAM_MAX:
            return False
        with contextlib.suppress(queue.Full):  # its end was told already
            self._messages.put_nowait(message)
        return True


Waiting = Future[bytes] | Stream


class Session:
    """The calls of one connection: numbers them, and gives each the answer that is its own.  Thread-safe, no I/O."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._lock = threading.Lock()
        self._next = 1  # a client's streams have odd numbers
        self._waiting: dict[int, tuple[Waiting, str]] = {}
        self._reader = frames.FrameReader()
        self._ended: CrioError | None = None

    def call(
        self, service: str, method: str, payload: bytes, timeout: float | None
    ) -> tuple[int, bytes, Future[bytes]]:
        """(number, bytes to send, the answer to come)."""
        future: Future[bytes] = Future()
        number, data = self._open(service, method, payload, timeout, lambda _: future, 0)
        return number, data, future

    def stream(self, service: str, method: str, payload: bytes) -> tuple[Stream, bytes]:
        """A call whose answers are a stream; we send no more than the request."""
        made: list[Stream] = []

        def make(number: int) -> Stream:
            made.append(Stream(self, number, method))
            return made[0]

        _, data = self._open(service, method, payload, None, make, frames.REMOTE_CLOSED)
        return made[0], data

    def forget(self, number: int) -> None:
        """Nobody waits for this call any more."""
        with self._lock:
            self._waiting.pop(number, None)

    def receive(self, data: bytes) -> None:
        """Take the peer's bytes in.  Raises ProtocolError; then the connection is of no use any more."""
        for frame in self._reader.feed(data):
            self._take(frame)

    def end(self, error: CrioError) -> None:
        """The connection has ended: so does every call, now and later."""
        with self._lock:
            self._ended = self._ended or error
            waiting, self._waiting = self._waiting, {}
        for waiter, _ in waiting.values():
            _settle(waiter, error)

    @property
    def between_frames(self) -> bool:
        return self._reader.between

    def _open(
        self,
        service: str,
        method: str,
        payload: bytes,
        timeout: float | None,
        make: Callable[[int], Waiting],
        flags: int,
    ) -> tuple[int, bytes]:
        nanoseconds = int(timeout * 1e9) if timeout else 0
        request = ttrpc_pb2.Request(service=service, method=method, payload=payload, timeout_nano=nanoseconds)
        message = request.SerializeToString()
        if len(message) > frames.MESSAGE_MAX:
            raise ResourceExhausted(f"{method}: a request of {len(message)} bytes exceeds {frames.MESSAGE_MAX}")
        with self._lock:
            if self._ended is not None:
                raise self._ended
            if len(self._waiting) >= CALLS_MAX:
                raise ResourceExhausted(f"{CALLS_MAX} calls to {self.peer} are unanswered")
            number = self._next
            self._next += 2
            self._waiting[number] = make(number), method
        return number, frames.pack(frames.Frame(number, frames.REQUEST, flags, message))

    def _take(self, frame: frames.Frame) -> None:
        with self._lock:
            if frame.kind == frames.REQUEST or frame.stream >= self._next or not frame.stream % 2:
                raise frames.ProtocolError(
                    f"a frame of type {frame.kind} on stream {frame.stream}, which nobody opened"
                )
            entry = self._waiting.get(frame.stream)
        if entry is None:
            return  # an answer that came too late
        waiter, method = entry
        if frame.oversize:
            limit = f"{frame.oversize} bytes exceed {frames.MESSAGE_MAX}"
            self._finish(frame.stream, ResourceExhausted(f"{self.peer} answered {method} with too much: {limit}"))
        elif frame.kind == frames.DATA:
            self._take_data(frame, waiter, method)
        else:
            self._finish(frame.stream, self._answer(frame.payload, method))

    def _take_data(self, frame: frames.Frame, waiter: Waiting, method: str) -> None:
        if isinstance(waiter, Future):
            self._finish(frame.stream, Internal(f"{self.peer} answered {method} with a stream"))
            return
        if not frame.flags & frames.NO_DATA and not waiter.put(frame.payload):
            self._finish(frame.stream, ResourceExhausted(f"more than {STREAM_MAX} messages of {method} were not read"))
        elif frame.flags & frames.REMOTE_CLOSED:
            self._finish(frame.stream, None)

    def _answer(self, payload: bytes, method: str) -> bytes | CrioError:
        try:
            response = ttrpc_pb2.Response.FromString(payload)
        except DecodeError:
            return Internal(f"{self.peer} answered {method} with what is no ttrpc response")
        if response.status.code:
            return refusal(self.peer, method, response.status.code, response.status.message)
        answer: bytes = response.payload
        return answer

    def _finish(self, number: int, result: bytes | CrioError | None) -> None:
        with self._lock:
            entry = self._waiting.pop(number, None)
        if entry is not None:
            _settle(entry[0], result)


def _settle(waiter: Waiting, result: bytes | CrioError | None) -> None:
    if isinstance(waiter, Stream):
        if isinstance(result, bytes) and result:
            waiter.put(result)
        waiter.put(result if isinstance(result, CrioError) else None)
    elif waiter.set_running_or_notify_cancel():
        if isinstance(result, CrioError):
            waiter.set_exception(result)
        else:
            waiter.set_result(result or b"")


class Client:
    """A connection to a ttrpc server.  ended: called once, in the loop's thread or a caller's, when it is lost."""

    def __init__(self, sock: socket.socket, peer: str, loop: Loop, ended: Callable[[], None] = lambda: None) -> None:
        self._sock, self._loop, self._ended = sock, loop, ended
        self._session = Session(peer)
        self._send_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._open = True
        sock.settimeout(SEND_SECONDS)  # for sendall; the loop reads only what is there
        loop.add(sock.fileno(), self._readable)

    def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        """The answer's payload.  timeout: seconds, told to the server too; None for no limit.

        Raises DeadlineExceeded, Unavailable when the connection is lost, Internal for nonsense, and the error of the
        server's own status.
        """
        number, future = self._begin(service, method, payload, timeout)
        try:
            return future.result(timeout)
        except FutureTimeout:
            self._session.forget(number)
            raise DeadlineExceeded(f"{self._session.peer} did not answer {method} within {timeout:g} s") from None

    def begin(self, service: str, method: str, payload: bytes) -> Future[bytes]:
        """The same without waiting."""
        return self._begin(service, method, payload, None)[1]

    def stream(self, service: str, method: str, payload: bytes) -> Stream:
        stream, data = self._session.stream(service, method, payload)
        self._send(data)
        return stream

    def close(self, why: str = "the connection was closed") -> None:
        """Close the connection; calls that wait fail with Unavailable.  Nothing happens when it is closed."""
        with self._close_lock:
            if not self._open:
                return
            self._open = False
        self._loop.remove(self._sock.fileno())
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._send_lock:
            self._sock.close()
        self._session.end(Unavailable(f"{self._session.peer}: {why}"))
        self._ended()

    @property
    def is_open(self) -> bool:
        return self._open

    def _begin(self, service: str, method: str, payload: bytes, timeout: float | None) -> tuple[int, Future[bytes]]:
        number, data, future = self._session.call(service, method, payload, timeout)
        self._send(data)
        return number, future

    def _send(self, data: bytes) -> None:
        """A frame that is half sent cannot be taken back: then the connection is closed, which ends the call too."""
        try:
            with self._send_lock:
                self._sock.sendall(data)
        except TimeoutError:
            self.close(f"it took no request for {SEND_SECONDS:g} s")
        except OSError as error:
            self.close(f"it closed the connection ({error.strerror or error})")

    def _readable(self) -> None:
        try:
            data = os.read(self._sock.fileno(), _READ)  # of a socket with a time limit, so it never waits
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"it closed the connection ({error.strerror or error})")
            return
        if not data:
            where = "" if self._session.between_frames else " in the middle of a message"
            self.close(f"it closed the connection{where}")
            return
        try:
            self._session.receive(data)
        except frames.ProtocolError as error:
            self.close(f"it does not speak ttrpc: it sent {error}")
