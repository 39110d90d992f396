"""Which network the pods get: the files of `network_dir`, looked at again each time that somebody wants to know.

A look costs a directory listing and a stat for each file, some microseconds beside the milliseconds of a pod; so a
network that appears, changes or loses its program is noticed by the next pod, and by the next NetworkReady, with no
watch that could miss an event or overflow.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import CrioError, InvalidArgument, NotFound
from crio_native.network.conflist import BUILT_IN, NetworkList, kernel_has_ipv6

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20
MAX_FILES = 256
_ENDINGS = (".conf", ".conflist", ".json")

Signature = tuple[object, ...]


class NetworkDirectory:
    """The network by the rules of libcni's users: the first file, by name, that has a usable one, or the network named
    `default_network`, which is waited for.  The built-in default serves when there is no file.  Thread-safe."""

    def __init__(self, network_dir: str | Path, default_network: str = "", plugin_dirs: Sequence[str] = ()) -> None:
        self._path = Path(network_dir)
        self._default = default_network
        self.plugin_dirs = tuple(plugin_dirs)
        self._lock = threading.Lock()
        self._signature: Signature = ()
        self._chosen: NetworkList | CrioError | None = None
        self._skipped = ""

    def __call__(self) -> NetworkList:
        """The network as the files have it now.

        Raises InvalidArgument with file and key, Unimplemented for a plugin that is neither built in nor installed (of
        the first file, when none is usable), NotFound when no file defines `default_network`.
        """
        with self._lock:
            signature = self._look()
            if self._chosen is None or signature != self._signature:
                self._signature = signature
                self._choose_again()
            chosen = self._chosen
        if isinstance(chosen, CrioError):
            raise chosen
        assert chosen is not None
        return chosen

    @property
    def skipped(self) -> str:
        """Why files that come before the chosen one are not used, "" when there are none."""
        return self._skipped

    def _look(self) -> Signature:
        """What changes whenever an answer of ours could."""
        try:
            with os.scandir(self._path) as entries:
                names = sorted(entry.path for entry in entries if entry.name.endswith(_ENDINGS) or entry.is_dir())
        except OSError:
            names = []
        return tuple(_identity(path) for path in (*names[: 2 * MAX_FILES], *self.plugin_dirs))

    def _choose_again(self) -> None:
        problems: list[str] = []
        before = self._chosen
        try:
            self._chosen = self._choose(problems)
        except CrioError as error:
            self._chosen = error
        self._skipped = "; ".join(problems) if isinstance(self._chosen, NetworkList) else ""
        for problem in problems:
            log.warning("not used as the pod network: %s", problem)
        if isinstance(self._chosen, CrioError):
            log.error("the pod network is not ready: %s", self._chosen)
        elif before is None or isinstance(before, CrioError) or before.data != self._chosen.data:
            log.info("the pod network is %r of %s", self._chosen.name, self._chosen.source)

    def _choose(self, problems: list[str]) -> NetworkList:
        first_error: CrioError | None = None
        paths = self._candidates()
        for path in paths:
            data = None
            try:
                data = read_json(path)
                if self._default and not (isinstance(data, dict) and data.get("name") == self._default):
                    continue
                return NetworkList.parse(self._with_parts(data), str(path), self.has_program)
            except CrioError as error:
                problems.append(str(error))
                if not self._default or data is not None:  # nobody knows whether an unreadable one is the one named
                    first_error = first_error or error
        if (not paths and not self._default) or self._default == BUILT_IN["name"]:
            return NetworkList.built_in(ipv6=kernel_has_ipv6())
        if first_error is not None:
            raise first_error
        hint = f"crio.network.cni_default_network names it, but no file in {self._path} defines it (yet)"
        raise NotFound("network", self._default, hint)

    def _candidates(self) -> list[Path]:
        try:
            names = sorted(os.listdir(self._path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InvalidArgument("crio.network.network_dir", str(self._path), f"cannot be read: {error}") from None
        paths = [self._path / name for name in names if name.endswith(_ENDINGS)]
        if len(paths) > MAX_FILES:
            raise InvalidArgument("crio.network.network_dir", str(self._path), f"has more than {MAX_FILES} networks")
        return paths

    def _with_parts(self, data: Any) -> Any:
        """Plugins may also lie one a file in a directory of the network's name (1.1.0), after those of the list."""
        if not isinstance(data, dict) or data.get("loadOnlyInlinedPlugins") is True or "type" in data:
            return data
        name = data.get("name")
        directory = self._path / name if isinstance(name, str) and "/" not in name and name.strip(".") else None
        if directory is None or not directory.is_dir():
            return data
        parts = sorted(path for path in directory.iterdir() if path.name.endswith(".conf"))
        inlined = data.get("plugins", [])
        return (
            {**data, "plugins": [*inlined, *map(read_json, parts[:MAX_FILES])]} if isinstance(inlined, list) else data
        )

    def has_program(self, kind: str) -> bool:
        return find_program(self.plugin_dirs, kind) is not None


def find_program(directories: Sequence[str], kind: str) -> str | None:
    """The path of a plugin's program, of the first directory that has it."""
    for directory in directories:
        path = os.path.join(directory, kind)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def _open_at_once(path: str, flags: int) -> int:
    """Opening a FIFO that someone left there would never return."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_json(path: Path) -> Any:
    """Raises InvalidArgument with the path for what is no file, too large, or not JSON."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidArgument(str(path), f"{len(data)} bytes or more", f"at most {MAX_FILE_BYTES} are accepted")
        return json.loads(data)
    except OSError as error:
        raise InvalidArgument(str(path), error.strerror, "cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(str(path), str(error), "is not JSON") from None


def _identity(path: str) -> tuple[object, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        return (path, error.errno)
    return (path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
