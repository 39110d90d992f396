"""The directories that layers became, one a layer, by diff id.

    layers/NAME/fs           the tree, as overlayfs wants a lower directory
    layers/NAME/layer.json   what it is; written before NAME appears
    layers/NAME/files.json   its files by digest, where the image said so
    layers/empty/fs          what an image without layers stands on
    tmp/                     what is being made or removed; nothing in it survives a start

NAME is short and random: 127 of them fit the kernel's page of mount options, and no stranger chooses it.  A layer
appears and disappears by one rename.  Which image needs which layer is `store`'s to know.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from crio_native.errors import Internal, InvalidArgument, ResourceExhausted
from crio_native.images.unpacker import Limits
from crio_native.images.unpacking import unpack
from crio_native.linux import inroot
from crio_native.linux.filesystem import syncfs

EMPTY = "empty"
RECORD, CONTENTS = "layer.json", "files.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layer:
    """One unpacked layer.

    lower: its tree, relative to the layers' directory.  bytes, inodes: what it takes on disk.  opaque: it hides all
    layers below.  owner: (mode, uid, gid) that it gives the root directory, None if it says nothing about it.
    """

    diff_id: str
    lower: str
    bytes: int
    inodes: int
    opaque: bool
    owner: tuple[int, int, int] | None


def read(directory: Path) -> Layer:
    """The layer that a directory holds.  Raises OSError, ValueError."""
    try:
        record = json.loads((directory / RECORD).read_bytes())
        owner = record.pop("owner")
        layer = Layer(**record, owner=owner and tuple(owner))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its record is malformed: {error}") from None
    if layer.lower != f"{directory.name}/fs" or not (directory / "fs").is_dir():
        raise ValueError("its record is of another layer")
    return layer


class Layers:
    """The layers below one directory, which no other process uses.  Methods may be called from any thread."""

    def __init__(self, root: Path, limits: Limits | None = None) -> None:
        self.base, self._scratch, self._limits = root / "layers", root / "tmp", limits
        self._layers: dict[str, Layer] = {}
        for directory in (self.base, self._scratch):
            directory.mkdir(mode=0o700, exist_ok=True)
        (self.base / EMPTY / "fs").mkdir(parents=True, exist_ok=True)
        for left in self._scratch.iterdir():
            _remove(left)
        for directory in self.base.iterdir():
            if directory.name != EMPTY:
                self._adopt(directory)

    def _adopt(self, directory: Path) -> None:
        try:
            layer = read(directory)
            if layer.diff_id in self._layers:
                raise ValueError("its layer is here twice")
        except (OSError, ValueError) as error:
            log.warning("layer directory %s is not usable (%s) and is removed", directory, error)
            _remove(self._put_away(directory))
        else:
            self._layers[layer.diff_id] = layer

    def get(self, diff_id: str) -> Layer | None:
        return self._layers.get(diff_id)

    def all(self) -> list[Layer]:
        return list(self._layers.values())

    def add(
        self,
        diff_id: str,
        pieces: Iterable[bytes],
        *,
        what: str,
        check: bool = True,
        contents: Mapping[str, str] | None = None,
    ) -> Layer:
        """Unpack a layer and let it appear.  Durable only after `sync`.

        check: diff_id is the digest of the archive; else it is a name for content that was checked otherwise.
        contents: its files by digest, where they are known, for `find`.
        Raises what `unpacking.unpack` and `pieces` raise, and InvalidArgument if it is not the layer that diff_id
        names; then nothing of it is left.
        """
        with self.scratch() as directory:
            tree = directory / "fs"
            tree.mkdir(mode=0o755)
            os.chmod(tree, 0o755)  # whatever the umask: this is the mode of the container's root directory
            made = unpack(tree, pieces, what=what, limits=self._limits)
            if check and made.digest != diff_id:
                raise InvalidArgument(what, made.digest, f"its content is not what the image config says, {diff_id}")
            name = directory.name
            layer = Layer(diff_id, f"{name}/fs", made.bytes, made.inodes, made.opaque, made.owner)
            (directory / RECORD).write_text(json.dumps(dataclasses.asdict(layer)))
            if contents:
                (directory / CONTENTS).write_text(json.dumps(contents))
            os.rename(directory, self.base / name)
        self._layers[diff_id] = layer
        return layer

    def contents(self) -> dict[str, tuple[str, str]]:
        """Files by digest, of the layers that know: (tree, name in it).  Whether they are so is for the user to see."""
        found: dict[str, tuple[str, str]] = {}
        for layer in self.all():
            try:
                known = json.loads((self.base / layer.lower).with_name(CONTENTS).read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                log.warning("the list of files of layer %s is not usable: %s", layer.diff_id, error)
                continue
            found |= {digest: (layer.lower, name) for digest, name in known.items()}
        return found

    def sync(self) -> None:
        """Make every layer durable (one syncfs for all: an fsync a file would cost seconds)."""
        syncfs(os.fspath(self.base))

    def remove(self, diff_ids: Iterable[str]) -> list[Path]:
        """Let layers disappear, at once; what they occupied is for `delete` to free."""
        gone = [layer for diff_id in diff_ids if (layer := self._layers.pop(diff_id, None))]
        return [self._put_away((self.base / layer.lower).parent) for layer in gone]

    @staticmethod
    def delete(removed: Iterable[Path]) -> None:
        """Free what `remove` has put away.  Takes as long as there are files."""
        for directory in removed:
            _remove(directory)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new directory on the same file system, removed at the end with all that is in it.  Raises
        ResourceExhausted, Internal."""
        name = base64.b32encode(os.urandom(10)).decode().lower()[:12]
        directory = self._scratch / name
        try:
            directory.mkdir(mode=0o700)
            yield directory
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(
                    f"no space left on the device of {self._scratch} (ENOSPC); free some and retry"
                ) from None
            raise Internal(f"the image store failed on {error.filename}: {error.strerror}") from error
        finally:
            _remove(directory)

    def _put_away(self, directory: Path) -> Path:
        away = self._scratch / directory.name
        try:
            os.rename(directory, away)
        except OSError as error:  # the next start finds it without an image, and tries again
            log.warning("cannot remove layer directory %s: %s", directory, error)
        return away


class LocalFiles:
    """The files of all layers, by digest, as of one moment."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._known: dict[str, tuple[str, str]] | None = None

    def open(self, digest: str, size: int) -> int | None:
        """A descriptor of a file with this content; None if there is none.  The content is looked at, not believed:
        a later entry of the layer's archive may have replaced the file."""
        if self._known is None:
            self._known = self._layers.contents()
        place = self._known.get(digest)
        return self._open(place, digest, size) if place else None

    def _open(self, place: tuple[str, str], digest: str, size: int) -> int | None:
        tree, name = place
        root = os.open(self._layers.base / tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = inroot.open_in_root(root, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except (OSError, ValueError):
            return None
        finally:
            os.close(root)
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_size == size:
            with open(os.dup(fd), "rb") as file:
                if f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest:
                    os.lseek(fd, 0, os.SEEK_SET)
                    return fd
        os.close(fd)
        return None


def _remove(path: Path) -> None:
    """Remove a tree; what cannot be removed stays for the next start, and is logged."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
