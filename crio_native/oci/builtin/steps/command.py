"""Steps that make the process what its command is to run as, and in the end exec it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import errno
import os
import resource
import stat

from crio_native.linux import capabilities, inroot, process, syscalls
from crio_native.oci.builtin import users, wire
from crio_native.oci.builtin.steps.context import Context, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_OVERFLOW_ID = 65534  # how a user namespace shows an owner that it has no number for
_set_limit = resource.setrlimit  # a step's argument has the module's name


def make_working_directory(context: Context, path: str) -> None:
    try:
        os.close(inroot.make_directories(context.root, path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def environment(context: Context, entries: list[str]) -> None:
    for entry in entries:
        name, _, value = entry.partition("=")
        context.environment[name] = value


def take_user(context: Context, uid: int, gid: int, groups: list[int]) -> None:
    context.user = users.User(uid, gid, tuple(groups), "/")


def find_user(context: Context, user: str, group: str, supplementary: list[int], merge: bool) -> None:
    """Names are looked up in the container's own /etc, whoever wrote it: bounded, and numbers checked."""
    try:
        context.user = users.find(context.root, user, group, supplementary, merge)
    except users.NoSuchUser as error:
        raise Refused(error.file, str(error), 0) from None
    context.environment.setdefault("HOME", context.user.home)


def find_home(context: Context) -> None:
    """HOME for a user that is given by number; who has no entry in the container's own passwd file is at home in /."""
    root = context.root if context.root >= 0 else os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        context.environment["HOME"] = users.find(root, str(context.user.uid), "", (), False).home
    except users.NoSuchUser as error:
        raise Refused(error.file, str(error), 0) from None
    finally:
        if root != context.root:
            os.close(root)


def limit_resource(context: Context, resource: int, name: str, soft: int, hard: int) -> None:
    try:
        _set_limit(resource, (soft, hard))
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EPERM
        raise OSError(number, f"{os.strerror(number)} ({name} soft {soft}, hard {hard})") from None


def scheduling(
    context: Context, policy: int, flags: int, nice: int, priority: int, runtime: int, deadline: int, period: int
) -> None:
    syscalls.sched_setattr(policy, flags, nice, priority, runtime, deadline, period)


def io_priority(context: Context, priority: int) -> None:
    syscalls.ioprio_set(priority)


def memory_policy(context: Context, mode: int, nodes: int) -> None:
    syscalls.set_mempolicy(mode, nodes)


def personality(context: Context, domain: int) -> None:
    syscalls.personality(domain)


def no_new_privileges(context: Context) -> None:
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def seccomp(context: Context, program: bytes, flags: int, notice: dict[str, Any] | None = None) -> None:
    """Load the filter.  notice: the container process state (runtime-spec) for who listens to the filter's
    notifications; it goes to the listener with the descriptor that loading gave."""
    found = syscalls.seccomp_filter(program, flags)
    if notice is None:
        return
    assert context.listener is not None
    state = {**notice["state"], "pid": context.own_pid}
    message = wire.encode({**notice, "pid": context.own_pid, "state": state})
    wire.send_stream(context.listener, message.encode(), [found])
    os.close(found)
    context.listener.close()


def limit_bounding_set(context: Context, keep: int, last: int) -> None:
    capabilities.limit_bounding(keep, last)


def change_user(context: Context, umask: int, keep_groups: bool = False) -> None:
    """Supplementary groups, then gid, then uid: each needs what the next one gives up.  keep_groups: those we have,
    among them such as a user namespace does not know and nobody can ask for."""
    user = context.user
    for number in (0, 1, 2):  # so that /dev/stdout can be opened; only ever a pipe or a pty of ours
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            _give(number, user.uid, user.gid)
        elif context.terminal >= 0:
            _give(number, user.uid, -1)  # its group is the terminals'
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    if not keep_groups:
        _set_groups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 0)
    os.umask(umask)


