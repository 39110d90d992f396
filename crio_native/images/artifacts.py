"""OCI artifacts: manifests whose blobs are files and not layers (image-spec, "Guidelines for Artifact Usage").

An artifact becomes an image of one directory a file, so that the store keeps, shares, counts and mounts it as any
other.  The file's name is the blob's title; its content, the blob's bytes, is what was checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator

from crio_native.images.manifests import OCI_CONFIG, Descriptor, Manifest

TITLE = "org.opencontainers.image.title"
FILE = "application/vnd.crio-native.file"  # a blob that is to become a file; never outside of this program
MAX_TITLE = 1024
BLOCK = 512


def as_image(manifest: Manifest) -> tuple[Manifest, bytes]:
    """An artifact as an image: its manifest, and the config that was made for it.

    What stands for a diff id names the blob and its title: the archive that has one is only made on its way.
    """
    files = tuple(dataclasses.replace(layer, media_type=FILE) for layer in manifest.layers)
    names = [hashlib.sha256(f"{_title(file)}\0{file.digest}".encode()).hexdigest() for file in files]
    config = {
        "artifactType": manifest.artifact_type,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{name}" for name in names]},
    }
    raw = json.dumps(config).encode()
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    return Manifest(Descriptor(OCI_CONFIG, digest, len(raw)), files), raw


def archived(descriptor: Descriptor, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a file's blob as an archive that the unpacker takes."""
    import tarfile  # to write a header, which takes it a line; nothing of a stranger's is read with it

    entry = tarfile.TarInfo(_title(descriptor))
    entry.size, entry.mode = descriptor.size, 0o644
    yield entry.tobuf(tarfile.PAX_FORMAT)
    yield from pieces
    yield bytes(-descriptor.size % BLOCK + 2 * BLOCK)


def _title(descriptor: Descriptor) -> str:
    """A blob without a usable title is named by its digest.  What leads out of a directory the unpacker refuses."""
    title = descriptor.annotations.get(TITLE, "")
    return title if 0 < len(title) <= MAX_TITLE else descriptor.digest.replace(":", "-")
