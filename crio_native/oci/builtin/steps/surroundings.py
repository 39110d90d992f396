"""Steps that set up what is around the process: session, control groups, namespaces, sysctls, keyring, label files.

All of it happens while the host's own /proc is in view: a container's procfs is not to be trusted.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import resource
import stat
import sys

from crio_native.linux import control_files, namespaces, process, syscalls
from crio_native.oci.builtin.steps.context import Context, Refused

_SIOCSIFFLAGS, _IFF_UP, _SIZEOF_IFREQ = 0x8914, 1, 40


def new_session(context: Context) -> None:
    os.setsid()


def await_cgroup(context: Context) -> None:
    word = os.read(context.gate, 1)
    os.close(context.gate)
    if word != b"k":
        raise Refused("", "the daemon could not make the control group, or has ended")


def join_cgroup(context: Context, files: list[str]) -> None:
    for path in files:
        control_files.write(path, "0")


# In the order in which they are joined.
_JOIN_FLAG = {
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "network": syscalls.CLONE_NEWNET,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "time": syscalls.CLONE_NEWTIME,
}


def join_namespaces(context: Context, namespaces: list[list[str]]) -> None:
    """Open all before entering one: after setns(mount) the paths would mean other files.

    The host's root may enter any of them.  Who is not that may only enter those of his own user namespace, from in
    there: what is refused here is tried again by `enter_user_namespace`.
    """
    order = list(_JOIN_FLAG)
    ordered = sorted(namespaces, key=lambda entry: order.index(entry[0]))
    opened = [(process.open_namespace(path), kind, path) for kind, path in ordered]
    for fd, kind, path in opened:
        if not _enter(fd, kind, path, context.user_namespace >= 0):
            context.to_join.append((fd, kind, path))


def open_mount_namespace(context: Context, path: str) -> None:
    """Refuses our own: to make a root file system in there would be to remake the machine's."""
    context.mount_namespace = process.open_namespace(path)
    if namespaces.same(context.mount_namespace, "/proc/self/ns/mnt"):
        raise Refused(path, "is the mount namespace of the runtime itself", errno.EINVAL)


def join_mount_namespace(context: Context) -> None:
    syscalls.setns(context.mount_namespace, syscalls.CLONE_NEWNS)
    os.close(context.mount_namespace)


def new_namespaces(context: Context, flags: int) -> None:
    if flags & ~context.made:
        syscalls.unshare(flags & ~context.made)


def new_time_namespace(context: Context, offsets: str) -> None:
    namespaces.new_time_namespace(offsets)


def user_namespace(context: Context, uid_map: str, gid_map: str, path: str) -> None:
    """Make the container's user namespace, or open the one at `path`; it is entered later."""
    context.user_namespace = process.open_namespace(path) if path else namespaces.new_user_namespace(uid_map, gid_map)


def enter_user_namespace(context: Context, new_pid: bool, join_pid: str, keep_groups: bool = False) -> None:
    """Give up the host's privileges for those of the container's user namespace.

    The container's PID namespace must belong to it, so it is made here, for a child that goes on with the plan as the
    init; our parent becomes its parent, and is told its pid.  As root in there, so that what is made now is root's.
    """
    joined = process.open_namespace(join_pid) if join_pid else -1
    if joined >= 0 and _enter(joined, "pid", join_pid, True):
        joined = -1
    if not namespaces.same(context.user_namespace, "/proc/self/ns/user"):
        syscalls.setns(context.user_namespace, syscalls.CLONE_NEWUSER)
    if joined >= 0:
        syscalls.setns(joined, syscalls.CLONE_NEWPID)
    for fd, kind, path in context.to_join:
        _enter(fd, kind, path, False)
    for fd in context.id_maps.values():
        os.close(fd)
    os.close(context.user_namespace)
    context.user_namespace = -1
    if new_pid or join_pid:
        ended, end = os.pipe2(os.O_CLOEXEC)
        init = syscalls.clone3(syscalls.CLONE_PARENT | (syscalls.CLONE_NEWPID if new_pid else 0), exit_signal=0)
        if init:
            assert context.parent is not None
            context.parent.send(b"B%d" % init)
            os._exit(0)
        os.close(end)
        os.read(ended, 1)  # or our first word to the parent could come before that of who bore us
        os.close(ended)
    _become_root(keep_groups)


def _become_root(keep_groups: bool = False) -> None:
    if not keep_groups:
        try:
            os.setgroups([])
        except PermissionError:
            pass  # who may not drop groups (/proc/PID/setgroups) has only his own
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _enter(fd: int, kind: str, path: str, later: bool) -> bool:
    """setns, into no namespace of another kind; False when it takes privileges that we may have `later`."""
    try:
        syscalls.setns(fd, syscalls.CLONE_NEWPID if kind == "pid" else _JOIN_FLAG[kind])
    except OSError as error:
        if later and error.errno == errno.EPERM:
            return False
        why = f"{error.strerror} (is it a namespace of kind {kind}?)" if error.errno == errno.EINVAL else error.strerror
        raise OSError(error.errno, why, path) from None
    os.close(fd)
    return True


def own_streams(context: Context, uid: int, gid: int) -> None:
    """Root of a user namespace may hand the standard streams on to the command's user if it knows both their ids."""
    for number in (0, 1, 2):
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            os.fchown(number, uid, gid)


