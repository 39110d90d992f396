"""Reading the configuration: crio.conf, its drop-ins, the command line; one checked Config comes out.

Here belong finding and parsing files, merging them key by key, and the warnings about what they say.  What holds
between options is in `rules`; the options themselves are in `tables`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from crio_native.config import rules
from crio_native.config.schema import Named, Option, default_of, members
from crio_native.config.tables import Config, RootTable
from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted

DEFAULT_FILE = Path("/etc/crio/crio.conf")
DEFAULT_DIRECTORY = Path("/etc/crio/crio.conf.d")
COMMAND_LINE = "command line"
_LISTEN = "crio.api.listen"

FILE_SIZE_MAX = 1 << 20
FILES_MAX = 256
WARNINGS_MAX = 100
NAMED_TABLES_MAX = 256

# Keys that are met where CRI-O's parser would ignore them, and where they belong: older files, and the manual's slips.
MOVED = {
    ("crio", "log_level"): ("crio", "runtime", "log_level"),
    ("crio", "log_filter"): ("crio", "runtime", "log_filter"),
    ("crio", "image", "separate_pull_cgroup"): ("crio", "runtime", "separate_pull_cgroup"),
}

_BACKUP = re.compile(r"\..*|.*~|#.*#|.*\.(?:bak|orig|old|rej|swp|tmp|rpmnew|rpmsave|rpmorig|dpkg-\w+|ucf-\w+)")
_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", re.ASCII)

Key = tuple[str, ...]
Shape = Mapping[str, Any]  # key -> Option, Named or Shape


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, what was odd about it, and the files that it came from, in the order they were read.

    where: "FILE: KEY" of a key, for messages about its value.
    """

    config: Config
    warnings: list[str]
    files: list[Path]
    where: Callable[[str], str]


class Setting(NamedTuple):
    """A value and where it was written."""

    value: Any
    source: str


