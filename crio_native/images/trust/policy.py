"""policy.json: requirements by transport and scope, and which of them are for an image (containers-policy.json(5)).

What a requirement asks is `rules`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crio_native.errors import InvalidArgument
from crio_native.images import references
from crio_native.images.references import Reference
from crio_native.images.trust import documents, rules
from crio_native.images.trust.documents import Fields
from crio_native.images.trust.rules import Rule

MAX_RULES = 256  # in one list
_ON_DISK = ("dir", "oci", "oci-archive")
_WILDCARD = re.compile(r"\*(\.[A-Za-z0-9-]+)+(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Rules:
    """What counts for a scope.  where: of them in the file.  rules: each with its own JSON."""

    where: str
    rules: tuple[tuple[Rule, Any], ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy.json."""

    default: Rules
    transports: Mapping[str, Mapping[str, Rules]]

    def find(self, transport: str, scopes: Sequence[str]) -> Rules:
        """The requirements for an image.  scopes: that it belongs to, the narrowest first."""
        by_scope = self.transports.get(transport, {})
        for scope in (*scopes, ""):
            if scope in by_scope:
                return by_scope[scope]
        return self.default


def load(path: str) -> Policy:
    """Raises InvalidArgument with the path in the file, FailedPrecondition for a file that cannot be read."""
    fields = documents.parse(documents.read(path, "trust policy"), path)
    default = _rules(fields.take("default", list), fields.path("default"))
    transports = {}
    if fields.has("transports"):
        table = fields.object("transports")
        transports = {name: _scopes(name, table.object(name)) for name in table.names()}
    fields.done("a trust policy")
    return Policy(default, transports)


def _scopes(transport: str, table: Fields) -> dict[str, Rules]:
    found = {}
    for scope in table.names():
        where = f'{table.where}["{scope}"]'
        _check_scope(transport, scope, where)
        found[scope] = _rules(table.take(scope, list), where)
    return found


def _rules(values: list[Any], where: str) -> Rules:
    if not 0 < len(values) <= MAX_RULES:
        raise InvalidArgument(where, values, f"not a list of 1 to {MAX_RULES} requirements")
    return Rules(where, tuple((rules.parse(value, f"{where}[{n}]"), value) for n, value in enumerate(values)))


def _check_scope(transport: str, scope: str, where: str) -> None:
    """One that can never fit would leave its images to a wider scope without a word."""
    if not scope:
        return
    if transport in _ON_DISK and (not scope.startswith("/") or scope == "/" or "//" in scope or "/../" in scope + "/"):
        raise InvalidArgument(where, scope, 'not an absolute path below "/", without ".."; use "" for all')
    if transport in ("docker", "atomic"):
        if "*" in scope and not _WILDCARD.fullmatch(scope):
            raise InvalidArgument(where, scope, "a wildcard is *.DOMAIN[:PORT] alone")
        if "*" not in scope and not references.is_location(scope):
            references.parse(scope, where)


# The scopes of an image


def of_reference(reference: Reference) -> Iterator[str]:
    """From the one image to its host, then the host's domains."""
    yield f"{reference.name}@{reference.digest}" if reference.digest else str(reference)
    name = reference.name
    while name:
        yield name
        name = name.rpartition("/")[0]
    host = reference.registry
    while "." in host:
        host = host.partition(".")[2]
        yield f"*.{host}"


def of_file(transport: str, path: str, tag: str) -> Iterator[str]:
    """From the one image to the highest directory.  path: absolute, without links."""
    if transport not in _ON_DISK:
        return
    if tag:
        yield f"{path}:{tag}"
    while path.strip("/"):
        yield path
        path = path.rpartition("/")[0]
