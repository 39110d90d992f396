"""registries.conf, version 2, and its drop-ins (containers-registries.conf(5)): which hosts to ask for an image.

From files to checked values, and from a reference to the endpoints that may serve it.  What a short name means is
`short_names`'s; talking to a host is `registry`'s.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.errors import InvalidArgument, PermissionRefused
from crio_native.images import references
from crio_native.images.references import Reference

FILE = Path("/etc/containers/registries.conf")
DIRECTORY = Path("/etc/containers/registries.conf.d")
# Aliases that tools of the same family have recorded; they win over the files.
ALIASES_CACHE = Path("/var/cache/containers/short-name-aliases.conf")

MODES = ("enforcing", "permissive", "disabled")
PULLS = ("all", "digest-only", "tag-only")
MAX_FILE = 1 << 20  # bytes
MAX_FILES = 1000
MAX_MIRRORS = 32  # of one registry: each may cost a pull its time limit

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Paths:
    """Where to read.  `from_environment` knows the usual places and the variables that replace them."""

    file: Path = FILE
    directory: Path = DIRECTORY
    aliases: Path = ALIASES_CACHE

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Paths:
        return cls(
            Path(environment.get("CONTAINERS_REGISTRIES_CONF") or FILE),
            Path(environment.get("CONTAINERS_REGISTRIES_CONF_DIR") or DIRECTORY),
            Path(environment.get("CONTAINERS_SHORT_NAME_ALIASES_CONF") or ALIASES_CACHE),
        )

    def all(self) -> list[Path]:
        """The files there are, in the order in which they are read.  Raises InvalidArgument for too many."""
        drop_ins = sorted(self.directory.glob("*.conf"))
        if len(drop_ins) > MAX_FILES:
            raise InvalidArgument(str(self.directory), len(drop_ins), f"more than {MAX_FILES} files")
        return [path for path in (self.file, *drop_ins, self.aliases) if path.is_file()]


@dataclass(frozen=True, slots=True)
class Mirror:
    """A place to ask before the registry itself.  pull: for which references, one of PULLS."""

    location: str
    insecure: bool = False
    pull: str = "all"

    def serves(self, reference: Reference) -> bool:
        return self.pull == "all" or (self.pull == "digest-only") == bool(reference.digest)


@dataclass(frozen=True, slots=True)
class Registry:
    """One [[registry]].  location: "" where the prefix is a wildcard and names are not rewritten.  source: its file."""

    prefix: str
    location: str
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[Mirror, ...] = ()
    source: str = ""

    def match(self, name: str) -> int:
        """How many characters of a complete name the prefix covers; 0 if it does not match."""
        if not self.prefix.startswith("*."):
            end = len(self.prefix)
            # After a host alone a colon would begin a port, which makes it another host.
            ends = ":/@" if "/" in self.prefix else "/"
            matches = name.startswith(self.prefix) and (end == len(name) or name[end] in ends)
            return end if matches else 0
        host, _, _ = name.partition("/")
        suffix, _, path = self.prefix[1:].partition("/")
        bare = references.split_port(host)[0] if ":" not in suffix else host
        if not bare.endswith(suffix) or bare == suffix:
            return 0
        end = len(bare) + (len(path) + 1 if path else 0)
        tail_fits = end == len(name) or name[end] in ":/@"
        return end if tail_fits and name[len(bare) : end] == (path and f"/{path}") else 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Whom to ask, and for what: the reference as that host knows it.  A mirror is not given the caller's secrets."""

    reference: Reference
    insecure: bool = False
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class Registries:
    """All files together.

    search: registries that a short name may be of, in order.  mode: one of MODES, or "" where no file says.  helpers:
    where credentials are looked up, in order.
    """

    search: tuple[str, ...] = ()
    mode: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    helpers: tuple[str, ...] = ()
    registries: tuple[Registry, ...] = ()

    def find(self, reference: Reference) -> Registry | None:
        """The [[registry]] with the longest prefix of a reference."""
        name = str(reference)
        best = max(self.registries, key=lambda registry: registry.match(name), default=None)
        return best if best and best.match(name) else None

    def endpoints(self, reference: Reference) -> tuple[Endpoint, ...]:
        """Whom to ask in turn: mirrors first, the registry itself last.  Raises PermissionRefused if it is blocked."""
        registry = self.find(reference)
        if registry is None:
            return (Endpoint(reference),)
        if registry.blocked:
            raise PermissionRefused(
                f"registry {registry.prefix!r} is blocked by {registry.source}, so {reference} is not pulled"
            )
        end = registry.match(str(reference))
        mirrors = [
            Endpoint(_rewritten(reference, mirror.location, end), mirror.insecure, mirror=True)
            for mirror in registry.mirrors
            if mirror.serves(reference)
        ]
        return (*mirrors, Endpoint(_rewritten(reference, registry.location, end), registry.insecure))


