"""HTTP answers whose head must come in one time limit, for connections of urllib3.

http.client gives each read of a head the whole time limit anew, and reads on for as long as interim answers
(RFC 9110, 15.2) or bytes of a line arrive: who sends a little now and then, or `100 Continue` without end, would keep
a thread for ever.
"""

from __future__ import annotations

import http.client
import io
import math
import time
from typing import Any, cast

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


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


class _SecureConnection(HTTPSConnection):
    response_class = Answer


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


POOLS = {"http": _Pool, "https": _SecurePool}
