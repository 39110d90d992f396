"""Port-forward by WebSocket channels: for the n-th port of the request, 2n carries data and 2n+1 errors."""

from __future__ import annotations

import asyncio
import struct

from crio_native.errors import CrioError
from crio_native.streaming.portforward import Connection, Ports
from crio_native.streaming.websocket import Channels, Messages

PROTOCOLS = ("v4.channel.k8s.io", "v4.base64.channel.k8s.io", "")


async def serve(messages: Messages, protocol: str, ports: Ports) -> None:
    """Until the client has gone, or all connections have ended.  Raises OSError."""
    names = {
        2 * n + kind: f"{word} {n}" for n in range(len(ports.numbers)) for kind, word in enumerate(("data", "error"))
    }
    channels = Channels(messages, protocol, names)
    connections = {f"data {n}": Connection(ports, port) for n, port in enumerate(ports.numbers)}
    for name, port in zip(names.values(), (port for port in ports.numbers for _ in range(2)), strict=True):
        await channels.send(name, memoryview(struct.pack("<H", port)))  # tells the client that the channel is there
    reader = asyncio.ensure_future(channels.run(_Input(connections)))
    copies = asyncio.ensure_future(_copy_all(channels, connections))
    try:
        await asyncio.wait([reader, copies], return_when=asyncio.FIRST_COMPLETED)
        if copies.done():
            copies.result()
            await channels.end()
    finally:
        reader.cancel()
        copies.cancel()
        await asyncio.gather(reader, copies, return_exceptions=True)
        for connection in connections.values():
            await connection.close()


async def _copy_all(channels: Channels, connections: dict[str, Connection]) -> None:
    async with asyncio.TaskGroup() as group:
        for number, connection in enumerate(connections.values()):
            group.create_task(_copy(channels, number, connection))


async def _copy(channels: Channels, number: int, connection: Connection) -> None:
    try:
        await connection.run(lambda part: channels.send(f"data {number}", part))
    except CrioError as error:
        await channels.send(f"error {number}", memoryview(str(error).encode()))


class _Input:
    def __init__(self, connections: dict[str, Connection]) -> None:
        self._connections = connections

    async def data(self, name: str, data: memoryview) -> None:
        if name in self._connections:
            await self._connections[name].write(data)

    async def ended(self, name: str) -> None:
        """These protocols have no word for it."""
