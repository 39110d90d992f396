"""Connections of urllib3 that can be ended from outside, and HTTP answers whose head must come in one time limit.

http.client gives each read of a head the whole time limit anew, and reads on for as long as interim answers
(RFC 9110, 15.2) or bytes of a line arrive: who sends a little now and then, or `100 Continue` without end, would keep
a thread for ever.  And no event reaches a thread that reads: only an end of its connection does; one that still
connects is left behind.
"""

from __future__ import annotations

import http.client
import io
import math
import time
from functools import partial
from typing import Any, cast

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from crio_native.images.work import Connections


class _Timed(io.RawIOBase):
    """What a socket says, up to a moment."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self.until = raw, math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self.until:
            raise TimeoutError("the head of its answer does not end")
        return cast(int | None, self._raw.readinto(buffer))

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class Answer(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **more: Any) -> None:
        super().__init__(sock, *args, **more)
        self._seconds = sock.gettimeout() or math.inf
        self._timed = _Timed(self.fp.detach())
        self.fp = io.BufferedReader(self._timed)

    def begin(self) -> None:
        self._timed.until = time.monotonic() + self._seconds
        super().begin()
        self._timed.until = math.inf


class _Connection(HTTPConnection):
    response_class = Answer

    def __init__(self, *args: Any, connections: Connections, **more: Any) -> None:
        super().__init__(*args, **more)
        self._connections = connections

    def connect(self) -> None:
        self._connections.open(super().connect)
        self._connections.add(self.sock)


class _SecureConnection(HTTPSConnection):
    response_class = Answer

    def __init__(self, *args: Any, connections: Connections, **more: Any) -> None:
        super().__init__(*args, **more)
        self._connections = connections

    def connect(self) -> None:
        self._connections.open(super().connect)
        self._connections.add(self.sock)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


def pools(connections: Connections) -> dict[str, Any]:
    """The pools' classes by scheme, for a PoolManager whose connections are to be among these."""
    return {"http": partial(_Pool, connections=connections), "https": partial(_SecurePool, connections=connections)}
