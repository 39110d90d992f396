"""The connection to a CRI socket, and the translation of gRPC's errors into ours.

No command logic and no printing.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import grpc
from google.protobuf.message import Message

from crio_native import errors
from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.api.runtime.v1 import api_pb2_grpc

MESSAGE_LIMIT = 80 * 1024 * 1024
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.default_authority", "localhost"),  # servers in Go refuse the socket's path as authority
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
NO_METHOD = ("", "Method not found!", "Method not implemented!")  # the last two are gRPC for Python's
OWN_DEADLINE = "Deadline Exceeded"  # what gRPC says when the client gave up, not the runtime
# How gRPC's own words begin; a runtime's, about a registry say, may hold the same further on.
LOST = re.compile(
    r"(?:unix:\S+ )?(?:failed to connect|connect|socket closed|goaway|recvmsg|sendmsg|broken pipe|transport)",
    re.IGNORECASE,
)
CLASSES: dict[grpc.StatusCode, type[errors.CrioError]] = {
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionRefused,
}


class CallRefused(errors.CrioError):
    """The runtime answered a call with an error for which we have no better class; the message is the runtime's."""


class CallNotFound(errors.CrioError):
    """The runtime does not know the object; the message is the runtime's."""


class Client:
    """A CRI socket.  Connects at the first call; safe to construct without a daemon.

    path: of the socket.  timeout: seconds that a call may take beyond what its own work is granted.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self.timeout = timeout

    def call(self, request: Message, *, grant: float | None = 0, patient: bool = False) -> Any:
        """The answer to `request`, whose type names the call.

        grant: seconds that the work itself may take; None for no deadline.  patient: outlast a restart of the daemon.
        Raises the classes of `errors` as `_translate` maps them.
        """
        name = request.DESCRIPTOR.name.removesuffix("Request")
        deadline = None if grant is None else self.timeout + grant
        try:
            return self._method(name)(request, timeout=deadline, wait_for_ready=patient)
        except grpc.RpcError as error:
            raise self._translate(name, error, deadline) from None

    def events(self) -> Iterator[api.ContainerEventResponse]:
        """Changes of containers and pods, without end."""
        try:
            yield from self._method("GetContainerEvents")(api.GetEventsRequest())
        except grpc.RpcError as error:
            raise self._translate("GetContainerEvents", error, None) from None

    def close(self) -> None:
        if "_stubs" in self.__dict__:
            self._stubs[0].close()

    def _method(self, name: str) -> Any:
        _, runtime, images = self._stubs
        return getattr(runtime if hasattr(runtime, name) else images, name)

    @cached_property
    def _stubs(self) -> tuple[grpc.Channel, Any, Any]:
        self._probe()
        channel = grpc.insecure_channel(f"unix://{self.path}", options=CHANNEL_OPTIONS)
        stubs = api_pb2_grpc.RuntimeServiceStub(channel), api_pb2_grpc.ImageServiceStub(channel)
        return channel, *stubs

    def _probe(self) -> None:
        """Connect once with a plain socket, whose errno says more than gRPC's UNAVAILABLE."""
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(self.timeout)
                probe.connect(self.path)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            if isinstance(error, PermissionError):
                raise errors.PermissionRefused(f"cannot connect to {self.path}: {why}; run crioctl as root") from None
            raise errors.Unavailable(
                f"cannot connect to {self.path}: {why}; start the daemon, or name its socket with --socket"
            ) from None

    def _translate(self, name: str, error: grpc.RpcError, deadline: float | None) -> errors.CrioError:
        code, details = error.code(), " ".join((error.details() or "").split())
        if code == grpc.StatusCode.UNIMPLEMENTED:
            # Of a call that they do not have servers say its name, or NO_METHOD; else what they cannot do with it.
            if name in details or details in NO_METHOD:
                return errors.Unimplemented(f"the runtime at {self.path} does not implement {name}")
            return CallRefused(f"{name}: {details}")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            if deadline is not None and details in ("", OWN_DEADLINE):
                details = f"no answer within {deadline:g} s; raise it with --timeout"
            return errors.DeadlineExceeded(f"{name}: {details}")
        if code == grpc.StatusCode.UNAVAILABLE and not LOST.match(details):
            return errors.Unavailable(f"{name}: {details}")  # something that the runtime needs, a registry say
        if code == grpc.StatusCode.UNAVAILABLE:
            return errors.Unavailable(f"{name}: the runtime at {self.path} is unavailable: {details}")
        if code == grpc.StatusCode.NOT_FOUND:
            return CallNotFound(f"{name}: {details}")
        if code == grpc.StatusCode.CANCELLED:
            return errors.Unavailable(f"{name}: cancelled: {details}")
        return CLASSES.get(code, CallRefused)(f"{name}: {details or code.name}")