def _set_groups(groups: tuple[int, ...]) -> None:
    """A rootless user namespace denies it to all; who wants no more than his own group has that already."""
    try:
        os.setgroups(groups)
    except PermissionError:
        if groups and groups != (os.getgid(),):
            raise OSError(errno.EPERM, f"this user namespace denies setgroups; wanted {list(groups)}") from None


def _give(stream: int, uid: int, gid: int) -> None:
    """A pipe whose owner a user namespace does not know cannot be given away in there; it serves all the same."""
    try:
        os.fchown(stream, uid, gid)
    except PermissionError:
        if os.fstat(stream).st_uid != _OVERFLOW_ID:
            raise


def set_capabilities(context: Context, effective: int, permitted: int, inheritable: int, ambient: int | None) -> None:
    """ambient: None leaves those that stay permitted and inheritable."""
    syscalls.capset(effective, permitted, inheritable)
    if ambient is not None:
        capabilities.set_ambient(ambient)


def change_directory(context: Context, path: str) -> None:
    """Enter the directory as the user, and prove that it is in the root: a leaked descriptor of the host's, reached
    by /proc/self/fd, would show as unreachable (CVE-2024-21626)."""
    try:
        os.chdir(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (chdir to process.cwd)", path) from None
    try:
        inside = os.getcwd().startswith("/")
    except FileNotFoundError:
        inside = False
    if not inside:
        raise Refused(path, "is outside the container's root file system", errno.EPERM)


def write_labels(context: Context, labels: dict[str, str]) -> None:
    for module, label in labels.items():
        fd = context.labels.get(module, -1)
        if fd < 0:
            raise Refused(label, f"the kernel does not run {module}", errno.ENOTSUP)
        try:
            os.write(fd, (f"exec {label}" if module == "apparmor" else label).encode())
        except OSError as error:
            why = f"{error.strerror} (the kernel does not run {module}, or knows no such label)"
            raise OSError(error.errno, why, label) from None
        os.close(fd)


def find_command(context: Context, name: str) -> None:
    """Where the command is, as a filter may forbid to look; refuses what could not be executed, for an engine tells a
    missing command by a create that fails."""
    path = name if "/" in name else _search(name, context.environment.get("PATH", ""))
    if stat.S_ISDIR(os.stat(path).st_mode):
        raise OSError(errno.EACCES, f"{os.strerror(errno.EACCES)} (is a directory)", path)
    if not os.access(path, os.X_OK):  # not faccessat2(2), which older kernels do not know
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
    context.command = path


def execute(context: Context, args: list[str]) -> None:
    os.execve(context.command, args, context.environment)


def open_pause_program(context: Context, path: str) -> None:
    context.program = process.unwritable_executable(path)


def execute_pause(context: Context) -> None:
    """Exec a program of the host by a descriptor that was opened before the host went out of view."""
    os.execve(context.program, ["pause", "pause"], {})


def default_signals(context: Context) -> None:
    restore_signals()


def restore_signals() -> None:
    """What Python or a launcher changed goes back to how a program expects it."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGINT, _signal.SIGCHLD):
        _signal.signal(number, _signal.SIG_DFL)


def _search(name: str, path: str) -> str:
    """execvp(3)'s search; the refusal that weighs most is the one reported."""
    denied = False
    for directory in path.split(":"):
        candidate = f"{directory or '.'}/{name}"
        try:
            if stat.S_ISDIR(os.stat(candidate).st_mode):
                continue
        except OSError:
            continue
        if os.access(candidate, os.X_OK):
            return candidate
        denied = True
    if denied:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), name)
    raise OSError(errno.ENOENT, f"executable file not found in $PATH ({path!r})", name)


STEPS = (
    make_working_directory,
    environment,
    take_user,
    find_user,
    find_home,
    limit_resource,
    scheduling,
    io_priority,
    memory_policy,
    personality,
    no_new_privileges,
    seccomp,
    limit_bounding_set,
    change_user,
    set_capabilities,
    change_directory,
    write_labels,
    find_command,
    default_signals,
    execute,
    open_pause_program,
    execute_pause,
)
