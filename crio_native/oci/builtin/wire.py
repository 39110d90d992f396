"""Packets between daemon, launchers and inits, over SEQPACKET sockets: marshal towards a launcher, JSON back.

A launcher's memory is copied for every container that it clones, so what it imports is measured in pages: the C
modules behind `socket` and `json` do all that is needed here, at a tenth of the price.
"""

from __future__ import annotations

import _socket
import marshal
import os
import struct
from _json import encode_basestring_ascii as quoted

TYPE_CHECKING = False  # as typing's, which would be imported for nothing
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

MAX_PACKET = 64 * 1024  # well below the least default of net.core.wmem; a larger packet travels in a memfd
MAX_DESCRIPTORS = 8


def channel(descriptor: int) -> _socket.socket:
    """The SEQPACKET socket behind a descriptor, which it now owns."""
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, descriptor)


def send(to: _socket.socket, message: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send a packet with descriptors; raises OSError (EPIPE at a closed peer, never a signal)."""
    if len(message) <= MAX_PACKET:
        _send(to, message, descriptors)
        return
    memory = os.memfd_create("packet", os.MFD_CLOEXEC)
    try:
        os.write(memory, message)
        _send(to, b"memfd", [*descriptors, memory])
    finally:
        os.close(memory)


def _send(to: _socket.socket, message: bytes, descriptors: Sequence[int]) -> None:
    packed = struct.pack(f"{len(descriptors)}i", *descriptors)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if descriptors else []
    to.sendmsg([message], ancillary, _socket.MSG_NOSIGNAL)


def send_stream(to: _socket.socket, message: bytes, descriptors: Sequence[int]) -> None:
    """The same to a stream socket, which may take a message in several parts."""
    packed = struct.pack(f"{len(descriptors)}i", *descriptors)
    sent = to.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)], _socket.MSG_NOSIGNAL)
    to.sendall(message[sent:], _socket.MSG_NOSIGNAL)


def receive(source: _socket.socket, flags: int = 0, *, large: bool = True) -> tuple[bytes, list[int]]:
    """The next packet and its descriptors (close-on-exec); (b"", []) at the end of the connection.

    large: False where who sends may be a stranger, whose memfd could be anything."""
    space = _socket.CMSG_LEN(MAX_DESCRIPTORS * 4)
    data, ancillary, _, _ = source.recvmsg(MAX_PACKET, space, flags | _socket.MSG_CMSG_CLOEXEC)
    found: list[int] = []
    for _, _, payload in ancillary:
        found += struct.unpack(f"{len(payload) // 4}i", payload[: len(payload) // 4 * 4])
    if large and data == b"memfd":
        memory = found.pop()
        data = os.pread(memory, os.fstat(memory).st_size, 0)
        os.close(memory)
    return data, found


def pack(request: Mapping[str, Any]) -> bytes:
    """A request for a launcher, which runs the same interpreter: plain dicts, lists, strings, bytes and numbers."""
    return marshal.dumps(dict(request))


def unpack(data: bytes) -> dict[str, Any]:
    request: dict[str, Any] = marshal.loads(data)
    return request


def encode(value: object) -> str:
    """JSON of plain dicts, sequences, strings, numbers and booleans."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{quoted(key)}:{encode(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(encode(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else quoted(str(value))


def tell(descriptor: int, message: Mapping[str, Any]) -> None:
    """Send JSON to the socket behind a descriptor, if somebody still listens; never blocks, never raises."""
    try:
        to = channel(descriptor)
    except OSError:
        return
    try:
        to.send(encode(message).encode(), _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
    except OSError:
        pass
    finally:
        to.detach()
