"""A small HTTP/1.1 server for questions with short answers: what tools ask beside gRPC, and metrics.

GET only, no bodies, a bounded number of requests a connection and of seconds a request.  A client is a stranger at its
`Reception` but while its request is being answered.  What a path means is its caller's: a `Route` gets the path without
its query, and raises the program's errors.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h11

from crio_native import errors
from crio_native.streaming.reception import Reception

log = logging.getLogger(__name__)

REQUEST_MAX = 16 << 10  # bytes of request line and headers
REQUESTS_MAX = 1000  # on one connection
REQUEST_SECONDS = 10.0  # for TLS, and for a request to come whole
ANSWER_SECONDS = 30.0  # for its answer to be made and taken
_CHUNK = 16 << 10
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidArgument, 400),
    (errors.NotFound, 404),
    (errors.FailedPrecondition, 409),
    (errors.Unimplemented, 501),
    (errors.Unavailable, 503),
)


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: int = 200


Route = Callable[[str], Awaitable[Answer]]


def as_json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), "application/json")


async def serve(
    sock: socket.socket, route: Route, reception: Reception, tls: Callable[[], ssl.SSLContext] | None = None
) -> None:
    """Serve one connection to its end.  Never raises but for cancellation."""
    try:
        reader, writer = await _streams(sock, tls() if tls else None)
    except OSError:
        return  # no TLS, or not in time
    connection, done = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_MAX), False
    writer.transport.set_write_buffer_limits(0)  # an answer that was waited for has been taken whole
    try:
        for _ in range(REQUESTS_MAX):
            if not await _one(connection, reader, writer, route, reception):
                break
        done = True
    except (OSError, TimeoutError, h11.LocalProtocolError):
        pass  # the client has gone, or is too slow
    finally:
        # What a client does not take would keep a connection that is only closed.
        writer.close() if done else writer.transport.abort()


async def _streams(
    sock: socket.socket, tls: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Of a connection that was accepted.  Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    seconds = REQUEST_SECONDS if tls else None
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=tls, ssl_handshake_timeout=seconds)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _one(
    connection: h11.Connection,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    route: Route,
    reception: Reception,
) -> bool:
    """One request and its answer; whether another may follow."""
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            request = await _request(connection, reader)
    except h11.RemoteProtocolError as error:
        async with asyncio.timeout(REQUEST_SECONDS):
            await _send(connection, writer, Answer(f"{error}\n".encode(), status=error.error_status_hint), False)
        return False
    if request is None:
        return False
    async with asyncio.timeout(ANSWER_SECONDS):
        with reception.admitted():
            answer = await _answer(route, request)
        await _send(connection, writer, answer, request.method == b"HEAD")
    if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
        return False
    connection.start_next_cycle()
    return True


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """The next request, with its (empty) body read; None when the client leaves without one."""
    request = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            raise h11.RemoteProtocolError("a request's body is not wanted here", error_status_hint=413)
        else:
            return request


async def _answer(route: Route, request: h11.Request) -> Answer:
    if request.method not in (b"GET", b"HEAD"):
        return Answer(b"only GET is served here\n", status=405)
    path = request.target.decode("latin-1").partition("?")[0]
    try:
        return await route(path)
    except errors.CrioError as error:
        status = next((number for kind, number in _STATUS if isinstance(error, kind)), 500)
        return Answer(f"{error}\n".encode(), status=status)
    except Exception as error:
        log.error("GET %s: %s", path, error, exc_info=error)
        return Answer(b"this is a defect, see the daemon's log\n", status=500)


async def _send(connection: h11.Connection, writer: asyncio.StreamWriter, answer: Answer, head: bool) -> None:
    headers = [("Content-Type", answer.kind), ("Content-Length", str(len(answer.body)))]
    parts = [connection.send(h11.Response(status_code=answer.status, headers=headers))]
    if not head:
        parts.append(connection.send(h11.Data(data=answer.body)))
    parts.append(connection.send(h11.EndOfMessage()))
    writer.write(b"".join(part or b"" for part in parts))
    await writer.drain()
