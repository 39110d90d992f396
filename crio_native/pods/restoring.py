"""A container from a checkpoint's file: what `pods.checkpoint` writes, and CRI-O does.

The file's images become processes, its changes the container's upper directory.  What the container is allowed comes
from the pod and from the request, never from the file; the executor refuses processes that have more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition, InvalidArgument, NotFound
from crio_native.images import unpacking
from crio_native.images.directories import open_file, pieces_of, read_file
from crio_native.images.unpacker import Limits
from crio_native.pods import names, trees
from crio_native.pods.node import Node
from crio_native.pods.values import ContainerConfig

IMAGES = "checkpoint"  # in the file
_DESCRIPTION, _CHANGES, _DELETED = "config.dump", "rootfs-diff.tar", "deleted.files"
_DESCRIPTION_MAX = 1 << 20
_DELETED_MAX = 4 << 20
_LIMITS = Limits(entries=100_000)  # and the bytes, headers and holes that a layer may have


def is_file(config: ContainerConfig) -> bool:
    """Whether the image that is asked for is a checkpoint's file, as CRI-O has it."""
    return config.image.image.startswith("/")


@contextlib.contextmanager
def unpacked(node: Node, path: str) -> Iterator[Path]:
    """The file's content in a directory, for that time.

    It is a stranger's: the confined unpacker makes it, and what is in it is believed to be no more than files.
    Raises NotFound, InvalidArgument, ResourceExhausted, and what else `unpacking.unpack` raises.
    """
    place = node.layout.bundle(names.new_id())  # of no container: a start removes it after a daemon that was killed
    content = place / "content"  # the archive says who owns this one, and what others may do with it
    place.mkdir(mode=0o700)
    try:
        content.mkdir()
        with _opened(path) as file:
            try:
                unpacking.unpack(content, pieces_of(file), layer=False, what=f"checkpoint {path}", limits=_LIMITS)
                _check_plain(content)
            except InvalidArgument as error:
                raise InvalidArgument("config.image.image", path, f"is no checkpoint: {error}") from None
        yield content
    finally:
        trees.remove_tree(place)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound("checkpoint", path, "there is no such file on this node") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL
        why = f"is no checkpoint: {str(getattr(error, 'strerror', error)).lower()}"
        raise InvalidArgument("config.image.image", path, why) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument("config.image.image", path, "is no checkpoint: not a regular file")
        yield fd
    finally:
        os.close(fd)


def _check_plain(content: Path) -> None:
    """CRIU follows links and waits for FIFOs, and to open a device may be to use it."""
    for directory, directories, files in os.walk(content):
        for name in (*directories, *files):
            mode = os.lstat(os.path.join(directory, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise InvalidArgument("archive", name, "is neither a file nor a directory")


def with_base_image(node: Node, config: ContainerConfig, content: Path) -> ContainerConfig:
    """The configuration with the image that the checkpoint's container stood on; how it is called there counts only if
    the image has that name, for the trust policy judges by it.

    Raises FailedPrecondition for an image that is not there, InvalidArgument for a file that is no checkpoint.
    """
    path = config.image.image
    description = _description(content, path)
    wanted = [description.get(name) for name in ("rootfsImageRef", "rootfsImage", "rootfsImageName")]
    named = [name for name in wanted if isinstance(name, str) and name]
    for name in named:
        try:
            image = node.images.get(name)
        except (NotFound, InvalidArgument):
            continue
        own = [name for name in named if name in image.names]
        found = dataclasses.replace(config.image, image=image.id, user_specified_image=own[-1] if own else "")
        return dataclasses.replace(config, image=found)
    raise FailedPrecondition(f"the checkpoint {path} needs the image {named[-1] if named else '?'!r}: pull it first")


def apply_changes(content: Path, upper: Path) -> None:
    """What the container had changed in its root file system, into one that is new.  Raises InvalidArgument, and what
    else `unpacking.unpack` raises."""
    with _directory(content) as root:
        try:
            with open_file(root, _CHANGES) as changes:
                pieces = _changes_and_whiteouts(changes, _deleted(root))
                unpacking.unpack(upper, pieces, what=f"checkpoint's {_CHANGES}")
        except NotFound:
            pass


def _changes_and_whiteouts(changes: int, deleted: list[str]) -> Iterator[bytes]:
    """As one layer.  The whiteouts come first, for nothing is read after the mark of an archive's end.  The unpacker
    looks at every path."""
    for name in deleted:
        above, _, last = name.rpartition("/")
        whiteout = tarfile.TarInfo(f"{above}/.wh.{last}" if above else f".wh.{last}")
        yield whiteout.tobuf(tarfile.PAX_FORMAT)
    yield from pieces_of(changes)


def _deleted(root: int) -> list[str]:
    try:
        found = json.loads(read_file(root, _DELETED, _DELETED_MAX))
    except NotFound:
        return []
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("checkpoint", _DELETED, f"is not JSON: {error}") from None
    if not isinstance(found, list) or not all(_is_path(name) for name in found):
        raise InvalidArgument("checkpoint", _DELETED, "must be a list of paths")
    return found


def _is_path(name: object) -> bool:
    try:
        return isinstance(name, str) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _description(content: Path, path: str) -> dict[str, Any]:
    try:
        with _directory(content) as root:
            found = json.loads(read_file(root, _DESCRIPTION, _DESCRIPTION_MAX))
    except (NotFound, InvalidArgument, ValueError, RecursionError) as error:
        raise InvalidArgument("config.image.image", path, f"is no checkpoint: {_DESCRIPTION}: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument("config.image.image", path, f"is no checkpoint: its {_DESCRIPTION} is no object")
    return found


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
