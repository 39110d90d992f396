"""The daemon's part in OCI hooks: bounding all, and having a launcher run poststart and poststop.

Those two come when the init's parent is the monitor, and the daemon itself starts no programs.  What they are is kept
in the container's run_dir, for they outlive the daemon; the other four kinds travel in the plan.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from crio_native.errors import DeadlineExceeded, StepFailed, Unavailable
from crio_native.oci.builtin.replies import receive
from crio_native.oci.spec import HOOKS

log = logging.getLogger(__name__)

FILE = "hooks"
LATE = ("poststart", "poststop")


class Launchers(Protocol):
    def conversation(self, request: dict[str, Any]) -> AbstractContextManager[socket.socket]: ...


def bounded(hooks: Mapping[str, Any], seconds: int) -> dict[str, Any]:
    """The same hooks, each with a timeout: one without could hold its container up for ever."""
    return {kind: [{"timeout": seconds} | dict(hook) for hook in hooks[kind]] for kind in HOOKS if hooks.get(kind)}


def record(run_dir: Path, hooks: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Keep the late ones, and the container's state as they will get it."""
    late = {kind: hooks[kind] for kind in LATE if kind in hooks}
    if late:
        text = json.dumps({"hooks": late, "state": dict(state)})
        with open(os.open(run_dir / FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)


def run_poststart(launchers: Launchers, run_dir: Path) -> None:
    """Raises StepFailed for the first that fails: the container is to be stopped then."""
    for index, (entry, state) in enumerate(_recorded(run_dir, "poststart")):
        _run(launchers, "poststart", index, entry, {**state, "status": "running"})


def run_poststop(launchers: Launchers, run_dir: Path, container_id: str) -> None:
    """Run them once: whoever deletes again finds none.  One that fails is a warning, and the others run."""
    recorded = _recorded(run_dir, "poststop")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{run_dir}/{FILE}")
    for index, (entry, state) in enumerate(recorded):
        try:
            _run(launchers, "poststop", index, entry, {**state, "status": "stopped", "pid": 0})
        except (StepFailed, DeadlineExceeded, Unavailable) as error:
            log.warning("container %s: %s", container_id, error)


def _recorded(run_dir: Path, kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    if not os.path.exists(f"{run_dir}/{FILE}"):
        return []
    found = json.loads((run_dir / FILE).read_text())
    return [(entry, found["state"]) for entry in found["hooks"].get(kind) or ()]


def _run(launchers: Launchers, kind: str, index: int, entry: dict[str, Any], state: dict[str, Any]) -> None:
    request = {"op": "hook", "kind": kind, "index": index, "entry": entry, "state": state}
    with launchers.conversation(request) as reply:
        said = receive(reply, entry["timeout"] + 10, f"it ran the {kind} hook {entry['path']}")
    if "error" in said:
        raise StepFailed.from_dict(said["error"])
