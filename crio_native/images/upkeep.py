"""Looking whether the store's layers are what they were when they were unpacked, and what to do about one that is not.

A power loss cannot damage an image (see `store`); a failing disk, or a person, can.  A layer is whole when it has as
many files as were counted while it was unpacked, and they are as large.  What is in them is not read: that would take
as long as pulling them.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crio_native.errors import CrioError
from crio_native.images.layers import Layer
from crio_native.images.unpacker.tree import allocated

if TYPE_CHECKING:
    from crio_native.images.store import ImageStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Damage:
    """A layer that is not whole.  images: the ids of those that stand on it.  reason: what is wrong."""

    layer: str
    images: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer} of {', '.join(self.images) or 'no image'}: {self.reason}"


def check(store: ImageStore) -> list[Damage]:
    """Every layer that is not whole.  Reads each directory once: some seconds for a node full of images."""
    found = []
    for layer in store.layers.all():
        if reason := _wrong(layer, store.layers.base):
            images = tuple(image.id for image in store.own() if layer.diff_id in image.layers)
            found.append(Damage(layer.diff_id, images, reason))
    return found


def repair(store: ImageStore, *, in_use: Collection[str] = ()) -> tuple[list[Damage], list[str]]:
    """Remove the images that stand on damaged layers, so that they are pulled again; no other.

    in_use: ids of images that containers stand on, which stay.  Returns all damage, and what could not be removed, in
    words.
    """
    damage, left = check(store), list[str]()
    for found in damage:
        log.error("%s", found)
    for id_ in dict.fromkeys(id_ for found in damage for id_ in found.images):
        try:
            store.remove(id_, in_use=in_use)
        except CrioError as error:
            left.append(str(error))
            log.error("a damaged image stays: %s", error)
    return damage, left


def _wrong(layer: Layer, base: Path) -> str:
    """What is wrong with a layer's tree; "" if nothing is."""
    try:
        counted = _count(base / layer.lower)
    except OSError as error:
        return f"{error.filename} cannot be read: {os.strerror(error.errno or 0).lower()}"
    if counted != (layer.bytes, layer.inodes):
        bytes_, inodes = counted
        return f"{inodes} files of {bytes_} bytes are there, where {layer.inodes} of {layer.bytes} were unpacked"
    return ""


def _count(tree: Path) -> tuple[int, int]:
    """(bytes, inodes) below a directory, as the unpacker counts them."""
    seen: set[int] = set()
    size = inodes = 0
    for info in _files(tree):
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            if info.st_ino in seen:
                continue
            seen.add(info.st_ino)
        size, inodes = size + allocated(info), inodes + 1
    return size, inodes


def _files(tree: Path) -> Iterator[os.stat_result]:
    """Of all below a directory; no link is followed, and no directory is open while another is read."""
    pending = [os.fspath(tree)]
    while pending:
        directory = pending.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                yield info
                if stat.S_ISDIR(info.st_mode):
                    pending.append(entry.path)
