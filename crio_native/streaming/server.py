"""The streaming server: a listener and a thread of its own with an event loop, apart from the CRI's.

A URL is given out for one `Command` or `Ports` (see `tokens`); who connects to it gets that, once.  The thread, and the
libraries that only it needs, come with the first URL: a node where nobody execs does not pay for them.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import TYPE_CHECKING

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.streaming.settings import Settings, TlsFiles
from crio_native.streaming.tokens import Tokens

if TYPE_CHECKING:
    from crio_native.streaming.portforward import Ports
    from crio_native.streaming.remotecommand import Command
    from crio_native.streaming.service import Service
    from crio_native.streaming.tls import Tls

_BACKLOG = 1024


class StreamServer:
    """`url` may be called from any thread, `close` once at the end."""

    def __init__(self, settings: Settings) -> None:
        """Binds the address.  Raises FailedPrecondition when it is taken, InvalidArgument for unusable TLS files."""
        self._settings = settings
        self._tls = _tls(settings.tls) if settings.tls else None
        self._tokens: dict[str, Tokens[Command | Ports]] = {
            kind: Tokens() for kind in ("exec", "attach", "portforward")
        }
        self._listener = _listen(settings.address or "127.0.0.1", settings.port)
        self._lock = threading.Lock()
        self._service: Service | None = None

    def url(self, kind: str, meaning: Command | Ports) -> str:
        """kind: exec, attach or portforward.  Raises ResourceExhausted while too many URLs are unused."""
        token = self._tokens[kind].give(meaning)
        with self._lock:
            if self._service is None:
                from crio_native.streaming.service import Service

                self._service = Service(self._listener, self._tls, self._tokens, self._settings.idle_timeout)
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{self._host()}/{kind}/{token}"

    def _host(self) -> str:
        """As a client on this node reaches us."""
        address, port = self._listener.getsockname()[:2]
        ip = ipaddress.ip_address(address)
        if ip.is_unspecified:
            ip = ipaddress.ip_address("127.0.0.1" if ip.version == 4 else "::1")
        return f"{ip}:{port}" if ip.version == 4 else f"[{ip}]:{port}"

    def close(self) -> None:
        """End all sessions."""
        with self._lock:
            if self._service is not None:
                self._service.stop()
        self._listener.close()


def _tls(files: TlsFiles) -> Tls:
    from crio_native.streaming.tls import Tls

    return Tls(files)


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise InvalidArgument("crio.api.stream_address", address, f"is no address: {error.strerror}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise FailedPrecondition(
            f"the streaming server cannot listen on {address} port {port}: {(error.strerror or '').lower()}; "
            "set crio.api.stream_address and stream_port to what is free"
        ) from None
    listener.setblocking(False)
    return listener
