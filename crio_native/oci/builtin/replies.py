"""What launchers answer to the daemon."""

from __future__ import annotations

import json
import socket
from typing import Any

from crio_native.errors import DeadlineExceeded, Unavailable


def receive(reply: socket.socket, seconds: float | None, stage: str) -> dict[str, Any]:
    """One packet from a launcher.  Raises DeadlineExceeded naming the stage; Unavailable at EOF."""
    reply.settimeout(seconds)
    try:
        data = reply.recv(65536)
    except TimeoutError:
        raise DeadlineExceeded(f"nothing within {seconds:g} s while {stage}") from None
    if not data:
        raise Unavailable(f"the launcher ended while {stage}")
    answer: dict[str, Any] = json.loads(data)
    return answer
