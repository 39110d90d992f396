"""The remotecommand protocols v1 to v5: a command's streams, its terminal's size, and how it ended.

The same for SPDY and WebSocket, which differ only in how a stream is named and closed: that is a `Transport`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from crio_native.errors import CrioError, DeadlineExceeded, Internal
from crio_native.streaming.programs import Options, Program
from crio_native.streaming.sessions import Session

log = logging.getLogger(__name__)

V4, V3, V2, V1 = (f"{version}channel.k8s.io" for version in ("v4.", "v3.", "v2.", ""))
SPDY_PROTOCOLS = (V4, V3, V2, V1)
OPEN_SECONDS = 30.0  # for the client to open all streams
_SIZE_MAX = 4096  # bytes of an unfinished terminal size


@dataclass(frozen=True, slots=True)
class Command:
    """What an exec or attach URL stands for.  start: makes the program; blocks; raises CrioError."""

    options: Options
    start: Callable[[], Program]


class Sink(Protocol):
    """What a client sends."""

    async def data(self, name: str, data: memoryview) -> None: ...

    async def ended(self, name: str) -> None: ...


class Transport(Protocol):
    """Named streams between us and one client."""

    async def ready(self) -> None:
        """Until the client has opened all streams; `run` must be running."""

    async def begun(self) -> None:
        """Tell the client that the command runs: a message without content on its first output."""

    async def run(self, sink: Sink) -> None:
        """Until the client has gone."""

    async def send(self, name: str, data: memoryview) -> None:
        """Raises OSError when the client has gone."""

    async def end(self) -> None:
        """All streams end."""


def stream_names(options: Options, protocol: str) -> list[str]:
    """The streams that a SPDY client opens."""
    names = ["error", *(name for name in ("stdin", "stdout", "stderr") if getattr(options, name))]
    if options.tty and protocol in (V4, V3):
        names.append("resize")
    return names


async def serve(transport: Transport, command: Command, *, status_objects: bool) -> None:
    """One session, from its streams to its status.

    status_objects: the end is told as JSON (v4 and later), else as text, and only an error (v1 to v3).  Raises
    DeadlineExceeded for a client that does not open its streams.
    """
    started: asyncio.Future[Program] = asyncio.get_running_loop().create_future()
    reader = asyncio.ensure_future(transport.run(_Input(started)))
    program: Program | None = None
    try:
        await _before(_ready(transport), reader)
        try:
            program = await _start(command)
            started.set_result(program)
            await transport.begun()
            end = _exit_status(await _before(program.run(transport.send), reader))
        except CrioError as error:
            end = _failure(error)
        text = json.dumps(end) if status_objects else end.get("message", "")
        if text:
            await transport.send("error", memoryview(text.encode()))
        await transport.end()
    except TimeoutError:
        raise DeadlineExceeded(f"the client did not open its streams within {OPEN_SECONDS:g} s") from None
    finally:
        reader.cancel()
        started.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        if program is not None:
            program.hang_up()


async def _ready(transport: Transport) -> None:
    async with asyncio.timeout(OPEN_SECONDS):
        await transport.ready()


async def _start(command: Command) -> Program:
    """A program that starts after its client has gone is let go of, not forgotten."""
    task = asyncio.ensure_future(asyncio.to_thread(command.start))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_abandon)
        raise
    except CrioError:
        raise
    except Exception as error:
        log.exception("a session could not begin")
        raise Internal(f"{type(error).__name__}: {error}; see the daemon's log") from None


def _abandon(task: asyncio.Future[Program]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().hang_up()


async def _before(work: Any, reader: asyncio.Future[None]) -> Any:
    """The result of `work`, which is given up when the client goes first (ConnectionResetError)."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task, reader], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            reader.result()
            raise ConnectionResetError("the client has gone")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Input:
    """The client's side; what comes before the program runs waits, and with it the connection."""

    def __init__(self, started: asyncio.Future[Program]) -> None:
        self._started = started
        self._size = ""

    async def data(self, name: str, data: memoryview) -> None:
        program = await asyncio.shield(self._started)
        if name == "stdin":
            await program.write(data)
        elif name == "resize":
            self._size += bytes(data).decode("utf-8", "replace")
            sizes, self._size = parse_sizes(self._size)
            for height, width in sizes[-1:]:  # only the last of a burst is what the user sees
                await program.resize(height, width)

    async def ended(self, name: str) -> None:
        if name == "stdin":
            (await asyncio.shield(self._started)).end_input()


def parse_sizes(text: str) -> tuple[list[tuple[int, int]], str]:
    """(height, width) of the JSON objects in `text`, which follow each other, and what is left of an unfinished one.

    A size that makes no sense is left out: a client's window is no reason to end its session.
    """
    sizes: list[tuple[int, int]] = []
    decoder = json.JSONDecoder()
    text = text.lstrip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return sizes, text if len(text) <= _SIZE_MAX else ""
        text = text[end:].lstrip()
        if isinstance(value, dict) and all(_is_length(value.get(name)) for name in ("Height", "Width")):
            sizes.append((value["Height"], value["Width"]))
    return sizes, ""


def _is_length(value: object) -> bool:
    return type(value) is int and 0 < value <= 65535


def _exit_status(code: int) -> dict[str, Any]:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit code {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _failure(error: CrioError) -> dict[str, Any]:
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"error executing command in container: {error}",
        "reason": "InternalError",
        "details": {"causes": [{"message": str(error)}]},
        "code": 500,
    }


class SpdyStreams:
    """A Transport of one SPDY stream for each name, which the client opens with the header `streamtype`."""

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        self._session = session
        self._missing = set(names)
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._ready = asyncio.Event()
        self._sink: Sink | None = None

    async def ready(self) -> None:
        await self._ready.wait()

    async def begun(self) -> None:
        first = next((name for name in ("stdout", "stderr") if name in self._numbers), "")
        if first:
            await self.send(first, memoryview(b""))

    async def run(self, sink: Sink) -> None:
        self._sink = sink
        await self._session.run(self)

    async def send(self, name: str, data: memoryview) -> None:
        try:
            await self._session.send(self._numbers[name], data)
        except BrokenPipeError:
            pass  # the client wants no more of this one stream

    async def end(self) -> None:
        for number in self._names:
            await self._session.end(number)

    async def opened(self, stream: int, headers: dict[str, str]) -> None:
        name = headers.get("streamtype", "")
        if name not in self._missing:
            await self._session.reset(stream)
            return
        self._missing.discard(name)
        self._numbers[name], self._names[stream] = stream, name
        if not self._missing:
            self._ready.set()

    async def data(self, stream: int, data: memoryview) -> None:
        if stream in self._names and self._sink is not None:
            await self._sink.data(self._names[stream], data)

    async def ended(self, stream: int) -> None:
        if stream in self._names and self._sink is not None:
            await self._sink.ended(self._names[stream])

    async def reset(self, stream: int) -> None:
        await self.ended(stream)
