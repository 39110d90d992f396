"""Who a container's command runs as: names looked up in the image's own /etc/passwd and /etc/group.

The files are a stranger's: read below the root's descriptor, bounded, malformed lines skipped, numbers checked
(CVE-2024-40635: a number that wraps around is root).  Decimal digits are always a number, also where an entry has them
for its name: who checks that a command is not root's looks at the number alone (runAsNonRoot).
"""

from __future__ import annotations

from crio_native.linux import inroot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_FILE = 4 << 20
MAX_ID = 2**32 - 2
MAX_GROUPS = 65536  # NGROUPS_MAX


class User:
    """Who a command runs as, in numbers."""

    def __init__(self, uid: int, gid: int, groups: tuple[int, ...], home: str) -> None:
        self.uid, self.gid, self.groups, self.home = uid, gid, groups, home


class NoSuchUser(Exception):
    """A name that the image's file does not have, or a number out of range."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(why)
        self.file = file


def find(root: int, user: str, group: str, supplementary: Sequence[int], merge: bool) -> User:
    """Resolve "user", "uid", "user:group", ...; see `oci.runtime.UserRequest`.

    The groups always contain the primary one (CVE-2022-2995), then those that the image's group file gives a named
    user (when `merge`), then the supplementary ones.
    """
    name, _, tail = user.partition(":")
    group = group or tail
    passwd = list(_records(root, "/etc/passwd", 7))
    entry = _find_entry(passwd, name or "0")
    if entry is not None:
        login, uid, gid, home = entry
    elif (number := _number(name or "0")) is not None:
        login, uid, gid, home = "", number, 0, "/"
    else:
        raise NoSuchUser("/etc/passwd", f"no user {name!r} in the image's /etc/passwd")
    groups_file = list(_records(root, "/etc/group", 4)) if group or (merge and login) else []
    if group:
        gid = _find_group(groups_file, group)
    extra = [int(record[2]) for record in groups_file if login and login in record[3].split(",") and _ok(record[2])]
    groups = list(dict.fromkeys([gid, *(extra if merge else ()), *supplementary]))
    if len(groups) > MAX_GROUPS:
        raise NoSuchUser("/etc/group", f"{len(groups)} groups are more than the kernel's {MAX_GROUPS}")
    return User(uid, gid, tuple(groups), home or "/")


def check_group_names(root: int, groups: Sequence[int]) -> None:
    """For a runtime that is told the numbers: runc before 1.3 looks additional groups up by name first.

    Raises NoSuchUser.
    """
    names = {str(group) for group in groups}
    for name, _, number, *_ in _records(root, "/etc/group", 4):
        if name in names and number != name:
            raise NoSuchUser("/etc/group", f"the image's /etc/group calls group {number} by the number {name}")


def _find_entry(passwd: list[list[str]], name: str) -> tuple[str, int, int, str] | None:
    number = _number(name)
    for record in passwd:
        if not (_ok(record[2]) and _ok(record[3])):
            continue
        if record[0] == name if number is None else int(record[2]) == number:
            return record[0], int(record[2]), int(record[3]), record[5]
    return None


def _find_group(groups: list[list[str]], name: str) -> int:
    number = _number(name)
    if number is not None:
        return number
    for record in groups:
        if record[0] == name and _ok(record[2]):
            return int(record[2])
    raise NoSuchUser("/etc/group", f"no group {name!r} in the image's /etc/group")


def _number(text: str) -> int | None:
    """A user or group number in decimal; None for a name; NoSuchUser for a number that the kernel has no room for."""
    if not (text.isascii() and text.isdigit()):
        return None
    if not _ok(text):
        raise NoSuchUser("", f"user or group number {text} is outside 0..{MAX_ID}")
    return int(text)


def _ok(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID


def _records(root: int, path: str, fields: int) -> Iterator[list[str]]:
    try:
        content = inroot.read_file(root, path, MAX_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in content.decode("utf-8", "surrogateescape").splitlines():
        record = line.split(":")
        if len(record) >= fields and not line.startswith("#"):
            yield record
