"""A node of its own for each test of the pod network: real namespaces, nothing of the machine's network is touched.

A network namespace belongs to a thread.  `on_a_node` runs a test in a thread with new network and mount namespaces,
which the threads that it starts inherit; `Pod` and `Outside` are further namespaces, entered by short-lived threads.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from crio_native.linux import syscalls

T = TypeVar("T")
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
NODE_IPS = {4: "192.0.2.1", 6: "2001:db8::1"}
OUTSIDE_IPS = {4: "192.0.2.2", 6: "2001:db8::2"}
SECONDS = 5.0


def in_thread(function: Callable[[], T]) -> T:
    """What the function returns or raises, from a thread of its own."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, function()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if not outcome[0]:
        raise outcome[1]
    return outcome[1]  # type: ignore[no-any-return]


def on_a_node(test: Callable[..., None]) -> Callable[..., None]:
    """Decorate a test to run on a node of its own."""

    @functools.wraps(test)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        def run() -> None:
            syscalls.unshare(CLONE_NEWNET | CLONE_NEWNS)
            syscalls.mount(None, "/", None, MS_REC | MS_PRIVATE)
            ip("link set lo up")
            test(*args, **kwargs)

        in_thread(run)

    return wrapped


def ip(arguments: str) -> Any:
    """iproute2 in the calling thread's namespace; its JSON, if it prints any."""
    done = subprocess.run(["ip", "-j", *arguments.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr}"
    return json.loads(done.stdout or "[]")


def links() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


class Namespace:
    """A pinned network namespace, as a launcher makes it: the bind mount, and a socket that was opened inside."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"netns-{name}"
        self.path.touch()
        in_thread(self._make)

    def _make(self) -> None:
        syscalls.unshare(CLONE_NEWNET)
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        syscalls.mount(f"/proc/self/fd/{self._fd}", str(self.path), None, MS_BIND)

    def run(self, function: Callable[[], T]) -> T:
        """Call the function in the namespace."""

        def enter() -> T:
            syscalls.setns(self._fd, CLONE_NEWNET)
            return function()

        return in_thread(enter)

    def close(self) -> None:
        if self._fd < 0:
            return
        self.netlink.close()
        os.close(self._fd)
        self._fd = -1
        syscalls.umount2(str(self.path), MNT_DETACH)
        self.path.unlink()

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Outside(Namespace):
    """A machine on the node's other link.  It knows no route to pods."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "outside")
        fd = f"/proc/{os.getpid()}/fd/{self._fd}"
        ip(f"link add up0 type veth peer name up0 netns {fd}")
        addresses(NODE_IPS)
        self.run(lambda: addresses(OUTSIDE_IPS))


def addresses(ips: dict[int, str]) -> None:
    ip("link set lo up")
    ip("link set up0 up")
    ip(f"addr add {ips[4]}/24 dev up0")
    ip(f"addr add {ips[6]}/64 dev up0 nodad")


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Server:
    """Answers each TCP connection, or UDP datagram, with its name and the client's address as it sees it."""

    def __init__(self, where: Namespace | None, address: str, port: int, name: str, kind: int = socket.SOCK_STREAM):
        self._name = name
        make = functools.partial(self._listen, address, port, kind)
        self._socket = where.run(make) if where else make()
        self._socket.settimeout(0.02)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @staticmethod
    def _listen(address: str, port: int, kind: int) -> socket.socket:
        sock = socket.socket(family_of(address), kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(16)
        return sock

    def _serve(self) -> None:
        while not self._closing:
            try:
                self._answer()
            except TimeoutError:
                continue

    def _answer(self) -> None:
        if self._socket.type == socket.SOCK_STREAM:
            connection, peer = self._socket.accept()
            with connection:
                connection.sendall(f"{self._name} {peer[0]}".encode())
        else:
            _, peer = self._socket.recvfrom(100)
            self._socket.sendto(f"{self._name} {peer[0]}".encode(), peer)

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(address: str, port: int, kind: int = socket.SOCK_STREAM, timeout: float = SECONDS) -> tuple[str, str]:
    """(server's name, our address as it sees it).  Raises OSError when nobody answers."""
    with socket.socket(family_of(address), kind) as sock:
        sock.settimeout(timeout)
        sock.connect((address, port))
        if kind == socket.SOCK_DGRAM:
            sock.send(b"?")
        name, peer = sock.recv(100).decode().split()
        return name, peer


def ping(address: str) -> None:
    """One echo request and its answer (ICMP, RFC 792 and 4443).  Raises TimeoutError."""
    six = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    request, reply = (128, 129) if six else (8, 0)
    with socket.socket(family_of(address), socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(SECONDS)
        body = struct.pack("!BBHHH", request, 0, 0, 0x4352, 1)
        if not six:  # in IPv6 the kernel fills the checksum in
            total = sum(struct.unpack("!4H", body))
            body = struct.pack("!BBHHH", request, 0, ~(total % 0xFFFF) & 0xFFFF, 0x4352, 1)
        sock.sendto(body, (address, 0))
        while True:
            data, peer = sock.recvfrom(1500)
            message = data if six else data[(data[0] & 15) * 4 :]
            if peer[0] == address and message[0] == reply:
                return
