"""Strict JSON, as trust needs it: no key twice, none unknown, each value of its type; errors with the path in the
document.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
from typing import Any

from crio_native.errors import FailedPrecondition, InvalidArgument

MAX_FILE = 1 << 20  # bytes, of a policy, a key, a file of registries.d


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open`: does not wait for whom a FIFO wants to meet."""
    return os.open(path, flags | os.O_NONBLOCK)


def read(path: str, what: str) -> bytes:
    """A file that the node's configuration names.  Raises FailedPrecondition where it cannot be read or is no such."""
    try:
        with open(path, "rb", opener=open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FailedPrecondition(f"{what} {path} is not a regular file")
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        raise FailedPrecondition(f"{what} {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(raw) > MAX_FILE:
        raise FailedPrecondition(f"{what} {path} is larger than {MAX_FILE} bytes")
    return raw


def parse(raw: bytes, where: str) -> Fields:
    """A document that is an object.  Raises InvalidArgument."""
    try:
        document = json.loads(raw, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(where, raw[:60], f"not valid JSON: {json_fault(error)}") from None
    return Fields(document, where)


def json_fault(error: Exception) -> str:
    """What is wrong with a document, in words; Python's own for one that is too deep are about its stack."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key!r} comes twice")
        made[key] = value
    return made


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no value of JSON")


class Fields:
    """An object of a document, whose fields are taken one by one.  where: its path.  All raise InvalidArgument."""

    def __init__(self, value: object, where: str, top: bool = True) -> None:
        if not isinstance(value, dict):
            raise InvalidArgument(where, value, "not an object")
        self.where, self._left = where, dict(value)
        self._separator = ": " if top else "."

    def path(self, key: str) -> str:
        return f"{self.where}{self._separator}{key}"

    def has(self, key: str) -> bool:
        return key in self._left

    def names(self) -> list[str]:
        return list(self._left)

    def take(self, key: str, kind: type, default: Any = ...) -> Any:
        """A field's value; without a default it must be there."""
        if key not in self._left:
            if default is ...:
                raise InvalidArgument(self.path(key), None, "is missing")
            return default
        value = self._left.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            words = {str: "a text", int: "a whole number", list: "a list", dict: "an object", bool: "a boolean"}
            raise InvalidArgument(self.path(key), value, f"not {words[kind]}")
        return value

    def text(self, key: str) -> str:
        """Text that is not empty."""
        value: str = self.take(key, str)
        if not value:
            raise InvalidArgument(self.path(key), value, "is empty")
        return value

    def object(self, key: str) -> Fields:
        return Fields(self.take(key, dict), self.path(key), top=False)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of at least one text, none of them empty."""
        values = self.take(key, list)
        if not values or not all(isinstance(value, str) and value for value in values):
            raise InvalidArgument(self.path(key), values, "not a list of at least one text")
        return tuple(values)

    def done(self, kind: str) -> None:
        """Nothing is left that nobody asked for."""
        for key, value in self._left.items():
            raise InvalidArgument(self.path(key), value, f"is no field of {kind}")


def decoded(text: str, where: str) -> bytes:
    """Base64 of something.  Raises InvalidArgument."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(where, text, "not base64") from None
