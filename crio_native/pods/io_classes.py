"""Classes of block I/O and of RDT, which a container joins by annotation.

The operator's file `blockio_config_file` says what a class of block I/O is (goresctrl's form, YAML or JSON); an RDT
class is a group of the resctrl file system that somebody has made.  Turning them into limits is the runtime's work.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.pods import yaml_documents

_FILE_MAX = 1 << 20
_OPTION = "crio.runtime.blockio_config_file"
_RATES = {
    "throttlereadbps": "throttleReadBpsDevice",
    "throttlewritebps": "throttleWriteBpsDevice",
    "throttlereadiops": "throttleReadIOPSDevice",
    "throttlewriteiops": "throttleWriteIOPSDevice",
}
_KNOWN = ("devices", "weight", *_RATES)
_DEVICES_MAX = 256
_QUANTITY = re.compile(r"(\d{1,15})(?:([kMGT])(i?))?", re.ASCII)  # a subset of Kubernetes' quantities
_POWER = {None: 0, "k": 1, "M": 2, "G": 3, "T": 4}


def class_of(kind: str, container: str, of_container: Mapping[str, str], of_pod: Mapping[str, str]) -> tuple[str, str]:
    """(field, class) that the annotations name, ("", "") for none.  kind: "blockio" or "rdt"."""
    own = f"io.kubernetes.cri.{kind}-class"
    if own in of_container:
        return f"config.annotations[{own!r}]", of_container[own]
    for name in (
        f"{kind}.resources.beta.kubernetes.io/container.{container}",
        f"{kind}.resources.beta.kubernetes.io/pod",
    ):
        if name in of_pod:
            return f"the pod's annotations[{name!r}]", of_pod[name]
    return "", ""


def rdt_group(field: str, name: str) -> dict[str, Any]:
    """`linux.intelRdt` for a class.  Raises InvalidArgument."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", name, re.ASCII):
        raise InvalidArgument(field, name, "is no name of a group of resctrl")
    return {"closID": name}


class BlockIo:
    """The classes of the file, read once; with `again` at each use.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path, self._classes = "", dict[str, Any]()

    def limits(self, path: str, field: str, name: str, *, again: bool) -> dict[str, Any]:
        """`linux.resources.blockIO` of a class.  Raises FailedPrecondition for a file that cannot be used,
        InvalidArgument for a class that it does not have."""
        classes = self.classes(path, again=again)
        if name not in classes:
            known = ", ".join(sorted(classes)[:20]) or "none"
            raise InvalidArgument(field, name, f"is no class of {path}; there are: {known}")
        try:
            return _limits(classes[name])
        except (ValueError, TypeError, AttributeError) as error:
            raise FailedPrecondition(f"{_OPTION}: {path}: class {name!r}: {error}") from None

    def classes(self, path: str, *, again: bool = False) -> Mapping[str, Any]:
        """What the file says.  Raises FailedPrecondition."""
        with self._lock:
            if again or path != self._path:
                self._classes = _read(path)
                self._path = path
            return self._classes


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is no file")
            data = file.read(_FILE_MAX + 1)
        if len(data) > _FILE_MAX:
            raise ValueError(f"it has more than {_FILE_MAX} bytes")
        document = yaml_documents.load(data)
        classes = _lower({} if document is None else document).get("classes") or {}
        for name, entries in classes.items():
            for entry in entries or ():
                _check(str(name), _lower(entry))
        return {str(name): entries or [] for name, entries in classes.items()}
    except OSError as error:
        raise FailedPrecondition(f"{_OPTION}: {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise FailedPrecondition(f"{_OPTION}: {path}: {error}") from None


def _lower(table: Mapping[str, Any]) -> dict[str, Any]:
    """Names as they are compared: goresctrl does not mind their case."""
    return {str(name).lower(): value for name, value in table.items()}


def _check(name: str, entry: Mapping[str, Any]) -> None:
    for key, value in entry.items():
        if key not in _KNOWN:
            raise ValueError(f"class {name!r} has {key!r}, which is none of {', '.join(_KNOWN)}")
        if key == "devices" and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise ValueError(f"class {name!r}: devices must be a list of paths")
        if key != "devices":
            _number(value)
    if "devices" not in entry and set(entry) - {"weight"}:
        raise ValueError(f"class {name!r}: only a weight is for all devices; throttles need devices")


def _limits(entries: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Later entries win, device by device."""
    result: dict[str, Any] = {}
    found: dict[str, dict[tuple[int, int], dict[str, int]]] = {}
    for entry in map(_lower, entries):
        if "devices" not in entry:
            result["weight"] = _weight(entry["weight"])
            continue
        for device in _devices(entry["devices"]):
            place = dict(zip(("major", "minor"), device, strict=True))
            for key, name in _RATES.items():
                if key in entry:
                    found.setdefault(name, {})[device] = {**place, "rate": _number(entry[key])}
            if "weight" in entry:
                found.setdefault("weightDevice", {})[device] = {**place, "weight": _weight(entry["weight"])}
    return result | {name: list(devices.values()) for name, devices in found.items()}


def _devices(patterns: list[str]) -> Iterator[tuple[int, int]]:
    """The disks that the patterns mean.  A part of a disk has no limits of its own; a disk that is not there has none
    to keep."""
    count = 0
    for pattern in patterns:
        for path in sorted(glob.glob(pattern)):
            status = os.stat(path)
            numbers = os.major(status.st_rdev), os.minor(status.st_rdev)
            whole = not Path(f"/sys/dev/block/{numbers[0]}:{numbers[1]}/partition").exists()
            if stat.S_ISBLK(status.st_mode) and whole:
                count += 1
                if count > _DEVICES_MAX:
                    raise ValueError(f"the devices are more than {_DEVICES_MAX}")
                yield numbers


def _weight(value: Any) -> int:
    weight = _number(value)
    if not 10 <= weight <= 1000:
        raise ValueError(f"weight {weight} is not within 10 to 1000")
    return weight


def _number(value: Any) -> int:
    match = _QUANTITY.fullmatch(str(value))
    if not match:
        raise ValueError(f"{value!r} is no quantity such as 60M or 1Gi")
    return int(match[1]) * int((1024 if match[3] else 1000) ** _POWER[match[2]])
