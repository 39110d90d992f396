"""Talking netlink: pyroute2's message classes, over plain sockets of our own.

pyroute2 encodes and decodes; its sockets are not used, because they run an event loop per call, and because the inside
of a pod is configured through a socket that a launcher opened there.  What the messages mean is told in `links.py` and
`nftables.py`.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import socket
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

from crio_native.errors import DeadlineExceeded, Internal, StepFailed

REQUEST, ACK, DUMP = 1, 4, 0x300
REPLACE, EXCL, CREATE = 0x100, 0x200, 0x400
# The kernel answers within the send itself, so a wait means that the answer was lost.
ANSWER_SECONDS = 10.0
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_MAX_DATAGRAM = 1 << 16
_HEADER = struct.Struct("=IHHII")
_import_lock = threading.Lock()


class _Messages:
    """pyroute2's message classes, imported when first used."""

    @cached_property
    def link(self) -> Any:
        return _lean_import("pyroute2.netlink.rtnl.ifinfmsg").ifinfmsg

    @cached_property
    def link_head(self) -> Any:
        """A link without its attributes, whose decoding takes a tenth of a pod's set-up."""
        return type("link_head", (_lean_import("pyroute2.netlink").nlmsg,), {"fields": self.link.fields})

    @cached_property
    def address(self) -> Any:
        return _lean_import("pyroute2.netlink.rtnl.ifaddrmsg").ifaddrmsg

    @cached_property
    def route(self) -> Any:
        return _lean_import("pyroute2.netlink.rtnl.rtmsg").rtmsg

    @cached_property
    def netfilter(self) -> Any:
        return _lean_import("pyroute2.netlink.nfnetlink").nfgen_msg

    @cached_property
    def nftables(self) -> Any:
        """The module with one class for each kind of nf_tables object."""
        return _lean_import("pyroute2.netlink.nfnetlink.nftsocket")

    @cached_property
    def error(self) -> Any:
        """An error with its explanation.  pyroute2's own class takes the header of the request, which the kernel
        repeats after the error number, for attributes."""
        base = _lean_import("pyroute2.netlink").nlmsgerr
        header = (("of_length", "I"), ("of_type", "H"), ("of_flags", "H"), ("of_sequence", "I"), ("of_pid", "I"))
        return type("error", (base,), {"fields": (*base.fields, *header)})


messages = _Messages()


def _lean_import(name: str) -> Any:
    """Import a module of pyroute2 without running the package's own `__init__`.

    That one imports all of pyroute2: 20 MiB and 130 ms, against 4 MiB and 40 ms for the modules used here (measured
    beside grpc).  An empty package stands in for it only while its submodules are imported.
    """
    with _import_lock:
        if "pyroute2" in sys.modules:
            return importlib.import_module(name)
        spec = importlib.util.find_spec("pyroute2")
        if spec is None:
            raise Internal("the Python package pyroute2 is missing; install crio-native with its dependencies")
        sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)
        try:
            return importlib.import_module(name)
        finally:
            del sys.modules["pyroute2"]


@dataclass(frozen=True, slots=True)
class Request:
    """One message to send.  step and subject name it in an error: "create-veth", "veth01234567"."""

    step: str
    subject: str
    message: type[Any]
    kind: int
    flags: int
    body: Mapping[str, Any]

    def encode(self, sequence: int, more_flags: int) -> bytes:
        message = self.message()
        message.update(self.body)
        message["header"].update(
            type=self.kind, flags=REQUEST | self.flags | more_flags, sequence_number=sequence, pid=0
        )
        message.encode()
        return bytes(message.data)


