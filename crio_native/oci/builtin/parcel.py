"""The descriptors of a process that is born later: they lie in a socket meanwhile.

Who bears it then holds none of them, and they take the lowest numbers in their order when they come out.
"""

from __future__ import annotations

import _socket
import os

from crio_native.linux import donation, syscalls
from crio_native.oci.builtin import wire

FIRST = 64  # the lowest number of what is kept while a parcel is packed; far above what comes out of it
_INT = 4
_ROOM = _socket.CMSG_LEN(wire.MAX_DESCRIPTORS * _INT)


class Parcel:
    def __init__(self) -> None:
        ends = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self._put, self._take = (wire.channel(donation.moved(end.detach(), FIRST)) for end in ends)

    def pack(self, stdio: list[int], others: list[int], keep: list[int]) -> None:
        """stdio: -1 is /dev/null.  Nothing else stays open but `keep`, all of it FIRST or higher."""
        if -1 in stdio:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            stdio = [null if fd < 0 else fd for fd in stdio]
        wire.send(self._put, b"stdio", stdio)
        wire.send(self._put, b"others", others)
        syscalls.close_others([self._take.fileno(), *keep], first=0)

    def unpack(self, keep: list[int]) -> None:
        """stdio is 0 to 2, the others close-on-exec from 3 on; nothing else stays open but `keep`."""
        self._take.recvmsg(16, _ROOM)
        count = len(self._take.recvmsg(16, _ROOM, _socket.MSG_CMSG_CLOEXEC)[1][0][2]) // _INT
        syscalls.close_others(keep, first=3 + count)
