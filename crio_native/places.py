"""The directories that the pods of this boot live in belong together, and a start with other ones is refused.

A pod has its record in `root`, its processes' sockets in `runroot` and its namespaces pinned in `namespaces_dir`.  A
daemon that looked for one of the three elsewhere would take pods that run for lost ones, or for somebody's remains,
and kill them.  So a file in `root`, and the same one in `runroot`, says which three were used last, and in which boot.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from crio_native.config import Config
from crio_native.errors import FailedPrecondition

log = logging.getLogger(__name__)

_FILE = "places"
_OPTIONS = {
    "root": ("crio.root", "--root"),
    "runroot": ("crio.runroot", "--runroot"),
    "namespaces_dir": ("crio.runtime.namespaces_dir", "--namespaces-dir"),
}


@dataclass(frozen=True, slots=True)
class Places:
    """Without links, so that one directory has one name."""

    boot: str
    root: str
    runroot: str
    namespaces_dir: str


def check(config: Config) -> None:
    """Raises FailedPrecondition while pods live elsewhere than the configuration says."""
    wanted = _configured(config)
    for old in _recorded(wanted):
        if old.boot == wanted.boot and _has_living_pods(old):
            raise FailedPrecondition(_refusal(old, wanted))


def settle(config: Config) -> None:
    """Record where pods will live from now on.  Raises FailedPrecondition as `check`.

    What stopped pods have left in another `runroot` is removed.  Both directories must be the caller's (their locks).
    """
    check(config)
    wanted = _configured(config)
    for old in _recorded(wanted):
        if old.runroot != wanted.runroot and _read(old.runroot) == old:
            _clean(old.runroot)
    for directory in (wanted.runroot, wanted.root):
        if _read(directory) != wanted:
            _write(directory, wanted)


def _configured(config: Config) -> Places:
    return Places(
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        root=os.path.realpath(config.crio.root),
        runroot=os.path.realpath(config.crio.runroot),
        namespaces_dir=os.path.realpath(config.runtime.namespaces_dir),
    )


def _recorded(wanted: Places) -> list[Places]:
    """What the two directories tell otherwise."""
    return [old for old in map(_read, (wanted.root, wanted.runroot)) if old not in (None, wanted)]


def _has_living_pods(old: Places) -> bool:
    """A pod has a directory in `runroot` from before its first process until after its last.

    Those in one that another root has taken over since are not these pods'.
    """
    from crio_native.pods import names

    if _read(old.runroot) != old:
        return False
    try:
        return any(map(names.is_id, os.listdir(f"{old.runroot}/sandboxes")))
    except FileNotFoundError:
        return False


def _refusal(old: Places, wanted: Places) -> str:
    changed = [name for name in _OPTIONS if getattr(old, name) != getattr(wanted, name)]
    told = " and ".join(
        f"{_OPTIONS[name][0]} is {getattr(wanted, name)}, but pods that run here use {getattr(old, name)}"
        for name in changed
    )
    flags = " ".join(f"{_OPTIONS[name][1]}={getattr(old, name)}" for name in changed)
    return f"{told}; set it back, or remove all pods and images first: crio-native {flags} wipe --force"


def _clean(runroot: str) -> None:
    """Of one that is given up: it may be a directory that others use, too."""
    from crio_native.pods import names, trees

    log.info("removing what stopped pods have left in %s, which was the runroot until now", runroot)
    for kind in ("containers", "sandboxes"):
        with contextlib.suppress(OSError):
            for name in filter(names.is_id, os.listdir(f"{runroot}/{kind}")):
                trees.remove_tree(f"{runroot}/{kind}/{name}")
    with contextlib.suppress(OSError):
        os.unlink(f"{runroot}/{_FILE}")


def _read(directory: str) -> Places | None:
    """None where there is none, or none that can be read: a file that was cut off is of a boot before."""
    try:
        return Places(**json.loads(Path(directory, _FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write(directory: str, places: Places) -> None:
    """Whole or not there.  On a full disk the start goes on: it is removing pods that frees space."""
    path = Path(directory, _FILE)
    try:
        path.with_suffix(".new").write_text(json.dumps(asdict(places), indent=2) + "\n")
        path.with_suffix(".new").rename(path)
    except OSError as error:
        log.warning("%s: %s; a start with changed directories cannot be told from this one", path, error.strerror)
