"""Bytes in and out of sockets and other descriptors on the event loop, each copied once and none queued.

Reading and writing try the system call first and wait for the descriptor only when it refuses: while bytes flow, the
loop's own bookkeeping is not in their way.  Who waits in `send` holds back whoever feeds him: that is all the flow
control there is, and all that is needed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

SMALLEST, LARGEST = 16 * 1024, 512 * 1024  # bytes of a buffer
_TCP_ESTABLISHED = 1


async def readable(fd: int) -> None:
    """Until a read would not block.  Only one waiter a descriptor and direction."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Until a write would not block, or would fail."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Buffer:
    """A buffer that grows while it is filled: an idle session has a small one, a busy one asks the kernel seldom."""

    def __init__(self, largest: int = LARGEST) -> None:
        self._largest = largest
        self.view = memoryview(bytearray(min(SMALLEST, largest)))

    def filled(self, count: int) -> memoryview:
        """What was read; the buffer is larger at the next read if it was full."""
        view = self.view
        if count == len(view) < self._largest:
            self.view = memoryview(bytearray(min(4 * count, self._largest)))
        return view[:count]


async def read(fd: int, buffer: Buffer) -> memoryview:
    """What a descriptor has; empty at its end.  The view is good until the next read."""
    while True:
        try:
            return buffer.filled(os.readv(fd, [buffer.view]))
        except BlockingIOError:
            await readable(fd)


async def write(fd: int, data: memoryview) -> None:
    """All of `data`.  Raises OSError (EPIPE) when nobody reads any more."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            await writable(fd)


class Wire:
    """A stream socket, in the clear or by TLS, with a clock that tells when it last carried payload."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.used = time.monotonic()
        self._sending = asyncio.Lock()

    async def handshake(self) -> None:
        """Of TLS; nothing for a socket in the clear.  Raises ssl.SSLError, OSError."""
        if isinstance(self.sock, ssl.SSLSocket):
            await self._patiently(self.sock.do_handshake)

    async def receive(self, buffer: Buffer) -> memoryview:
        """What has come; empty at the end.  Lets others run first, as a fast client never makes us wait."""
        await asyncio.sleep(0)
        return buffer.filled(await self._patiently(self.sock.recv_into, buffer.view))

    async def send(self, *parts: bytes | memoryview) -> None:
        """All the parts, with nobody else's bytes between.  Raises OSError when the other side has gone."""
        async with self._sending:
            if isinstance(self.sock, ssl.SSLSocket):
                await self._send_by_tls(parts)
                return
            rest: list[Any] = [part for part in parts if part]
            while rest:
                try:
                    sent = self.sock.sendmsg(rest)
                except BlockingIOError:
                    await writable(self.sock.fileno())
                    continue
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if sent:
                    rest[0] = memoryview(rest[0])[sent:]

    async def _send_by_tls(self, parts: tuple[bytes | memoryview, ...]) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[await self._patiently(self.sock.send, view) :]

    async def _patiently(self, function: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                return function(*args)
            except (BlockingIOError, ssl.SSLWantReadError):
                await readable(self.sock.fileno())
            except ssl.SSLWantWriteError:
                await writable(self.sock.fileno())

    def end_sending(self) -> None:
        """Half-close; nothing when the other side has gone."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def has_hung_up(self) -> bool:
        """Whether the other side sends no more, known also while what it sent before is not read."""
        state = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return bool(state != _TCP_ESTABLISHED)

    def close(self) -> None:
        self.sock.close()


def keep_alive(sock: socket.socket, seconds: int) -> None:
    """Notice a peer that vanished without a word (its host died) within about `seconds`."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 2))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 8))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
