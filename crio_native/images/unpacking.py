"""The daemon's side of the unpacker: start the confined child, feed it, and believe it only as far as needed.

The child's own program is `unpacker/`.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crio_native
from crio_native.errors import CrioError, DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, StepFailed
from crio_native.images.unpacker import Limits

REPORT_TIMEOUT = 300.0  # seconds for the child's last writes after the last byte was fed
END_TIMEOUT = 10.0  # seconds from its report, or from an error here, to its end
MAX_REPORT = 1 << 16
PIPE_SIZE = 1 << 20

_PACKAGES = os.fspath(Path(crio_native.__file__).parent.parent)
# How compressed data begins.  What a media type says does not decide: registries have images where it is wrong.
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
HEAD = 10  # bytes to tell them apart
# -S and our own paths instead of -m: reading site-packages would double the child's start.
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.path.append(sys.argv.pop(1)); "
    "from crio_native.images.unpacker.main import main; main()"
)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What the child made.

    digest: sha256 of the uncompressed archive.  size: its bytes.  bytes, inodes: what the directory takes on disk.
    opaque: the layer hides everything below it.  owner: (mode, uid, gid) of the root directory if the archive has it.
    """

    digest: str
    size: int
    bytes: int
    inodes: int
    opaque: bool
    owner: tuple[int, int, int] | None


def unpack(
    directory: Path,
    pieces: Iterable[bytes],
    *,
    layer: bool = True,
    what: str = "layer",
    limits: Limits | None = None,
) -> Unpacked:
    """Unpack an archive, compressed or not, that comes in pieces into an empty directory of ours.

    layer: translate whiteouts for overlayfs.  what: names the archive in errors.
    Raises what `pieces` raises; InvalidArgument for an archive that is broken or hostile, ResourceExhausted at a bound
    or when the disk is full, StepFailed when the kernel refuses, Internal when the child dies.  What is in the
    directory after an error is the caller's to remove.
    """
    pieces = iter(pieces)
    head = _head(pieces)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            child = _start(directory, theirs, compression(head), layer, limits or Limits())
        try:
            _feed(child, itertools.chain((head,), pieces))
            return _result(ours, child, what)
        finally:
            _end(child, ours)


def compression(head: bytes) -> str:
    """How data that begin so are compressed, in the unpacker's words."""
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), "none")


def _head(pieces: Iterator[bytes]) -> bytes:
    """Enough of the beginning to see how it is compressed; what does not come fails before there is a child."""
    head = b""
    while len(head) < HEAD and (piece := next(pieces, b"")):
        head += piece
    return head


@functools.cache
def _libraries() -> str:
    """Where the packages are that the child imports; nothing is imported here to find them."""
    found = importlib.util.find_spec("isal")
    assert found and found.submodule_search_locations
    return os.path.dirname(found.submodule_search_locations[0])


def _start(
    directory: Path, report: socket.socket, compressed: str, layer: bool, limits: Limits
) -> subprocess.Popen[bytes]:
    arguments = (os.getpid(), report.fileno(), directory.absolute(), compressed, "layer" if layer else "archive")
    return subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _BOOT,
            _PACKAGES,
            _libraries(),
            *map(str, arguments),
            ",".join(map(str, limits)),
        ],
        stdin=subprocess.PIPE,
        pipesize=PIPE_SIZE,
        pass_fds=(report.fileno(),),
        env={},
        cwd="/",
        bufsize=0,
    )


def _feed(child: subprocess.Popen[bytes], pieces: Iterable[bytes]) -> None:
    assert child.stdin
    with child.stdin as pipe:
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(pipe.fileno(), rest) :]
        except BrokenPipeError:
            pass  # it has ended early; its report says why


def _result(report: socket.socket, child: subprocess.Popen[bytes], what: str) -> Unpacked:
    report.settimeout(REPORT_TIMEOUT)
    try:
        while True:
            packet, descriptors, _, _ = socket.recv_fds(report, MAX_REPORT, 1)
            if packet != b"opaque":
                break
            for fd in descriptors:
                _mark_opaque(fd)
    except TimeoutError:
        raise DeadlineExceeded(f"{what}: the unpacker did not finish within {REPORT_TIMEOUT:.0f} s") from None
    if not packet:
        status = child.wait()
        hint = ", killed by the kernel: it used too much memory or time" if status == 128 + signal.SIGKILL else ""
        raise Internal(f"{what}: the unpacker died with status {status}{hint}")
    answer = json.loads(packet)
    if "error" in answer:
        raise _error(what, answer["error"])
    owner = answer.pop("owner")
    return Unpacked(**answer, owner=owner and tuple(owner))


def _end(child: subprocess.Popen[bytes], report: socket.socket) -> None:
    """Its input has ended, so it ends, in one way or the other; nothing of it may be left when we return."""
    try:
        child.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        while report.recv(MAX_REPORT):  # until nobody has the other end: a process of the child's own did the work
            pass


def _mark_opaque(fd: int) -> None:
    """The one thing that the child may not do itself; the descriptor can only be of its own directory."""
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.setxattr(fd, "trusted.overlay.opaque", b"y")
    except OSError as error:
        raise StepFailed("mark an opaque directory", error.errno or 0) from None
    finally:
        os.close(fd)


def _error(what: str, error: dict[str, Any]) -> CrioError:
    kind, entry, reason, number = error["kind"], error["entry"], error["reason"], error["errno"]
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"{what}: no space left on the device while unpacking {entry!r}; free some and retry")
    if kind == "limit":
        return ResourceExhausted(f"{what}: {f'entry {entry!r}: ' if entry else ''}{reason}")
    if kind == "system":
        return StepFailed("unpack", number, entry, what)
    return InvalidArgument(what, entry, reason)