class Netlink:
    """A conversation with the kernel on one socket; not thread-safe.

    All methods raise StepFailed, with the request's step and subject, the errno and the kernel's own explanation.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Use an open netlink socket, which remains the caller's."""
        self._socket = sock
        self._owned = False
        # Not from 1: whoever had the socket before may have left answers unread.
        self._sequence = int.from_bytes(os.urandom(3), "big")
        sock.settimeout(ANSWER_SECONDS)
        sock.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        sock.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)

    @classmethod
    def open(cls, protocol: int = socket.NETLINK_ROUTE) -> Netlink:
        """A socket of our own, in the network namespace of the calling thread.  Raises StepFailed."""
        try:
            self = cls(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol))
        except OSError as error:
            raise StepFailed("open-netlink", error.errno or 0, f"netlink protocol {protocol}") from error
        self._owned = True
        return self

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            self._socket.close()

    def run(self, *requests: Request) -> None:
        """Have the requests carried out, in order, in one system call.

        The kernel goes on after a failed one: put together only what may be tried after a failure of the one before.
        """
        self._run(requests, len(requests) - 1)

    def run_batch(self, begin: Request, requests: Sequence[Request], end: Request) -> None:
        """Have the requests carried out between two marks that make them one transaction (nfnetlink)."""
        # Kernels before 6.10 do not acknowledge the mark of the end.
        self._run([begin, *requests, end], len(requests))

    def _run(self, requests: Sequence[Request], acknowledged: int) -> None:
        """Only one is acknowledged, the last that can be: a failure is always told, whichever it is."""
        self._send([(request, ACK if index == acknowledged else 0) for index, request in enumerate(requests)])
        while self._receive(requests) is not None:
            pass

    def get(self, request: Request, decoder: Any) -> Any:
        """The one object that the request asks for, decoded; None when the kernel has none such."""
        self._send([(request, 0)])
        try:
            data = self._receive([request])
        except StepFailed as error:
            if is_missing(error):
                return None
            raise
        message = decoder(data)
        message.decode()
        return message

    def dump(self, request: Request, decoder: Any) -> list[Any]:
        """All objects of the kind that the request asks for, decoded."""
        self._send([(request, DUMP)])
        found: list[Any] = []
        while True:
            data = self._receive([request])
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _NLMSG_DONE:
                    return found
                message = decoder(data[:length])
                message.decode()
                found.append(message)
                data = data[(length + 3) & ~3 :]

    def _send(self, requests: Sequence[tuple[Request, int]]) -> None:
        first = self._sequence + 1
        data = [request.encode(first + index, flags) for index, (request, flags) in enumerate(requests)]
        self._sequence += len(data)
        try:
            # Port 0 is the kernel.
            self._socket.sendto(b"".join(data), (0, 0))
        except OSError as error:
            raise StepFailed(requests[0][0].step, error.errno or 0, requests[0][0].subject, "cannot be sent") from error

    def _receive(self, requests: Sequence[Request]) -> bytes | None:
        """The next answer to these, the latest, requests; None for an acknowledgement."""
        while True:
            try:
                data, (sender, _groups) = self._socket.recvfrom(_MAX_DATAGRAM)
            except TimeoutError:
                step = requests[-1].step
                raise DeadlineExceeded(f"step {step!r}: the kernel gave no answer in {ANSWER_SECONDS:g} s") from None
            except OSError as error:
                raise StepFailed(requests[-1].step, error.errno or 0, requests[-1].subject, "no answer") from error
            # Anyone in the namespace who has the capability may send to this socket; only the kernel is believed.
            if sender != 0 or len(data) < _HEADER.size + 4:
                continue
            _length, kind, _flags, sequence, _pid = _HEADER.unpack_from(data)
            index = sequence - (self._sequence - len(requests) + 1)
            if not 0 <= index < len(requests):
                continue
            if kind != _NLMSG_ERROR:
                return data
            (number,) = struct.unpack_from("=i", data, _HEADER.size)
            if number:
                raise StepFailed(requests[index].step, -number, requests[index].subject, _explanation(data))
            return None


def _explanation(data: bytes) -> str:
    """The text of an extended acknowledgement (NLMSGERR_ATTR_MSG), "" without one."""
    message = messages.error(data)
    message.decode()
    return str(message.get_attr("NLMSGERR_ATTR_MSG") or "")


def is_missing(error: StepFailed) -> bool:
    """Whether the object that the request named is not there."""
    return error.number in (errno.ENODEV, errno.ENOENT, errno.ESRCH)
