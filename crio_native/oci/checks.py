"""Checking the types and ranges of parsed JSON, each refusal with the value's path: what `spec` is written in.

None counts as absent, as in Go, whose programs write most config.json files: `items` and `mapping` make it empty.
"""

from __future__ import annotations

from _collections_abc import Mapping  # without the package around it, which costs as much as all of this file

from crio_native.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

MAX_STRING = 128 * 1024  # the kernel's own bound of one argument (MAX_ARG_STRLEN)
MAX_ANNOTATION = 2 << 20  # Kubernetes allows 256 KiB in all, which are one value here, escaped as JSON
MAX_ITEMS = 10_000


def matches(pattern: str, text: str) -> bool:
    """Whether all of the text fits.  The import is as dear as all else here, and few containers need it."""
    import re

    return re.fullmatch(pattern, text, re.ASCII) is not None


def mapping(value: Any, field: str) -> Mapping[str, Any]:
    if type(value) is dict:  # what a parser makes; asking the abstract class costs ten times as much
        return value
    if value is None:
        return {}
    checked: Mapping[str, Any] = _typed(value, field, Mapping, "an object")
    return checked


def items(value: Any, field: str) -> list[Any]:
    checked = [] if value is None else list(_typed(value, field, (list, tuple), "a list"))
    if len(checked) > MAX_ITEMS:
        raise InvalidArgument(field, len(checked), f"may have at most {MAX_ITEMS} entries")
    if None in checked:  # a field may be null where it is absent; an entry cannot be absent
        raise InvalidArgument(f"{field}[{checked.index(None)}]", None, "may not be null")
    return checked


def string(value: Any, field: str, most: int = MAX_STRING) -> str:
    checked: str = value if type(value) is str else _typed(value, field, str, "a string")
    if "\0" in checked:
        raise InvalidArgument(field, checked, "may not contain a NUL byte")
    if len(checked) > most:
        raise InvalidArgument(field, checked, f"may have at most {most} characters")
    if not checked.isascii():
        _encodable(checked, field, "surrogateescape")
    return checked


def optional_string(value: Any, field: str) -> str:
    return "" if value is None else string(value, field)


def strings(value: Any, field: str) -> list[str]:
    entries = items(value, field)
    for index, entry in enumerate(entries):
        # Else no path needs to be made up.
        if type(entry) is not str or len(entry) > MAX_STRING or "\0" in entry or not entry.isascii():
            string(entry, f"{field}[{index}]")
    return entries


def encodable(value: Any, field: str) -> None:
    """Raise InvalidArgument for a string in parsed JSON, or a key, that has half of a surrogate pair: the kernel takes
    bytes, and for that there are none.  (Those halves with which Python spells foreign bytes are not meant by JSON.)"""
    pending = [(field, value)]
    while pending:
        field, value = pending.pop()
        if isinstance(value, str):
            _encodable(value, field, "strict")
        elif isinstance(value, dict):
            for key, item in value.items():
                here = f"{field}.{key}".lstrip(".") if key.isidentifier() else f"{field}[{key!r}]"
                pending += (here, key), (here, item)
        elif isinstance(value, list):
            pending += ((f"{field}[{index}]", item) for index, item in enumerate(value))


def _encodable(text: str, field: str, errors: str) -> None:
    try:
        text.encode(errors=errors)
    except UnicodeEncodeError:
        raise InvalidArgument(field, text, "may not contain half of a surrogate pair") from None


def absolute(value: Any, field: str) -> str:
    path = string(value, field)
    if not path.startswith("/"):
        raise InvalidArgument(field, path, "must be absolute")
    return path


def number(value: Any, field: str, least: int, most: int) -> int:
    checked: int = _typed(value, field, int, "a whole number")
    if not least <= checked <= most:
        raise InvalidArgument(field, checked, f"must be between {least} and {most}")
    return checked


def boolean(value: Any, field: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidArgument(field, value, "must be true or false")
    return bool(value)


def one_of(value: Any, field: str, known: Collection[str]) -> str:
    name = string(value, field)
    if name not in known:
        raise InvalidArgument(field, name, f"must be one of {', '.join(known)}")
    return name


def _typed(value: Any, field: str, kind: type | tuple[type, ...], words: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidArgument(field, value, f"must be {words}")
    return value
