"""What runs in a clone of the launcher: opening sockets in a pod's network namespace, for port-forwards."""

from __future__ import annotations

import _socket
import errno
import os

from crio_native.linux import syscalls
from crio_native.oci.builtin import steps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def open_in(path: str, reply: int) -> NoReturn:
    """Send an unconnected TCP socket of each family; a socket stays in the namespace in which it was opened."""
    step = "join_network"
    try:
        syscalls.setns(os.open(path, os.O_RDONLY | os.O_CLOEXEC), syscalls.CLONE_NEWNET)
        step = "open_socket"
        sockets = [opened for family in (_socket.AF_INET, _socket.AF_INET6) if (opened := _open(family)) >= 0]
        wire.send(wire.channel(reply), b'{"opened":true}', sockets)
    except BaseException as error:
        wire.tell(reply, {"error": steps.describe(step, error)})
    finally:
        os._exit(0)


def _open(family: int) -> int:
    """-1 where the kernel has no such family."""
    try:
        return _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0).detach()
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return -1
        raise
