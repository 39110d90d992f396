"""Steps in which the init waits for others: its parent, hooks, whoever starts it.  The words are in `parent`."""

from __future__ import annotations

import os

from crio_native.oci.builtin import hooks, wire
from crio_native.oci.builtin.steps.context import Context, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def ask_parent(context: Context, duty: str) -> None:
    """Have our parent do what only the host's root, in the host's namespaces, can; see `parent.serve`.

    It kills us when it fails, so an answer means that it is done.
    """
    _ask(context, duty.encode())


def release_parent(context: Context) -> None:
    """From here on there is only the monitor, which knows our pid by now."""
    _ask(context, b"D")
    context.parent = context.sync


def _ask(context: Context, word: bytes) -> None:
    assert context.parent is not None
    context.parent.send(word)
    if context.parent.recv(16) != b"k":
        os._exit(0)  # the parent is gone


def run_hooks(context: Context, kind: str, entries: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Hooks of the container's namespaces: in the root directory until that is entered, then in the command's."""
    directory = context.root if context.root >= 0 else "."
    try:
        hooks.run(kind, entries, {**state, "pid": os.getpid()}, directory=directory)
    except hooks.HookFailed as error:
        raise Refused(error.path, str(error), error.number) from None


def wait_for_start(context: Context) -> None:
    sync = context.sync
    assert sync is not None
    user = context.user
    resolved = {"uid": user.uid, "gid": user.gid, "groups": user.groups, "home": user.home}
    sync.send(b"R" + wire.encode(resolved).encode())
    if sync.recv(16) != b"S":
        os._exit(0)  # the monitor is gone, and with it whoever could want us to start


STEPS = (ask_parent, release_parent, run_hooks, wait_for_start)
