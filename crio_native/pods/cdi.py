"""CDI, the container device interface (1.1): devices by name, and the edits of a config.json that each stands for.

A specification file describes devices of one kind ("vendor.com/class"); a caller asks for "vendor.com/class=name", in
`CDI_devices` or in an annotation.  Only the pod may ask, never an image or a checkpoint (CVE-2026-53492).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.oci.spec import normalise
from crio_native.pods import yaml_documents
from crio_native.pods.devices import Devices, devices_at

ANNOTATION = "cdi.k8s.io/"
_FILE_MAX = 1 << 20
_FILES_MAX = 1024
_NAME = re.compile(
    r"(?P<kind>[A-Za-z][A-Za-z0-9._-]{0,252}/[A-Za-z][A-Za-z0-9_.-]{0,252})=(?P<name>[A-Za-z0-9][A-Za-z0-9_.:-]{0,252})",
    re.ASCII,
)
_HOOKS = frozenset("prestart createRuntime createContainer startContainer poststart poststop".split())


@dataclass(frozen=True, slots=True)
class _Found:
    """A device of a file: the file's own edits, which are made once, and the device's."""

    path: Path
    common: Mapping[str, Any]
    edits: Mapping[str, Any]


@dataclass(slots=True)
class Edits:
    """All edits for a container, put together."""

    env: dict[str, str] = field(default_factory=dict)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    hooks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    linux: dict[str, Any] = field(default_factory=dict)


def requested(names: Sequence[str], annotations: Mapping[str, str]) -> dict[str, str]:
    """The devices that a container asks for -> the field that says so.  Raises InvalidArgument for what is no name."""
    asked = {name: f"config.CDI_devices[{index}].name" for index, name in enumerate(names)}
    for key, value in annotations.items():
        if key.startswith(ANNOTATION):
            asked |= {name: f"config.annotations[{key!r}]" for name in value.split(",") if name not in asked}
    for name, where in asked.items():
        if not _NAME.fullmatch(name):
            raise InvalidArgument(where, name, "is no CDI device; they are written vendor.com/class=name")
    return asked


def edits(asked: Mapping[str, str], directories: Iterable[str], devices: Devices) -> Edits:
    """What the devices change; their nodes and rules are added to `devices`.

    asked: as `requested` gives them.  directories: of specification files, later ones win.  Raises InvalidArgument for
    an unknown device, FailedPrecondition for files that are damaged or do not agree.
    """
    result = Edits()
    if not asked:
        return result
    known, problems = _load(directories)
    done: set[Path] = set()
    for name, where in asked.items():
        found = known.get(name)
        if found is None:
            raise InvalidArgument(where, name, _unknown(name, known, problems, directories))
        if isinstance(found, str):
            raise FailedPrecondition(f"{where}: the CDI device {name} is described twice: {found}")
        try:
            for each in (found.edits,) if found.path in done else (found.common, found.edits):
                _apply(each, result, devices)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FailedPrecondition(f"{found.path}: the CDI device {name} has unusable edits: {error!r}") from None
        done.add(found.path)
    return result


def _unknown(name: str, known: Mapping[str, Any], problems: Sequence[str], directories: Iterable[str]) -> str:
    kind = name.partition("=")[0]
    of_kind = sorted(each.partition("=")[2] for each in known if each.partition("=")[0] == kind)[:20]
    reason = f"no CDI specification in {', '.join(directories)} describes it"
    if of_kind:
        reason += f"; of {kind} there are {', '.join(of_kind)}"
    return "; ".join([reason, *problems[:3]])


def _load(directories: Iterable[str]) -> tuple[dict[str, _Found | str], list[str]]:
    """(device -> where it is found, or which files of one directory contradict each other; files that are damaged)."""
    known: dict[str, _Found | str] = {}
    problems: list[str] = []
    for directory in directories:
        here: dict[str, _Found | str] = {}
        for path in _files(directory):
            try:
                for name, found in _read(path).items():
                    other = here.get(name)
                    here[name] = f"{other.path} and {path}" if isinstance(other, _Found) else other or found
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"{path} is not usable: {error}")
        known |= here
    return known, problems


def _files(directory: str) -> list[Path]:
    try:
        names = sorted(os.listdir(directory))[:_FILES_MAX]
    except OSError:
        return []
    return [Path(directory) / name for name in names if name.endswith((".json", ".yaml", ".yml"))]


def _read(path: Path) -> dict[str, _Found]:
    document = _parse(path)
    kind = document["kind"]
    common = document.get("containerEdits") or {}
    result = {}
    for device in document["devices"]:
        name = f"{kind}={device['name']}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no device name")
        result[name] = _Found(path, common, device.get("containerEdits") or {})
    return result


def _parse(path: Path) -> Any:
    with path.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        data = file.read(_FILE_MAX + 1)
    if len(data) > _FILE_MAX:
        raise ValueError(f"it has more than {_FILE_MAX} bytes")
    if path.suffix == ".json":
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
    return yaml_documents.load(data)


def _apply(edit: Mapping[str, Any], result: Edits, devices: Devices) -> None:
    for entry in edit.get("env") or ():
        name, _, value = entry.partition("=")
        result.env[name] = value
    for node in edit.get("deviceNodes") or ():
        _add_node(node, devices)
    for mount in edit.get("mounts") or ():
        result.mounts.append(
            {
                "destination": normalise(mount["containerPath"]),
                "type": mount.get("type") or "bind",
                "source": mount["hostPath"],
                "options": list(mount.get("options") or ("ro", "nosuid", "nodev", "bind")),
            }
        )
    for hook in edit.get("hooks") or ():
        if hook["hookName"] not in _HOOKS:
            raise ValueError(f"{hook['hookName']!r} is no hook")
        plain = {key: hook[key] for key in ("path", "args", "env", "timeout") if hook.get(key)}
        result.hooks.setdefault(hook["hookName"], []).append(plain)
    result.groups += [int(group) for group in edit.get("additionalGids") or () if group]
    if edit.get("intelRdt"):
        result.linux["intelRdt"] = dict(edit["intelRdt"])
    for device in edit.get("netDevices") or ():
        links = result.linux.setdefault("netDevices", {})
        links[device["hostInterfaceName"]] = {"name": device.get("name") or device["hostInterfaceName"]}


def _add_node(node: Mapping[str, Any], devices: Devices) -> None:
    """What the file leaves out is as the host's own node is."""
    path = normalise(node["path"])
    origin = node.get("hostPath") or node["path"]
    found = devices_at(origin, path)
    if len(found) != 1:
        if node.get("type") not in ("c", "b") or node.get("major") is None:
            raise ValueError(f"the host has no device {origin!r}")
        found = [(origin, {"path": path, "fileMode": 0o666, "uid": 0, "gid": 0, "major": 0, "minor": 0})]
    [(_, known)] = found
    for key in ("type", "major", "minor", "fileMode", "uid", "gid"):
        if node.get(key) is not None:
            known[key] = node[key]
    devices.add(found, node.get("permissions") or "rwm")
