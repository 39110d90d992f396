"""The errors that cross room boundaries, and nothing else.

Two families.  A caller's mistake (`InvalidArgument`, `NotFound`, ...) names the field and the value; a failed act
(`StepFailed`, `Internal`, ...) names the step, what it worked on and the errno.  Messages are lower-case and have no
full stop.  `cri/` maps each class to one gRPC status in one table; nothing else in the program knows gRPC's codes.

What a message quotes may come from a registry, an image or a tenant, and who reads it has a terminal or a log of lines:
the text of every error is `printable`.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def printable(text: str) -> str:
    """`text` in one line, with control characters, and whatever else shows nothing, as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class CrioError(Exception):
    """Base of every error that the program raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidArgument(CrioError):
    """The caller's input is wrong.

    field: path of the offending field in the input's own words (``config.linux.resources.memory_limit_in_bytes``).
    value: what was given; shortened in the message, and left out of it for `...`.  reason: what is wrong and what would
    be accepted.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field}: {reason}" + ("" if value is ... else f" (got {shown})"))
        self.field, self.value, self.reason = field, value, reason


class NotFound(CrioError):
    """A named object does not exist."""

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(f"{kind} {name!r} not found" + (f": {hint}" if hint else ""))
        self.kind, self.name = kind, name


class AlreadyExists(CrioError):
    """The name is taken by a live object."""


class FailedPrecondition(CrioError):
    """The object exists but is not in a state that permits the act."""


class Unavailable(CrioError):
    """Something outside (a registry, a plugin, a launcher) did not serve; trying again may help."""


class DeadlineExceeded(CrioError):
    """A time limit passed; the message names the stage that the work is in."""


class ResourceExhausted(CrioError):
    """A bound was reached: disk, addresses, sizes, counts."""


class PermissionRefused(CrioError):
    """Policy, or the kernel, forbids it."""


class UntrustedImage(CrioError):
    """The trust policy refuses an image; the message starts with the word by which the kubelet knows that (CRI)."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"SignatureValidationFailed: {reason}")


class Unimplemented(CrioError):
    """A call or feature that this version does not have."""


class Internal(CrioError):
    """An invariant broke or the kernel refused something that should work."""


class StepFailed(CrioError):
    """A step of a plan failed (in a launcher, an init, or here).

    step: the step's name.  number: errno, 0 when no system call failed.  path: what it worked on, may be empty.
    detail: what to know beyond that.  The same four travel from the child as JSON (`to_dict`, `from_dict`).
    """

    def __init__(self, step: str, number: int = 0, path: str = "", detail: str = "") -> None:
        why = f"{_errno.errorcode.get(number, number)} ({os.strerror(number).lower()})" if number else ""
        parts = [f"step {step!r} failed", path and f"on {path}", why and f"with {why}", detail]
        head = " ".join(p for p in parts[:3] if p)
        super().__init__(head + (f": {detail}" if detail else ""))
        self.step, self.number, self.path, self.detail = step, number, path, detail

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "errno": self.number, "path": self.path, "detail": self.detail}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepFailed:
        return cls(str(data["step"]), int(data.get("errno", 0)), str(data.get("path", "")), str(data.get("detail", "")))


class StartFailed(StepFailed):
    """The container was made but its command could not be executed (kubelet's StartError)."""
