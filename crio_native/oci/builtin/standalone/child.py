"""The process that create and exec clone: what it inherits, what it may be granted, its filter, its birth."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import os
import select

from crio_native.errors import InvalidArgument
from crio_native.linux import capabilities, syscalls
from crio_native.oci.builtin import plan as plans
from crio_native.oci.builtin.standalone import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import SimpleNamespace
    from typing import Any, Protocol

    from crio_native.oci.builtin.plan import Host

    class Parent(Protocol):
        """Who keeps a child's pid and pidfd."""

        pid: int
        pidfd: int


MAX_PRESERVED = 4096
END_SECONDS = 2.0  # for a killed child to be gone: it holds little that the kernel has to take apart
ALL_CAPABILITIES = (1 << 64) - 1  # the creator of a user namespace has them all in there


def clone(parent: Parent, flags: int, cgroup: int | None, become: Callable[[], None]) -> None:
    """Clone a child that runs `become`; `pid` and `pidfd` of the parent are the child's.

    However that ends, the child does too: what is further up the stack undoes what is half made, by paths that may
    mean other files in the child.  Signals wait until it is known whose they are.
    """
    held = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP))
    try:
        parent.pid = syscalls.clone3(flags, exit_signal=_signal.SIGCHLD, cgroup=cgroup)
        if parent.pid == 0:
            try:
                _signal.pthread_sigmask(_signal.SIG_SETMASK, held)
                become()
            finally:
                os._exit(1)
        parent.pidfd = os.pidfd_open(parent.pid)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, held)


def compiled(seccomp: Mapping[str, Any] | None, root: str) -> tuple[bytes, int] | None:
    """(BPF program, load flags) of a `linux.seccomp` object, None without one."""
    if not seccomp:
        return None
    from crio_native.oci.builtin.standalone import filters

    return filters.compiled(seccomp, root)


def preserved_descriptors(options: SimpleNamespace, listen: int = 0) -> list[int]:
    """The descriptors that the process inherits: from 3 on, listen sockets, as far as they are open, and --preserve-fds
    more, which all have to be.  Raises InvalidArgument.

    To be called before this program opens anything that it keeps.
    """
    more = options.preserve_fds or 0
    if not 0 <= more <= MAX_PRESERVED:
        raise InvalidArgument("--preserve-fds", more, f"must be between 0 and {MAX_PRESERVED}")
    found = []
    for fd in range(3, 3 + listen + more):
        try:
            if fd == options.view.descriptor:
                raise OSError
            os.set_inheritable(fd, True)
            found.append(fd)
        except OSError:
            if fd >= 3 + listen:
                raise InvalidArgument("--preserve-fds", more, f"descriptor {fd} is not open") from None
    return found


_known_host: list[Host] = []


def host() -> Host:
    """What plans have to know of this machine."""
    if not _known_host:
        _, permitted, _ = syscalls.capget()
        _known_host.append(plans.Host(capabilities.last_known(), permitted, -1000))
    return _known_host[0]


def grantable(wanted: Mapping[str, Any], permitted: int) -> Mapping[str, Any]:
    """The process object without the capabilities that it cannot be given: the specification wants a container that
    asks for them to start, and a warning.  permitted: mask of those that there are to give; an ambient one must be
    permitted and inheritable too."""
    sets = wanted.get("capabilities") or {}
    both = {*(sets.get("inheritable") or ())} & {*(sets.get("permitted") or ())}
    given = {
        kind: [
            name for name in names if permitted >> capabilities.NUMBER[name] & 1 and (kind != "ambient" or name in both)
        ]
        for kind, names in sets.items()
    }
    for kind, names in sets.items():
        if missing := [name for name in names if name not in given[kind]]:
            log.warning(f"process.capabilities.{kind}: {', '.join(missing)} cannot be given")
    return {**wanted, "capabilities": given} if given != sets else wanted


def kill(pid: int, pidfd: int) -> None:
    """SIGKILL, and reap it.  One that cgroup v1 has frozen dies when it is thawed: that is said, and not waited for."""
    try:
        _signal.pidfd_send_signal(pidfd, _signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(END_SECONDS * 1000):
            os.waitpid(pid, 0)
        else:
            log.warning(f"process {pid} has been killed, and ends when the kernel lets it go on: is its cgroup frozen?")
    except (ProcessLookupError, ChildProcessError):
        return
