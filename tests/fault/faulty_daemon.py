"""The real daemon, with places where it can be made to fail.

`python -m tests.fault.faulty_daemon FILE CONFIG DIRECTORY`.  FILE says ``POINT before|after NUMBER``: at the NUMBERth
passage of that point the act raises "disk full".  FILE is removed when that happens, so every fault happens once.  The
points are the functions by which the daemon touches disk and kernel.
"""

from __future__ import annotations

import errno
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crio_native import daemon
from crio_native.config import load
from crio_native.errors import StepFailed

POINTS = (
    "store.insert",
    "store.change",
    "store.delete",
    "pin_namespaces",
    "unpin_namespaces",
    "network.setup",
    "network.teardown",
    "mount_files",
    "pod_files.write",
    "mount_shm",
    "prepare_root",
    "runtime.create",
    "runtime.start",
    "runtime.watch",
    "runtime.delete",
    "remove_tree",
)


class Faults:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._passed = 0

    def point(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._trip(name, "before")
            result = function(*args, **kwargs)
            self._trip(name, "after")
            return result

        return wrapped

    def _trip(self, name: str, when: str) -> None:
        with self._lock:
            try:
                wanted, moment, number = self._file.read_text().split()
            except FileNotFoundError:
                self._passed = 0
                return
            if (wanted, moment) != (name, when):
                return
            self._passed += 1
            if self._passed < int(number):
                return
            self._passed = 0
            self._file.unlink()
        raise StepFailed(f"injected at {name}", errno.ENOSPC)


def install(faults: Faults) -> None:
    from crio_native.images.store import ImageStore
    from crio_native.network import PodNetwork
    from crio_native.oci.builtin.launchers import Launchers
    from crio_native.oci.builtin.runtime import BuiltinRuntime
    from crio_native.pods import pod_files, sandboxes, trees
    from crio_native.pods.store import Store

    places: dict[str, tuple[Any, str]] = {
        "mount_files": (sandboxes, "_mount_files"),
        "mount_shm": (sandboxes, "_mount_shm"),
        "pod_files.write": (pod_files, "write"),
        "remove_tree": (trees, "remove_tree"),
        "prepare_root": (ImageStore, "prepare_root"),
        "pin_namespaces": (Launchers, "pin_namespaces"),
        "unpin_namespaces": (Launchers, "unpin_namespaces"),
    }
    places |= {f"store.{name}": (Store, name) for name in ("insert", "change", "delete")}
    places |= {f"network.{name}": (PodNetwork, name) for name in ("setup", "teardown")}
    places |= {f"runtime.{name}": (BuiltinRuntime, name) for name in ("create", "start", "watch", "delete")}
    assert sorted(places) == sorted(POINTS)
    for name, (holder, attribute) in places.items():
        static = isinstance(holder, type) and isinstance(inspect.getattr_static(holder, attribute), staticmethod)
        wrapped = faults.point(name, getattr(holder, attribute))
        setattr(holder, attribute, staticmethod(wrapped) if static else wrapped)


def main(file: str, config: str, directory: str) -> int:
    serve = daemon._serve

    def faulty_serve(*arguments: Any) -> None:
        install(Faults(Path(file)))
        serve(*arguments)

    daemon._serve = faulty_serve  # type: ignore[assignment]  # after the launchers have started, as for real
    return daemon.main(load(Path(config), Path(directory)).config)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
