"""Reading JSON that an operator wrote: every key by name, each mistake told with its file and path."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable
from typing import Any, TypeVar

from crio_native.errors import InvalidArgument

log = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
T = TypeVar("T", str, int, bool, list[Any])


class Keys:
    """A JSON object that is consumed key by key, so that what is left over was not understood."""

    def __init__(self, data: Any, source: str, path: str) -> None:
        self.source, self.path = source, path
        if not isinstance(data, dict):
            raise InvalidArgument(f"{source}: {path.rstrip('.') or 'document'}", data, "must be an object")
        self.data = dict(data)

    def wrong(self, key: str, value: object, reason: str) -> InvalidArgument:
        return InvalidArgument(f"{self.source}: {self.path}{key}", value, reason)

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.data.pop(key, default)
        if value is None:
            raise self.wrong(key, None, f"is required and must be of type {kind.__name__}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(key, value, f"must be of type {kind.__name__}")
        return value

    def inner(self, key: str) -> Keys:
        return Keys(self.data.pop(key, None), self.source, f"{self.path}{key}.")

    def address(self, key: str, default: Address | None) -> Address:
        text = self.take(key, str, None if default is None else str(default))
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise self.wrong(key, text, "must be an IP address") from None
        if getattr(address, "scope_id", None):
            raise self.wrong(key, text, "must be an address without a zone")
        return address

    def finish(self, ignored: Iterable[str]) -> None:
        for key in self.data:
            if key not in ignored:
                log.warning("%s: %s%.60s: unknown key, ignored", self.source, self.path, key)