def raise_limits(context: Context, limits: list[list[int]]) -> None:
    """Hard limits above our own, which only the host's root may raise; `limit_resource` sets the exact ones later."""
    for number, hard in limits:
        present_soft, present_hard = resource.getrlimit(number)
        unlimited = resource.RLIM_INFINITY
        if present_hard != unlimited and (hard == unlimited or hard > present_hard):
            try:
                resource.setrlimit(number, (present_soft, hard))
            except ValueError:  # what Python makes of EPERM
                why = f"{os.strerror(errno.EPERM)} (resource {number}: hard limit {hard}, ours is {present_hard})"
                raise OSError(errno.EPERM, why) from None


def raise_loopback(context: Context) -> None:
    """A new network namespace has a loopback interface, but switched off; one that was made in advance has it on."""
    if not context.made & syscalls.CLONE_NEWNET:
        switch_loopback_on()


def switch_loopback_on() -> None:
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    request = b"lo".ljust(16, b"\0") + _IFF_UP.to_bytes(2, sys.byteorder)
    fcntl.ioctl(control, _SIOCSIFFLAGS, request.ljust(_SIZEOF_IFREQ, b"\0"))
    control.close()


def set_hostname(context: Context, name: str) -> None:
    _socket.sethostname(name)


def set_domainname(context: Context, name: str) -> None:
    syscalls.setdomainname(name)


def set_sysctls(context: Context, values: dict[str, str]) -> None:
    for name, value in values.items():
        path = "/proc/sys/" + sysctl_path(name)
        if path == "/proc/sys/kernel/domainname":  # its file is the host root's, also in a user namespace
            syscalls.setdomainname(value)
        elif path == "/proc/sys/kernel/hostname":
            _socket.sethostname(value)
        else:
            control_files.write(path, value)


def sysctl_path(name: str) -> str:
    """`net.ipv4.conf.eth0/1.forwarding` and `net/ipv4/...`: the first separator decides which one separates."""
    first = min((name.index(mark), mark) for mark in "./" if mark in name)[1] if set("./") & set(name) else "."
    return name if first == "/" else name.translate({ord("."): "/", ord("/"): "."})


def oom_score(context: Context, value: int) -> None:
    control_files.write("/proc/self/oom_score_adj", str(value))


def open_labels(context: Context) -> None:
    for module, path in (("selinux", "/proc/self/attr/exec"), ("apparmor", "/proc/self/attr/apparmor/exec")):
        try:
            context.labels[module] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass


def find_own_pid(context: Context) -> None:
    context.own_pid = int(os.readlink("/proc/self"))


def session_keyring(context: Context, name: str) -> None:
    try:
        syscalls.join_session_keyring(name)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EDQUOT):  # no keyrings in this kernel; or root's quota is full
            raise


def set_affinity(context: Context, cpus: list[int]) -> None:
    os.sched_setaffinity(0, cpus)


def connect_listener(context: Context, path: str) -> None:
    """Through its directory's descriptor: a socket's own name has room for 107 bytes only."""
    parent_path, _, name = path.rpartition("/")
    parent = os.open(parent_path or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        context.listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
        context.listener.settimeout(10)
        context.listener.connect(f"/proc/self/fd/{parent}/{name}")
    except OSError as error:
        raise OSError(error.errno, error.strerror or "no answer within 10 s", path) from None
    finally:
        os.close(parent)


def enter_container(context: Context, flags: int) -> None:
    """Namespaces of the init all at once, by its pidfd: none can be swapped in between.  flags: CLONE_NEW*; with
    CLONE_NEWPID our children are born in that."""
    _hide()
    syscalls.setns(context.container, flags)
    os.close(context.container)
    if flags & syscalls.CLONE_NEWUSER:
        _become_root()


def enter_pid_namespace(context: Context) -> None:
    """The init's user and PID namespace, for who is not the host's root: the second wants CAP_SYS_ADMIN not only in
    itself, but in the caller's own user namespace, so that it can be entered from the first alone.

    Only children are born there.
    """
    _hide()
    syscalls.setns(context.container, syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
    _become_root()
    _go_on_in_a_child(context)


def appear(context: Context) -> None:
    """Be born in the container's PID namespace, at last.  Who may trace any process there (CAP_SYS_PTRACE) can make us
    do what we are able to, so we were elsewhere while that was more than what the command is."""
    _go_on_in_a_child(context)


def _go_on_in_a_child(context: Context) -> None:
    """A copy of us, our parent's child like ourselves, goes on with the plan as soon as the parent knows it."""
    assert context.parent is not None
    child = syscalls.clone3(syscalls.CLONE_PARENT, exit_signal=0)
    if child:
        context.parent.send(b"B%d" % child)
        os._exit(0)
    word = context.parent.recv(16)
    if word[:1] != b"k":
        os._exit(0)  # the parent is gone
    context.own_pid = int(word[1:])


def _hide() -> None:
    """Root of the container's user namespace, whom we come near now, may trace and look into who shares his uid or is
    in his user namespace, unless that is not dumpable (CVE-2019-5736).  The exec makes it dumpable again.

    Late, for who is not root cannot write his own files in /proc any more.
    """
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


STEPS = (
    new_session,
    await_cgroup,
    join_cgroup,
    join_namespaces,
    open_mount_namespace,
    join_mount_namespace,
    new_namespaces,
    new_time_namespace,
    user_namespace,
    enter_user_namespace,
    own_streams,
    raise_limits,
    raise_loopback,
    set_hostname,
    set_domainname,
    set_sysctls,
    oom_score,
    open_labels,
    find_own_pid,
    session_keyring,
    set_affinity,
    connect_listener,
    enter_container,
    enter_pid_namespace,
    appear,
)
