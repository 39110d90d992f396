"""What a container's seccomp profile forbids, noticed: the annotation `seccomp-notifier-action.crio.io`.

The profile's refusals become notifications, which are answered with the very errors that they were, and counted; with
the action "stop" a container is killed when five seconds have passed since its last forbidden call, or when it has made
so many that they are answered no more.  Answers need a living daemon: while there is none, and for those of a daemon
that has gone, the kernel says ENOSYS instead.  What kills a process does so still, and what is refused with ENOSYS is
refused in silence: programs ask for such calls to find out whether they are there.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyseccomp

from crio_native.errors import InvalidArgument
from crio_native.pods.pod_annotations import Allowed

log = logging.getLogger(__name__)

_RECV, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_PIECE, _PIECES_MAX = 1 << 16, 64
_PATIENCE = 5.0  # seconds after the last forbidden call; CRI-O's
_FILTERS_MAX = 64  # of a container and its execs, at a time
_CALLS_MAX = 10_000  # of a container; then the kernel answers by itself, as who calls more wants to keep us busy
_LABELS_MAX = 1000

Stop = Callable[[str, str], None]  # container's id, what it has called


def action(allowed: Allowed) -> str:
    """ "", "log" or "stop".  Raises InvalidArgument."""
    field, value = allowed.get("seccomp_notifier")
    if value not in ("", "log", "stop"):
        raise InvalidArgument(field, value, 'must be "log" or "stop"')
    return value


class Notifiers:
    """The listeners of all containers; each has a thread.  stop: called in it, once a container; who can stop one sets
    it.  counts: by container and call."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.stop: Stop = lambda container_id, calls: None
        self._listeners: dict[str, _Listener] = {}
        self.counts: Counter[tuple[str, ...]] = Counter()

    def listen(
        self, container_id: str, name: str, profile: Mapping[str, Any], *, stop: bool, defaults: bool
    ) -> dict[str, Any]:
        """The profile with notifications for refusals, and somebody who hears them.

        name: of the container, for the count.  defaults: also what no rule allows; most runtimes' programs cannot.
        """
        changed, errors = notifying(profile, defaults=defaults)
        if "SCMP_ACT_NOTIFY" not in (changed["defaultAction"], *(rule["action"] for rule in changed["syscalls"])):
            log.info("container %s: no rule of its seccomp profile refuses what could be noticed", container_id)
            return changed
        path = self._serve(container_id, name, errors, stop)
        return {**changed, "listenerPath": str(path)}

    def listen_again(self, container_id: str, name: str, *, stop: bool) -> None:
        """For the execs of a container that another daemon began; its first filter has nobody any more."""
        self._serve(container_id, name, {"": errno.EPERM}, stop)

    def _serve(self, container_id: str, name: str, errors: Mapping[str, int], stop: bool) -> Path:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._directory / container_id[:24]  # a socket's address has 107 bytes
        path.unlink(missing_ok=True)

        def count(call: str) -> None:
            if (name, call) in self.counts or len(self.counts) < _LABELS_MAX:
                self.counts[name, call] += 1

        self._listeners[container_id] = _Listener(
            path, errors, count, (lambda calls: self.stop(container_id, calls)) if stop else None
        )
        return path

    def close(self, container_id: str) -> None:
        """Nobody listens any more; idempotent."""
        listener = self._listeners.pop(container_id, None)
        if listener is not None:
            listener.close()