def _rewritten(reference: Reference, location: str, matched: int) -> Reference:
    if not location:
        return reference
    # The prefix may end inside the tag or digest, which stay what they were asked for.
    rest = reference.name[matched:]
    host, _, path = f"{location}{rest}".partition("/")
    return Reference(host, path, reference.tag, reference.digest)


def load(paths: Paths) -> Registries:
    """Read and check everything.

    Where there is no file at all, a name without a registry is one of Docker Hub's, as people are used to.  Raises
    InvalidArgument with file and field.
    """
    merged = Registries()
    found = paths.all()
    for path in found:
        merged = _merged(merged, _read(path))
    return dataclasses.replace(merged, search=(references.DEFAULT_REGISTRY,)) if not found else merged


def _merged(below: Registries, above: Registries) -> Registries:
    """A later file replaces what it says, name by name where there are names; an empty alias removes one."""
    aliases = {**below.aliases, **above.aliases}
    registries = {registry.prefix: registry for registry in (*below.registries, *above.registries)}
    return Registries(
        above.search or below.search,
        above.mode or below.mode,
        {name: value for name, value in aliases.items() if value},
        above.helpers or below.helpers,
        tuple(registries.values()),
    )


def _read(path: Path) -> Registries:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise InvalidArgument(str(path), f"{len(raw)} bytes", f"larger than {MAX_FILE} bytes")
        document = tomllib.loads(raw.decode())
    except OSError as error:
        raise InvalidArgument(str(path), error.strerror, "it cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(str(path), str(error), "not TOML") from None
    return _Reader(str(path)).file(document)


class _Reader:
    """Checks one file; its name begins the path of every field."""

    def __init__(self, path: str) -> None:
        self._path = path

    def file(self, document: dict[str, Any]) -> Registries:
        if "registries" in document:
            raise InvalidArgument(
                f"{self._path}: registries",
                "version 1",
                "this is the old form of the file; write unqualified-search-registries and [[registry]]",
            )
        known = {"unqualified-search-registries", "short-name-mode", "aliases", "credential-helpers", "registry"}
        self._warn_of_others(document, known | {"additional-layer-store-auth-helper"}, "")
        mode = self._get(document, "short-name-mode", "", str, "")
        if mode not in ("", *MODES):
            raise InvalidArgument(f"{self._path}: short-name-mode", mode, f"not one of {', '.join(MODES)}")
        return Registries(
            tuple(self._search(document)),
            mode,
            self._aliases(self._get(document, "aliases", {}, dict, "")),
            tuple(self._texts(document, "credential-helpers")),
            tuple(self._registries(self._get(document, "registry", [], list, ""))),
        )

    def _search(self, document: dict[str, Any]) -> Iterator[str]:
        for number, text in enumerate(self._texts(document, "unqualified-search-registries")):
            yield self._location(text, f"unqualified-search-registries[{number}]")

    def _aliases(self, table: dict[str, Any]) -> dict[str, str]:
        for name, value in table.items():
            where = f"{self._path}: aliases.{name}"
            if not isinstance(value, str):
                raise InvalidArgument(where, value, "not an image's name")
            if not references.is_short(name) or {":", "@"} & set(name):
                raise InvalidArgument(where, name, "an alias is a name without registry, tag and digest")
            if value:
                target = references.parse(value, where)
                if references.is_short(value) or target.digest or value != target.name:
                    reason = "not a complete name without tag and digest, such as docker.io/library/busybox"
                    raise InvalidArgument(where, value, reason)
        return dict(table)

    def _registries(self, entries: list[Any]) -> Iterator[Registry]:
        for number, entry in enumerate(entries):
            where = f"registry[{number}]"
            if not isinstance(entry, dict):
                raise InvalidArgument(f"{self._path}: {where}", entry, "not a table")
            yield self._registry(entry, where)

    def _registry(self, entry: dict[str, Any], where: str) -> Registry:
        known = {"prefix", "location", "insecure", "blocked", "mirror", "mirror-by-digest-only"}
        self._warn_of_others(entry, known, where)
        location = self._get(entry, "location", "", str, where)
        prefix = self._get(entry, "prefix", "", str, where) or location
        wildcard = prefix.startswith("*.")
        if location:
            location = self._location(location, f"{where}.location")
        elif not wildcard:
            raise InvalidArgument(
                f"{self._path}: {where}.location",
                prefix,
                "missing; only a prefix that begins with *. does without a location",
            )
        self._location(prefix[2:] if wildcard else prefix, f"{where}.prefix")
        by_digest = self._get(entry, "mirror-by-digest-only", False, bool, where)
        mirrors = self._get(entry, "mirror", [], list, where)
        if len(mirrors) > MAX_MIRRORS:
            raise InvalidArgument(f"{self._path}: {where}.mirror", len(mirrors), f"more than {MAX_MIRRORS} mirrors")
        return Registry(
            prefix.rstrip("/"),
            location,
            self._get(entry, "insecure", False, bool, where),
            self._get(entry, "blocked", False, bool, where),
            tuple(self._mirror(mirror, by_digest, f"{where}.mirror[{n}]") for n, mirror in enumerate(mirrors)),
            self._path,
        )

    def _mirror(self, entry: Any, by_digest: bool, where: str) -> Mirror:
        if not isinstance(entry, dict):
            raise InvalidArgument(f"{self._path}: {where}", entry, "not a table")
        self._warn_of_others(entry, {"location", "insecure", "pull-from-mirror"}, where)
        pull = self._get(entry, "pull-from-mirror", "", str, where)
        if pull not in ("", *PULLS):
            raise InvalidArgument(f"{self._path}: {where}.pull-from-mirror", pull, f"not one of {', '.join(PULLS)}")
        if pull and by_digest:
            reason = "contradicts mirror-by-digest-only of its registry; set one of them"
            raise InvalidArgument(f"{self._path}: {where}.pull-from-mirror", pull, reason)
        location = self._location(self._get(entry, "location", "", str, where), f"{where}.location")
        insecure = self._get(entry, "insecure", False, bool, where)
        return Mirror(location, insecure, pull or ("digest-only" if by_digest else "all"))

    def _location(self, text: str, where: str) -> str:
        """host[:port][/path].  Returns it without a slash at its end."""
        stripped = text.rstrip("/")
        if not references.is_location(stripped):
            reason = "not HOST[:PORT][/PATH] of a registry, without a scheme"
            raise InvalidArgument(f"{self._path}: {where}", text, reason)
        return stripped

    def _texts(self, document: dict[str, Any], key: str) -> list[str]:
        values: list[str] = self._get(document, key, [], list, "")
        if not all(isinstance(value, str) and value for value in values):
            raise InvalidArgument(f"{self._path}: {key}", values, "not a list of names")
        return values

    def _get(self, table: dict[str, Any], key: str, default: Any, kind: type, where: str) -> Any:
        value = table.get(key, default)
        if not isinstance(value, kind):
            names = {str: "a string", bool: "true or false", list: "a list", dict: "a table"}
            raise InvalidArgument(f"{self._path}: {where and where + '.'}{key}", value, f"not {names[kind]}")
        return value

    def _warn_of_others(self, table: dict[str, Any], known: set[str], where: str) -> None:
        for key in sorted(table.keys() - known):
            log.warning("%s: %s%s is not known and has no effect", self._path, where and where + ".", key)
