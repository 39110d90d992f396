"""The devices of a container: the usual ones, those that its configuration names, a privileged one's.

Looks at the host's /dev and makes nothing.  What a device is called by (CRI device, annotation, crio.conf) is decided
by the caller; devices that come with mounts and environment, by CDI, are `cdi`'s.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crio_native.errors import InvalidArgument
from crio_native.oci.spec import normalise
from crio_native.pods.values import Device

# What a host's /dev holds besides devices that a privileged container may want: the container has its own of these.
_OWN_DEV = frozenset(
    "pts shm mqueue fd stdin stdout stderr ptmx console .udev core null zero full random urandom tty".split()
)
_MAX_DEVICES = 4096
# null, zero, full, random, urandom; tty, console, ptmx; pseudo-terminals.
_DEFAULT_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None))


@dataclass(slots=True)
class Devices:
    """nodes: as `linux.devices` has them.  origins: a node's path on the host, by its path in the container.  rules: of
    the device controller, of which the last that matches decides."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    rules: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Sequence[tuple[str, dict[str, Any]]], access: str) -> None:
        """Nodes with their origins; one replaces an earlier one at its path."""
        taken = {node["path"] for _, node in found}
        self.nodes = [node for node in self.nodes if node["path"] not in taken] + [node for _, node in found]
        self.origins |= {node["path"]: origin for origin, node in found}
        self.rules += [_rule(node, access) for _, node in found]

    def give_to(self, uid: int | None, gid: int | None) -> None:
        """Who owns the nodes; None leaves the host's owner."""
        for node in self.nodes:
            node["uid"] = node["uid"] if uid is None else uid
            node["gid"] = node["gid"] if gid is None else gid

    def bound(self) -> list[dict[str, Any]]:
        """The nodes as mounts, for a user namespace, whose root cannot make any: the host's own are shown."""
        return [
            {
                "destination": node["path"],
                "type": "bind",
                "source": self.origins[node["path"]],
                "options": ["bind", "nosuid", "noexec"],
            }
            for node in self.nodes
        ]


def of_container(asked: Sequence[Device], configured: Sequence[Device], *, all_of_host: bool) -> Devices:
    """asked: `config.devices`.  Raises InvalidArgument with the device's index."""
    result = Devices(rules=default_rules())
    if all_of_host:
        result.add(_host_devices(), "rwm")
        result.rules = [{"allow": True, "access": "rwm"}]
    for index, device in enumerate(asked):
        result.add(*_checked(device, f"config.devices[{index}]"))
    for index, device in enumerate(configured):
        result.add(*_checked(device, f"crio.runtime.additional_devices[{index}]"))
    return result


def default_rules() -> list[dict[str, Any]]:
    """The device rules of every container: the usual devices; and any node may be made, which gives no access to it."""
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": kind, "access": "m"} for kind in ("c", "b")]
    for major, minor in _DEFAULT_DEVICES:
        rule = {"allow": True, "type": "c", "major": major, "access": "rwm"}
        rules.append(rule if minor is None else {**rule, "minor": minor})
    return rules


def _checked(device: Device, field_path: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    access = device.permissions or "rwm"
    if not set(access) <= set("rwm"):
        raise InvalidArgument(f"{field_path}.permissions", access, "must be made of r, w and m")
    if not device.container_path.startswith("/"):
        raise InvalidArgument(f"{field_path}.container_path", device.container_path, "must be an absolute path")
    found = devices_at(device.host_path, normalise(device.container_path))
    if not found:
        raise InvalidArgument(f"{field_path}.host_path", device.host_path, "is no device, nor a directory with devices")
    return found, access


def _host_devices() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for entry in sorted(os.listdir("/dev")):
        if entry not in _OWN_DEV:
            found += devices_at(f"/dev/{entry}", f"/dev/{entry}")
    return found[:_MAX_DEVICES]


def devices_at(host_path: str, container_path: str) -> list[tuple[str, dict[str, Any]]]:
    """The device at a path, or all in the directory there: (path on the host, node in the container)."""
    try:
        info = os.stat(host_path)
        if stat.S_ISDIR(info.st_mode):
            names = sorted(os.listdir(host_path))[:_MAX_DEVICES]
            return [
                found
                for name in names
                if not os.path.islink(f"{host_path}/{name}")  # a loop would have no end
                for found in devices_at(f"{host_path}/{name}", f"{container_path}/{name}")
            ][:_MAX_DEVICES]
    except OSError:
        return []
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
    if not kind:
        return []
    node = {
        "path": container_path,
        "type": kind,
        "major": os.major(info.st_rdev),
        "minor": os.minor(info.st_rdev),
        "fileMode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
    }
    return [(host_path, node)]


def _rule(node: Mapping[str, Any], access: str) -> dict[str, Any]:
    return {"allow": True, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": access}
