"""Image references: `[registry/]repository[:tag][@digest]`, parsed strictly and made complete.

The grammar is the one of OCI Distribution (names, tags, digests) with Docker's short forms: `busybox` is
`docker.io/library/busybox:latest`.  Looking a name up is the store's business.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from crio_native.errors import InvalidArgument

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
DIGEST_LENGTHS = {"sha256": 64, "sha512": 128}
MAX_REFERENCE = 1024
MAX_NAME = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A complete reference; at least one of tag and digest is set.  `str()` is its canonical form."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.repository}"

    @property
    def wanted(self) -> str:
        """What to ask a registry for: the digest if there is one, as it says exactly what is meant."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return self.name + (self.tag and f":{self.tag}") + (self.digest and f"@{self.digest}")


def parse(text: str, field: str = "image") -> Reference:
    """Parse and complete a reference.  Raises InvalidArgument, naming `field` and the wrong part."""
    if not text or len(text) > MAX_REFERENCE:
        raise InvalidArgument(field, text, f"an image reference has 1 to {MAX_REFERENCE} characters")
    rest, at, digest = text.partition("@")
    if at:
        check_digest(digest, field)
    name, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:  # the colon is a port's, or there is none
        name, tag = rest, ""
    elif not _TAG.fullmatch(tag):
        raise InvalidArgument(field, text, f"tag {tag!r} is not 1 to 128 letters, digits, '_', '.' and '-'")
    registry, repository = _split_registry(name)
    if not _REGISTRY.fullmatch(registry) or not _valid_host(registry):
        raise InvalidArgument(field, text, f"{registry!r} is not a registry's host name, with or without a port")
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidArgument(
            field, text, f"repository {repository!r} is not lower-case words joined by '.', '_', '-' and '/'"
        )
    if len(registry) + len(repository) + 1 > MAX_NAME:
        raise InvalidArgument(field, text, f"registry and repository together have more than {MAX_NAME} characters")
    return Reference(registry, repository, tag or ("" if digest else DEFAULT_TAG), digest)


def check_digest(digest: object, field: str) -> str:
    """A digest as it may be used in paths and URLs.  Raises InvalidArgument."""
    if isinstance(digest, str):
        algorithm, _, value = digest.partition(":")
        if len(value) == DIGEST_LENGTHS.get(algorithm) and not value.strip("0123456789abcdef"):
            return digest
    raise InvalidArgument(field, digest, "not a digest: sha256: and 64 hex digits, or sha512: and 128")


def is_short(text: str) -> bool:
    """Whether a reference names no registry: `busybox`, `team/app:v1`."""
    first, slash, _ = text.partition("@")[0].partition("/")
    return not slash or not _is_registry(first)


def is_location(text: str) -> bool:
    """Whether a text is a registry or a name below one, without tag and digest: HOST[:PORT][/PATH]."""
    registry, slash, path = text.partition("/")
    valid_path = not slash or _REPOSITORY.fullmatch(path) is not None
    return bool(_REGISTRY.fullmatch(registry)) and _valid_host(registry) and valid_path and len(text) <= MAX_NAME


def _is_registry(first: str) -> bool:
    """Without one of these marks of a host, the first word of a name is a user of some registry."""
    return bool(set(".:") & set(first)) or first == "localhost" or first != first.lower()


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not _is_registry(first):
        first, rest = DEFAULT_REGISTRY, name
    if first in ("index.docker.io", "registry-1.docker.io"):
        first = DEFAULT_REGISTRY
    return first, f"library/{rest}" if first == DEFAULT_REGISTRY and "/" not in rest else rest


def _valid_host(registry: str) -> bool:
    host, port = split_port(registry)
    if port and not 0 < int(port) < 65536:
        return False
    try:
        return not host.startswith("[") or ipaddress.IPv6Address(host[1:-1]) is not None
    except ValueError:
        return False


def split_port(registry: str) -> tuple[str, str]:
    """(host, port) of a registry; the port is "" if none is given, an IPv6 address keeps its brackets."""
    host, colon, port = registry.rpartition(":")
    return (host, port) if colon and not port.endswith("]") else (registry, "")


def is_loopback(registry: str) -> bool:
    host = split_port(registry)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
