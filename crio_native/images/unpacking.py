"""The daemon's side of the unpacker: have a confined process made, feed it, and believe it only as far as needed.

That process's own program is `unpacker/`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
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
_ENDED = b"ended "
_KILLED = str(128 + signal.SIGKILL)

_PACKAGES = os.fspath(Path(crio_native.__file__).parent.parent)
# How compressed data begins.  What a media type says does not decide: registries have images where it is wrong.
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
HEAD = 10  # bytes to tell them apart
# -S and our own paths instead of -m: reading site-packages would double the start.
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
    with _fork_server.running() as server, ours:
        with theirs:
            pipe = server.fork(theirs, directory, compression(head), layer, limits or Limits())
        try:
            _feed(pipe, itertools.chain((head,), pieces))
            return _result(ours, what)
        finally:
            _end(ours)


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


class ForkServerProcess:
    """The process that unpackers are forked from.  It is there while somebody unpacks: an interpreter's start costs as
    much as a small layer, and for many layers at once it is paid once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[ForkServerProcess]:
        with self._lock:
            if not self._users or self._process.poll() is not None:
                self._start()
            self._users += 1
        try:
            yield self
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._socket.close()
                    self._process.wait()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line = (sys.executable, "-I", "-S", "-c", _BOOT, _PACKAGES, _libraries(), str(theirs.fileno()))
        with theirs:
            self._process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), env={}, cwd="/"
            )

    def fork(self, report: socket.socket, directory: Path, compressed: str, layer: bool, limits: Limits) -> int:
        """A new unpacker; the pipe that it reads.  Raises Internal."""
        words = (os.fspath(directory.absolute()), compressed, "layer" if layer else "archive")
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            request = os.fsencode("\0".join((*words, ",".join(map(str, limits)))))
            socket.send_fds(self._socket, [request], [read, report.fileno()])
        except OSError as error:
            os.close(write)
            raise Internal(f"the unpackers' process {self._process.pid} takes no request: {error.strerror}") from error
        finally:
            os.close(read)
        return write


_fork_server = ForkServerProcess()


def _feed(pipe: int, pieces: Iterable[bytes]) -> None:
    with open(pipe, "wb", buffering=0) as file:
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]
        except BrokenPipeError:
            pass  # it has ended early; its report says why


def _result(report: socket.socket, what: str) -> Unpacked:
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
    if not packet or packet.startswith(_ENDED):
        status = packet.removeprefix(_ENDED).decode() or "unknown"
        hint = ", killed by the kernel: it used too much memory or time" if status == _KILLED else ""
        raise Internal(f"{what}: the unpacker died with status {status}{hint}")
    answer = json.loads(packet)
    if "error" in answer:
        raise _error(what, answer["error"])
    owner = answer.pop("owner")
    return Unpacked(**answer, owner=owner and tuple(owner))


def _end(report: socket.socket) -> None:
    """Its input has ended, so it ends, in one way or the other; nothing of it may be left when we return."""
    try:
        _hear_out(report, END_TIMEOUT)
    except TimeoutError:
        report.shutdown(socket.SHUT_WR)  # which has it killed
        _hear_out(report, math.inf)


def _hear_out(report: socket.socket, seconds: float) -> None:
    """Until nobody has the other end.  Raises TimeoutError."""
    until = time.monotonic() + seconds
    packet = b" "
    while packet:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        report.settimeout(None if math.isinf(left) else left)
        packet, descriptors, _, _ = socket.recv_fds(report, MAX_REPORT, 1)
        for fd in descriptors:
            os.close(fd)


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
        return ResourceExhausted(
            f"{what}: no space left on the device (ENOSPC) while unpacking {entry!r}; free some and retry"
        )
    if kind == "limit":
        return ResourceExhausted(f"{what}: {f'entry {entry!r}: ' if entry else ''}{reason}")
    if kind == "system":
        return StepFailed("unpack", number, entry, what)
    return InvalidArgument(what, entry or ..., reason)  # what is wrong with the archive itself has no entry
