"""Image volumes: the files of an image, mounted read-only in a container that is made of another.

Each is an overlay of the image's layers below the container's bundle, with no upper directory.  It is made by the
daemon itself, so that every kind of runtime can bind it; it goes with the container.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.linux import inroot, mounts, process, syscalls, trees
from crio_native.oci.runtime import Overlay
from crio_native.pods.records import ImageVolume
from crio_native.pods.values import Mount, MountPropagation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crio_native.images import ImageStore

DIRECTORY = "volumes"  # below the bundle
_FLAGS = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV


def resolve(asked: Sequence[Mount], images: ImageStore, namespace: str) -> tuple[ImageVolume, ...]:
    """The images that mounts name.  namespace: of the pod, whose trust policy counts.

    Raises InvalidArgument with the mount's index, NotFound for an absent image, UntrustedImage.
    """
    found = []
    for index, mount in enumerate(asked):
        if mount.image is None:
            if mount.image_sub_path:
                _refuse(index, "image_sub_path", mount.image_sub_path, "belongs to an image")
            continue
        _check(mount, index)
        image = images.get(mount.image.image)
        images.authorize(image, mount.image.user_specified_image or mount.image.image, namespace)
        found.append(ImageVolume(index, image.id))
    return tuple(found)


def _check(mount: Mount, index: int) -> None:
    assert mount.image is not None
    if not mount.image.image:
        _refuse(index, "image.image", "", "names no image")
    if mount.host_path:
        _refuse(index, "host_path", mount.host_path, "excludes an image on the same mount")
    if not mount.readonly:
        _refuse(index, "readonly", False, "must be true: an image volume cannot be written to")
    if mount.propagation is not MountPropagation.PROPAGATION_PRIVATE:
        _refuse(index, "propagation", mount.propagation.name, "must be PROPAGATION_PRIVATE for an image")
    if mount.image_sub_path.startswith("/") or ".." in mount.image_sub_path.split("/"):
        _refuse(index, "image_sub_path", mount.image_sub_path, "must be relative to the image's root, without '..'")


def mount_all(
    volumes: Sequence[ImageVolume],
    asked: Sequence[Mount],
    images: ImageStore,
    bundle: Path,
    *,
    user_namespace: str = "",
    label: str = "",
) -> dict[int, str]:
    """Mount all below the bundle; where each is, by its mount's index, for the container to bind.

    user_namespace: the file of one to show owners by.  label: the files' SELinux label, "" for none.  Raises
    InvalidArgument for a sub-path that is not there, StepFailed when the kernel refuses; `unmount_all` then undoes it.
    """
    places: dict[int, str] = {}
    for volume in volumes:
        place = bundle / DIRECTORY / str(volume.index)
        place.mkdir(mode=0o700, parents=True)
        try:
            _mount(images.view(volume.image_id), place, user_namespace, label)
        except OSError as error:
            name = asked[volume.index].image
            raise StepFailed(
                "mount_image_volume", error.errno or 0, str(error.filename or place), f"image {name and name.image!r}"
            ) from None
        places[volume.index] = _inside(place, asked[volume.index].image_sub_path, volume.index)
    return places


def unmount_all(bundle: Path) -> None:
    """Undo `mount_all`; what is gone already is fine."""
    try:
        places = [entry.path for entry in os.scandir(bundle / DIRECTORY)]
    except FileNotFoundError:
        return
    for place in places:
        _unmount(place)


def _mount(image: Overlay, place: Path, user_namespace: str, label: str) -> None:
    """By descriptor of the layers' directory: 127 layers by their whole paths would not fit the page of mount data.

    A name may be absolute: the empty layer's is, as it is not an additional store's.
    """
    with layers(image.base, place.with_suffix(".layers"), user_namespace) as base:
        lowers = ":".join(os.path.join(f"/proc/self/fd/{base}", lower) for lower in image.lowers)
        context = f',context="{label}"' if label else ""
        syscalls.mount("overlay", str(place), "overlay", _FLAGS, f"lowerdir={lowers}{context}")


@contextmanager
def layers(base: str, aside: Path, user_namespace: str) -> Iterator[int]:
    """A descriptor of the layers' directory; with a user namespace, of a view of it as that maps owners.

    The view has to be mounted somewhere while the overlay is made, which then keeps its own copy.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    if not user_namespace:
        fd = os.open(base, flags)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    aside.mkdir(mode=0o700)
    tree = trees.clone(syscalls.AT_FDCWD, base)
    tree.change(mounts.MOUNT_ATTR_RDONLY)  # who removes the bundle after a crash must not get at the layers
    namespace = process.open_namespace(user_namespace)
    target = os.open(aside, flags)
    try:
        tree.map_ids(namespace, recursive=False)
        tree.attach(target)
        yield tree.fd
    finally:
        for fd in (namespace, target):
            os.close(fd)
        tree.close()
        _unmount(str(aside))
        aside.rmdir()


def _unmount(place: str) -> None:
    """All that is mounted there; `ismount` would not see a mount of the same file system."""
    while True:
        try:
            syscalls.umount2(place, mounts.MNT_DETACH)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return


def _inside(place: Path, sub_path: str, index: int) -> str:
    """Where the sub-path leads without leaving the image, whatever links are on the way."""
    if not sub_path:
        return str(place)
    root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = inroot.open_in_root(root, sub_path, os.O_PATH)
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        _refuse(index, "image_sub_path", sub_path, f"is not in the image: {why}")
    finally:
        os.close(root)
    try:
        return os.readlink(f"/proc/self/fd/{found}")
    finally:
        os.close(found)


def _refuse(index: int, field: str, value: object, reason: str) -> NoReturn:
    raise InvalidArgument(f"config.mounts[{index}].{field}", value, reason)
