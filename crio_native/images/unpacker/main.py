"""The unpackers' fork server: each request gets one, in a process that starts where this one has come to.

    main SOCKET

SOCKET: number of a SEQPACKET socket.  A packet is a request, `DIRECTORY NUL COMPRESSION NUL KIND NUL LIMITS`, with two
descriptors: the archive, and a SEQPACKET socket for the report (see `run`).  KIND: `layer` or `archive`.  LIMITS:
numbers, comma-separated, in the order of `Limits`.  When the unpacker has ended, `ended STATUS` is the last packet on
that socket, STATUS as a shell has it; one whose report nobody wants any more is killed.

It ends when nobody has the other end of SOCKET, and its unpackers with it.
"""

from __future__ import annotations

import _socket
import gc
import os
import select
import sys

from crio_native.images.unpacker import Limits
from crio_native.images.unpacker.run import run
from crio_native.images.unpacker.stream import decompressor
from crio_native.linux import confine, syscalls

REQUEST_MAX = 1 << 14
_SIGKILL = 9  # signal itself would make enumerations first


def main() -> None:
    ForkServer(_socket.socket(fileno=int(sys.argv[1]))).serve()


class ForkServer:
    """The unpackers that live.  It reads nothing that comes from an archive."""

    def __init__(self, requests: _socket.socket) -> None:
        self._requests = requests
        self._poll = select.poll()
        self._poll.register(requests.fileno(), select.POLLIN)
        self._unpackers: dict[int, Unpacker] = {}  # by each of the descriptors that tell of it

    def serve(self) -> None:
        gc.freeze()  # what is here stays: no child need write to it
        while True:
            for fd, _ in self._poll.poll():
                unpacker = self._unpackers.get(fd)
                if fd == self._requests.fileno():
                    if not self._accept():
                        return
                elif unpacker and fd == unpacker.pidfd:
                    self._reap(unpacker)
                elif unpacker:
                    self._poll.unregister(fd)
                    os.kill(unpacker.pid, _SIGKILL)  # not waited for yet, so it is still this one

    def _accept(self) -> bool:
        packet, rights, _, _ = self._requests.recvmsg(REQUEST_MAX, _socket.CMSG_SPACE(8), _socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return False
        archive, report = memoryview(rights[0][2]).cast("i")
        directory, compression, kind, numbers = os.fsdecode(packet).split("\0")
        limits = Limits(*(int(number) for number in numbers.split(",")))
        decompress = decompressor(compression)  # its imports stay here, for the next
        pid = confine.bear_alone()
        if pid == 0:
            _become(archive, report)
            try:
                run(_socket.socket(fileno=1), directory, decompress, limits, layer=kind == "layer")
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        os.close(archive)
        self._keep(Unpacker(pid, report))
        return True

    def _keep(self, unpacker: Unpacker) -> None:
        self._unpackers[unpacker.pidfd] = self._unpackers[unpacker.report] = unpacker
        self._poll.register(unpacker.pidfd, select.POLLIN)
        self._poll.register(unpacker.report, select.POLLRDHUP)

    def _reap(self, unpacker: Unpacker) -> None:
        for fd in (unpacker.pidfd, unpacker.report):
            del self._unpackers[fd]
            try:
                self._poll.unregister(fd)
            except KeyError:
                pass
        unpacker.end()


class Unpacker:
    """report: descriptor of our copy of its socket."""

    def __init__(self, pid: int, report: int) -> None:
        self.pid, self.report, self.pidfd = pid, report, os.pidfd_open(pid)

    def end(self) -> None:
        """Reap it and say how it ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.pidfd)
        report = _socket.socket(fileno=self.report)
        try:
            report.send(b"ended %d" % (code if code >= 0 else 128 - code), _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # nobody listens, or it has said too much; the end of the socket says enough
        report.close()


def _become(archive: int, report: int) -> None:
    """The new unpacker's descriptors: 0, 1 and standard error, and none of its siblings'."""
    os.dup2(archive, 0)
    os.dup2(report, 1)
    syscalls.close_range(3)
