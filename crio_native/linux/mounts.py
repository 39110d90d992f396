"""Mount options, flags and attributes: their names, their numbers, and how option lists turn into both.

Pure data and parsing (runtime-spec, config-linux "mounts"); the calls themselves are in `syscalls`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_POSIXACL = 1 << 16
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_I_VERSION = 1 << 23
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_DETACH = 2

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_ATIME = 0x70  # a field, not a flag: relatime is 0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_NOSYMFOLLOW = 0x00200000

# option -> (sets?, flag)
_FLAGS: dict[str, tuple[bool, int]] = {
    "acl": (True, MS_POSIXACL),
    "async": (False, MS_SYNCHRONOUS),
    "atime": (False, MS_NOATIME),
    "bind": (True, MS_BIND),
    "defaults": (True, 0),
    "dev": (False, MS_NODEV),
    "diratime": (False, MS_NODIRATIME),
    "dirsync": (True, MS_DIRSYNC),
    "exec": (False, MS_NOEXEC),
    "iversion": (True, MS_I_VERSION),
    "lazytime": (True, MS_LAZYTIME),
    "loud": (False, MS_SILENT),
    "mand": (True, MS_MANDLOCK),
    "noacl": (False, MS_POSIXACL),
    "noatime": (True, MS_NOATIME),
    "nodev": (True, MS_NODEV),
    "nodiratime": (True, MS_NODIRATIME),
    "noexec": (True, MS_NOEXEC),
    "noiversion": (False, MS_I_VERSION),
    "nolazytime": (False, MS_LAZYTIME),
    "nomand": (False, MS_MANDLOCK),
    "norelatime": (False, MS_RELATIME),
    "nostrictatime": (False, MS_STRICTATIME),
    "nosuid": (True, MS_NOSUID),
    "nosymfollow": (True, MS_NOSYMFOLLOW),
    "rbind": (True, MS_BIND | MS_REC),
    "relatime": (True, MS_RELATIME),
    "remount": (True, MS_REMOUNT),
    "ro": (True, MS_RDONLY),
    "rw": (False, MS_RDONLY),
    "silent": (True, MS_SILENT),
    "strictatime": (True, MS_STRICTATIME),
    "suid": (False, MS_NOSUID),
    "symfollow": (False, MS_NOSYMFOLLOW),
    "sync": (True, MS_SYNCHRONOUS),
}
PROPAGATION: dict[str, int] = {
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "rshared": MS_SHARED | MS_REC,
    "rslave": MS_SLAVE | MS_REC,
    "runbindable": MS_UNBINDABLE | MS_REC,
    "shared": MS_SHARED,
    "slave": MS_SLAVE,
    "unbindable": MS_UNBINDABLE,
}
# option -> (attributes to set, attributes to clear), applied to the whole tree
_RECURSIVE: dict[str, tuple[int, int]] = {
    "ratime": (0, MOUNT_ATTR_ATIME),
    "rdev": (0, MOUNT_ATTR_NODEV),
    "rdiratime": (0, MOUNT_ATTR_NODIRATIME),
    "rexec": (0, MOUNT_ATTR_NOEXEC),
    "rnoatime": (MOUNT_ATTR_NOATIME, MOUNT_ATTR_ATIME),
    "rnodev": (MOUNT_ATTR_NODEV, 0),
    "rnodiratime": (MOUNT_ATTR_NODIRATIME, 0),
    "rnoexec": (MOUNT_ATTR_NOEXEC, 0),
    "rnostrictatime": (0, MOUNT_ATTR_ATIME),
    "rnorelatime": (0, MOUNT_ATTR_ATIME),
    "rnosuid": (MOUNT_ATTR_NOSUID, 0),
    "rnosymfollow": (MOUNT_ATTR_NOSYMFOLLOW, 0),
    "rrelatime": (0, MOUNT_ATTR_ATIME),
    "rro": (MOUNT_ATTR_RDONLY, 0),
    "rrw": (0, MOUNT_ATTR_RDONLY),
    "rstrictatime": (MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_ATIME),
    "rsuid": (0, MOUNT_ATTR_NOSUID),
    "rsymfollow": (0, MOUNT_ATTR_NOSYMFOLLOW),
}
EXTENSIONS = frozenset({"tmpcopyup", "idmap", "ridmap", "copy-symlink", "src-nofollow", "dest-nofollow"})
RECURSIVE_OPTIONS = frozenset(_RECURSIVE)
KNOWN_OPTIONS = frozenset(_FLAGS) | frozenset(PROPAGATION) | frozenset(_RECURSIVE) | EXTENSIONS

# The flags that belong to a mount rather than to its file system, as attributes of mount_setattr(2).
_ATTRIBUTE_OF = {
    MS_RDONLY: MOUNT_ATTR_RDONLY,
    MS_NOSUID: MOUNT_ATTR_NOSUID,
    MS_NODEV: MOUNT_ATTR_NODEV,
    MS_NOEXEC: MOUNT_ATTR_NOEXEC,
    MS_NODIRATIME: MOUNT_ATTR_NODIRATIME,
    MS_NOSYMFOLLOW: MOUNT_ATTR_NOSYMFOLLOW,
}


class Options:
    """A parsed option list.

    flags, cleared: MS_* bits asked for and asked against.  propagation: MS_* values in order.  data: what the file
    system itself gets, comma-joined.  tree_set, tree_clear: MOUNT_ATTR_* for the whole tree.  extensions: words that
    the runtime itself acts on.
    """

    __slots__ = ("cleared", "data", "extensions", "flags", "propagation", "tree_clear", "tree_set")

    def __init__(
        self,
        flags: int,
        cleared: int,
        propagation: tuple[int, ...],
        data: str,
        tree_set: int,
        tree_clear: int,
        extensions: frozenset[str],
    ) -> None:
        self.flags, self.cleared, self.propagation, self.data = flags, cleared, propagation, data
        self.tree_set, self.tree_clear, self.extensions = tree_set, tree_clear, extensions

    @property
    def top_flags(self) -> int:
        """MS_* bits that the mount itself ends up with: what is asked for the whole tree comes last."""
        flags = self.flags
        for flag, attribute in _ATTRIBUTE_OF.items():
            if (self.tree_set | self.tree_clear) & attribute:
                flags = flags | flag if self.tree_set & attribute else flags & ~flag
        return flags

    @property
    def tree_flags(self) -> int:
        """MS_* bits that every mount of the tree ends up with."""
        return sum(flag for flag, attribute in _ATTRIBUTE_OF.items() if self.tree_set & attribute)

    @property
    def tree_cleared(self) -> int:
        """MS_* bits that no mount of the tree ends up with."""
        return sum(flag for flag, attribute in _ATTRIBUTE_OF.items() if self.tree_clear & attribute)


def parse(options: Iterable[str]) -> Options:
    """Parse an option list; a later word overrides an earlier one, unknown words are the file system's data."""
    flags = cleared = tree_set = tree_clear = 0
    propagation: list[int] = []
    data: list[str] = []
    extensions: set[str] = set()
    for option in options:
        if option in _FLAGS:
            sets, flag = _FLAGS[option]
            flags, cleared = (flags | flag, cleared & ~flag) if sets else (flags & ~flag, cleared | flag)
        elif option in PROPAGATION:
            propagation.append(PROPAGATION[option])
        elif option in _RECURSIVE:
            to_set, to_clear = _RECURSIVE[option]
            tree_set, tree_clear = (tree_set & ~to_clear) | to_set, (tree_clear & ~to_set) | to_clear
        elif option in EXTENSIONS:
            extensions.add(option)
        else:
            data.append(option)
    return Options(flags, cleared, tuple(propagation), ",".join(data), tree_set, tree_clear, frozenset(extensions))


