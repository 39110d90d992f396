"""The unpacker's run: shut in, read standard input to its end, report.

Packets on the report socket: any number of `opaque` with a directory's descriptor, which the daemon marks (setting
trusted.overlay.opaque takes CAP_SYS_ADMIN, with which no confinement would hold), and at the end one JSON object:
`{"digest","size","bytes","inodes","opaque","owner"}`, or `{"error": {"kind","entry","reason","errno"}}`.
"""

from __future__ import annotations

import _socket
import os
import sys
from _json import encode_basestring_ascii as _quoted  # json itself imports re, a third of the start

from crio_native.images.unpacker import Limits, Refused, tar
from crio_native.images.unpacker.stream import Stream
from crio_native.images.unpacker.tree import Tree
from crio_native.linux import confine

TYPE_CHECKING = False  # as typing's, which would cost a fifth of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from crio_native.images.unpacker.stream import Pieces

CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP")
MEMORY = 1 << 30  # bytes; a million directories' times fit
NICE = 5  # the daemon's answers come before images that arrive, which do not starve beside busy neighbours either
CPU_SECONDS = 3600  # ten times what the largest layer takes; names can be made that take for ever to resolve


def run(
    report: _socket.socket, directory: str, decompress: Callable[[Pieces], Pieces], limits: Limits, *, layer: bool
) -> None:
    """directory: absolute path of an empty one.  layer: of an image; else a plain archive."""
    try:
        os.nice(NICE)
        confine.limit_resources(memory=MEMORY, files=1024, file_size=limits.bytes, cpu=CPU_SECONDS)
        confine.into_directory(directory, CAPABILITIES)
        os.umask(0)
        result = _unpack(report, Stream(0, decompress, limits), limits, layer=layer)
    except Refused as refused:
        result = _error(refused.kind, refused.entry, refused.reason)
    except OSError as error:
        entry = error.filename if isinstance(error.filename, bytes) else os.fsencode(error.filename or "")
        result = _error("system", entry, error.strerror or str(error), error.errno or 0)
    except MemoryError:
        result = _error("limit", b"", f"it needs more than {MEMORY} bytes of memory to unpack")
    try:
        report.send(_encode(result).encode())
    except BrokenPipeError:
        pass  # a daemon that was killed; its archive broke off, and nobody is left to be told


def _unpack(report: _socket.socket, stream: Stream, limits: Limits, *, layer: bool) -> dict[str, Any]:
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    tree = Tree(root, limits, layer=layer)
    for entry in tar.entries(stream, limits):
        tree.add(entry, stream)
    stream.drain()
    tree.finish()
    for fd in tree.opaque_directories():
        rights = fd.to_bytes(4, sys.byteorder)
        report.sendmsg([b"opaque"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    return {
        "digest": stream.digest(),
        "size": stream.size,
        "bytes": tree.bytes,
        "inodes": tree.inodes,
        "opaque": tree.root_is_opaque,
        "owner": tree.owner,
    }


def _error(kind: str, entry: bytes, reason: str, number: int = 0) -> dict[str, Any]:
    shown = entry[:300].decode("utf-8", "backslashreplace")
    return {"error": {"kind": kind, "entry": shown, "reason": reason, "errno": number}}


def _encode(value: Any) -> str:
    """JSON of what a report is made of."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quoted(key)}:{_encode(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ",".join(map(_encode, value)) + "]"
    if isinstance(value, str):
        return str(_quoted(value))
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
