"""What is no plain image made into one on its way to the store: artifacts, schema 1, encrypted layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from crio_native.errors import PermissionRefused
from crio_native.images import artifacts
from crio_native.images.layouts import Blobs
from crio_native.images.manifests import ENCRYPTED, Descriptor, Manifest


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
    manifest: Manifest, blobs: Blobs, scratch: AbstractContextManager[Path], origin: str
) -> Iterator[tuple[Manifest, Blobs]]:
    """A manifest and where its content comes from, as the store takes them.

    scratch: a directory for what must be kept meanwhile, only made where it is needed.
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
            if layer.media_type.endswith(ENCRYPTED):
                raise PermissionRefused(
                    f"layer {layer.digest} is encrypted ({layer.media_type}), and this node has no key for it"
                )
        yield manifest, blobs
