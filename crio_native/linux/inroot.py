"""Opening and making files inside a root that a stranger may have filled, and may be changing at this moment.

Every path is resolved by the kernel under the root's descriptor (openat2 with RESOLVE_IN_ROOT): an absolute symlink
starts at that root, `..` stops there, and magic links of a procfs are refused.  Where the kernel has no openat2 the
walk below does the same by hand, one component at a time.
"""

from __future__ import annotations

import errno
import os
import stat

from crio_native.linux import syscalls

_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
MAX_LINKS = 40  # the kernel's own bound
_RACES = 16  # openat2 answers EAGAIN when a rename crosses its walk


def open_in_root(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` below the descriptor `root`; OSError as openat2(2).  The descriptor is close-on-exec."""
    for _ in range(_RACES):
        try:
            return syscalls.openat2(root, path.lstrip("/") or ".", flags, resolve=_RESOLVE, mode=mode)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                return _walk(root, path, flags, mode)
            if error.errno != errno.EAGAIN:
                raise
    raise OSError(errno.EAGAIN, "the path kept changing while it was resolved", path)


def open_beneath(top: str, below: str) -> int:
    """An O_PATH descriptor of `below`, a path without symlinks below the file or directory `top`, which may be named by
    one; `top` itself when there is none.  Raises OSError."""
    root = os.open(top, os.O_PATH | os.O_CLOEXEC)
    parts = below.strip("/").split("/") if below else []
    if {"", ".", ".."}.intersection(parts):
        os.close(root)
        raise OSError(errno.EINVAL, "the path does not lead straight down", below)
    for part in parts:  # step by step, what openat2 does with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS, on any kernel
        try:
            following = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        finally:
            os.close(root)
        root = following
        if stat.S_ISLNK(os.fstat(root).st_mode):
            os.close(root)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), below)
    return root


def _walk(root: int, path: str, flags: int, mode: int) -> int:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    stack = [os.dup(root)]
    links = 0
    try:
        while parts:
            name = parts.pop(0)
            if name == "..":
                if len(stack) > 1:
                    os.close(stack.pop())
                continue
            final = not parts
            if final and flags & (os.O_CREAT | os.O_NOFOLLOW):
                return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=stack[-1])
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stack[-1])
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                links += 1
                try:
                    target = os.readlink("", dir_fd=fd)
                finally:
                    os.close(fd)
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                if target.startswith("/"):
                    while len(stack) > 1:
                        os.close(stack.pop())
                parts = [part for part in target.split("/") if part not in ("", ".")] + parts
                continue
            stack.append(fd)
        return _reopen(stack[-1], flags)
    finally:
        for fd in stack:
            os.close(fd)


def _reopen(fd: int, flags: int) -> int:
    if flags & os.O_PATH:
        if flags & os.O_DIRECTORY and not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return os.dup(fd)
    return os.open(f"/proc/self/fd/{fd}", flags & ~os.O_NOFOLLOW | os.O_CLOEXEC)


def make_directories(root: int, path: str, mode: int = 0o755, links: int = 0) -> int:
    """mkdir -p below `root`; an O_PATH descriptor of the last directory.

    Each component is made relative to the descriptor of its parent, so that nobody can swap a symlink in between
    two lookups and have us create directories elsewhere (CVE-2024-45310).  links: how many dangling symlinks may be
    followed, what each of them names being made, below `root` too; further ones are an OSError.
    """
    try:
        return open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        pass
    current = os.dup(root)
    done = ""
    try:
        for name in [part for part in path.split("/") if part not in ("", ".")]:
            done = f"{done}/{name}"
            following = _existing_directory(root, done)
            if following < 0:
                try:
                    os.mkdir(name, mode, dir_fd=current)
                except FileExistsError:
                    pass  # a dangling symlink, or somebody was faster
                following = _made_directory(root, current, name, mode, links)
            os.close(current)
            current = following
        result, current = current, -1
        return result
    finally:
        if current >= 0:
            os.close(current)


def _made_directory(root: int, parent: int, name: str, mode: int, links: int) -> int:
    if links and (leads_to := _dangling(root, parent, name)):
        return make_directories(root, leads_to, mode, links - 1)
    return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _dangling(root: int, parent: int, name: str) -> str:
    """The path below `root` that a symlink in the directory `parent` leads to; "" when it is none."""
    try:
        target = os.readlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return ""
    if target.startswith("/"):
        return target
    top, directory = (os.readlink(f"/proc/self/fd/{fd}") for fd in (root, parent))
    return f"{directory.removeprefix(top)}/{target}"


def _existing_directory(root: int, path: str) -> int:
    try:
        return open_in_root(root, path, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        return -1


def make_file(root: int, path: str, mode: int = 0o644, links: int = 0) -> int:
    """An O_PATH descriptor of a non-directory at `path`, made as an empty file when it is missing; symlinks as in
    `make_directories`."""
    try:
        return open_in_root(root, path, os.O_PATH)
    except FileNotFoundError:
        pass
    parent_path, _, name = path.rstrip("/").rpartition("/")
    parent = make_directories(root, parent_path, links=links)
    try:
        try:
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent)
            os.close(fd)
        except FileExistsError:
            if links and (leads_to := _dangling(root, parent, name)):
                return make_file(root, leads_to, mode, links - 1)
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)


def read_file(root: int, path: str, limit: int) -> bytes:
    """At most `limit` bytes of a regular file below `root`; a larger or special file is an OSError (CVE-2025-4437)."""
    fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", path)
        chunks: list[bytes] = []
        size = 0
        while size <= limit and (chunk := os.read(fd, 65536)):
            chunks.append(chunk)
            size += len(chunk)
        if size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", path)
        return b"".join(chunks)
    finally:
        os.close(fd)
