"""Moving network links from one network namespace to another, by rtnetlink messages made by hand.

Small because launchers import it; the pod network, which does more, is made with a library in `network`.
For single-threaded callers: `move_links` visits the other namespace and comes back.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct

from crio_native.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    _Addresses = list[tuple[int, int, bytes]]  # as `_Route.addresses` gives them

RTM_NEWLINK, RTM_NEWADDR, RTM_GETADDR = 16, 20, 22
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_CREATE, NLM_F_EXCL = 1, 4, 0x300, 0x400, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
IFLA_IFNAME, IFLA_NET_NS_FD = 3, 28
IFA_ADDRESS, IFA_LOCAL, IFA_LABEL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 3, 4, 8
IFA_F_PERMANENT = 0x80
IFA_F_NODAD = 0x02
RT_SCOPE_UNIVERSE = 0
IFF_UP = 1
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg


def move_links(links: Mapping[str, str], namespace: int) -> None:
    """Move each link of our network namespace (name -> its name there, which may hold a "%d" for the kernel to fill)
    into `namespace`, with its permanent addresses of global scope, and set it up.

    All or none: after a failure those that were moved are here again, under their own names.  OSError's filename is the
    link.
    """
    here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    moved: list[tuple[str, str, _Addresses]] = []
    name = ""
    try:
        for name, wanted in links.items():
            found, addresses = _move(name, wanted, here, namespace)
            moved.append((name, found, addresses))
            _set_up(found, addresses)
    except OSError as error:
        for before, after, addresses in reversed(moved):
            _move(after, before, namespace, here)
            _set_up(before, addresses)
        raise OSError(error.errno, error.strerror, name) from None
    finally:
        syscalls.setns(here, syscalls.CLONE_NEWNET)
        os.close(here)


def _move(name: str, wanted: str, source: int, target: int) -> tuple[str, _Addresses]:
    """Move one link, which loses its addresses; returns its name there and what it had.  We end up in `target`."""
    syscalls.setns(target, syscalls.CLONE_NEWNET)
    before = {there for _, there in _socket.if_nameindex()}
    if wanted in before:
        raise OSError(errno.EEXIST, f"the network namespace that it goes to has a link {wanted!r} already")
    syscalls.setns(source, syscalls.CLONE_NEWNET)
    with _Route() as route:
        index = _index(name)
        addresses = list(route.addresses(index))
        route.set_link(index, _attribute(IFLA_NET_NS_FD, struct.pack("=I", target)) + _name(wanted))
    syscalls.setns(target, syscalls.CLONE_NEWNET)
    return next(there for _, there in _socket.if_nameindex() if there not in before), addresses


def _set_up(name: str, addresses: _Addresses) -> None:
    with _Route() as route:
        index = _index(name)
        route.set_link(index, b"", up=True)
        for family, prefix, attributes in addresses:
            route.add_address(index, family, prefix, attributes)


def _index(name: str) -> int:
    for index, found in _socket.if_nameindex():
        if found == name:
            return index
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def _name(name: str) -> bytes:
    return _attribute(IFLA_IFNAME, name.encode() + b"\0")


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        if not 4 <= size <= len(data):
            return
        yield kind & 0x3FFF, data[4:size]  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
        data = data[size + -size % 4 :]


class _Route:
    """A NETLINK_ROUTE socket of the network namespace that we are in."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, 0)

    def __enter__(self) -> _Route:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def set_link(self, index: int, attributes: bytes, *, up: bool = False) -> None:
        flags = IFF_UP if up else 0
        body = _LINK.pack(_socket.AF_UNSPEC, 0, index, flags, flags)
        list(self._ask(RTM_NEWLINK, NLM_F_ACK, body + attributes))

    def addresses(self, index: int) -> Iterator[tuple[int, int, bytes]]:
        """(family, prefix length, attributes to make it anew by) of a link's permanent global addresses."""
        for body in self._ask(RTM_GETADDR, NLM_F_DUMP, _ADDRESS.pack(_socket.AF_UNSPEC, 0, 0, 0, 0)):
            family, prefix, flags, scope, owner = _ADDRESS.unpack_from(body)
            found = dict(_attributes(body[_ADDRESS.size :]))
            flags = struct.unpack("=I", found[IFA_FLAGS])[0] if IFA_FLAGS in found else flags
            if owner == index and scope == RT_SCOPE_UNIVERSE and flags & IFA_F_PERMANENT:
                kept = (IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST)
                yield family, prefix, b"".join(_attribute(kind, found[kind]) for kind in kept if kind in found)

    def add_address(self, index: int, family: int, prefix: int, attributes: bytes) -> None:
        # The address was in use on this very link: to look for duplicates would only delay it.
        flags = IFA_F_NODAD if family == _socket.AF_INET6 else 0
        body = _ADDRESS.pack(family, prefix, flags, RT_SCOPE_UNIVERSE, index)
        list(self._ask(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body + attributes))

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body)
        while True:
            data = self._socket.recv(1 << 16)
            while len(data) >= _HEADER.size:
                size, kind, _, _, _ = _HEADER.unpack_from(data)
                content, data = data[_HEADER.size : size], data[size + -size % 4 :]
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", content)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                yield content
