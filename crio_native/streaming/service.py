"""The streaming server's thread: it accepts, reads the request, and runs the session that its URL stands for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from crio_native.errors import CrioError
from crio_native.streaming import portchannels, remotecommand, websocket
from crio_native.streaming.http import PROTOCOL_HEADER, Door, Refused, Request, agree
from crio_native.streaming.portforward import PROTOCOL, Forwarder, Ports
from crio_native.streaming.reception import Reception, Seldom, this_task
from crio_native.streaming.remotecommand import Command, SpdyStreams
from crio_native.streaming.sessions import Session
from crio_native.streaming.spdy import ProtocolError
from crio_native.streaming.tls import Tls
from crio_native.streaming.tokens import Tokens
from crio_native.streaming.wires import Buffer, Wire, keep_alive

log = logging.getLogger(__name__)

SESSIONS_MAX = 1024
STRANGERS_MAX = 128  # connections that have not shown a token yet
_DOOR_SECONDS = 5.0  # for the TLS handshake and the request
_LINGER_SECONDS = 5.0  # for the client to take the last bytes and close
_WATCH_SECONDS = 2.0
_VANISHED_SECONDS = 15.0  # without progress, after the client has hung up
_KEEPALIVE_SECONDS = 120
_STOP_SECONDS = 5.0
_STARTS = 16  # programs that are started, and connections that are opened, at once


class Service:
    """Accepts and serves; everything but `stop` happens in its thread."""

    def __init__(
        self, listener: socket.socket, tls: Tls | None, tokens: dict[str, Tokens[Command | Ports]], idle: float
    ) -> None:
        self._listener, self._tls, self._tokens, self._idle = listener, tls, tokens, idle
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(_STARTS, "stream"))
        self._stopping = asyncio.Event()
        self._reception = Reception("streaming clients", self._session, most=SESSIONS_MAX, strangers=STRANGERS_MAX)
        self._wires: dict[asyncio.Task[None], Wire] = {}  # of the sessions; strangers have none
        self._refusals = Seldom(logging.INFO)
        self._thread = threading.Thread(target=self._main, name="streaming", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(_STOP_SECONDS)

    def _main(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._reception.open(self._listener)
        watch = asyncio.ensure_future(self._watch())
        await self._stopping.wait()
        self._reception.close(self._listener)
        watch.cancel()
        await asyncio.wait([watch, *self._reception.hang_up()], timeout=_STOP_SECONDS)

    def _secured(self, sock: socket.socket) -> socket.socket:
        keep_alive(sock, _KEEPALIVE_SECONDS)
        if self._tls is None:
            return sock
        return self._tls.context().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    async def _watch(self) -> None:
        """End sessions that are idle, and those whose client has gone while nobody reads what it sent before."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            for task, wire in list(self._wires.items()):
                still = now - wire.used
                if self._idle and still > self._idle:
                    log.info("closing a stream that carried nothing for %g s", self._idle)
                    task.cancel()
                elif still > _VANISHED_SECONDS and wire.has_hung_up():
                    task.cancel()

    async def _session(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.closing(Wire(self._secured(sock))) as wire:
                await self._serve_client(wire)
                await self._linger(wire)
        except (OSError, TimeoutError, CrioError, ProtocolError) as error:
            tell = log.info if this_task() in self._wires else self._refusals.tell
            tell("a streaming session ended: %s", str(error) or "it took too long")
        except Exception:
            log.exception("a streaming session failed; this is a defect")
        finally:
            self._wires.pop(this_task(), None)

    async def _serve_client(self, wire: Wire) -> None:
        door = Door(wire)
        try:
            async with asyncio.timeout(_DOOR_SECONDS):
                await wire.handshake()
                request = await door.request()
            if request is not None:
                await self._dispatch(door, request)
        except Refused as refusal:
            self._refusals.tell("a streaming request was refused: %s", refusal)
            await door.refuse(refusal)

    async def _dispatch(self, door: Door, request: Request) -> None:
        kind, _, token = request.path.partition("?")[0].removeprefix("/").partition("/")
        if request.method not in ("GET", "POST"):
            raise Refused(405, f"the method {request.method} is not allowed here", [("Allow", "GET, POST")])
        meaning = self._tokens[kind].take(token) if kind in self._tokens else None
        if meaning is None:
            raise Refused(404, "this URL was used already, has expired, or never was; ask the runtime for a new one")
        self._reception.admit()
        self._wires[this_task()] = door.wire
        websocket = request.wants("websocket")
        if not websocket and not request.wants("SPDY/3.1"):
            raise Refused(400, "the request asks for no upgrade; what is served here is SPDY/3.1 and WebSocket")
        if isinstance(meaning, Command):
            await (_command_by_websocket if websocket else _command_by_spdy)(door, request, meaning)
        else:
            await (_ports_by_websocket if websocket else _ports_by_spdy)(door, request, meaning)

    async def _linger(self, wire: Wire) -> None:
        """Let the client read to the end: closing with something unread would take away what it has not got yet."""
        wire.end_sending()
        buffer = Buffer()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while await wire.receive(buffer):
                    pass


async def _switch_to_spdy(door: Door, request: Request, known: tuple[str, ...]) -> tuple[Session, str]:
    protocol = agree(request, known)
    await door.switch([("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), (PROTOCOL_HEADER, protocol)])
    return Session(door.wire, request.rest), protocol


async def _command_by_spdy(door: Door, request: Request, command: Command) -> None:
    session, protocol = await _switch_to_spdy(door, request, remotecommand.SPDY_PROTOCOLS)
    transport = SpdyStreams(session, remotecommand.stream_names(command.options, protocol))
    await remotecommand.serve(transport, command, status_objects=protocol == remotecommand.V4)


async def _command_by_websocket(door: Door, request: Request, command: Command) -> None:
    messages, protocol = await websocket.accept(door.wire, request, websocket.COMMAND_PROTOCOLS)
    names = dict(enumerate(websocket.CHANNELS))
    for unwanted in (n for n, name in enumerate(websocket.CHANNELS[:3]) if not getattr(command.options, name)):
        del names[unwanted]
    transport = websocket.Channels(messages, protocol, names)
    await remotecommand.serve(transport, command, status_objects=protocol.startswith(("v4.", "v5.")))


async def _ports_by_spdy(door: Door, request: Request, ports: Ports) -> None:
    session, _ = await _switch_to_spdy(door, request, (PROTOCOL,))
    await Forwarder(session, ports).run()


async def _ports_by_websocket(door: Door, request: Request, ports: Ports) -> None:
    messages, protocol = await websocket.accept(door.wire, request, (websocket.TUNNEL, *portchannels.PROTOCOLS))
    if protocol == websocket.TUNNEL:
        await Forwarder(Session(websocket.Tunnel(messages)), ports).run()
    else:
        await portchannels.serve(messages, protocol, ports)
