"""Packets between daemon, launchers and inits: JSON over SEQPACKET sockets, in a memfd when large."""

from __future__ import annotations

import array  # noqa: F401  socket.send_fds imports it at call time, when the host's files may be out of reach
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

MAX_PACKET = 64 * 1024  # well below the least default of net.core.wmem
MAX_DESCRIPTORS = 8


def send(channel: socket.socket, message: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send a packet with descriptors; raises OSError (EPIPE at a closed peer, never a signal)."""
    if len(message) <= MAX_PACKET:
        socket.send_fds(channel, [message], descriptors, socket.MSG_NOSIGNAL)
        return
    memory = os.memfd_create("packet", os.MFD_CLOEXEC)
    try:
        os.write(memory, message)
        socket.send_fds(channel, [b"memfd"], [*descriptors, memory], socket.MSG_NOSIGNAL)
    finally:
        os.close(memory)


def receive(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """The next packet and its descriptors (close-on-exec); (b"", []) at the end of the connection."""
    data, descriptors, _, _ = socket.recv_fds(channel, MAX_PACKET, MAX_DESCRIPTORS, flags | socket.MSG_CMSG_CLOEXEC)
    if data == b"memfd":
        memory = descriptors.pop()
        data = os.pread(memory, os.fstat(memory).st_size, 0)
        os.close(memory)
    return data, descriptors


def tell(descriptor: int, message: dict[str, Any]) -> None:
    """Send JSON to the socket behind a descriptor, if somebody still listens; never blocks, never raises."""
    try:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)
    except OSError:
        return
    try:
        channel.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except OSError:
        pass
    finally:
        channel.detach()
