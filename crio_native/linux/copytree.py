"""Copying a directory's content into another, by descriptors: what `tmpcopyup` starts a tmpfs with.

Never follows a symlink, never leaves the two directories.  Owners, modes, times and extended attributes come along, and
so do holes; hard links become copies; sockets are left out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

MAX_DEPTH = 128  # of directories: each holds two descriptors and a frame of ours


def copy_entry(source: int, target: int, name: str) -> None:
    """Copy what is no directory from one directory to another, which has nothing of that name.  Raises OSError."""
    _copy_entry(source, target, name, 0)


def copy(source: int, target: int, depth: int = 0) -> None:
    """Copy all entries below the directory `source` into the empty directory `target`.  OSError names the entry."""
    if depth > MAX_DEPTH:
        raise OSError(errno.ELOOP, f"directories are nested deeper than {MAX_DEPTH}")
    for name in os.listdir(source):
        try:
            _copy_entry(source, target, name, depth)
        except OSError as error:
            below = f"{name}/{error.filename}" if isinstance(error.filename, str) and error.filename != name else name
            raise OSError(error.errno, error.strerror, below) from None


def _copy_entry(source: int, target: int, name: str, depth: int) -> None:
    status = os.stat(name, dir_fd=source, follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    elif kind in (stat.S_IFREG, stat.S_IFDIR):
        _copy_content(source, target, name, kind == stat.S_IFDIR, status, depth)
    elif kind != stat.S_IFSOCK:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)  # chown may have cleared bits, as umask has


def _copy_content(source: int, target: int, name: str, directory: bool, status: os.stat_result, depth: int) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    old = os.open(name, flags, dir_fd=source)
    new = -1
    try:
        if directory:
            os.mkdir(name, 0o700, dir_fd=target)
            new = os.open(name, flags | os.O_DIRECTORY, dir_fd=target)
            copy(old, new, depth + 1)
        else:
            creating = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            new = os.open(name, creating, 0o600, dir_fd=target)
            _copy_data(old, new)
        copy_metadata(old, new, status)
    finally:
        os.close(old)
        if new >= 0:
            os.close(new)


def _copy_data(old: int, new: int) -> None:
    """Holes stay holes: an image can have a file of any size in a few bytes."""
    size = os.fstat(old).st_size
    for start, end in ranges_of_data(old):
        _copy_range(old, new, start, end)
    os.ftruncate(new, size)


def ranges_of_data(fd: int) -> Iterator[tuple[int, int]]:
    """Where a file is no hole: (start, end), ascending.  Moves the descriptor's offset."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole, or the end
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _copy_range(old: int, new: int, start: int, end: int) -> None:
    try:
        # On btrfs and xfs both then share it on the disk.
        while start < end and (copied := os.copy_file_range(old, new, min(end - start, 1 << 30), start, start)):
            start += copied
    except OSError:  # not the same file system, or an old kernel
        pass
    os.lseek(new, start, os.SEEK_SET)
    while start < end and (copied := os.sendfile(new, old, start, min(end - start, 1 << 20))):
        start += copied


def copy_metadata(old: int, new: int, status: os.stat_result) -> None:
    """Owner, mode, attributes and times of an open file.  Raises OSError."""
    os.fchown(new, status.st_uid, status.st_gid)
    os.fchmod(new, stat.S_IMODE(status.st_mode))
    _copy_attributes(old, new)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_attributes(old: int, new: int) -> None:
    """The user's own and the file's capabilities; a tmpfs that has no such attributes does without."""
    for name in os.listxattr(old):
        if name.startswith("user.") or name == "security.capability":
            try:
                os.setxattr(new, name, os.getxattr(old, name))
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM):
                    raise
