"""Subvolumes of btrfs (btrfs-ioctl(2), include/uapi/linux/btrfs.h): made, copied, bounded and destroyed as one.

A subvolume is a directory that can be copied in no time, whatever is in it.  Every user may make some below a directory
of its own, so what is below one of ours is not only what we have made.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

_FIRST_INODE = 256  # of every subvolume's own directory
_CREATE, _SNAPSHOT, _DESTROY, _DESTROY_V2 = 0x5000940E, 0x50009401, 0x5000940F, 0x5000943F
_SEARCH, _LOOK_UP, _LIMIT = 0xD0009411, 0xD0009412, 0x8030942B
_ROOT_TREE, _ROOT_REF = 1, 156
_BY_ID = 1 << 4
_MAX_EXCLUSIVE = 1 << 1
_ARGUMENTS = 4096  # bytes of each structure with a name in it
_NAME = struct.Struct("=q4088s")
_KEY = struct.Struct("=7Q4I32x")
_HEADER = struct.Struct("=3Q2I")
_ALL = (1 << 64) - 1
_SET_FLAGS = 0x4008941A
_HANDLE_BYTES, _HANDLE_KIND = 20, 0x4D  # FILEID_BTRFS_WITHOUT_PARENT
_MAX_NESTED = 100_000


class _Handle(ctypes.Structure):
    """struct file_handle (open_by_handle_at(2)) as btrfs makes them; a generation of 0 stands for any."""

    _pack_ = 4
    _fields_ = (
        ("bytes", ctypes.c_uint),
        ("kind", ctypes.c_int),
        ("inode", ctypes.c_uint64),
        ("subvolume", ctypes.c_uint64),
        ("generation", ctypes.c_uint32),
    )


_open_by_handle_at = ctypes.CDLL(None, use_errno=True).open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.POINTER(_Handle), ctypes.c_int)
_open_by_handle_at.restype = ctypes.c_int


def is_btrfs(directory: str) -> bool:
    """Whether a directory is on btrfs.  Raises OSError."""
    fd = _open(directory)
    try:
        _id(fd)
        return True
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    finally:
        os.close(fd)


def create(path: str) -> None:
    """Make an empty subvolume.  Raises OSError."""
    _by_name(path, _CREATE)


def snapshot(source: str, path: str) -> None:
    """Make a subvolume that begins as a copy of another, on the same file system.  Raises OSError."""
    fd = _open(source)
    try:
        _by_name(path, _SNAPSHOT, fd)
    finally:
        os.close(fd)


def limit(path: str, size: int) -> None:
    """Bound what a subvolume may have for itself alone, in bytes.  Raises OSError: ENOTCONN where quotas are off."""
    fd = _open(path)
    try:
        fcntl.ioctl(fd, _LIMIT, struct.pack("=6Q", 0, _MAX_EXCLUSIVE, 0, size, 0, 0))  # 0: the subvolume of fd
    finally:
        os.close(fd)


def destroy(path: str) -> None:
    """Remove a subvolume with all that is in it, whoever made it.  Raises OSError: EINVAL for what is none."""
    fd = _open(path)
    try:
        if os.fstat(fd).st_ino != _FIRST_INODE:
            raise OSError(errno.EINVAL, "no subvolume", path)
        below = _nested(fd)
        for nested in below:
            _make_writable(fd, nested)  # what is in a read-only one cannot be removed
        for nested in below:
            arguments = struct.pack("=3Q32xQ", 0, 0, _BY_ID, nested)
            fcntl.ioctl(fd, _DESTROY_V2, bytearray(arguments.ljust(_ARGUMENTS, b"\0")))
    finally:
        os.close(fd)
    _by_name(path, _DESTROY)


def _nested(fd: int) -> list[int]:
    """The numbers of the subvolumes below one, each after those below itself."""
    found = [_id(fd)]
    for number in found:  # which grows meanwhile
        found += _children(fd, number)
        if len(found) > _MAX_NESTED:
            raise OSError(errno.E2BIG, f"more than {_MAX_NESTED} subvolumes below it")
    return found[:0:-1]


def _children(fd: int, parent: int) -> list[int]:
    children: list[int] = []
    while True:
        after = children[-1] + 1 if children else 0
        key = _KEY.pack(_ROOT_TREE, parent, parent, after, _ALL, 0, _ALL, _ROOT_REF, _ROOT_REF, 100, 0)
        buffer = bytearray(key.ljust(_ARGUMENTS, b"\0"))
        fcntl.ioctl(fd, _SEARCH, buffer)
        count = _KEY.unpack_from(buffer)[9]
        if not count:
            return children
        place = _KEY.size
        for _ in range(count):
            _, _, child, _, length = _HEADER.unpack_from(buffer, place)
            children.append(child)
            place += _HEADER.size + length


def _make_writable(fd: int, number: int) -> None:
    """A subvolume that may be anywhere on the file system of fd: by its number, no path leads astray."""
    handle = _Handle(_HANDLE_BYTES, _HANDLE_KIND, _FIRST_INODE, number, 0)
    opened = _open_by_handle_at(fd, ctypes.byref(handle), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if opened < 0:
        raise OSError(ctypes.get_errno(), f"cannot open subvolume {number}")
    try:
        fcntl.ioctl(opened, _SET_FLAGS, bytes(8))
    finally:
        os.close(opened)


def _id(fd: int) -> int:
    """The number of the subvolume that a directory is in."""
    buffer = bytearray(struct.pack("=QQ", 0, _FIRST_INODE).ljust(_ARGUMENTS, b"\0"))
    fcntl.ioctl(fd, _LOOK_UP, buffer)
    return int.from_bytes(buffer[:8], "little")


def _by_name(path: str, act: int, fd: int = 0) -> None:
    parent = _open(os.path.dirname(path))
    try:
        fcntl.ioctl(parent, act, bytearray(_NAME.pack(fd, os.fsencode(os.path.basename(path)))))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(parent)


def _open(directory: str) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
