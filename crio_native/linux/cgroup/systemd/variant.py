"""Properties in annotations: ``org.systemd.property.NAME: VALUE``, with the value in GVariant's text form.

The form: ``true``, ``'text'``, ``12``, ``uint64 12``, ``1.5``, ``['a', 'b']``, ``(1, 'a')``.  A NAME that ends with
``Sec`` is a time in seconds, which D-Bus knows as NAME with ``USec`` for its end, in microseconds.
"""

from __future__ import annotations

from crio_native.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .properties import Property

PREFIX = "org.systemd.property."
_TEXT_MAX = 4096
_TYPES = {
    name: signature
    for signature, name in zip(
        "bynqiuxtds", "boolean byte int16 uint16 int32 uint32 int64 uint64 double string".split(), strict=True
    )
}
_RANGES = {signature: (-(2 ** (bits - 1)), 2 ** (bits - 1)) for signature, bits in (("n", 16), ("i", 32), ("x", 64))}
_RANGES |= {signature: (0, 2**bits) for signature, bits in (("y", 8), ("q", 16), ("u", 32), ("t", 64))}


def of_annotations(annotations: Mapping[str, str]) -> list[Property]:
    """The properties that annotations ask for.  Raises InvalidArgument with the annotation's name."""
    return [_property(name, text) for name, text in sorted(annotations.items()) if name.startswith(PREFIX)]


def _property(annotation: str, text: str) -> Property:
    field, name = f"annotations[{annotation}]", annotation.removeprefix(PREFIX)
    if not (name.isascii() and name.isalnum() and name[:1].isupper()):
        raise InvalidArgument(field, name, "must end with the name of a systemd property")
    if len(text) > _TEXT_MAX:
        raise InvalidArgument(field, len(text), f"may have at most {_TEXT_MAX} characters")
    try:
        signature, value = parse(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise InvalidArgument(
            field, text, "must be a value in GVariant's text form, as true, 5, uint64 5, 'a' or ['a']"
        ) from None
    if not name.endswith("Sec") or name.endswith("USec"):
        return name, (signature, value)
    if signature not in "nqiuxtyd" or not 0 <= value < 2**40:
        raise InvalidArgument(field, text, "must be a number of seconds")
    return name.removesuffix("Sec") + "USec", ("t", int(value * 1_000_000))


def parse(text: str) -> tuple[str, Any]:
    """(D-Bus signature, value).  Raises ValueError or SyntaxError for what is no such text."""
    import ast

    word, _, rest = text.partition(" ")
    if word in _TYPES:
        signature, value = _TYPES[word], _literal(ast.parse(rest.strip(), mode="eval").body)
    elif word.startswith("@as") and rest.strip() == "[]":
        return "as", []
    else:
        value = _literal(ast.parse(text, mode="eval").body)
        signature = _signature(value)
    _check(signature, value)
    return signature, value


def _literal(node: Any) -> Any:
    import ast

    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_literal(element) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -_number(node.operand.value)
    if isinstance(node, ast.Constant) and type(node.value) in (str, int, float):
        return node.value
    raise ValueError("no literal")


def _number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise ValueError("only a number can be negative")
    return value


def _signature(value: Any) -> str:
    if isinstance(value, list):
        signatures = {_signature(element) for element in value}
        if len(signatures) != 1:
            raise ValueError("a list needs values, all of one type")
        return "a" + signatures.pop()
    if isinstance(value, tuple):
        return "(" + "".join(map(_signature, value)) + ")"
    return {bool: "b", str: "s", int: "i", float: "d"}[type(value)]


def _check(signature: str, value: Any) -> None:
    """That the value is one of the type, which the D-Bus library takes for granted."""
    if signature in _RANGES:
        low, high = _RANGES[signature]
        if type(value) is not int or not low <= value < high:
            raise ValueError("out of the type's range")
    elif signature in ("b", "s", "d"):
        if type(value) not in {"b": (bool,), "s": (str,), "d": (float, int)}[signature]:
            raise ValueError("of another type")
    elif isinstance(value, (list, tuple)):
        for element in value:
            _check(_signature(element), element)
