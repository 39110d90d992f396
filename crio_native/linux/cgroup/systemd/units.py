"""``slice:prefix:name``, as an OCI cgroupsPath has it for systemd: the unit's name, and where its group is."""

from __future__ import annotations

import os

from crio_native.errors import InvalidArgument

_FIELD = "linux.cgroupsPath"
_NAME_MAX = 255
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.\\-@")


class Unit:
    """A scope to be.  name: ends with ``.scope``.  slice: the unit it is in.  path: of its group, below the mount.

    user: whether it belongs to this user's own manager, not the machine's.
    """

    __slots__ = ("name", "path", "slice", "user")

    def __init__(self, name: str, slice: str, user: bool) -> None:
        self.name, self.slice, self.user = name, slice, user
        self.path = f"{_manager_group(user)}{slice_path(slice)}/{name}"


def parse(cgroups_path: str, user: bool) -> Unit:
    """The scope that cgroupsPath names.  An empty slice is the manager's usual one.  Raises InvalidArgument."""
    parts = cgroups_path.split(":")
    if len(parts) != 3 or not parts[2]:
        raise InvalidArgument(_FIELD, cgroups_path, "must be slice:prefix:name, because systemd manages the cgroups")
    slice, prefix, name = parts
    unit = (f"{prefix}-{name}" if prefix else name) + ".scope"
    if len(unit) > _NAME_MAX or not set(unit) <= _LETTERS:
        raise InvalidArgument(_FIELD, cgroups_path, f"{unit!r} is no name for a unit: letters, digits and :_.\\-@ only")
    return Unit(unit, slice or ("user.slice" if user else "system.slice"), user)


def slice_path(slice: str) -> str:
    """Where a slice's group is: ``a-b.slice`` is in ``a.slice``, ``-.slice`` is the root.  Raises InvalidArgument."""
    stem = slice.removesuffix(".slice")
    if stem == slice or len(slice) > _NAME_MAX or not set(slice) <= _LETTERS:
        raise InvalidArgument(_FIELD, slice, "the slice must be a unit's name that ends with .slice")
    if stem == "-":
        return ""
    parts = stem.split("-")
    if not all(parts):
        raise InvalidArgument(_FIELD, slice, "each part of a slice's name, between its dashes, must have a letter")
    return "".join("/" + "-".join(parts[: length + 1]) + ".slice" for length in range(len(parts)))


def _manager_group(user: bool) -> str:
    """The group below which the manager makes its units: the root, or what systemd calls each user's service."""
    uid = os.geteuid()
    return f"/user.slice/user-{uid}.slice/user@{uid}.service" if user else ""
