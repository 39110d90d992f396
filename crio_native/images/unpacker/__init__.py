"""The unpacker: a program of its own that turns one tar stream into one directory.

`crio_native.images.unpacking` starts it while there is something to unpack; it bears a process for each layer or
archive, which shuts itself into the target directory before it reads the first byte, so what a hostile archive can
reach is that directory and nothing else; what the archive may do there is decided in `tree`.  Here belongs only what
that program runs, with few and light imports (they are most of its start); nothing here is imported by the daemon but
this file.
"""

from __future__ import annotations

from collections import namedtuple

# Not a dataclass or NamedTuple: their modules would cost a quarter of the start.
Limits = namedtuple(
    "Limits", ("entries", "bytes", "depth", "ratio", "ratio_from"), defaults=(1_000_000, 64 << 30, 255, 200, 1 << 30)
)
Limits.__doc__ = """What one archive may cost.

entries: headers of any kind.  bytes: uncompressed size.  depth: directories above an entry.  ratio: uncompressed bytes
for each compressed one, once more than ratio_from bytes came out (a small file may be all zeros).
"""


class Refused(Exception):
    """The archive is broken, or does what no archive may.

    kind: "invalid" (the content is wrong) or "limit" (a bound was reached).  entry: the member's name, b"" when it is
    about the stream.  reason: what is wrong, in words.
    """

    def __init__(self, reason: str, entry: bytes = b"", kind: str = "invalid") -> None:
        super().__init__(reason)
        self.reason, self.entry, self.kind = reason, entry, kind