def attributes(flags: int, cleared: int) -> tuple[int, int]:
    """MS_* bits of one mount as (attributes to set, attributes to clear) for mount_setattr(2)."""
    to_set = sum(attr for flag, attr in _ATTRIBUTE_OF.items() if flags & flag)
    to_clear = sum(attr for flag, attr in _ATTRIBUTE_OF.items() if cleared & flag and not flags & flag)
    if flags & MS_NOATIME:
        to_set, to_clear = to_set | MOUNT_ATTR_NOATIME, to_clear | MOUNT_ATTR_ATIME
    elif flags & MS_STRICTATIME:
        to_set, to_clear = to_set | MOUNT_ATTR_STRICTATIME, to_clear | MOUNT_ATTR_ATIME
    elif flags & MS_RELATIME or cleared & MS_NOATIME:
        to_clear |= MOUNT_ATTR_ATIME
    return to_set, to_clear


# statvfs(3)'s flags of a mount, where they are not the MS_* of the same meaning (the first five are).
_STATVFS_SAME = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME
_STATVFS_FLAGS = {4096: MS_RELATIME, 8192: MS_NOSYMFOLLOW}


def remount_flags(statvfs_flags: int, to_set: int, to_clear: int) -> int:
    """The MS_* flags for a bind remount of a mount that has these statvfs flags, with MOUNT_ATTR_* set and cleared."""
    flags = statvfs_flags & _STATVFS_SAME
    flags |= sum(flag for shown, flag in _STATVFS_FLAGS.items() if statvfs_flags & shown)
    for flag, attribute in _ATTRIBUTE_OF.items():
        if to_clear & attribute:
            flags &= ~flag
        if to_set & attribute:
            flags |= flag
    if (to_set | to_clear) & MOUNT_ATTR_ATIME:
        flags &= ~(MS_NOATIME | MS_RELATIME | MS_STRICTATIME)
        time = to_set & MOUNT_ATTR_ATIME
        flags |= {MOUNT_ATTR_NOATIME: MS_NOATIME, MOUNT_ATTR_STRICTATIME: MS_STRICTATIME}.get(time, MS_RELATIME)
    return flags


_MS_NAMES = {value: name for name, value in sorted(globals().items()) if name.startswith("MS_")}
_ATTR_NAMES = {
    value: name for name, value in sorted(globals().items()) if name.startswith("MOUNT_ATTR_") and "ATIME" not in name
} | {MOUNT_ATTR_NOATIME: "MOUNT_ATTR_NOATIME", MOUNT_ATTR_STRICTATIME: "MOUNT_ATTR_STRICTATIME"}


def _names(value: int, table: dict[int, str]) -> str:
    known = [name for bit, name in sorted(table.items()) if bit and value & bit == bit]
    rest = value & ~sum(bit for bit in table if value & bit == bit)
    return "|".join(known + ([hex(rest)] if rest else [])) or "0"


def flag_names(flags: int) -> str:
    """MS_* bits in words, for messages and explanations; an unknown rest stays a number."""
    return _names(flags, _MS_NAMES)


def attribute_names(attrs: int) -> str:
    """MOUNT_ATTR_* bits in words."""
    return _names(attrs, _ATTR_NAMES)