def load(
    path: Path | None = None,
    directory: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Loaded:
    """The configuration of `path`, then of the files in `directory` in lexical order, then of `overrides`.

    None reads CRI-O's own places, as far as they exist; what is named must exist.  Later values win, key by key.
    overrides: TOML values by dotted key ("crio.runtime.log_level").  variables: by the same keys, the variable of the
    environment that such a value came from, where it was not the command line.  Raises InvalidArgument whose field is
    "FILE: KEY" (for a syntax error "FILE:LINE:COLUMN"), NotFound, FailedPrecondition for a file that cannot be read,
    ResourceExhausted for one that is too large.  Unknown keys only warn: files
    of other versions must load.
    """
    files = [*_main_file(path), *_drop_ins(directory)]
    warnings = Warnings()
    settings: dict[Key, Setting] = {}
    for file in files:
        settings.update(scan(parse(file), str(file), warnings))
    for key, value in overrides.items():
        settings.update(scan(_nested(key, value), variables.get(key, COMMAND_LINE), warnings))
    config = build(Config, settings, ())
    where = partial(_source, settings)
    return Loaded(rules.settle(config, where, warnings.add), warnings.lines(), files, where)


def socket_anyway(path: Path | None, directory: Path | None, overrides: Mapping[str, Any]) -> str:
    """The CRI socket that a configuration names which `load` refuses, as far as it can be read."""
    files: list[Path] = []
    with suppress(CrioError):
        files += _main_file(path)
    with suppress(CrioError):
        files += _drop_ins(directory)
    tables: list[dict[str, Any]] = []
    for file in files:
        with suppress(CrioError):
            tables.append(parse(file))
    if _LISTEN in overrides:
        tables.append(_nested(_LISTEN, overrides[_LISTEN]))
    found = Config().api.listen
    for table in tables:
        with suppress(InvalidArgument, KeyError, TypeError):
            found = _option(tuple(_LISTEN.split("."))).kind.read(table["crio"]["api"]["listen"], _LISTEN)
    return found


def _main_file(path: Path | None) -> list[Path]:
    if path is not None and not path.exists():
        raise NotFound("configuration file", str(path))
    return [path or DEFAULT_FILE] if path or DEFAULT_FILE.exists() else []


def _drop_ins(directory: Path | None) -> list[Path]:
    try:
        names = sorted(os.listdir(directory or DEFAULT_DIRECTORY))
    except FileNotFoundError:
        if directory is not None:
            raise NotFound("configuration directory", str(directory)) from None
        return []
    except OSError as error:
        raise FailedPrecondition(f"{directory}: cannot be read: {error.strerror}") from None
    files = [(directory or DEFAULT_DIRECTORY) / name for name in names if not _BACKUP.fullmatch(name)]
    files = [file for file in files if not file.is_dir()]
    if len(files) > FILES_MAX:
        raise ResourceExhausted(f"{directory or DEFAULT_DIRECTORY}: more than {FILES_MAX} configuration files")
    return files


def parse(file: Path) -> dict[str, Any]:
    """One file's TOML.  Raises InvalidArgument with line and column where the syntax is wrong."""
    text = _read(file)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InvalidArgument(str(file), text, "is nested too deeply") from None
    except ValueError as error:
        position = _POSITION.search(str(error))
        reason = str(error)[: position.start()] if position else str(error)
        lines = text.split("\n")
        line, column = (
            (int(position[1]), int(position[2])) if position and position[1] else (len(lines), len(lines[-1]) + 1)
        )
        raise InvalidArgument(f"{file}:{line}:{column}", lines[line - 1], f"is not TOML: {reason.lower()}") from None


def _read(file: Path) -> str:
    try:
        # O_NONBLOCK: a FIFO in the directory must not hold the start for ever.
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if not stat.S_ISREG(mode) and str(file) != os.devnull:
                raise FailedPrecondition(f"{file}: is not a regular file")
            data = stream.read(FILE_SIZE_MAX + 1)
    except OSError as error:
        raise FailedPrecondition(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > FILE_SIZE_MAX:
        raise ResourceExhausted(f"{file}: larger than {FILE_SIZE_MAX} bytes")
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise InvalidArgument(f"{file}:{line}:{column}", data[error.start : error.end], "is not UTF-8") from None


class Warnings:
    """Lines for the log, bounded: a file may be wrong in every line."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = 0

    @property
    def full(self) -> bool:
        return len(self._lines) >= WARNINGS_MAX

    def add(self, line: str) -> None:
        if self.full:
            self._more += 1
        else:
            self._lines.append(line)

    def lines(self) -> list[str]:
        return [*self._lines, f"and {self._more} more warnings"] if self._more else self._lines


def shape(cls: type) -> dict[str, Any]:
    return {name: shape(member) if isinstance(member, type) else member for name, member in members(cls).items()}


def _whole_shape() -> Shape:
    # Config.crio stands for the table [crio] itself, whose tables are Config's other fields.
    tables = shape(Config)
    return {"crio": tables.pop("crio") | tables}


SHAPE = _whole_shape()


def scan(raw: Mapping[str, Any], source: str, warnings: Warnings) -> dict[Key, Setting]:
    """The settings of one source, checked each by itself."""
    settings: dict[Key, Setting] = {}
    moved: dict[Key, Setting] = {}
    for key, value in _scan_table(raw, SHAPE, (), source, warnings):
        if key in MOVED:
            warnings.add(
                f"{source}: {'.'.join(key)}: belongs to {'.'.join(MOVED[key][:-1])}; taken as if it were there"
            )
            key = MOVED[key]
            moved[key] = Setting(_option(key).kind.read(value, f"{source}: {'.'.join(key)}"), source)
        else:
            settings[key] = Setting(value, source)
    return moved | settings


def _scan_table(
    raw: Mapping[str, Any], known: Shape, at: Key, source: str, warnings: Warnings
) -> Iterator[tuple[Key, Any]]:
    for name, value in raw.items():
        key = (*at, name)
        member = known.get(name)
        if isinstance(member, Option):
            where = f"{source}: {'.'.join(key)}"
            read = member.kind.read(value, where)
            if member.deprecated and read != member.default:
                warnings.add(f"{where}: deprecated: {member.deprecated}")
            yield key, _raised(member, read, where, warnings)
        elif key in MOVED:
            yield key, value
        elif member is None:
            _warn_unknown(key, known, source, warnings)
        elif not isinstance(value, dict):
            raise InvalidArgument(f"{source}: {'.'.join(key)}", value, "must be a table")
        elif isinstance(member, Named):
            yield from _scan_named(value, member, key, source, warnings)
        else:
            yield from _scan_table(value, member, key, source, warnings)


def _scan_named(
    raw: Mapping[str, Any], member: Named, at: Key, source: str, warnings: Warnings
) -> Iterator[tuple[Key, Any]]:
    if len(raw) > NAMED_TABLES_MAX:
        raise InvalidArgument(
            f"{source}: {'.'.join(at)}", len(raw), f"must not have more than {NAMED_TABLES_MAX} tables"
        )
    for name, entry in raw.items():
        where = f"{source}: {'.'.join((*at, name))}"
        if not _NAME.fullmatch(name):
            raise InvalidArgument(where, name, "must be named with letters, digits and inner '-', '_', '.', at most 63")
        if not isinstance(entry, dict):
            raise InvalidArgument(where, entry, "must be a table")
        yield (*at, name), None  # the table exists, even if nothing is in it
        yield from _scan_table(entry, shape(member.cls), (*at, name), source, warnings)


def _raised(option: Option, value: Any, where: str, warnings: Warnings) -> Any:
    if option.floor is None or value >= option.floor:
        return value
    warnings.add(f"{where}: {value} is raised to {option.floor}, the least that is used")
    return option.floor


def _warn_unknown(key: Key, known: Shape, source: str, warnings: Warnings) -> None:
    if warnings.full:  # the search below is too dear to be made for nothing
        warnings.add("")
        return
    nearest = _nearest(key, known)
    shown = repr(".".join(key)[:200])[1:-1]  # a quoted key may hold line breaks
    warnings.add(f"{source}: {shown}: unknown key, ignored" + (f"; did you mean {nearest}?" if nearest else ""))


def _nearest(key: Key, known: Shape) -> str:
    """The known key most like an unknown one: in its own table first, then anywhere."""
    name = key[-1][:80]
    if close := difflib.get_close_matches(name, known, 1, 0.7):
        return ".".join((*key[:-1], close[0]))
    everywhere = {option[-1]: option for option in _all_keys(SHAPE, ())}
    close = difflib.get_close_matches(name, everywhere, 1, 0.8)
    return ".".join(everywhere[close[0]]) if close else ""


def _all_keys(known: Shape, at: Key) -> Iterator[Key]:
    for name, member in known.items():
        if isinstance(member, Named):
            yield from _all_keys(shape(member.cls), (*at, name, "NAME"))
        elif not isinstance(member, Option):
            yield from _all_keys(member, (*at, name))
        yield (*at, name)


def _option(key: Key) -> Option:
    found: Any = SHAPE
    for name in key:
        found = found[name]
    assert isinstance(found, Option)
    return found


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    """A value as TOML would have it: in its tables."""
    raw: Any = list(value) if isinstance(value, tuple) else value
    for name in reversed(dotted.split(".")):
        raw = {name: raw}
    return dict(raw)


def build(cls: type, settings: Mapping[Key, Setting], at: Key) -> Any:
    """A table, of the settings below its key and of defaults."""
    values = {}
    for name, member in members(cls).items():
        key = ("crio",) if cls is Config and member is RootTable else ("crio", name) if cls is Config else (*at, name)
        if isinstance(member, type):
            values[name] = build(member, settings, key)
        elif isinstance(member, Named):
            values[name] = _build_named(member, default_of(cls, name), settings, key)
        elif key in settings:
            values[name] = settings[key].value
    return cls(**values)


def _build_named(
    member: Named, default: Mapping[str, Any], settings: Mapping[Key, Setting], at: Key
) -> Mapping[str, Any]:
    entries = dict(default)
    names = [key[-1] for key in settings if len(key) == len(at) + 1 and key[: len(at)] == at]
    for name in names:
        built = build(member.cls, settings, (*at, name))
        entries[name] = _over_default(default[name], built, settings, (*at, name)) if name in default else built
    return MappingProxyType(entries)


def _over_default(default: Any, built: Any, settings: Mapping[Key, Setting], at: Key) -> Any:
    given = {name: getattr(built, name) for name in members(type(built)) if (*at, name) in settings}
    return dataclasses.replace(default, **given)


def _source(settings: Mapping[Key, Setting], dotted: str) -> str:
    """Where a key was written, for a message about it."""
    found = [setting.source for key, setting in settings.items() if ".".join(key) == dotted]
    return f"{found[0] if found else 'default'}: {dotted}"
