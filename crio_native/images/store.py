"""The image store: pull, load, look up, remove, and the root file system of a container.

One directory, one daemon:

    images.db  images, names, digests (`records`)      layers/, tmp/  what they stand on (`layers`)
    lock       held while a daemon uses the store

An image exists from the commit of its record, which comes after all its layers are durable; a layer that no image
needs, and no pull in progress, is removed.  After a crash at any moment an image is there with all its layers or not
at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from crio_native.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    StepFailed,
    Unimplemented,
)
from crio_native.images import (
    admission,
    conversion,
    layouts,
    manifests,
    references,
    roots,
    snapshots,
)
from crio_native.images.adding import Adding, Arrival, OnProgress
from crio_native.images.additional import Additional
from crio_native.images.admission import Admission, Check
from crio_native.images.directories import Blobs, Found
from crio_native.images.layers import EMPTY, Layers
from crio_native.images.manifests import Descriptor, Manifest, verified
from crio_native.images.model import Credentials, FsUsage, Image, Platform, Progress
from crio_native.images.records import Record, Records, image_of
from crio_native.images.references import Reference
from crio_native.images.registry import Repository
from crio_native.images.sources import Settings, Sources
from crio_native.images.unpacker import Limits
from crio_native.images.work import Joining, Stop
from crio_native.oci.runtime import Overlay

MIN_PREFIX = 12  # hex digits of an id

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """All images as of one moment.  Replaced as a whole, so reading takes no lock."""

    images: Mapping[str, Image] = field(default_factory=dict)
    by_name: Mapping[str, Image] = field(default_factory=dict)  # and by digest


class ImageStore:
    """The images of one node.  Methods may be called from any thread; `list`, `get` and `usage` never wait.

    root: the store's directory, made if missing.  layers_in_parallel: of one pull.  settings: of registries.
    pinned: patterns as for `pin`.  limits: bounds of one layer.  options: of the storage driver.
    Raises InvalidArgument for wrong registry settings, FailedPrecondition if another process uses the directory,
    StepFailed if it cannot be used.
    """

    def __init__(
        self,
        root: Path,
        *,
        layers_in_parallel: int = 3,
        settings: Settings | None = None,
        pinned: Collection[str] = (),
        limits: Limits | None = None,
        options: roots.Options | None = None,
    ) -> None:
        self._root, self._parallel, self._sources = root, layers_in_parallel, Sources(settings or Settings())
        self._pinned, self._limits = tuple(pinned), limits
        self._joining = Joining()
        self._closing = threading.Event()
        self._mutex = threading.RLock()  # of the catalogue's next version, and of which layers may go
        self._wanted: Counter[str] = Counter()  # diff ids that pulls in progress count on
        self._catalogue = _Catalogue()
        self._leaving = ""  # the image that is being removed
        self._options, self._offered = options or roots.Options(), Additional()
        self._additional = self._offered  # of those the images that this store has not
        try:
            self._open()
        except OSError as error:
            raise StepFailed("open the image store", error.errno or 0, str(error.filename or root)) from error

    def _open(self) -> None:
        """All or nothing of it."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            self._lock_fd = _lock(self._root)
            undo.callback(os.close, self._lock_fd)
            self._layers = Layers(self._root, self._limits)
            self._adding = Adding(self._layers, self._joining, self._parallel)
            self._records = Records(self._root / "images.db")
            undo.callback(self._records.close)
            self._admission = Admission(self._sources, self._records)
            self._offered = Additional.read(self._options.stores)
            self._forget_incomplete()
            self._refresh()
            Layers.delete(self._collect())
            self._open_wholes()
            undo.pop_all()

    def interrupt(self) -> None:
        """Give up what is being pulled, loaded and saved, and whatever of these is asked for from now on."""
        self._closing.set()
        self._sources.connections.end()

    def close(self) -> None:
        """Let go of the directory; what is still being pulled is given up."""
        self.interrupt()
        self._records.close()
        os.close(self._lock_fd)

    # Looking

    @property
    def layers(self) -> Layers:
        """The unpacked layers, for `upkeep`."""
        return self._layers

    def list(self) -> Sequence[Image]:
        """All images, oldest first."""
        return [*self._catalogue.images.values()]

    def own(self) -> Sequence[Image]:
        """Those whose layers are here, not in an additional store."""
        return [image for image in self.list() if image.id not in self._additional.trees]

    def get(self, ref: str) -> Image:
        """The image of a name, a digest ("name@sha256:..."), an id, or at least 12 digits of an id.

        Raises NotFound; InvalidArgument for what can be none of these, or fits several images.
        """
        catalogue = self._catalogue
        if ref in catalogue.images:
            return catalogue.images[ref]
        digits = ref.removeprefix("sha256:")
        is_prefix = MIN_PREFIX <= len(digits) <= 64 and not digits.strip("0123456789abcdef")
        if not (is_prefix and len(digits) == 64):
            for reference in self._sources.names(ref):
                key = f"{reference.name}@{reference.digest}" if reference.digest else str(reference)
                if key in catalogue.by_name:
                    return catalogue.by_name[key]
        found = [image for id_, image in catalogue.images.items() if is_prefix and id_.startswith(f"sha256:{digits}")]
        if len(found) > 1:
            raise InvalidArgument("image", ref, f"{len(found)} images have ids that start so; give more digits")
        if not found:
            raise NotFound("image", ref, "it is not in the store; pull or load it first")
        return found[0]

    def usage(self) -> FsUsage:
        """What the layers take on disk, from what was counted when they were unpacked."""
        layers = self._layers.all()
        size, inodes = sum(layer.bytes for layer in layers), sum(layer.inodes for layer in layers)
        return FsUsage(str(self._root), size, inodes, time.time_ns())

    # Adding

    def pull(
        self,
        ref: str,
        *,
        credentials: Credentials | None = None,
        namespace: str = "",
        progress: OnProgress | None = None,
        platform: Platform | None = None,
        cancelled: threading.Event | None = None,
    ) -> Image:
        """Get an image from its registry; a pull of the same that is in progress is joined (without its progress).

        namespace: of the pod that it is for, which may have credentials of its own.  progress: called from other
        threads, at most ten times a second a layer.  platform: instead of this machine's.  cancelled: ends the pull at
        its next step.
        Raises InvalidArgument (the reference, a document or a layer is wrong), NotFound, PermissionRefused,
        Unavailable (the registry), ResourceExhausted (the disk, a bound), DeadlineExceeded (cancelled),
        Unimplemented (no container image, an unknown compression), UntrustedImage (refused by policy).  After an error
        nothing new is left.
        """
        platform = platform or Platform.host()
        stop = Stop(f"pull of {ref}", cancelled, self._closing, patience=self._sources.settings.patience)

        def use(reference: Reference) -> Callable[[Repository, str], Image]:
            check = self._admission.pulled(reference, namespace)
            return lambda repository, origin: self._pull(repository, reference, check, origin, progress, platform, stop)

        return self._joining.run(
            ("pull", ref, platform, credentials, namespace),
            lambda: self._sources.pull(ref, stop, use, credentials=credentials, namespace=namespace),
            stop,
            shares=lambda error: not isinstance(error, DeadlineExceeded),
        )

    def _pull(
        self,
        repository: Repository,
        reference: Reference,
        check: Check,
        origin: str,
        progress: OnProgress | None,
        platform: Platform,
        stop: Stop,
    ) -> Image:
        def fetch(descriptor: Descriptor) -> bytes:
            raw, _, _ = repository.manifest(descriptor.digest)
            return b"".join(verified([raw], descriptor, origin))

        raw, media_type, stated = repository.manifest(reference.wanted)
        if promised := reference.digest or stated:
            raw = b"".join(verified([raw], Descriptor(media_type, promised, len(raw)), origin))
        manifest, digests = manifests.resolve(fetch, raw, media_type, platform, f"manifest of {reference}")
        names = () if reference.digest else (str(reference),)
        known_as = dict.fromkeys(f"{reference.name}@{digest}" for digest in (*digests, promised) if digest)
        met = check(digests[::-1], repository)
        arrival = self._arrival(repository, origin, progress, stop)
        image = self._add(manifest, digests[-1], names, tuple(known_as), arrival)
        self._admission.remember(image, reference, met)
        return image

    def load(
        self,
        source: str,
        *,
        namespace: str = "",
        progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Sequence[Image]:
        """Import all images of an OCI layout or docker-archive on this machine.

        source: "oci:/directory[:tag]", "oci-archive:/file[:tag]", "docker-archive:/file[:name]", or a path alone.
        Raises as `pull`; NotFound, too, for a file or a tag.  Images before the one that fails stay.
        """
        stop = Stop(f"load of {source}", cancelled, self._closing)
        with self._layers.scratch() as scratch, layouts.opened(source, scratch, Platform.host()) as found:
            for image in found:
                self._admission.loaded(image, source, namespace)
            return [self._add_found(image, source, progress, stop) for image in found]

    def save(self, ref: str, target: str, *, cancelled: threading.Event | None = None) -> Image:
        """Write an image to this machine's disk, archived anew (see `exporting`).

        target: "oci:/directory", "oci-archive:/file", "docker-archive:/file" or "dir:/directory", which must not exist.
        Raises InvalidArgument, NotFound, AlreadyExists, Unimplemented (an artifact), ResourceExhausted, Internal.
        """
        from crio_native.images import exporting

        image = self.get(ref)
        if image.id in self._additional.trees:
            raise Unimplemented(f"image {image.id} ({ref}) is in an additional store: load it here first to save it")
        stop = Stop(f"save of {ref}", cancelled, self._closing)
        with self._keeping(image.layers), self._layers.scratch() as scratch:
            layers = [layer for diff_id in image.layers if (layer := self._layers.get(diff_id))]
            exporting.export(image, layers, self._layers.base, target, scratch, stop)
        return image

    def _add_found(self, image: Found, source: str, progress: OnProgress | None, stop: Stop) -> Image:
        repositories = {references.parse(name).name for name in image.names}
        known_as = tuple(f"{name}@{digest}" for name in sorted(repositories) for digest in image.digests)
        digest = image.digests[-1] if image.digests else ""
        arrival = self._arrival(image.blobs, source, progress, stop)
        return self._add(image.manifest, digest, image.names, known_as, arrival)

    def _arrival(self, blobs: Blobs, origin: str, progress: OnProgress | None, stop: Stop) -> Arrival:
        return Arrival(blobs, origin, self._sources.settings.keys, progress or _ignore, stop)

    def _add(
        self, manifest: Manifest, digest: str, names: tuple[str, ...], known_as: tuple[str, ...], arrival: Arrival
    ) -> Image:
        """digest: the manifest's, "" if it has none."""
        origin = arrival.origin
        if manifest.artifact_type and not self._sources.settings.artifacts:
            raise Unimplemented(
                f"{origin}: an artifact of type {manifest.artifact_type!r}, not a container image, and "
                "oci_artifact_mount_support is off"
            )
        scratch = self._layers.scratch()
        with conversion.as_image(manifest, arrival.blobs, scratch, origin, arrival.keys) as (plain, blobs):
            raw = b"".join(verified(blobs.blob(plain.config), plain.config, origin))
            config = manifests.parse_config(raw, len(plain.layers), f"config {plain.config.digest}")
            if another := manifests.of_another_machine(config):
                log.warning("image %s: %s", names[0] if names else _id_of(raw), another)
            layers = dict(zip(config["rootfs"]["diff_ids"], plain.layers, strict=True))
            with self._keeping(layers.keys()):
                self._adding.add(layers, replace(arrival, blobs=blobs))
                self._sync()
                return self._record(Record(_id_of(raw), digest, raw, names, known_as))

    def _record(self, record: Record) -> Image:
        with self._mutex:
            self._records.add(record)
            self._refresh()
            return self._catalogue.images[record.id]

    def _sync(self) -> None:
        try:
            self._layers.sync()
        except OSError as error:
            raise Internal(f"the image store {self._root} cannot be made durable: {error.strerror}") from error

    def authorize(self, image: Image, name: str, namespace: str) -> None:
        """Whether a pod of a namespace may use an image, asked for by a name ("" if unknown): see `admission`."""
        stop = Stop(f"verification of {name or image.id}", self._closing, patience=admission.PATIENCE)
        self._admission.authorize(image, name, namespace, stop)

    # Removing

    def remove(self, ref: str, *, in_use: Collection[str] | Callable[[], Collection[str]] = ()) -> None:
        """Remove an image with all its names, and the layers that no other needs.

        in_use: ids of images that containers stand on, or what tells them; a mapping gives what uses each.  Only what
        tells them is safe beside containers that are being made.  Raises NotFound, and FailedPrecondition for an image
        in use or of an additional store.
        """
        image = self.get(ref)
        if image.id in self._additional.trees:
            raise FailedPrecondition(f"image {image.id} ({ref}) is in an additional store, which is only read")
        with self._mutex:
            # A container is recorded first and asks for its layers then; we do it the other way round, so one of us
            # sees the other.
            self._leaving = image.id
            try:
                self._refuse_if_used(image, ref, in_use() if callable(in_use) else in_use)
                self._records.remove([image.id])
                self._refresh()
            finally:
                self._leaving = ""
            removed = self._collect()
            self._drop_wholes()
        Layers.delete(removed)

    def _open_wholes(self) -> None:
        self._wholes = snapshots.Wholes(self._root, self._layers.scratch) if self._options.driver == "btrfs" else None
        if self._wholes is None:
            snapshots.forget(self._root)
        self._drop_wholes()

    def _drop_wholes(self) -> None:
        if self._wholes:
            self._wholes.keep(self._catalogue.images)

    @staticmethod
    def _refuse_if_used(image: Image, ref: str, in_use: Collection[str]) -> None:
        if image.id in in_use:
            user = in_use[image.id] if isinstance(in_use, Mapping) else "a container"
            raise FailedPrecondition(f"image {image.id} ({ref}) is in use by {user}: remove that first")

    @contextlib.contextmanager
    def _keeping(self, diff_ids: Iterable[str]) -> Iterator[None]:
        """Layers that are not to be removed meanwhile, though no image needs them yet."""
        with self._mutex:
            self._wanted.update(diff_ids)
        try:
            yield
        finally:
            with self._mutex:
                self._wanted.subtract(diff_ids)
                self._wanted += Counter()  # drops what is at zero
                removed = self._collect()
            Layers.delete(removed)

    def _collect(self) -> Sequence[Path]:
        """Put away the layers that nothing needs; the mutex is held."""
        needed = {diff_id for image in self.own() for diff_id in image.layers} | self._wanted.keys()
        return self._layers.remove(layer.diff_id for layer in self._layers.all() if layer.diff_id not in needed)

    # Using

    def prepare_root(self, image_id: str, container_dir: Path) -> Overlay | None:
        """Make what a container's root file system needs in its directory, and say how to mount it; None where
        `rootfs` there already is it (see `roots.prepare`).

        Whoever is to keep the image must be in `in_use` of `remove` before this is called.
        Raises NotFound, AlreadyExists (container_dir has been prepared before), ResourceExhausted, FailedPrecondition
        (quotas are wanted where there are none).
        """
        tree = self._tree(image_id)
        if self._wholes is None:
            return roots.prepare(tree, container_dir, self._options)
        stop = Stop(f"making a root file system of {image_id}", self._closing)
        self._wholes.prepare(image_id, tree, container_dir, self._options.size, stop)
        return None

    def view(self, image_id: str) -> Overlay:
        """How to mount an image's files alone, read-only; in_use as for `prepare_root`.  Raises NotFound."""
        return roots.view(self._tree(image_id), os.path.join(self._layers.base, EMPTY, "fs"))

    def _tree(self, image_id: str) -> roots.Tree:
        """An image's layers, topmost first.  Raises NotFound."""
        image = self._catalogue.images.get(image_id)
        if image is None or image_id == self._leaving:
            with self._mutex:  # whoever removes it decides first
                image = self._catalogue.images.get(image_id)
        if image is None:
            raise NotFound("image", image_id, "it is not in the store; pull or load it first")
        if image_id in self._additional.trees:
            return self._additional.trees[image_id]
        layers = [layer for diff_id in image.layers if (layer := self._layers.get(diff_id))]
        if len(layers) != len(image.layers):
            lost = next(diff_id for diff_id in image.layers if not self._layers.get(diff_id))
            raise Internal(f"image {image.id} has lost layer {lost}: remove it and pull it again")
        return roots.Tree(str(self._layers.base), *roots.stack(layers))

    def pin(self, patterns: Iterable[str]) -> None:
        """Mark as pinned the images with a name or digest that fits one: complete names, `*` for any text."""
        with self._mutex:
            self._pinned = tuple(patterns)
            self._refresh()

    def reload(self, *, keys: Path | None) -> None:
        """Read registries.conf anew, and take keys of encrypted images from there.

        Raises InvalidArgument for files that are wrong; then nothing changes.
        """
        self._sources.reload()
        self._sources.settings = replace(self._sources.settings, keys=keys)

    # The catalogue

    def _refresh(self) -> None:
        """Read the records anew; the mutex is held."""
        known = self._catalogue.images
        own = {record.id: self._image(record, known.get(record.id)) for record in self._records.load()}
        taken = {name for image in own.values() for name in (*image.names, *image.digests)}
        self._additional = self._offered.without(own)
        images = {**self._additional.images, **own}
        for id_ in own.keys() & self._offered.images.keys():
            images[id_] = _named_too(own[id_], self._offered.images[id_], taken)
        by_name = {name: image for image in images.values() for name in (*image.names, *image.digests)}
        self._catalogue = _Catalogue(images, by_name)

    def _image(self, record: Record, known: Image | None) -> Image:
        pinned = any(fnmatch.fnmatchcase(n, p) for n in (*record.names, *record.digests) for p in self._pinned)
        if known:
            return replace(known, names=record.names, digests=record.digests, pinned=pinned)
        layers = dict.fromkeys(json.loads(record.config)["rootfs"]["diff_ids"])
        size = sum(layer.bytes for diff_id in layers if (layer := self._layers.get(diff_id)))
        return image_of(record, size, pinned=pinned)

    def _forget_incomplete(self) -> None:
        """Drop records whose layers are gone (somebody else's doing): the image can be pulled again."""
        for record in self._records.load():
            missing = [d for d in json.loads(record.config)["rootfs"]["diff_ids"] if not self._layers.get(d)]
            if missing:
                log.error("image %s %s has lost layer %s and is forgotten", record.id, record.names, missing[0])
                self._records.remove([record.id])


def _lock(root: Path) -> int:
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise FailedPrecondition(f"image store {root} is in use by another process") from None
    return fd


def _id_of(config: bytes) -> str:
    return "sha256:" + hashlib.sha256(config).hexdigest()


def _ignore(progress: Progress) -> None:
    pass


def _named_too(own: Image, offered: Image, taken: Collection[str]) -> Image:
    """An image with the names, too, that it has in an additional store, but for those that are here for another."""
    names = tuple(name for name in offered.names if name not in taken)
    digests = tuple(digest for digest in offered.digests if digest not in taken)
    return replace(own, names=(*own.names, *names), digests=(*own.digests, *digests))
