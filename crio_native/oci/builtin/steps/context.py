"""What steps share: the `Context` that they hand on to each other, and the two ways in which one fails."""

from __future__ import annotations

import os

from crio_native.oci.builtin import users

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any

    from crio_native.linux.trees import Tree


class Refused(Exception):
    """The step found something that it must not go on with; `path` is what, the message says why."""

    def __init__(self, path: str, why: str, number: int = 0) -> None:
        super().__init__(why)
        self.path, self.why, self.number = path, why, number


class Context:
    """What steps hand on to later steps of the same init."""

    def __init__(self, sync: _socket.socket | None, parent: _socket.socket | None = None) -> None:
        self.sync = sync  # to the monitor; None for an exec
        self.parent = parent or sync  # to who has the parent's duties (see `parent`), until there are none any more
        self.made = 0  # CLONE_NEW* of namespaces that are the container's own already
        self.gate = -1  # a pipe that brings word when the control groups are ready
        self.root = -1  # O_PATH descriptor of the new root, until pivot_root
        self.root_path = ""  # the host's, of a root that is placed elsewhere
        self.placed = False  # the root is mounted on "/" already
        self.trees: dict[str, Tree] = {}  # opened while the host was in view, by the name that the plan gives them
        self.links: dict[str, str] = {}  # mounts that are symlinks to be copied: by that name, where they lead
        self.terminal = -1  # slave end of the pty
        self.labels: dict[str, int] = {}  # opened attribute files of the host's procfs
        self.environment: dict[str, str] = {}
        self.user = users.User(0, 0, (), "/")
        self.container: int = -1  # pidfd of the init to join, for an exec
        self.command = ""  # the path of what is executed
        self.program = -1  # an executable of the host, opened before it went out of view
        self.user_namespace = -1  # the container's own, until it is entered
        self.mount_namespace = -1  # one to join
        self.id_maps: dict[tuple[str, str], int] = {}  # user namespaces that only serve to describe id mappings
        self.to_join: list[
            tuple[int, str, str]
        ] = []  # namespaces (with kind and path) that need the privileges of the user namespace
        self.listener: _socket.socket | None = None  # where the seccomp listener's descriptor goes
        self.own_pid = 0  # as the host sees it
        self.preserved = 0  # so many descriptors from 3 on are the command's, not ours


def describe(step: str, error: BaseException) -> dict[str, Any]:
    """A failure as `errors.StepFailed.from_dict` reads it."""
    if isinstance(error, Refused):
        return {"step": step, "errno": error.number, "path": error.path, "detail": error.why}
    if isinstance(error, OSError):
        number, path = error.errno or 0, error.filename
        usual = os.strerror(number) if number else ""
        detail = error.strerror if error.strerror and error.strerror != usual else ""
        detail = detail.removeprefix(usual).strip()
        text = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        return {"step": step, "errno": number, "path": text, "detail": detail}
    return {"step": step, "errno": 0, "path": "", "detail": f"{type(error).__name__}: {error}"}
