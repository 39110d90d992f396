"""Printing the configuration: as commented TOML, and as the manual's tables.

Here belongs everything that turns declared options into text.  The TOML is printed by hand: a writer that keeps
comments would be a dependency of the daemon for the sake of a handful of value types.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from crio_native.config.schema import Named, Option, default_of, members
from crio_native.config.tables import Config

WIDTH = 118


class Table(NamedTuple):
    """A table and what its options have when no file says otherwise.

    key: its name in brackets.  added: it exists only because a file names it.
    """

    key: str
    values: Any
    defaults: Any
    added: bool = False


def tables(config: Config) -> Iterator[Table]:
    """All tables of a configuration, outer before inner."""
    defaults = Config()
    for name in members(Config):
        key = "crio" if name == "crio" else f"crio.{name}"
        yield from _tables(key, getattr(config, name), getattr(defaults, name))


def _tables(key: str, values: Any, defaults: Any, added: bool = False) -> Iterator[Table]:
    yield Table(key, values, defaults, added)
    for name, member in members(type(values)).items():
        inner, default = getattr(values, name), getattr(defaults, name)
        if isinstance(member, Named):
            for entry, value in inner.items():
                known = default.get(entry)
                yield from _tables(f"{key}.{name}.{_key(entry)}", value, known or member.cls(), known is None)
        elif isinstance(member, type):
            yield from _tables(f"{key}.{name}", inner, default)


class Difference(NamedTuple):
    """An option that two configurations disagree about; one that only one of them has is None in the other.

    reload: a running daemon can take the new value.
    """

    key: str
    old: Any
    new: Any
    reload: bool


def differences(old: Config, new: Config) -> list[Difference]:
    """Every option that differs, by key; a handler or workload that came or went differs as a whole."""
    before, after = ({table.key: table.values for table in tables(config)} for config in (old, new))
    found = []
    for key in before | after:
        if key not in before or key not in after:
            found.append(Difference(key, before.get(key), after.get(key), _reloads_whole(key)))
            continue
        for name, option in _options(type(after[key])):
            pair = getattr(before[key], name), getattr(after[key], name)
            if pair[0] != pair[1]:
                found.append(Difference(f"{key}.{name}", *pair, option.reload or _reloads_whole(key)))
    return found


def inert(config: Config) -> Iterator[tuple[str, Any, str]]:
    """(key, value, reason) of each option that is not at its default and has no effect."""
    for table in tables(config):
        for name, option in _options(type(table.values)):
            value = getattr(table.values, name)
            if option.inert and value != getattr(table.defaults, name):
                yield f"{table.key}.{name}", option.kind.write(value), option.inert


def _reloads_whole(key: str) -> bool:
    return key.startswith("crio.runtime.runtimes.")


def _options(cls: type) -> Iterator[tuple[str, Option]]:
    return ((name, member) for name, member in members(cls).items() if isinstance(member, Option))


def to_toml(config: Config, changed_only: bool = False) -> str:
    """Commented TOML that `load` reads back to an equal configuration; options at their default are commented out.

    With changed_only those are left out, and so are the comments.
    """
    blocks = [_changed(table) if changed_only else _commented(table) for table in tables(config)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _commented(table: Table) -> str:
    parts = [f"{_comment(_summary(type(table.values)))}\n[{table.key}]"]
    for name, option in _options(type(table.values)):
        doc, line = option.doc, _line(table, name, option)
        if option.inert:
            doc += f" No effect here: {option.inert}."
        if getattr(table.values, name) == getattr(table.defaults, name):
            line = f"# {line}"
            if option.deprecated:
                continue
        elif option.deprecated:
            doc += f" Deprecated: {option.deprecated}."
        parts.append(f"{_comment(doc)}\n{line}")
    return "\n\n".join(parts)


def _changed(table: Table) -> str:
    lines = [
        _line(table, name, option)
        for name, option in _options(type(table.values))
        if getattr(table.values, name) != getattr(table.defaults, name)
    ]
    # An empty table of the operator's naming still says that the handler or workload exists.
    return "\n".join([f"[{table.key}]", *lines]) if lines or table.added else ""


def _line(table: Table, name: str, option: Option) -> str:
    return f"{name} = {_toml_value(option.kind.write(getattr(table.values, name)))}"


def _summary(cls: type) -> str:
    text = (cls.__doc__ or "").partition(": ")[2]
    return text[:1].upper() + text[1:]


def _comment(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False))


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # TOML's basic strings take JSON's escapes; DEL is the one character that only TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)} = {_toml_value(member)}" for name, member in value.items()) + "}"
    return "[" + ", ".join(_toml_value(member) for member in value) + "]"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name, re.ASCII) else _toml_value(name)


def reference() -> str:
    """The manual's tables of all options, in Markdown."""
    parts = []
    for key, cls in _all_tables(Config, ""):
        parts.append(f"### [{key}]\n\n{_summary(cls)}\n\n| option | kind | default | meaning |\n|---|---|---|---|")
        parts[-1] += "".join(f"\n{_row(cls, name, option)}" for name, option in _options(cls))
    return "\n\n".join(parts) + "\n"


def _all_tables(cls: type, at: str) -> Iterator[tuple[str, type]]:
    for name, member in members(cls).items():
        key = f"{at}.{name}" if at else "crio" if name == "crio" else f"crio.{name}"
        if isinstance(member, Named):
            yield f"{key}.NAME", member.cls
            yield from _all_tables(member.cls, f"{key}.NAME")
        elif isinstance(member, type):
            yield key, member
            yield from _all_tables(member, key)


def _row(cls: type, name: str, option: Option) -> str:
    default = _toml_value(option.kind.write(default_of(cls, name)))
    marks = f" Deprecated: {option.deprecated}." if option.deprecated else ""
    marks += f" At least {option.floor} is used." if option.floor is not None else ""
    marks += f" **No effect here**: {option.inert}." if option.inert else ""
    marks += " *(reload)*" if option.reload else ""
    cells = (
        f"`{name}`",
        option.kind.allowed,
        f"`{default}`",
        option.doc + marks,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
