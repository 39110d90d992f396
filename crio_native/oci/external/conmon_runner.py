"""Having conmon create a container: what a runner does instead of becoming the monitor itself.

conmon runs the runtime, and stays; it tells the outcome on a pipe whose number is in its environment.
"""

from __future__ import annotations

import json
import os

from crio_native.oci.external import making
from crio_native.oci.external.children import Children, Tail, drain, is_child, parent_of, read_to_end, spawn, wait_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any

SYNC_FD = 3
SYNC_MAX = 16 << 10  # bytes of what conmon tells


def create(request: dict[str, Any], reply: _socket.socket, descriptors: list[int]) -> None:
    """The same as `runner.create`; request["conmon"] is conmon's argument vector."""
    with making.telling(request, reply) as step:
        if request["root"] and request["root"]["user_namespace"]:
            making.own_mounts(request["scratch"])  # conmon stays in them: it runs the runtime
        user = making.prepare(request, step)
        step.name = "create"
        pid = outcome(start(request, reply))
        with open(request["conmon_pid_file"], "rb", buffering=0) as file:
            conmon = int(file.read(making.PID_FILE_MAX))
        # conmon believes the runtime's pid file.  Of what the runtime made it is the parent, and we are conmon's.
        if not is_child(conmon) or parent_of(pid) != conmon:
            raise making.Refusal(f"the runtime left a pid file with {pid}, which is no process that it made")
        told = {"created": {"pid": pid, "monitor": conmon, "init": user or {}}}
        reply.send(json.dumps(told).encode())


def start(request: dict[str, Any], reply: _socket.socket) -> bytes:
    """Start conmon, which forks and goes on; what it tells.  Raises Refusal, Unwanted."""
    children = Children()
    sync, words = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    env = {**request["env"], "_OCI_SYNCPIPE": str(SYNC_FD)}
    pid = spawn(request["conmon"], env, [null, null, words[1], sync[1]])
    os.close(sync[1])
    os.close(words[1])
    tails = [Tail(sync[0], SYNC_MAX, end=False), Tail(words[0], making.WORDS_MAX, end=True)]
    status = wait_for(pid, children, reply, tails, {})
    if status != 0:
        drain(tails)
        raise making.Refusal(making.end_of(status, tails[1].data))
    read_to_end(tails[0], reply)  # a line: conmon itself keeps the pipe open
    return tails[0].data


def outcome(told: bytes) -> int:
    """The container's pid.  Raises Refusal with the runtime's words, which conmon passes on."""
    if not told:
        raise making.Refusal("nothing, and conmon ended without an outcome")
    try:
        message = json.loads(told.split(b"\n")[0])
        pid, said = int(message["pid"]), str(message.get("message", ""))
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        raise making.Refusal(f"conmon told no outcome: {told[:200]!r}") from None
    if pid <= 0:
        raise making.Refusal(said or "nothing, and conmon does not know more")
    return pid
