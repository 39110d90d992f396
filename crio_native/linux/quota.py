"""Project quotas: a bound on what one directory tree takes of its file system (ext4, xfs, f2fs).

A directory is given a project number, which all that is made in it inherits; limits are the project's.  The file
system must be mounted with `prjquota`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

QUOTACTL_FD = 443  # since Linux 5.14, the same on every architecture
_SET_QUOTA, _GET_QUOTA, _PROJECT = 0x800008, 0x800007, 2
_LIMITS = 1 | 4  # QIF_BLIMITS, QIF_ILIMITS
_FS_GET, _FS_SET = 0x801C581F, 0x401C5820  # FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
_INHERIT = 0x200  # FS_XFLAG_PROJINHERIT
_ATTRIBUTES = struct.Struct("=5I8x")  # struct fsxattr: flags, extsize, nextents, project, cowextsize
_BLOCK = 1024  # bytes; what the limits count in


class _dqblk(ctypes.Structure):
    _fields_ = (
        ("block_hard", ctypes.c_uint64),
        ("block_soft", ctypes.c_uint64),
        ("space", ctypes.c_uint64),
        ("inode_hard", ctypes.c_uint64),
        ("inode_soft", ctypes.c_uint64),
        ("inodes", ctypes.c_uint64),
        ("block_time", ctypes.c_uint64),
        ("inode_time", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_call = _libc.syscall
_call.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(_dqblk))
_call.restype = ctypes.c_long


def set_limits(directory: str, project: int, *, size: int, inodes: int) -> None:
    """Give an empty directory a project with limits.  size: bytes; 0 is no limit.

    Raises OSError: ENOTSUP where the file system has no project quotas, or they are not switched on.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        wanted = _dqblk(block_hard=-(-size // _BLOCK), inode_hard=inodes, valid=_LIMITS)
        _quotactl(fd, _SET_QUOTA, project, wanted, directory)
        flags, extent, extents, _, cow = _ATTRIBUTES.unpack(fcntl.ioctl(fd, _FS_GET, bytes(_ATTRIBUTES.size)))
        fcntl.ioctl(fd, _FS_SET, _ATTRIBUTES.pack(flags | _INHERIT, extent, extents, project, cow))
    finally:
        os.close(fd)


def lift(directory: str, project: int) -> None:
    """Take a project's limits away: the file system forgets a project that has neither limits nor files.

    directory: any on that file system.  Raises OSError as `set_limits`.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _quotactl(fd, _SET_QUOTA, project, _dqblk(valid=_LIMITS), directory)
    finally:
        os.close(fd)


def limits(directory: str, project: int) -> tuple[int, int]:
    """(bytes, inodes) that a project may take, 0 for no limit.  Raises OSError as `set_limits`."""
    found = _get(directory, project)
    return found.block_hard * _BLOCK, found.inode_hard


def usage(directory: str, project: int) -> tuple[int, int]:
    """(bytes, inodes) that a project takes.  Raises OSError as `set_limits`."""
    found = _get(directory, project)
    return found.space, found.inodes


def project_of(directory: str) -> int:
    """The project of a directory, 0 for none.  Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return int(_ATTRIBUTES.unpack(fcntl.ioctl(fd, _FS_GET, bytes(_ATTRIBUTES.size)))[3])
    finally:
        os.close(fd)


def _get(directory: str, project: int) -> _dqblk:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _dqblk()
        _quotactl(fd, _GET_QUOTA, project, found, directory)
        return found
    finally:
        os.close(fd)


def _quotactl(fd: int, command: int, project: int, values: _dqblk, path: str) -> None:
    if _call(QUOTACTL_FD, fd, command << 8 | _PROJECT, project, ctypes.byref(values)) < 0:
        number = ctypes.get_errno()
        unsupported = (errno.ENOSYS, errno.ESRCH, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)
        raise OSError(errno.ENOTSUP if number in unsupported else number, os.strerror(number), path)
