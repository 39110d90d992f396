"""The daemon's side of pinning a pod's namespaces that belong to a user namespace of the pod's own.

Pods without one have theirs pinned by `Launchers.pin_namespaces`.  Here a launcher's clone runs one step
(`steps.pinning`), asked for in the words of an exec, but into the daemon's own namespaces.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from crio_native.errors import Internal, StepFailed
from crio_native.oci.builtin.execs import Birth, BuiltinExec
from crio_native.oci.builtin.launchers import Launchers


def pin_namespaces(
    launchers: Launchers,
    paths: Mapping[str, Path],
    *,
    uid_map: str,
    gid_map: str,
    hostname: str,
    sysctls: Mapping[str, str],
) -> socket.socket | None:
    """As `Launchers.pin_namespaces`, all in a new user namespace with these mappings, pinned at paths["user"].

    uid_map, gid_map: lines as /proc/PID/uid_map takes them.  Raises StepFailed; then nothing stays.
    """
    try:
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            path.touch(mode=0o600, exist_ok=False)
        step = {
            "paths": {kind: str(path) for kind, path in paths.items()},
            "uid_map": uid_map,
            "gid_map": gid_map,
            "hostname": hostname,
            "sysctls": dict(sysctls),
        }
        return _run(launchers, step)
    except BaseException:
        launchers.unpin_namespaces(paths.values())
        raise


def _run(launchers: Launchers, step: Mapping[str, object]) -> socket.socket | None:
    status, their_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answer, their_answer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"op": "exec", "stdio": [0, -1, -1], "cgroup": False, "steps": [("pin_namespaces", step)]}
    with status, answer:
        ourselves = os.pidfd_open(os.getpid())
        try:
            with launchers.conversation(request, [their_status.fileno(), ourselves, their_answer.fileno()]) as reply:
                their_status.close()
                their_answer.close()
                session = BuiltinExec(reply, Birth(status, "making the pod's namespaces", StepFailed))
                session.started()  # its last word, for it executes nothing
                ended = session.result().code
        finally:
            their_status.close()
            their_answer.close()
            os.close(ourselves)
        if ended:
            raise Internal(f"the process that makes a pod's namespaces ended with status {ended}")
        _, descriptors, _, _ = socket.recv_fds(answer, 64, 1)
        return socket.socket(fileno=descriptors[0]) if descriptors else None
