"""What a command session talks to: a process that was exec'ed for it, or a container that runs anyway."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import struct
import termios
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from crio_native.errors import CrioError, Unavailable
from crio_native.oci.runtime import ExecSession
from crio_native.streaming.wires import Buffer, read, readable, writable, write

log = logging.getLogger(__name__)

DRAIN_SECONDS = 0.5  # for output that comes after the process has ended, from children that it left
_END_SECONDS = 2.0  # for the end of a container to be known after the end of its output
_PIPE_MAX = 1 << 20  # bytes that a pipe or a terminal may hold
_SMALL = 32 * 1024  # bytes of output after which the program gets a moment to write more
_MOMENT = 0.001  # seconds; shorter than anybody notices, and as long as a pipe takes to fill
_PACKET = 8192  # bytes of the monitor's packets, without the stream's number
_STREAMS = {2: "stdout", 3: "stderr"}

Send = Callable[[str, memoryview], Awaitable[None]]
"""Give output to the client, by the stream's name; waits while the client takes none."""


@dataclass(frozen=True, slots=True)
class Options:
    """The streams that the CRI request asked for."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False


class Program(Protocol):
    async def run(self, send: Send) -> int:
        """Pass on all output; returns the exit code (0 for an attachment) at the end.

        Raises CrioError when the end is none of the program's own.  `send` raises OSError for a client that has gone.
        """

    async def write(self, data: memoryview) -> None:
        """Input; what comes after the program has closed it is dropped."""

    def end_input(self) -> None: ...

    async def resize(self, height: int, width: int) -> None: ...

    def hang_up(self) -> None:
        """The client has gone, or all is done: let go of the streams.  Must be called on the loop, once."""


class Exec:
    """A process that was started for the session.

    stdin: our end of its input, -1 for none.  outputs: our ends of its outputs by name.  terminal: the pty's master,
    -1 for none, which is then both.  All are closed by us.
    """

    def __init__(self, session: ExecSession, stdin: int, outputs: Mapping[str, int], terminal: int) -> None:
        self._session = session
        self._stdin = terminal if terminal >= 0 else stdin
        self._terminal = terminal
        self._pumps = [_Pump(name, fd) for name, fd in outputs.items()]
        self._descriptors = {fd for fd in (stdin, terminal, *outputs.values()) if fd >= 0}
        for fd in self._descriptors:
            os.set_blocking(fd, False)
        self._over = False

    async def run(self, send: Send) -> int:
        pumps = {asyncio.create_task(pump.run(send)): pump for pump in self._pumps}
        end = asyncio.create_task(readable(self._session.fileno()))
        try:
            waiting: set[asyncio.Task[None]] = {end, *pumps}
            while not end.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            await _drain(pumps)
            self._over = True
            return self._session.result().code
        finally:
            for task in (end, *pumps):
                task.cancel()
            await asyncio.gather(end, *pumps, return_exceptions=True)

    async def write(self, data: memoryview) -> None:
        if self._stdin < 0:
            return
        try:
            await write(self._stdin, data)
        except OSError:
            self.end_input()

    def end_input(self) -> None:
        """A terminal's input has no end."""
        if self._stdin >= 0 and self._terminal < 0:
            self._descriptors.discard(self._stdin)
            os.close(self._stdin)
        self._stdin = -1

    async def resize(self, height: int, width: int) -> None:
        if self._terminal >= 0:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
            with contextlib.suppress(CrioError):
                await asyncio.to_thread(self._session.resized, height, width)

    def hang_up(self) -> None:
        """A process that still runs gets what a terminal's or a pipe's end means to it: SIGHUP, end of input, SIGPIPE.

        It may ignore them and live on, as under other runtimes; its session is kept until then, as ending that would
        kill it.
        """
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()
        self._stdin = self._terminal = -1
        if self._over:
            self._session.close()
        else:
            asyncio.get_running_loop().add_reader(self._session.fileno(), self._bury)

    def _bury(self) -> None:
        asyncio.get_running_loop().remove_reader(self._session.fileno())
        self._session.close()


class _Pump:
    """Output of one descriptor on its way to the client."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd = name, fd
        self.moved = 0
        self.waiting = False  # for the program, not for the client

    async def run(self, send: Send) -> None:
        buffer = Buffer()
        while data := await self._next(buffer):
            self.moved += len(data)
            await send(self.name, data)
            await asyncio.sleep(_MOMENT if len(data) < _SMALL else 0)

    async def _next(self, buffer: Buffer) -> memoryview:
        self.waiting = True
        try:
            return await read(self.fd, buffer)
        except OSError:
            return memoryview(b"")  # EIO: nobody has the terminal open any more
        finally:
            self.waiting = False


async def _drain(pumps: Mapping[asyncio.Task[None], _Pump]) -> None:
    """What the process wrote goes to the client at its pace; what its children write later does not hold us."""
    limits = {task: pump.moved + _PIPE_MAX for task, pump in pumps.items()}
    left = set(pumps)
    while left:
        done, left = await asyncio.wait(left, timeout=DRAIN_SECONDS)
        for task in done:
            task.result()
        idle = {task for task in left if pumps[task].waiting or pumps[task].moved > limits[task]}
        for task in idle:
            task.cancel()
        left -= idle


class Attachment:
    """The streams of a container, by its monitor.

    connection: from the monitor's `attach`.  resize: sets the terminal's size, blocking.  lives: whether the container
    does, for the end of an attachment of which the monitor says nothing.
    """

    def __init__(
        self,
        connection: socket.socket,
        options: Options,
        resize: Callable[[int, int], None],
        lives: Callable[[], bool],
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._wanted = {name for name in _STREAMS.values() if getattr(options, name)}
        self._resize, self._lives = resize, lives

    async def run(self, send: Send) -> int:
        buffer = Buffer(1 + _PACKET)
        while packet := await self._packet(buffer):
            name = _STREAMS.get(packet[0], "")
            if name in self._wanted:
                await send(name, packet[1:])
        if await self._goes_on():
            raise Unavailable("the container's output was not taken for 5 s, so it went on without this client")
        return 0

    async def _goes_on(self) -> bool:
        """Whether the container does; conmon lets its clients go some time before it tells how it ended."""
        deadline = time.monotonic() + _END_SECONDS
        while self._lives():
            if time.monotonic() > deadline:
                return True
            await asyncio.sleep(0.02)
        return False

    async def _packet(self, buffer: Buffer) -> memoryview:
        try:
            return await read(self._connection.fileno(), buffer)
        except ConnectionResetError:
            return memoryview(b"")  # the monitor ended with something of ours unread

    async def write(self, data: memoryview) -> None:
        while data:
            try:
                self._connection.send(data[:_PACKET])
            except BlockingIOError:
                await writable(self._connection.fileno())
                continue
            except OSError:
                return
            data = data[_PACKET:]

    def end_input(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    async def resize(self, height: int, width: int) -> None:
        try:
            await asyncio.to_thread(self._resize, height, width)
        except CrioError as error:
            log.info("resizing the terminal: %s", error)  # it has ended, or has no terminal: nothing to tell a client

    def hang_up(self) -> None:
        self._connection.close()
