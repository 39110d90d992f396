"""What is no plain image made into one on its way to the store: artifacts, schema 1, encrypted layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from crio_native.images import artifacts, encryption
from crio_native.images.directories import Blobs
from crio_native.images.manifests import Descriptor, Manifest


@dataclass(frozen=True, slots=True)
class _WithConfig:
    """The same blobs, and a config that nobody else has."""

    config: Descriptor
    raw: bytes
    layers: Blobs

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        return iter((self.raw,)) if descriptor == self.config else self.layers.blob(descriptor)


@contextlib.contextmanager
def as_image(
    manifest: Manifest, blobs: Blobs, scratch: AbstractContextManager[Path], origin: str, keys: Path | None
) -> Iterator[tuple[Manifest, Blobs]]:
    """A manifest and where its content comes from, as the store takes them.

    scratch: a directory for what must be kept meanwhile, only made where it is needed.  keys: directory of private
    keys.  Raises as `schema1` and `encryption` do.
    """
    if manifest.schema1:
        from crio_native.images import schema1

        with scratch as directory:
            made, config, spooled = schema1.as_image(manifest.schema1, cast(schema1.Blobs, blobs), directory, origin)
            yield made, _WithConfig(made.config, config, spooled)
    elif manifest.artifact_type:
        made, config = artifacts.as_image(manifest)
        yield made, _WithConfig(made.config, config, blobs)
    else:
        for layer in manifest.layers:
            if encryption.is_encrypted(layer):
                encryption.secret_of(layer, keys)  # before anything is fetched
        yield manifest, blobs


def archive_of(layer: Descriptor, pieces: Iterable[bytes], keys: Path | None) -> Iterable[bytes]:
    """The archive that a layer's blob, whose bytes were checked, holds.  Raises as `encryption` does."""
    if layer.media_type == artifacts.FILE:
        return artifacts.archived(layer, pieces)
    if encryption.is_encrypted(layer):
        return encryption.decrypted(pieces, layer, encryption.secret_of(layer, keys))
    return pieces
