"""Additional stores: images that are used where they are, and never changed.

A directory that another daemon of ours has filled (baked into the machine's disk, or on a network file system), or a
containers/storage root of podman and skopeo, with the overlay driver.  They are read once, at the start; whoever owns
them does not change them meanwhile.  Their images count as pinned: a kubelet that is short of space cannot have theirs.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Container, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from crio_native.errors import CrioError, FailedPrecondition
from crio_native.images import containers_storage, layers, references
from crio_native.images.layers import Layer
from crio_native.images.model import Image
from crio_native.images.records import Record, Records, image_of
from crio_native.images.roots import Tree, stack
from crio_native.images.work import in_time

PATIENCE = 10.0  # seconds to read one: the start waits for it

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Additional:
    """The images of all additional stores, and the trees that they stand on, by id."""

    images: dict[str, Image] = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)

    @classmethod
    def read(cls, stores: Iterable[Path]) -> Additional:
        """What is there; of an image that is in several, the first.  A store or an image that cannot be used, or does
        not answer, is logged and left out: the node's own images go on."""
        found = cls()
        for store in stores:
            try:
                for image, tree in in_time(partial(_images_of, store), PATIENCE):
                    if image.id not in found.images:
                        found.images[image.id], found.trees[image.id] = image, tree
            except TimeoutError:
                log.error(
                    "the additional store %s did not answer within %g s and is left out until the next start: "
                    "see whether its server can be reached",
                    *(store, PATIENCE),
                )
            except (CrioError, OSError) as error:
                log.error("the images of the additional store %s cannot be used: %s", store, error)
        return found

    def without(self, ids: Container[str]) -> Additional:
        """All but some images: those that the node has itself."""
        images = {id_: image for id_, image in self.images.items() if id_ not in ids}
        return Additional(images, {id_: self.trees[id_] for id_ in images})


def _images_of(store: Path) -> list[tuple[Image, Tree]]:
    if (store / "images.db").is_file():
        return list(_ours(store))
    if (store / "overlay-images/images.json").is_file():
        return list(_containers_storage(store))
    raise FailedPrecondition("it has neither an images.db nor an overlay-images/images.json")


def _ours(store: Path) -> Iterator[tuple[Image, Tree]]:
    by_id = dict(_layers(store / "layers"))
    with closing(Records.read_only(store / "images.db")) as records:
        for record in records.load():
            diff_ids = json.loads(record.config)["rootfs"]["diff_ids"]
            missing = [diff_id for diff_id in diff_ids if diff_id not in by_id]
            if missing:
                log.error("image %s of %s has lost layer %s and is left out", record.id, store, missing[0])
                continue
            unpacked = [by_id[diff_id] for diff_id in dict.fromkeys(diff_ids)]
            tree = Tree(str(store / "layers"), *stack([by_id[diff_id] for diff_id in diff_ids]))
            yield image_of(record, sum(layer.bytes for layer in unpacked), pinned=True), tree


def _layers(base: Path) -> Iterator[tuple[str, Layer]]:
    for directory in base.iterdir():
        if directory.name != layers.EMPTY:
            try:
                layer = layers.read(directory)
            except (OSError, ValueError) as error:
                log.error("layer directory %s is not usable: %s", directory, error)
            else:
                yield layer.diff_id, layer


def _containers_storage(store: Path) -> Iterator[tuple[Image, Tree]]:
    root = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        storage = containers_storage.Storage(root, str(store), "overlay")
        for found, lowers in storage.stacked():
            repositories = {references.parse(name).name for name in found.names}
            digests = tuple(f"{name}@{digest}" for name in sorted(repositories) for digest in found.digests)
            manifest_digest = found.digests[-1] if found.digests else ""
            record = Record(found.manifest.config.digest, manifest_digest, storage.config(found), found.names, digests)
            base = store / "overlay"
            info = os.stat(base / lowers[0]) if lowers else None
            owner = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) if info else None
            size = sum(layer.size for layer in found.manifest.layers)
            yield image_of(record, size, pinned=True), Tree(str(base), lowers, owner)
    finally:
        os.close(root)
