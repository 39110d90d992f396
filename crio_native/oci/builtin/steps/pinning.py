"""The step that makes a pod's namespaces inside a user namespace of the pod's own, and pins them.

A pin is a mount, which only the host's root can make, while the namespaces must be made by the user namespace's own
root, whose they are to be.  So there are two processes: a child in there that makes them, and us, who pin them.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import os

from crio_native.linux import mounts, namespaces, syscalls
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.steps.context import Context, Refused
from crio_native.oci.builtin.steps.surroundings import set_sysctls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_KINDS = {"net": syscalls.CLONE_NEWNET, "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS}


def pin_namespaces(
    context: Context, paths: dict[str, str], uid_map: str, gid_map: str, hostname: str, sysctls: dict[str, str]
) -> None:
    """Pin a new user namespace at paths["user"] and what else `paths` names; hand a netlink socket of the new network
    namespace out through descriptor 0.  It does not return: this process has no other purpose."""
    user = namespaces.new_user_namespace(uid_map, gid_map)
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    child = syscalls.clone3(0, exit_signal=_signal.SIGCHLD)
    if child == 0:
        ours.close()
        _make(theirs, user, paths, hostname, sysctls)
    theirs.close()
    try:
        problem = ours.recv(4096)
        if problem != b"made":
            raise _failure(problem.decode(errors="replace"))
        for kind, path in paths.items():
            origin = f"/proc/self/fd/{user}" if kind == "user" else f"/proc/{child}/ns/{kind}"
            syscalls.mount(origin, path, None, mounts.MS_BIND)
    finally:
        ours.close()
        os.waitpid(child, 0)
    os._exit(0)


def _make(
    channel: _socket.socket, user: int, paths: dict[str, str], hostname: str, sysctls: dict[str, str]
) -> NoReturn:
    """In the child: stay until the namespaces are pinned, which is when the other end is closed."""
    try:
        syscalls.setns(user, syscalls.CLONE_NEWUSER)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        syscalls.unshare(sum(flag for kind, flag in _KINDS.items() if kind in paths))
        if "uts" in paths:
            _socket.sethostname(hostname)
        set_sysctls(Context(None), sysctls)
        if "net" in paths:
            netlink = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, 0)
            wire.send(wire.channel(0), b"netlink", [netlink.fileno()])
        channel.send(b"made")
        channel.recv(1)
    except OSError as error:
        channel.send(f"{error.errno}\0{error.filename or ''}\0{error.strerror}".encode())
    except BaseException as error:
        channel.send(str(error).encode())
    finally:
        os._exit(0)


def _failure(told: str) -> Exception:
    if told.count("\0") != 2:
        return Refused("", told or "the process that makes the namespaces ended")
    number, path, why = told.split("\0")
    return OSError(int(number), why, path or None)


STEPS = (pin_namespaces,)
