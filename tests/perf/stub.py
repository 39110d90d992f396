"""A CRI client that costs what a kubelet's does, for both sides of a comparison.

The benchmark measures servers.  gRPC's client for Python adds 1.3 ms to an ExecSync of 4.7, in threads that wake each
other; the kubelet's, in Go, takes as long as this one, which writes a request and reads its answer in the caller's
thread (docs/decisions/0002).  It knows unary calls only, one at a time on a connection, and every thread has its own.
"""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.message_factory import GetMessageClass
from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from crio_native.api.runtime.v1 import api_pb2

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER = 9  # of a frame, bytes
_WINDOW = 1 << 30  # bytes that a server may send at once: nobody here waits for updates
_FRAME_MAX = (1 << 24) - 1
_READ = 1 << 20
_REST_SECONDS = 20.0  # servers ask now and then whether a client is there, and leave who does not answer for a minute
_MESSAGE_HEADER = 5  # gRPC's: compressed or not, and the length


def runtime(path: Path) -> Any:
    """The calls of the CRI's RuntimeService at a socket."""
    return Stub(path, api_pb2.DESCRIPTOR.services_by_name["RuntimeService"])


class Stub:
    """The unary calls of a protobuf service, as methods: `stub.Version(request, timeout=10)`.

    Raises RuntimeError with the status of a call that failed, TimeoutError, and OSError for a server that is not there.
    """

    def __init__(self, path: Path, service: Any) -> None:
        """service: a protobuf ServiceDescriptor."""
        self._path, self._local = path, threading.local()
        for method in service.methods:
            answer = GetMessageClass(method.output_type).FromString
            setattr(self, method.name, functools.partial(self._call, f"/{service.full_name}/{method.name}", answer))

    def _call(self, method: str, answer: Callable[[bytes], Any], request: Any, *, timeout: float) -> Any:
        connection = getattr(self._local, "connection", None)
        if connection is None or connection.rested() > _REST_SECONDS:
            connection = self._local.connection = _Connection(self._path)
        return answer(connection.call(method, request.SerializeToString(), timeout))


class _Connection:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._unread = bytearray()
        self._encoder, self._decoder = Encoder(), Decoder()
        self._stream = -1
        self._used = time.monotonic()
        settings = {SettingsFrame.INITIAL_WINDOW_SIZE: _WINDOW, SettingsFrame.MAX_FRAME_SIZE: _FRAME_MAX}
        window = WindowUpdateFrame(0, window_increment=_WINDOW)
        self._socket.sendall(_PREFACE + SettingsFrame(0, settings=settings).serialize() + window.serialize())

    def rested(self) -> float:
        """Seconds since its last call."""
        return time.monotonic() - self._used

    def call(self, method: str, message: bytes, timeout: float) -> bytes:
        self._socket.settimeout(timeout)
        self._stream += 2
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        head = HeadersFrame(self._stream, self._encoder.encode(headers, huffman=False), flags=["END_HEADERS"])
        data = DataFrame(self._stream, bytes(1) + len(message).to_bytes(4, "big") + message, flags=["END_STREAM"])
        self._socket.sendall(head.serialize() + data.serialize())
        try:
            return self._answer(method)
        finally:
            self._used = time.monotonic()

    def _answer(self, method: str) -> bytes:
        message = bytearray()
        while True:
            frame = self._frame()
            if isinstance(frame, DataFrame) and frame.stream_id == self._stream:
                message += frame.data
            elif isinstance(frame, HeadersFrame):
                trailers: dict[Any, Any] = dict(self._decoder.decode(frame.data))
                if "END_STREAM" in frame.flags:
                    break
            elif isinstance(frame, (GoAwayFrame, RstStreamFrame)):
                raise RuntimeError(f"{method}: the server ended it: {frame!r}")
            elif isinstance(frame, PingFrame) and "ACK" not in frame.flags:
                self._socket.sendall(PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"]).serialize())
            elif isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                self._socket.sendall(SettingsFrame(0, flags=["ACK"]).serialize())
        if trailers.get("grpc-status") != "0":
            raise RuntimeError(f"{method}: status {trailers.get('grpc-status')}: {trailers.get('grpc-message')}")
        if message:
            self._socket.sendall(WindowUpdateFrame(0, window_increment=len(message)).serialize())
        return bytes(message[_MESSAGE_HEADER:])

    def _frame(self) -> Frame:
        self._fill(_HEADER)
        frame, length = Frame.parse_frame_header(memoryview(self._unread[:_HEADER]))
        self._fill(_HEADER + length)
        frame.parse_body(memoryview(self._unread[_HEADER : _HEADER + length]))
        del self._unread[: _HEADER + length]
        return frame

    def _fill(self, size: int) -> None:
        while len(self._unread) < size:
            read = self._socket.recv(_READ)
            if not read:
                raise OSError("the server closed the connection")
            self._unread += read
