"""The volumes that an image's own configuration declares (Dockerfile's VOLUME): `crio.image.image_volumes`.

``mkdir`` makes each directory in the container's root file system where the image has none, owned by who the command
runs as; ``bind`` mounts an empty directory of the container's on each; ``ignore`` does neither.  What a caller mounts
on the same path takes its place.  Volumes that a pod asks for by an image's name are `image_volumes`' matter.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.images.roots import VOLUMES
from crio_native.linux import inroot, mounts, syscalls
from crio_native.oci.builtin import users
from crio_native.oci.runtime import Overlay, UserRequest
from crio_native.oci.spec import normalise
from crio_native.pods import image_volumes, userns
from crio_native.pods.values import UserNamespace

_MOST = 256
_OF_IMAGE = "the image's config.Volumes"


def paths(image_config: Mapping[str, Any], taken: Collection[str]) -> list[str]:
    """Where the image wants volumes and the caller mounts nothing; shallow ones first.

    The store has checked what the paths are made of.  taken: the callers' destinations, normal.  Raises
    InvalidArgument.
    """
    declared = image_config.get("Volumes") or {}
    if not isinstance(declared, Mapping) or len(declared) > _MOST:
        raise InvalidArgument("config.image.image", declared, f"{_OF_IMAGE} must be an object of at most {_MOST} paths")
    found = {normalise(f"/{path}") for path in declared} - set(taken)
    if "/" in found:
        raise InvalidArgument("config.image.image", "/", f"{_OF_IMAGE} must be below /, or they would hide the image")
    return sorted(found, key=lambda path: (path.count("/"), path))


def is_one(path: str, image_config: Mapping[str, Any]) -> bool:
    """Whether the image wants a volume there."""
    declared = image_config.get("Volumes")
    return isinstance(declared, Mapping) and path in (normalise(f"/{wanted}") for wanted in declared)


def binds(wanted: Sequence[str], bundle: Path, owner: tuple[int, int]) -> list[dict[str, Any]]:
    """Mounts of empty directories below the bundle, which go with it.  owner: of the directories, on the host."""
    found = []
    for index, path in enumerate(wanted):
        source = bundle / VOLUMES / str(index)
        source.mkdir(mode=0o755, parents=True)
        os.chown(source, *owner)
        found.append(
            {"destination": path, "type": "bind", "source": str(source), "options": ["bind", "rprivate", "rw"]}
        )
    return found


def make(
    wanted: Sequence[str],
    bundle: Path,
    overlay: Overlay | None,
    user: UserRequest,
    namespace: UserNamespace | None,
    namespace_file: str,
) -> None:
    """The directories that the root file system lacks.  overlay: what it will be mounted from; None where the bundle's
    `rootfs` already is it.  namespace: the pod's own, its file being namespace_file.

    Raises StepFailed, for instance where the image has something else on a path.
    """
    if not wanted:
        return
    with _root(bundle, overlay, namespace_file) as root:
        owner = _owner(root, user, namespace)
        for path in wanted:
            try:
                _make_one(root, path, owner)
            except OSError as error:
                raise StepFailed("image_volume", error.errno or 0, path, f"{_OF_IMAGE} name it") from None


def _make_one(root: int, path: str, owner: tuple[int, int]) -> None:
    """Each directory on the way that is missing is the owner's too."""
    parts = path.strip("/").split("/")
    for place in itertools.accumulate(parts, "{}/{}".format, initial=""):
        try:
            os.close(inroot.open_in_root(root, place, os.O_PATH | os.O_DIRECTORY))
        except FileNotFoundError:
            made = inroot.make_directories(root, place)
            try:
                os.chown(f"/proc/self/fd/{made}", *owner)
            finally:
                os.close(made)


def _owner(root: int, user: UserRequest, namespace: UserNamespace | None) -> tuple[int, int]:
    """The host's numbers of who the command runs as; a user who is not there is the runtime's to refuse."""
    try:
        found = users.find(root, user.user, user.group, (), False)
    except (users.NoSuchUser, OSError):
        return userns.root_of(namespace)
    if namespace is None:
        return found.uid, found.gid
    uid, gid = userns.host_id(namespace.uids, found.uid), userns.host_id(namespace.gids, found.gid)
    return userns.root_of(namespace) if uid is None or gid is None else (uid, gid)


@contextmanager
def _root(bundle: Path, overlay: Overlay | None, namespace_file: str) -> Iterator[int]:
    """A descriptor of the root file system, as the container will have it."""
    place = str(bundle / "rootfs")
    if overlay is None:
        with _opened(place) as root:
            yield root
        return
    # Such a mount marks its work directory, and the mark would refuse the container's own mount.
    plain = replace(overlay, options=[option for option in overlay.options if option != "volatile"])
    namespace = namespace_file if overlay.mapped else ""
    aside = bundle / image_volumes.DIRECTORY / "declared"  # where the bundle's release looks for mounts
    aside.parent.mkdir(mode=0o700, exist_ok=True)
    with image_volumes.layers(overlay.base, aside, namespace) as base:
        data = plain.data(base=f"/proc/self/fd/{base}")
        syscalls.mount("overlay", place, "overlay", mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOEXEC, data)
    try:
        with _opened(place) as root:
            yield root
    finally:
        syscalls.umount2(place)


@contextmanager
def _opened(place: str) -> Iterator[int]:
    root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield root
    finally:
        os.close(root)
