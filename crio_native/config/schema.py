"""How an option is declared, and what follows from the declaration alone.

Here belong `option`, `table` and `named`, the words that `tables` is written in.  Reading files is `loading`'s matter,
printing `render`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from crio_native.config.kinds import Kind


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of an option beyond its name and its default.

    default: the value while nothing else is said, where it is not made anew each time.
    reload: a running daemon takes a new value on SIGHUP.  deprecated: what to do instead, "" while it is current.
    flag: the command line's name for it, without dashes.  floor: smaller values are raised to it, with a warning.
    inert: why nothing here follows from it, "" for an option that has an effect; a value other than the default is
    warned about with that reason.
    """

    kind: Kind
    doc: str
    default: Any = None
    reload: bool = False
    deprecated: str = ""
    flag: str = ""
    floor: int | None = None
    inert: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """A table of tables that the operator names: `[crio.runtime.runtimes.NAME]`."""

    cls: type
    doc: str


def option(default: Any, kind: Kind, doc: str, **more: Any) -> Any:
    """A field for one option; a callable default is evaluated when no file gives a value."""
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"schema": Option(kind, doc, **more)})
    return dataclasses.field(default=default, metadata={"schema": Option(kind, doc, default, **more)})


def no_entries() -> Mapping[str, Any]:
    return MappingProxyType({})


def table(cls: type) -> Any:
    """A field for a table of its own."""
    return dataclasses.field(default_factory=cls, metadata={"schema": cls})


def named(cls: type, doc: str, default: Any = no_entries) -> Any:
    """A field for tables that the operator names; `default` makes those that exist without a configuration."""
    return dataclasses.field(default_factory=default, metadata={"schema": Named(cls, doc)})


def members(cls: type) -> Mapping[str, Option | Named | type]:
    """The options and tables of a table class, by name, in order."""
    return MappingProxyType({field.name: field.metadata["schema"] for field in dataclasses.fields(cls)})


def default_of(cls: type, name: str) -> Any:
    field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
