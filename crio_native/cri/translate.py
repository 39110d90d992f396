"""Protobuf to the domain's values and back: the door, in both directions.

Value classes carry the CRI's field names, so one walk over a class serves every message: no line is written for a
field.  A message that sets a field which the value class does not have is refused, because to ignore what a caller
asks of a security boundary is worse than to say no.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from crio_native.errors import InvalidArgument, Unimplemented
from crio_native.pods.values import Shape, shapes

T = TypeVar("T")

MAX_ITEMS = 16384
MAX_TEXT = 1 << 20


def from_message(cls: type[T], message: Any, path: str = "") -> T:
    """The value that a protobuf message says.

    path: the message's own place in the request, for errors.  Raises InvalidArgument for a list or text beyond its
    bound, a NUL byte or an unknown enum value; Unimplemented for a field that this version does not know how to honour.
    """
    known = shapes(cls)
    check_known(message, known, path)
    return cls(**{name: _field(message, name, shape, _join(path, name)) for name, shape in known.items()})


def check_known(message: Any, known: Collection[str], path: str = "") -> None:
    """Raises Unimplemented for a field that is set and not among the known."""
    for descriptor, _ in message.ListFields():
        if descriptor.name not in known:
            raise Unimplemented(f"{_join(path, descriptor.name)}: this version does not implement the field")


def _field(message: Any, name: str, shape: Shape, path: str) -> Any:
    if shape.kind == "optional":
        return _item(getattr(message, name), shape.inner, path) if message.HasField(name) else None
    if shape.kind == "scalar" and shape.inner is str:
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        if descriptor.enum_type is not None:
            return _enum_name(descriptor.enum_type, getattr(message, name), path)
    return _item(getattr(message, name), shape, path)


def _item(item: Any, shape: Shape, path: str) -> Any:
    match shape.kind:
        case "list":
            if len(item) > MAX_ITEMS:
                raise InvalidArgument(path, len(item), f"at most {MAX_ITEMS} items are accepted")
            return tuple(_item(each, shape.inner, f"{path}[{i}]") for i, each in enumerate(item))
        case "map":
            if len(item) > MAX_ITEMS:
                raise InvalidArgument(path, len(item), f"at most {MAX_ITEMS} entries are accepted")
            return {_text(key, path): _text(value, f"{path}[{key!r}]") for key, value in item.items()}
        case "value":
            return from_message(shape.inner, item, path)
        case "enum":
            try:
                return shape.inner(item)
            except ValueError:
                allowed = ", ".join(f"{e.name} ({e.value})" for e in shape.inner)
                raise InvalidArgument(path, item, f"is none of {allowed}") from None
        case _ if shape.inner is str:
            return _text(item, path)
        case _:
            return getattr(item, "value", item)  # Int64Value and its like wrap one number


def _text(item: str | bytes, path: str) -> str:
    if isinstance(item, bytes):  # KeyValue.value: bytes on the wire, text for execve
        item = item.decode(errors="surrogateescape")
    if len(item) > MAX_TEXT:
        raise InvalidArgument(path, item, f"is longer than {MAX_TEXT} characters")
    if "\0" in item:
        raise InvalidArgument(path, item, "contains a NUL character, which no system call can carry")
    return item


def _enum_name(enum: Any, number: int, path: str) -> str:
    if number == 0:
        return ""
    known = enum.values_by_number.get(number)
    if known is None:
        raise InvalidArgument(path, number, f"is not a number of {enum.name}")
    return str(known.name)


def to_message(message: Any, value: Any) -> Any:
    """Fill a protobuf message from a value; fields that the message lacks are left out.  Returns the message."""
    fields = message.DESCRIPTOR.fields_by_name
    for name, shape in shapes(type(value)).items():
        item = getattr(value, name)
        if name not in fields or item is None or item == ():
            continue
        _put(message, fields[name], name, shape.inner if shape.kind == "optional" else shape, item)
    return message


def _put(message: Any, descriptor: Any, name: str, shape: Shape, item: Any) -> None:
    match shape.kind:
        case "value":
            sub = getattr(message, name)
            sub.SetInParent()
            to_message(sub, item)
        case "list" if shape.inner.kind == "value":
            for each in item:
                to_message(getattr(message, name).add(), each)
        case "list":
            getattr(message, name).extend(item)
        case "map":
            getattr(message, name).update(item)
        case _ if descriptor.message_type is not None:
            getattr(message, name).value = item
        case _ if descriptor.enum_type is not None and isinstance(item, str):
            setattr(message, name, descriptor.enum_type.values_by_name[item].number if item else 0)
        case _ if isinstance(item, str) and descriptor.type == descriptor.TYPE_BYTES:
            setattr(message, name, item.encode(errors="surrogateescape"))
        case _:
            setattr(message, name, item)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether the labels have every pair of a filter's label selector."""
    return all(labels.get(key) == value for key, value in selector.items())
