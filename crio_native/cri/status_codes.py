"""The one table from the program's errors to gRPC's status codes."""

from __future__ import annotations

import errno

import grpc

from crio_native import errors

_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.PermissionRefused, grpc.StatusCode.PERMISSION_DENIED),
    (errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED),
    (errors.UntrustedImage, grpc.StatusCode.UNKNOWN),  # only of this code the kubelet reads the message
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})


def status_code(error: BaseException) -> grpc.StatusCode:
    """INTERNAL for whatever is not in the table.  Whoever met it, a full disk is RESOURCE_EXHAUSTED, and a process that
    has ended meanwhile is FAILED_PRECONDITION, as it is where its end is known."""
    number = error.errno if isinstance(error, OSError) else getattr(error, "number", 0)
    if number in _FULL:
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.FAILED_PRECONDITION if number == errno.ESRCH else grpc.StatusCode.INTERNAL