def notifying(profile: Mapping[str, Any], *, defaults: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """A profile whose refusals are notifications, and the errors to answer with, by call; that of "" for all others."""
    usual = int(profile.get("defaultErrnoRet", errno.EPERM))
    rules, errors = [], {"": usual}
    for rule in profile.get("syscalls") or ():
        number = int(rule.get("errnoRet", errno.EPERM))
        if rule["action"] == "SCMP_ACT_ERRNO" and number != errno.ENOSYS:
            rule = {key: value for key, value in rule.items() if key != "errnoRet"} | {"action": "SCMP_ACT_NOTIFY"}
            errors |= dict.fromkeys(rule["names"], number)
        rules.append(rule)
    changed = {**profile, "syscalls": rules}
    if defaults and profile["defaultAction"] == "SCMP_ACT_ERRNO" and usual != errno.ENOSYS:
        changed = {key: value for key, value in changed.items() if key != "defaultErrnoRet"}
        changed["defaultAction"] = "SCMP_ACT_NOTIFY"
    return changed, errors


class _Listener:
    """Takes the filters' descriptors, of the container's first process and of its execs, and answers what they say."""

    def __init__(
        self, path: Path, errors: Mapping[str, int], count: Callable[[str], None], stop: Callable[[str], None] | None
    ) -> None:
        self._path, self._errors, self._count, self._stop = path, errors, count, stop
        self._calls: Counter[str] = Counter()
        self._last = 0.0
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._server.bind(str(path))
        self._server.listen(_FILTERS_MAX)
        # The thread's end and `close`'s: each closes its own, once.  A number that both knew could be anybody's by now.
        self._awake, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="seccomp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The thread hears of it and leaves; idempotent."""
        self._wake.close()

    @property
    def _spent(self) -> bool:
        return self._calls.total() >= _CALLS_MAX

    def _run(self) -> None:
        poll, filters = select.poll(), set[int]()
        for sock in (self._awake, self._server):
            poll.register(sock, select.POLLIN)
        try:
            while True:
                due = self._due()
                if due == 0:
                    self._give_up()
                    due = None
                for fd, event in poll.poll(None if due is None else due * 1000):
                    if fd == self._awake.fileno():
                        return
                    if fd == self._server.fileno():
                        if (found := self._accept()) >= 0 and len(filters) < _FILTERS_MAX and not self._spent:
                            filters.add(found)
                            poll.register(found, select.POLLIN)
                        elif found >= 0:
                            os.close(found)
                    elif self._spent or not (event & select.POLLIN and self._answer(fd)):  # all it filtered have ended
                        poll.unregister(fd)
                        filters.discard(fd)
                        os.close(fd)
        except Exception:
            log.exception("the seccomp notifier of %s has failed", self._path)
        finally:
            for fd in filters:
                os.close(fd)
            self._awake.close()
            self._server.close()
            self._path.unlink(missing_ok=True)

    def _due(self) -> float | None:
        """In how many seconds the container is stopped for what it has called; None for never."""
        if self._stop is None or not self._calls:
            return None
        return 0 if self._spent else max(0, self._last + _PATIENCE - time.monotonic())

    def _give_up(self) -> None:
        assert self._stop is not None
        calls = ", ".join(f"{call} ({number}x)" for call, number in sorted(self._calls.items()))
        self._stop(f"used forbidden syscalls: {calls}")
        self._stop = None

    def _accept(self) -> int:
        """The filter's descriptor (runtime-spec, config-linux "The Container Process State"), -1 for none."""
        connection, _ = self._server.accept()
        with connection:
            connection.settimeout(5)
            try:
                _, ancillary, _, _ = connection.recvmsg(_PIECE, socket.CMSG_SPACE(8 * 4), socket.MSG_CMSG_CLOEXEC)
                for _ in range(_PIECES_MAX):  # of the state, whose sender must not meet a closed door
                    if not connection.recv(_PIECE):
                        break
            except OSError:
                return -1
        found = array.array("i")
        for _, _, data in ancillary:
            found.frombytes(data[: len(data) - len(data) % 4])
        for fd in found[1:]:
            os.close(fd)
        return found[0] if found else -1

    def _answer(self, fd: int) -> bool:
        """One notification; whether there may be more."""
        notification = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(fd, _RECV, notification)
            number, _, _, call, architecture, *_ = _NOTIFICATION.unpack(notification)
            name = _name(call, architecture)
            self._calls[name] += 1
            self._last = time.monotonic()
            self._count(name)
            if self._spent:
                log.warning(
                    "%s: %d forbidden calls were noticed; the kernel answers the others", self._path, _CALLS_MAX
                )
            fcntl.ioctl(fd, _SEND, _RESPONSE.pack(number, 0, -self._errors.get(name, self._errors[""]), 0))
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.EINTR, errno.EINPROGRESS)  # who called has died meanwhile
        return True


def _name(call: int, architecture: int) -> str:
    """libseccomp's numbers of architectures are the kernel's (AUDIT_ARCH_*)."""
    try:
        return str(pyseccomp.resolve_syscall(architecture, call).decode())
    except (OSError, ValueError, AttributeError):  # it knows fewer of either than the kernel
        return str(call)
