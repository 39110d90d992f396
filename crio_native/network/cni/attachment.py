"""What is attached through plugin programs, on disk: enough to detach it after any crash, and after a reboot.

One file an attachment, `results/NETWORK-CONTAINER-INTERFACE`, in the form that libcni writes (`cniCacheV1`), so that
the tools for it can read ours.  It is written before the first ADD, without a result, because what a killed daemon left
half-made needs its DEL too; and removed after the last DEL.  Addresses of built-in networks are `records`'s.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.errors import ResourceExhausted, StepFailed
from crio_native.network.cni.protocol import Result, checked_result
from crio_native.network.conflist import VERSIONS, NetworkList, PluginProgram

log = logging.getLogger(__name__)

_KIND = "cniCacheV1"
_MAX_BYTES = 8 << 20
_DAMAGED = ".damaged"


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a call is about.  args: CNI_ARGS.  capabilities: what plugins may ask for as runtimeConfig, by name."""

    container_id: str
    netns: str
    interface: str
    args: tuple[tuple[str, str], ...] = ()
    capabilities: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CniAttachment:
    """A container's attachment to a network: the programs that made it, and the result of the last, once there is one.

    version: of the specification, at which they were run.
    """

    network: str
    version: str
    data: Mapping[str, Any]
    programs: tuple[PluginProgram, ...]
    subject: Subject
    result: Result | None = None

    @classmethod
    def begin(cls, network: NetworkList, version: str, subject: Subject) -> CniAttachment:
        return cls(network.name, version, network.data, network.programs, subject)

    @property
    def disable_check(self) -> bool:
        return self.data.get("disableCheck") in (True, "true")

    @property
    def file_name(self) -> str:
        return f"{self.network}-{self.subject.container_id}-{self.subject.interface}"

    def to_json(self) -> bytes:
        document = {
            "kind": _KIND,
            "containerId": self.subject.container_id,
            "config": base64.b64encode(json.dumps(self.data).encode()).decode(),
            "ifName": self.subject.interface,
            "networkName": self.network,
            "netns": self.subject.netns,
            "cniArgs": self.subject.args,
            "capabilityArgs": dict(self.subject.capabilities),
            "result": {**self.result, "cniVersion": "1.1.0"} if self.result is not None else None,
            # Ours: the list may say `bridge` and mean the built-in one.
            "cniVersion": self.version,
            "programs": [program.index for program in self.programs],
        }
        return json.dumps(document).encode()

    @classmethod
    def from_json(cls, data: bytes) -> CniAttachment:
        """Raises ValueError, LookupError, TypeError or AttributeError for what `to_json` did not write."""
        document = json.loads(data)
        if document["kind"] != _KIND:
            raise ValueError(f"its kind is {document['kind']!r}")
        for key in ("networkName", "containerId", "ifName"):
            if not isinstance(document[key], str):
                raise ValueError(f"{key} is no text")
        config = json.loads(base64.b64decode(document["config"]))
        plugins = config["plugins"]
        numbers = document.get("programs", range(len(plugins)))
        version = document.get("cniVersion") or config["cniVersion"]
        if version not in VERSIONS:
            raise ValueError(f"its version is {version!r}")
        result = document.get("result")
        programs = tuple(_program(plugins[number], number) for number in numbers)
        return cls(
            network=document["networkName"],
            version=version,
            data=config,
            programs=programs,
            subject=Subject(
                document["containerId"],
                str(document.get("netns") or ""),
                document["ifName"],
                tuple((str(key), str(value)) for key, value in document.get("cniArgs") or ()),
                dict(document.get("capabilityArgs") or {}),
            ),
            result=None if result is None else checked_result(result),
        )


def _program(config: Any, number: int) -> PluginProgram:
    capabilities = config.get("capabilities", {})
    if not isinstance(config["type"], str) or not isinstance(capabilities, dict):
        raise ValueError(f"plugins[{number}] is no plugin's configuration")
    return PluginProgram(config["type"], config, number)


class Attachments:
    """The files of one directory, by container.  Thread-safe for different containers."""

    def __init__(self, directory: Path) -> None:
        """Read the directory, which is made when something is written.  A damaged file is set aside with a message."""
        self._directory = directory
        self._lock = threading.Lock()
        self._known: dict[str, CniAttachment] = {}
        if directory.is_dir():
            for path in sorted(directory.iterdir()):
                self._load(path)

    def _load(self, path: Path) -> None:
        if not path.is_file():
            return
        if path.name.startswith("."):
            path.unlink()  # of a write that a crash cut short; the file itself is as it was before
        elif not path.name.endswith(_DAMAGED):
            try:
                with path.open("rb") as file:
                    found = CniAttachment.from_json(file.read(_MAX_BYTES))
                if found.file_name != path.name:
                    raise ValueError(f"it is about {found.file_name}")
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                aside = path.with_name(path.name + _DAMAGED)
                path.rename(aside)
                log.error("the record of a network attachment is damaged, and is now %s: %s", aside, error)
            else:
                self._known[found.subject.container_id] = found

    def get(self, container_id: str) -> CniAttachment | None:
        return self._known.get(container_id)

    def all(self) -> dict[str, CniAttachment]:
        with self._lock:
            return dict(self._known)

    def put(self, attachment: CniAttachment) -> None:
        """Durable when it returns.  Raises ResourceExhausted when the disk is full, StepFailed."""
        final = self._directory / attachment.file_name
        temporary = self._directory / f".{attachment.file_name}"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(attachment.to_json())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(final)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(f"{final}: {error.strerror}; free space on its file system") from error
            raise StepFailed("record-attachment", error.errno or 0, str(final)) from error
        with self._lock:
            self._known[attachment.subject.container_id] = attachment

    @contextlib.contextmanager
    def lock(self, attachment: CniAttachment) -> Iterator[int]:
        """A descriptor of the attachment's file, locked, for the programs of its ADD to inherit: they hold the lock
        until the last of them has ended, whatever becomes of us."""
        descriptor = os.open(self._directory / attachment.file_name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield descriptor
        finally:
            os.close(descriptor)

    def is_locked(self, attachment: CniAttachment) -> bool:
        """Whether programs that a killed daemon started for the attachment still run."""
        try:
            descriptor = os.open(self._directory / attachment.file_name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def remove(self, attachment: CniAttachment) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._directory / attachment.file_name).unlink()
        with self._lock:
            self._known.pop(attachment.subject.container_id, None)
