"""The events service that shims report to: a ttrpc server of one method, of which only an OOM is of use here.

How containers end is asked for (`Wait`), not heard of.  But inside a virtual machine only the shim sees an OOM kill;
and a shim that can report to nobody complains of every event.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from crio_native.api.shim.v1 import events_pb2, ttrpc_pb2
from crio_native.oci.shim import frames
from crio_native.oci.shim.loop import Loop

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 2048  # one for each shim
PATH_MAX = 107  # bytes of a socket's address
_READ = 65536
_UNIMPLEMENTED, _INVALID = 12, 3
_CREDENTIALS = struct.Struct("3i")


class Events:
    """Serves on `path`; oom: told the id of a container whose memory ran out, as the shim says, by the loop's thread.

    Nothing is served where the path is too long for a socket; `path` is "" then.
    """

    def __init__(self, path: Path, loop: Loop, oom: Callable[[str], None]) -> None:
        self._loop, self._oom = loop, oom
        self._connections: dict[int, _Connection] = {}
        self.path = str(path) if len(os.fsencode(path)) <= PATH_MAX else ""
        if not self.path:
            log.warning("%s is too long for a socket: shims' events are not heard", path)
            return
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._listener.bind(self.path)
        os.chmod(self.path, 0o600)
        self._listener.listen(128)
        loop.add(self._listener.fileno(), self._accept)

    def close(self) -> None:
        if self.path:
            self._loop.remove(self._listener.fileno())
            self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.geteuid() or len(self._connections) >= CONNECTIONS_MAX:
            sock.close()
            return
        sock.setblocking(False)
        connection = _Connection(sock)
        self._connections[sock.fileno()] = connection
        self._loop.add(sock.fileno(), lambda: self._serve(connection))

    def _serve(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        try:
            if not data:
                self._drop(connection)
                return
            for frame in connection.reader.feed(data):
                response = self._answer(frame)
                if response is not None:
                    reply = frames.Frame(frame.stream, frames.RESPONSE, 0, response.SerializeToString())
                    connection.sock.sendall(frames.pack(reply))  # of a few bytes; a peer that takes none is dropped
        except (OSError, frames.ProtocolError):
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        self._connections.pop(connection.sock.fileno(), None)
        self._loop.remove(connection.sock.fileno())
        connection.sock.close()

    def _answer(self, frame: frames.Frame) -> ttrpc_pb2.Response | None:
        if frame.kind != frames.REQUEST:
            return None
        try:
            request = ttrpc_pb2.Request.FromString(frame.payload)
            if frame.oversize or request.method != "Forward":
                words = f"this service has Forward, not {request.method[:100]!r}"
                return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=_UNIMPLEMENTED, message=words))
            event = events_pb2.ForwardRequest.FromString(request.payload).envelope.event
            if event.type_url.endswith("containerd.events.TaskOOM"):
                self._oom(events_pb2.TaskOOM.FromString(event.value).container_id)
        except DecodeError:
            return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=_INVALID, message="this is no ttrpc request"))
        return ttrpc_pb2.Response()


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.reader = sock, frames.FrameReader()


def mark_oom(runs: Path, container_id: str) -> None:
    """Remember it where the container's end is told from."""
    if container_id and "/" not in container_id and not container_id.startswith("."):
        with contextlib.suppress(FileNotFoundError):  # a container that is not ours, or gone
            (runs / container_id / "oom").touch(mode=0o600)
