"""The one table from the program's errors to gRPC's status codes."""

from __future__ import annotations

import errno

from crio_native import errors
from crio_native.cri.rpc import Code

_CODES: tuple[tuple[type[BaseException], Code], ...] = (
    (errors.InvalidArgument, Code.INVALID_ARGUMENT),
    (errors.NotFound, Code.NOT_FOUND),
    (errors.AlreadyExists, Code.ALREADY_EXISTS),
    (errors.FailedPrecondition, Code.FAILED_PRECONDITION),
    (errors.Unavailable, Code.UNAVAILABLE),
    (errors.DeadlineExceeded, Code.DEADLINE_EXCEEDED),
    (errors.ResourceExhausted, Code.RESOURCE_EXHAUSTED),
    (errors.PermissionRefused, Code.PERMISSION_DENIED),
    (errors.Unimplemented, Code.UNIMPLEMENTED),
    (errors.UntrustedImage, Code.UNKNOWN),  # only of this code the kubelet reads the message
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})


def status_code(error: BaseException) -> Code:
    """INTERNAL for whatever is not in the table; a full disk is RESOURCE_EXHAUSTED, whoever met it."""
    number = error.errno if isinstance(error, OSError) else getattr(error, "number", 0)
    if number in _FULL:
        return Code.RESOURCE_EXHAUSTED
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return Code.INTERNAL
