"""SIGHUP: the configuration is read again, and what a running daemon can change is changed, all of it or nothing.

Which options those are is said where they are declared (`reload=True`); registries.conf and its directory are read
again too.  What else differs is named in a warning, and stays as it is until a restart.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crio_native.config import Config
from crio_native.config.render import Difference, differences
from crio_native.config.schema import Option, members
from crio_native.errors import CrioError
from crio_native.images import roots
from crio_native.pods.node import Node

log = logging.getLogger(__name__)

Read = Callable[[], Config]


class Reloader:
    """read: the configuration as the files, and this run's command line, have it now.

    set_logging: takes the new configuration's log level and filter.
    """

    def __init__(self, node: Node, read: Read, set_logging: Callable[[Config], None]) -> None:
        self._node, self._read, self._set_logging = node, read, set_logging
        self._lock = threading.Lock()

    def reload(self) -> None:
        """Never raises: what is wrong is logged, told by the verbose status, and changes nothing."""
        with self._lock:
            try:
                told = self._apply(self._read())
            except (CrioError, OSError) as error:
                log.error("the configuration was not reloaded, the old one goes on: %s", error)
                told = {"error": str(error)}
            self._node.reloaded = {"at": time.time_ns(), **told}

    def _apply(self, wanted: Config) -> dict[str, Any]:
        node = self._node
        changes = differences(node.config, wanted)
        config = taken_over(node.config, wanted)
        node.images.reload(keys=_path(config.runtime.decryption_keys_path))  # reads registries.conf, which may be wrong
        if config.runtime.runtimes != node.settings.runtimes or _default(config) != _default(node.config):
            node.handlers.reload(config.runtime)
        if roots.pinned(config) != roots.pinned(node.config):
            node.images.pin(roots.pinned(config))
        self._set_logging(config)
        node.config = config
        taken = [change for change in changes if change.reload]
        late = [change for change in changes if not change.reload]
        for change in taken:
            log.info("reloaded: %s", _words(change))
        for change in late:
            log.warning("not reloaded, a restart is needed: %s", _words(change))
        log.info("configuration and registries were read again; %d options changed", len(taken))
        return {"changed": [c.key for c in taken], "needRestart": [c.key for c in late]}


def taken_over(old: Any, new: Any) -> Any:
    """`old` with those options of `new` that can be reloaded; handlers as a whole."""
    values = {}
    for name, member in members(type(old)).items():
        if isinstance(member, type):
            values[name] = taken_over(getattr(old, name), getattr(new, name))
        elif name == "runtimes" or (isinstance(member, Option) and member.reload):
            values[name] = getattr(new, name)
    return dataclasses.replace(old, **values)


def _default(config: Config) -> str:
    return config.runtime.default_runtime


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _words(change: Difference) -> str:
    return f"{change.key} from {_short(change.old)} to {_short(change.new)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
