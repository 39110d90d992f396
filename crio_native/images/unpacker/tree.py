"""What the entries of a layer do to a directory.

The layer becomes a directory as overlayfs wants its lower layers: a whiteout is a character device 0:0, an opaque
directory has an xattr.  Every step of a path is opened by descriptor and without following links; a symlink on the way
to an entry is followed by hand, and only inside the layer.  Nothing is ever written through a name that existed
before: it is removed first.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from crio_native.images.unpacker import Limits, Refused, tar
from crio_native.images.unpacker.stream import Stream

WHITEOUT = b".wh."  # image-spec, layer.md
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."  # other names that only aufs itself used

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40  # as the kernel bounds one path
_ALLOCATION = 4096
_PARENTS = 512  # descriptors; twice the depth of a path is left of what the process may have

Path = tuple[bytes, ...]


class Tree:
    """A directory being filled.

    root: a descriptor of it.  bytes, inodes: what was written, bytes rounded up to blocks.  owner: (mode, uid, gid)
    that the archive gives the directory itself, None if it does not.
    """

    def __init__(self, root: int, limits: Limits, *, layer: bool) -> None:
        self._root, self._limits, self._layer = root, limits, layer
        self.bytes = self.inodes = self._holes = 0
        self.owner: tuple[int, int, int] | None = None
        self._times: dict[Path, int] = {}
        self._opaque: set[Path] = set()
        self._parents: dict[Path, int] = {}  # descriptors kept open: entries of one directory come again and again
        self._stale = False  # whether one of them may be of what is no longer there

    def add(self, entry: tar.Entry, stream: Stream) -> None:
        """Apply one entry.  Raises Refused with the entry's name, or OSError."""
        try:
            self._add(entry, stream)
        except Refused as refused:
            refused.entry = refused.entry or entry.name
            raise
        except OSError as error:
            error.filename = entry.name
            raise

    def _add(self, entry: tar.Entry, stream: Stream) -> None:
        path = self._split(entry.name)
        if not path:
            self._set_root(entry)
        elif self._layer and path[-1].startswith(WHITEOUT):
            self._whiteout(path)
        else:
            parent, name = self._parent(path[:-1]), path[-1]
            if entry.kind == tar.FILE:
                self._file(parent, name, entry, stream)
            elif entry.kind == tar.DIRECTORY:
                self._directory(parent, path, entry)
            elif entry.kind == tar.LINK:
                self._link(parent, name, entry)
            else:
                self._special(parent, name, entry)

    def finish(self) -> None:
        """Give directories their times, which making entries in them has changed."""
        for path, time in self._times.items():
            try:
                fd = self._open(path, make=False)
            except (OSError, Refused):  # a later entry has put something else there
                continue
            os.utime(fd, ns=(time, time))
            os.close(fd)

    @property
    def root_is_opaque(self) -> bool:
        return () in self._opaque

    def opaque_directories(self) -> Iterator[int]:
        """A descriptor of each directory below the root that hides what lower layers have there."""
        for path in sorted(self._opaque - {()}):
            try:
                fd = self._open(path, make=False)
            except (OSError, Refused):
                continue
            yield fd
            os.close(fd)

    # Paths

    def _split(self, name: bytes) -> Path:
        """The steps of a name; a leading slash means nothing, as for every tar."""
        path = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
        if b".." in path:
            raise Refused("the path has '..' in it, which could lead out of the layer", name)
        if len(path) > self._limits.depth:
            raise Refused(f"the path is deeper than {self._limits.depth} directories", name, "limit")
        if any(len(part) > 255 for part in path):
            raise Refused("a part of the path is longer than 255 bytes", name)
        return path

    def _parent(self, path: Path) -> int:
        """A descriptor of a directory to make an entry in; missing ones on the way are made.  It stays ours."""
        if self._stale or len(self._parents) >= _PARENTS:
            for fd in self._parents.values():
                os.close(fd)
            self._parents, self._stale = {}, False
        fd = self._parents.get(path, -1)
        if fd < 0:
            fd = self._parents[path] = self._open(path, make=True)
        return fd

    def _open(self, path: Path, *, make: bool) -> int:
        """Open a directory, following symlinks by hand: relative ones, that stay inside.  The caller closes it.

        The kernel's RESOLVE_BENEATH does nearly that, but would let links make a tree deeper than any bound.
        """
        steps, links = list(reversed(path)), 0
        chain = [os.dup(self._root)]  # a descriptor a level
        walked: list[bytes] = []  # its name
        try:
            while steps:
                step = steps.pop()
                if step == b"..":
                    if len(chain) == 1:
                        raise Refused("a symlink on its way leads out of the layer")
                    os.close(chain.pop())
                    walked.pop()
                    continue
                if len(chain) > self._limits.depth:
                    raise Refused(f"it is deeper than {self._limits.depth} directories", kind="limit")
                try:
                    chain.append(os.open(step, _OPEN_DIRECTORY, dir_fd=chain[-1]))
                    walked.append(step)
                except FileNotFoundError:
                    if not make:
                        raise
                    self._make_directory(chain[-1], step, 0o755)
                    steps.append(step)
                except NotADirectoryError:
                    if make and self._is_whiteout(chain[-1], step):
                        os.unlink(step, dir_fd=chain[-1])
                        self.inodes -= 1
                        self._opaque.add((*walked, step))
                        steps.append(step)
                        continue
                    links += 1
                    steps += self._follow(chain[-1], step, links)
            return chain.pop()
        finally:
            for fd in chain:
                os.close(fd)

    def _follow(self, parent: int, name: bytes, links: int) -> list[bytes]:
        """The steps of a symlink's target, last first."""
        try:
            target = os.readlink(name, dir_fd=parent)
        except OSError:
            raise Refused(f"{_show(name)} on its way is not a directory") from None
        if target.startswith(b"/") or links > _MAX_LINKS:
            what = "an absolute symlink" if links <= _MAX_LINKS else "too long a chain of symlinks"
            raise Refused(f"its path leads through {what} ({_show(name)} -> {_show(target)})")
        return [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]

    # Entries

    def _set_root(self, entry: tar.Entry) -> None:
        if entry.kind != tar.DIRECTORY:
            raise Refused("the root of the layer is not a directory")
        self.owner = (entry.mode, entry.uid, entry.gid)
        self._attributes(self._root, entry)
        self._times[()] = entry.mtime

    def _file(self, parent: int, name: bytes, entry: tar.Entry, stream: Stream) -> None:
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        except FileExistsError:
            self._remove(parent, name)
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        try:
            if entry.fragments is None:
                _write(fd, stream, entry.size)
            else:
                self._sparse(fd, stream, entry)
            self._attributes(fd, entry)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(fd)
        self.inodes += 1
        self.bytes += entry.whole + -entry.whole % _ALLOCATION

    def _sparse(self, fd: int, stream: Stream, entry: tar.Entry) -> None:
        """Holes cost no data, but whoever copies or reads the file: all of them together have the layer's bound."""
        self._holes += entry.whole - entry.size
        if self._holes > self._limits.bytes:
            raise Refused(f"its sparse files have more than {self._limits.bytes} bytes of holes", kind="limit")
        for offset, length in entry.fragments or ():
            os.lseek(fd, offset, os.SEEK_SET)
            _write(fd, stream, length)
        os.ftruncate(fd, entry.whole)

    def _directory(self, parent: int, path: Path, entry: tar.Entry) -> None:
        """A directory that is there already keeps its entries and gets new attributes."""
        name = path[-1]
        try:
            self._make_directory(parent, name, 0o700)
        except FileExistsError:
            if self._is_whiteout(parent, name):
                self._opaque.add(path)  # this layer removes what was there, and starts anew
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                self._remove(parent, name)
                self._make_directory(parent, name, 0o700)
        fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
        try:
            self._attributes(fd, entry)
        finally:
            os.close(fd)
        self._times[path] = entry.mtime

    def _link(self, parent: int, name: bytes, entry: tar.Entry) -> None:
        target = self._split(entry.link)
        if not target or (self._layer and target[-1].startswith(WHITEOUT)):
            raise Refused(f"a hard link to {_show(entry.link)}, which is not a file")
        try:
            directory = self._open(target[:-1], make=False)
        except FileNotFoundError:
            raise Refused(f"a hard link to {_show(entry.link)}, which this layer does not have") from None
        try:
            there = _stat(directory, target[-1])
            if there is None or stat.S_ISDIR(there.st_mode):
                raise Refused(f"a hard link to {_show(entry.link)}, which is not a file of this layer")
            here = _stat(parent, name)
            if here and os.path.samestat(here, there):
                return
            if here:
                self._remove(parent, name)
            os.link(target[-1], name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(directory)

    def _special(self, parent: int, name: bytes, entry: tar.Entry) -> None:
        """A symlink, a device or a FIFO."""
        if _stat(parent, name):
            self._remove(parent, name)
        if entry.kind == tar.SYMLINK:
            if not entry.link:
                raise Refused("a symlink without a target")
            os.symlink(entry.link, name, dir_fd=parent)
        else:
            format_ = {tar.CHAR: stat.S_IFCHR, tar.BLOCKDEV: stat.S_IFBLK, tar.FIFO: stat.S_IFIFO}[entry.kind]
            os.mknod(name, format_ | entry.mode, os.makedev(entry.major, entry.minor), dir_fd=parent)
        os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)
        self.inodes += 1

    def _whiteout(self, path: Path) -> None:
        """Hide a name, or all that is in a directory, of lower layers; never of this one (image-spec, layer.md)."""
        marker, directory = path[-1], path[:-1]
        if marker == OPAQUE:
            self._parent(directory)
            self._opaque.add(directory)
            return
        if marker.startswith(RESERVED):
            return
        name = marker.removeprefix(WHITEOUT)
        if name in (b"", b".", b".."):
            raise Refused("a whiteout of no name")
        parent = self._parent(directory)
        here = _stat(parent, name)
        if here is None:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
            self.inodes += 1
        elif stat.S_ISDIR(here.st_mode):
            self._opaque.add((*directory, name))

    # Parts of entries

    def _make_directory(self, parent: int, name: bytes, mode: int) -> None:
        os.mkdir(name, mode, dir_fd=parent)
        self.inodes += 1
        self.bytes += _ALLOCATION

    def _attributes(self, fd: int, entry: tar.Entry) -> None:
        """Owner first: changing it clears setuid bits and file capabilities."""
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode)
        for name, value in entry.xattrs.items():
            if name != b"security.capability" and (not name.startswith(b"user.") or name.startswith(b"user.overlay.")):
                continue  # labels are the host's to give, trusted.* is how overlayfs itself is driven
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno in (errno.E2BIG, errno.ERANGE, errno.ENOSPC):  # ext4 says the last of one too large
                    raise Refused(
                        f"the file system has no room for its attribute {_show(name)} of {len(value)} bytes: it takes "
                        "none so large, or is full",
                        kind="limit",
                    ) from None
                if error.errno != errno.ENOTSUP or name == b"security.capability":
                    raise

    def _is_whiteout(self, parent: int, name: bytes) -> bool:
        here = _stat(parent, name)
        return self._layer and here is not None and stat.S_ISCHR(here.st_mode) and here.st_rdev == 0

    def _remove(self, parent: int, name: bytes) -> None:
        """Remove what an earlier entry of this archive has put there."""
        self._stale = True
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISDIR(there.st_mode):
            os.unlink(name, dir_fd=parent)
        else:
            fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
            try:
                for child in os.listdir(fd):
                    self._remove(fd, os.fsencode(child))
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=parent)
        if stat.S_ISDIR(there.st_mode) or there.st_nlink == 1:
            self.inodes -= 1
            self.bytes -= allocated(there)


def _write(fd: int, stream: Stream, count: int) -> None:
    for piece in stream.pieces(count):
        while piece:
            piece = piece[os.write(fd, piece) :]


def allocated(info: os.stat_result) -> int:
    """What a file counts for: whole blocks, whatever the file system makes of it."""
    if stat.S_ISDIR(info.st_mode):
        return _ALLOCATION
    return info.st_size + -info.st_size % _ALLOCATION if stat.S_ISREG(info.st_mode) else 0


def _stat(parent: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _show(name: bytes) -> str:
    return repr(name[:200])[1:]
