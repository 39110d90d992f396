"""A container from a checkpoint's file: what `pods.checkpoint` writes, and CRI-O does.

The file's images become processes, its changes the container's upper directory.  What the container is allowed comes
from the pod and from the request, never from the file; the executor refuses processes that have more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition, InvalidArgument, NotFound
from crio_native.images import unpacking
from crio_native.images.roots import UPPER
from crio_native.pods.node import Node
from crio_native.pods.values import ContainerConfig

DIRECTORY = "restore"  # below the bundle
_CHANGES, _DELETED = "rootfs-diff.tar", "deleted.files"
_TOP = ("config.dump", "spec.dump", _CHANGES, _DELETED)
_IMAGE = re.compile(r"checkpoint/[A-Za-z0-9._-]{1,200}")
_DESCRIPTION_MAX = 1 << 20
_DELETED_MAX = 16 << 20
_FILES_MAX = 100_000


def is_file(config: ContainerConfig) -> bool:
    """Whether the image that is asked for is a checkpoint's file, as CRI-O has it."""
    return config.image.image.startswith("/")


def with_base_image(node: Node, config: ContainerConfig) -> ContainerConfig:
    """The configuration with the image that the checkpoint's container stood on.

    Raises NotFound for a file that is not there, FailedPrecondition for an image that is not, InvalidArgument for a
    file that is no checkpoint.
    """
    path = config.image.image
    with _archive(path) as archive:
        description = _description(archive, path)
    wanted = [description.get(name) for name in ("rootfsImageRef", "rootfsImage", "rootfsImageName")]
    names = [name for name in wanted if isinstance(name, str) and name]
    for name in names:
        try:
            image = node.images.get(name)
        except (NotFound, InvalidArgument):
            continue
        found = dataclasses.replace(config.image, image=image.id, user_specified_image=names[-1])
        return dataclasses.replace(config, image=found)
    raise FailedPrecondition(f"the checkpoint {path} needs the image {names[-1] if names else '?'!r}: pull it first")


def unpack(path: str, bundle: Path) -> Path:
    """The checkpoint's content into the bundle, whose root file system is prepared; the directory of the images.
    Raises InvalidArgument."""
    place = bundle / DIRECTORY
    (place / "checkpoint").mkdir(parents=True, mode=0o700)
    with _archive(path) as archive:
        for number, entry in enumerate(archive):
            name = entry.name.removeprefix("./").rstrip("/")
            if number > _FILES_MAX:
                raise InvalidArgument("config.image.image", path, f"has more than {_FILES_MAX} files")
            if entry.isfile() and (name in _TOP or _IMAGE.fullmatch(name)):
                content = archive.extractfile(entry)
                assert content is not None
                with open(place / name, "xb", opener=_private) as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    _apply_changes(place, bundle / UPPER)
    return place / "checkpoint"


def _apply_changes(place: Path, upper: Path) -> None:
    changes = place / _CHANGES
    if not changes.exists():
        return
    deleted = _deleted(place)
    try:
        with tarfile.open(changes, "a", format=tarfile.PAX_FORMAT) as archive:
            for name in deleted:  # as a layer says it; the unpacker looks at every path
                above, _, last = name.rpartition("/")
                archive.addfile(tarfile.TarInfo(f"{above}/.wh.{last}" if above else f".wh.{last}"))
    except tarfile.TarError as error:
        raise InvalidArgument("checkpoint", _CHANGES, f"is no archive: {error}") from None
    with changes.open("rb") as file:
        unpacking.unpack(upper, iter(lambda: file.read(1 << 20), b""), what="checkpoint's changes")
    changes.unlink()


def _deleted(place: Path) -> list[str]:
    try:
        found = json.loads(_read(place / _DELETED, _DELETED_MAX) or b"[]")
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("checkpoint", _DELETED, f"is not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InvalidArgument("checkpoint", _DELETED, "must be a list of paths")
    return found


def _archive(path: str) -> tarfile.TarFile:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return tarfile.open(fileobj=os.fdopen(fd, "rb"))
    except FileNotFoundError:
        raise NotFound("checkpoint", path, "there is no such file on this node") from None
    except (OSError, tarfile.TarError) as error:
        raise InvalidArgument("config.image.image", path, f"is no checkpoint: {error}") from None


def _description(archive: tarfile.TarFile, path: str) -> dict[str, Any]:
    try:
        content = archive.extractfile("config.dump")
        found = json.loads(content.read(_DESCRIPTION_MAX)) if content is not None else None
    except (KeyError, ValueError, RecursionError, tarfile.TarError) as error:
        raise InvalidArgument("config.image.image", path, f"is no checkpoint: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument("config.image.image", path, "is no checkpoint: its config.dump is no object")
    return found


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except FileNotFoundError:
        return b""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
