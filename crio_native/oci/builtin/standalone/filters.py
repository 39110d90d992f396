"""Compiled seccomp filters, kept for the next container with the same profile.

To compile one takes longer than to make the container: libseccomp must be loaded and given some hundred rules.  The
bytes are kept in a directory below `--root` that only root can write to, by a hash of all that they are made from.
"""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DIRECTORY = "@seccomp"  # no container's id has that letter
MAX_KEPT = 64
_HEADER = struct.Struct("=8sI")
_MAGIC = b"crio-bpf"


def compiled(seccomp: Mapping[str, Any], root: str) -> tuple[bytes, int]:
    """(BPF program, load flags) of a `linux.seccomp` object.  Raises InvalidArgument."""
    path = f"{root}/{DIRECTORY}/{_key(seccomp)}"
    kept = _read(path)
    if kept is not None:
        return kept
    from crio_native.oci import seccomp as filters

    fresh = filters.compile(seccomp)
    _keep(path, fresh.bpf, fresh.flags)
    return fresh.bpf, fresh.flags


def _key(seccomp: Mapping[str, Any]) -> str:
    """The profile, and whatever else decides what its bytes are: our compiler, the library, the architecture."""
    import _sha256  # type: ignore[import-not-found]

    from crio_native.oci.builtin import wire

    made_by = [os.uname().machine]
    for path in (__file__.replace("builtin/standalone/filters.py", "seccomp.py"), _library()):
        try:
            found = os.stat(path)
            made_by += [path, str(found.st_mtime_ns), str(found.st_size)]
        except FileNotFoundError:
            continue
    digest: str = _sha256.sha256(wire.encode([made_by, seccomp]).encode()).hexdigest()
    return digest


def _library() -> str:
    """libseccomp's file, where the dynamic loader finds it on every usual system."""
    for directory in (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/lib"):
        path = f"{directory}/libseccomp.so.2"
        if os.path.exists(path):
            return path
    return ""


def _read(path: str) -> tuple[bytes, int] | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        content = os.read(fd, 1 << 20)
    finally:
        os.close(fd)
    if len(content) <= _HEADER.size or (len(content) - _HEADER.size) % 8:
        return None
    magic, flags = _HEADER.unpack_from(content)
    return (content[_HEADER.size :], flags) if magic == _MAGIC else None


def _keep(path: str, program: bytes, flags: int) -> None:
    """As a whole, by rename.  A cache that cannot be written is no error."""
    directory = os.path.dirname(path)
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        for name in os.listdir(directory)[MAX_KEPT:]:
            os.unlink(f"{directory}/{name}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(_HEADER.pack(_MAGIC, flags) + program)
        os.rename(temporary, path)
    except OSError:
        return
