"""registries.d: where the signatures of a registry's images are kept (containers-registries.d(5)).

Only what concerns reading them; where they are written (the staging addresses) is checked and left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.images.references import Reference
from crio_native.images.trust import documents, policy

DIRECTORY = "/etc/containers/registries.d"
DEFAULT_LOOKASIDE = "file:///var/lib/containers/sigstore"
MAX_FILES = 1024
_ADDRESSES = ("lookaside", "lookaside-staging", "sigstore", "sigstore-staging")


@dataclass(frozen=True, slots=True)
class Place:
    """What one namespace says.  lookaside: a base address, "" where it says none."""

    lookaside: str = ""
    attachments: bool | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """All files of the directory."""

    default: Place = field(default_factory=Place)
    docker: Mapping[str, Place] = field(default_factory=dict)

    def of(self, reference: Reference) -> Place:
        """What counts for a reference: of each setting the one of the narrowest namespace that says it."""
        said = [self.docker[scope] for scope in policy.of_reference(reference) if scope in self.docker]
        said.append(self.default)
        lookaside = next((place.lookaside for place in said if place.lookaside), DEFAULT_LOOKASIDE)
        return Place(lookaside, next((p.attachments for p in said if p.attachments is not None), False))


def load(directory: str) -> Places:
    """Raises InvalidArgument with file and key, FailedPrecondition for a file that cannot be read."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".yaml"))
    except FileNotFoundError:
        return Places()
    except OSError as error:
        raise FailedPrecondition(f"{directory} cannot be read: {(error.strerror or '').lower()}") from None
    if len(names) > MAX_FILES:
        raise FailedPrecondition(f"{directory} has more than {MAX_FILES} files")
    default: tuple[str, Place] | None = None
    docker: dict[str, tuple[str, Place]] = {}
    for path in (os.path.join(directory, name) for name in names):
        fields = documents.Fields(_document(path), path)
        if fields.has("default-docker"):
            if default:
                raise InvalidArgument(fields.path("default-docker"), default[0], "is in another file already")
            default = (path, _place(fields.object("default-docker")))
        if fields.has("docker"):
            table = fields.object("docker")
            for namespace in table.names():
                if namespace in docker:
                    raise InvalidArgument(table.path(namespace), docker[namespace][0], "is in another file already")
                docker[namespace] = (path, _place(table.object(namespace)))
        fields.done("registries.d")
    return Places(default[1] if default else Place(), {name: place for name, (_, place) in docker.items()})


def _document(path: str) -> Any:
    import yaml  # as rarely needed as a signature

    try:
        return yaml.safe_load(documents.read(path, "file")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidArgument(path, " ".join(str(error).split())[:200], "not valid YAML") from None


def _place(fields: documents.Fields) -> Place:
    found = {}
    for key in _ADDRESSES:
        if fields.has(key):
            found[key] = address = fields.text(key)
            if urlsplit(address).scheme not in ("file", "http", "https"):
                raise InvalidArgument(fields.path(key), address, "not an address of file, http or https")
    attachments = fields.take("use-sigstore-attachments", bool, None)
    fields.done("a namespace of registries.d")
    return Place(found.get("lookaside") or found.get("sigstore", ""), attachments)
