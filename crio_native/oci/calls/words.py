"""The forms in which system calls are written: names of flags, quoted strings, and calls that many steps share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from crio_native.linux import capabilities, mounts, syscalls
from crio_native.linux.cgroup import devices

_SHOWN = 200  # characters of a string
_CLONE_NAMES = {value: name for name, value in vars(syscalls).items() if name.startswith("CLONE_")}
_OPEN_ROOT = "RESOLVE_IN_ROOT|RESOLVE_NO_MAGICLINKS"

DESCRIPTIONS: dict[str, Callable[..., Iterable[str]]] = {}


def describes(function: Callable[..., Iterable[str]]) -> Callable[..., Iterable[str]]:
    """The function says what the step of its name calls, from the step's arguments."""
    DESCRIPTIONS[function.__name__] = function
    return function


def quoted(value: object) -> str:
    text = json.dumps(str(value), ensure_ascii=False)
    return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}"...'


def clone_flags(flags: int) -> str:
    known = [name for value, name in sorted(_CLONE_NAMES.items()) if flags & value]
    rest = flags & ~sum(value for value in _CLONE_NAMES if flags & value)
    return "|".join(known + ([hex(rest)] if rest else [])) or "0"


def capability_set(mask: int) -> str:
    return "|".join(capabilities.names(mask)) or "0"


def device_rules(rules: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the device controller is told, in words; of those that match a device the last decides.

    Raises InvalidArgument.
    """
    devices.parse(rules)  # refuses what is no rule
    return [f"device rule: {'allow' if rule['allow'] else 'deny'} {device_rule(rule)}" for rule in rules]


def device_rule(rule: Mapping[str, Any]) -> str:
    """A rule's devices and accesses: "c 10:200 rw"."""
    numbers = ("*" if rule.get(name, -1) in (None, -1) else str(rule[name]) for name in ("major", "minor"))
    return f"{rule.get('type') or 'a'} {':'.join(numbers)} {rule.get('access') or 'rwm'}"


def write(path: str, text: object) -> list[str]:
    return [f"open({quoted(path)}, O_WRONLY|O_CLOEXEC)", f"write(fd, {quoted(text)})"]


def in_root(path: str, name: str, flags: str = "O_PATH") -> str:
    return f"{name} = openat2(root, {quoted(path.lstrip('/') or '.')}, {flags}, {_OPEN_ROOT})"


def made(path: str, name: str, directory: bool, follow: bool = True) -> list[str]:
    if not follow:
        return [in_root(path, name, "O_PATH|O_NOFOLLOW") + ", made when missing"]
    if directory:
        return [in_root(path, name, "O_PATH|O_DIRECTORY") + ", each missing component by mkdirat"]
    return [in_root(path, name) + ", made by openat(O_CREAT|O_EXCL|O_NOFOLLOW) when missing"]


def _propagation(kind: int) -> tuple[str, str]:
    """(flag of mount_setattr, propagation)."""
    return ("AT_RECURSIVE" if kind & mounts.MS_REC else "0"), mounts.flag_names(kind & ~mounts.MS_REC)


def set_attributes(fd: str, to_set: int, to_clear: int, flags: str = "0") -> list[str]:
    if not (to_set or to_clear):
        return []
    attributes = f"set={mounts.attribute_names(to_set)}"
    if to_clear:
        attributes += f", clear={mounts.attribute_names(to_clear)}"
    return [f"mount_setattr({fd}, {flags}, {attributes})"]


def set_propagation(fd: str, kinds: Iterable[int]) -> list[str]:
    return [f"mount_setattr({fd}, {deep}, propagation={kind})" for deep, kind in map(_propagation, kinds)]


def attached(tree: str, destination: str, directory: bool, follow: bool = True) -> list[str]:
    return [*made(destination, "target", directory, follow), f"move_mount({tree}, target)"]


def open_tree(path: str, recursive: bool = False, follow: bool = True) -> str:
    flags = ("|AT_RECURSIVE" if recursive else "") + ("" if follow else "|AT_SYMLINK_NOFOLLOW")
    return f"tree = open_tree({path}, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC{flags})"
