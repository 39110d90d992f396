"""Calls to a systemd manager over D-Bus, each on a connection of its own: nothing is shared, nothing to reconnect.

root talks to the machine's manager by its own socket, which needs no message bus, or by the system bus where only that
is there (a daemon in a container); a user to their own manager, in the same two ways.
"""

from __future__ import annotations

import _socket
import os
import time

from jeepney import DBusAddress, HeaderFields, MessageType, Parser, new_method_call  # type: ignore[import-untyped]

from crio_native.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    PermissionRefused,
    StepFailed,
    Unavailable,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .properties import Property

STEP = "systemd"
_SECONDS = 30.0  # for a call and the job that it starts, on a node that is busy booting
_AUTHENTICATION_SECONDS = 5.0
_ANSWER_MAX = 256
_MANAGER = DBusAddress("/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager")
_PEER = DBusAddress("/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.DBus.Peer")
_BUS = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
_ERROR = "org.freedesktop.systemd1."
_REMOVED = "type='signal',interface='org.freedesktop.systemd1.Manager',member='JobRemoved'"


class Refused(Exception):
    """The manager answered with an error.  name: D-Bus's, without systemd's prefix."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name.removeprefix(_ERROR)


class Manager:
    """A connection, to be closed (or used in a with statement).

    Raises FailedPrecondition where systemd does not run, Unavailable when it does not answer.
    """

    def __init__(self, user: bool) -> None:
        self._deadline = time.monotonic() + _SECONDS
        self._parser = Parser()
        self._serial = 0
        self._jobs: dict[str, str] = {}  # job -> result, of those that have ended
        path, direct = _address(user)
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            self._authenticate(path)
        except OSError as error:
            self.close()
            raise Unavailable(f"systemd does not answer on {path}: {error}") from error
        if not direct:
            self._call(_BUS, "Hello")
            self._call(_BUS, "AddMatch", "s", _REMOVED)
            self._call(_MANAGER, "Subscribe")

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def _authenticate(self, path: str) -> None:
        """All in one write, and nothing more before the answer: a call that systemd reads together with BEGIN, it does
        not look at until something else arrives."""
        self._socket.settimeout(_AUTHENTICATION_SECONDS)
        self._socket.connect(path)
        self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
        answer = b""
        while not answer.endswith(b"\r\n") and len(answer) < _ANSWER_MAX:
            data = self._socket.recv(1)
            if not data:
                raise ConnectionResetError("it closed the connection")
            answer += data
        if not answer.startswith(b"OK "):
            raise PermissionError(f"it refuses us: {answer!r}")

    def start_scope(self, unit: str, properties: Sequence[Property]) -> None:
        """Make a transient unit and wait until it is there.  Raises AlreadyExists, StepFailed."""
        try:
            (job,) = self._call(_MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "fail", list(properties), [])
        except Refused as error:
            if error.name == "UnitExists":
                raise AlreadyExists(f"systemd unit {unit} exists: stop it, or choose another cgroupsPath") from None
            raise _failure(error, unit, "starting the scope") from None
        result = self._result(job, unit)
        if result != "done":
            raise StepFailed(STEP, 0, unit, f"starting the scope ended with {result!r}: see journalctl -u {unit}")

    def set_properties(self, unit: str, properties: Sequence[Property]) -> None:
        """Until the next boot.  On return the manager has written its files.  Raises StepFailed."""
        try:
            self._call(_MANAGER, "SetUnitProperties", "sba(sv)", unit, True, list(properties))
            # It answers before it writes, but writes before it reads the next message.
            self._call(_PEER, "Ping")
        except Refused as error:
            names = ", ".join(name for name, _ in properties)
            raise _failure(error, unit, f"setting {names}") from None

    def stop(self, unit: str) -> None:
        """Stop a unit and forget that it failed.  Nothing happens when there is no such unit.  Raises StepFailed."""
        try:
            (job,) = self._call(_MANAGER, "StopUnit", "ss", unit, "replace")
            self._result(job, unit)
            self._call(_MANAGER, "ResetFailedUnit", "s", unit)
        except Refused as error:
            if error.name != "NoSuchUnit":
                raise _failure(error, unit, "stopping it") from None

    def _result(self, job: str, unit: str) -> str:
        while job not in self._jobs:
            self._receive(f"waiting for the job of {unit}")
        return self._jobs[job]

    def _call(self, address: DBusAddress, method: str, signature: str | None = None, *body: Any) -> tuple[Any, ...]:
        """The answer's body.  Raises Refused, Unavailable, DeadlineExceeded."""
        self._serial += 1
        message = new_method_call(address, method, signature, body)
        try:
            self._socket.settimeout(self._left(method))
            self._socket.sendall(message.serialise(self._serial))
        except OSError as error:
            raise Unavailable(f"systemd broke the connection at {method}: {error}") from error
        while True:
            answer = self._receive(method)
            if answer.header.fields.get(HeaderFields.reply_serial) != self._serial:
                continue
            if answer.header.message_type is MessageType.error:
                words = answer.body[0] if answer.body else ""
                raise Refused(answer.header.fields.get(HeaderFields.error_name, ""), str(words))
            return tuple(answer.body)

    def _receive(self, stage: str) -> Any:
        """The next message; the end of a job is noted."""
        while (message := self._parser.get_next_message()) is None:
            self._socket.settimeout(self._left(stage))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                self._left(stage)
                continue
            except OSError as error:
                raise Unavailable(f"systemd broke the connection at {stage}: {error}") from error
            if not data:
                raise Unavailable(f"systemd closed the connection at {stage}")
            self._parser.add_data(data)
        if message.header.fields.get(HeaderFields.member) == "JobRemoved":
            _, job, _, result = message.body
            self._jobs[job] = result
        return message

    def _left(self, stage: str) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"systemd did not answer within {_SECONDS:g} s at {stage}")
        return left


def _address(user: bool) -> tuple[str, bool]:
    """A socket, and whether it is the manager's own."""
    if user:
        runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
        choices = ((f"{runtime}/systemd/private", True), (f"{runtime}/bus", False))
    else:
        choices = (("/run/systemd/private", True), ("/run/dbus/system_bus_socket", False))
    for path, direct in choices:
        if os.path.exists(path):
            return path, direct
    whose = "this user's systemd" if user else "systemd"
    raise FailedPrecondition(
        f"{whose} is not there to make cgroups: there is neither {choices[0][0]} nor {choices[1][0]}"
    )


def _failure(error: Refused, unit: str, act: str) -> Exception:
    if error.name in (
        "org.freedesktop.DBus.Error.AccessDenied",
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
    ):
        return PermissionRefused(f"systemd does not let this user change {unit}: {error}")
    if error.name == "org.freedesktop.DBus.Error.InvalidArgs":
        return InvalidArgument(f"systemd unit {unit}", str(error), f"systemd refuses a value while {act}")
    return StepFailed(STEP, 0, unit, f"{act}: {error} ({error.name})")
