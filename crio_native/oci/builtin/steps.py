"""The single acts of a plan, as the container's init makes them.

Each function is one step: it takes the `Context` and the step's arguments, and raises OSError (the kernel refused) or
`Refused` (what was found is not acceptable).  Between clone and exec nothing may be imported, logged or locked, and
after `pivot_root` no path of the host may be used; what needs the host's /proc is therefore done or opened before.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import errno
import fcntl
import os
import resource
import stat
import struct
import termios

import prctl

from crio_native.linux import capabilities, inroot, mounts, process, syscalls
from crio_native.oci.builtin import users, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_GPTPEER = 0x5441  # TIOCGPTPEER: the terminal's other end, without going through a path (CVE-2025-52565)


class Refused(Exception):
    """The step found something that it must not go on with; `path` is what, the message says why."""

    def __init__(self, path: str, why: str, number: int = 0) -> None:
        super().__init__(why)
        self.path, self.why, self.number = path, why, number


class Context:
    """What steps hand on to later steps of the same init."""

    def __init__(self, sync: _socket.socket | None) -> None:
        self.sync = sync  # to the monitor; None for an exec
        self.root = -1  # O_PATH descriptor of the new root, until pivot_root
        self.terminal = -1  # slave end of the pty
        self.labels: dict[str, int] = {}  # opened attribute files of the host's procfs
        self.environment: dict[str, str] = {}
        self.user = users.User(0, 0, (), "/")
        self.container: int = -1  # pidfd of the init to join, for an exec
        self.program = -1  # an executable of the host, opened before it went out of view


# -- the process's surroundings ----------------------------------------------------------------------------------


def new_session(context: Context) -> None:
    os.setsid()


def join_cgroup(context: Context, files: list[str]) -> None:
    for path in files:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            os.close(fd)


_JOIN_ORDER = ("user", "ipc", "uts", "network", "cgroup", "time", "mount")


def join_namespaces(context: Context, namespaces: list[list[str]]) -> None:
    """Open all before entering one: after setns(mount) the paths would mean other files."""
    ordered = sorted(namespaces, key=lambda entry: _JOIN_ORDER.index(entry[0]))
    opened = [(process.open_namespace(path), path) for _, path in ordered]
    for fd, path in opened:
        try:
            syscalls.setns(fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        os.close(fd)


def new_namespaces(context: Context, flags: int) -> None:
    syscalls.unshare(flags)


def set_hostname(context: Context, name: str) -> None:
    _socket.sethostname(name)


def set_domainname(context: Context, name: str) -> None:
    syscalls.setdomainname(name)


def set_sysctls(context: Context, values: dict[str, str]) -> None:
    for name, value in values.items():
        path = "/proc/sys/" + sysctl_path(name)
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (value {value!r})", path) from None
        finally:
            os.close(fd)


def sysctl_path(name: str) -> str:
    """`net.ipv4.conf.eth0/1.forwarding` and `net/ipv4/...`: the first separator decides which one separates."""
    first = min((name.index(mark), mark) for mark in "./" if mark in name)[1] if set("./") & set(name) else "."
    return name if first == "/" else name.translate({ord("."): "/", ord("/"): "."})


def oom_score(context: Context, value: int) -> None:
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def open_labels(context: Context) -> None:
    for module, path in (("selinux", "/proc/self/attr/exec"), ("apparmor", "/proc/self/attr/apparmor/exec")):
        try:
            context.labels[module] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass


def session_keyring(context: Context, name: str) -> None:
    try:
        syscalls.join_session_keyring(name)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EDQUOT):  # no keyrings in this kernel; or root's quota is full
            raise


# -- the root file system ----------------------------------------------------------------------------------------


def root_propagation(context: Context, flags: int) -> None:
    syscalls.mount(None, "/", None, flags)


def bind_root(context: Context, path: str) -> None:
    """pivot_root(2) wants a mount point whose parent does not propagate: the root bound onto itself."""
    tree = syscalls.open_tree(
        syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_RECURSIVE
    )
    _place_root(context, path, tree)


def overlay_root(context: Context, path: str, base: str, data: str) -> None:
    """The layers' names are relative to `base`, so that 127 of them fit the page that mount data is bounded to."""
    _make_parent_private(path)
    os.chdir(base)
    syscalls.mount("overlay", path, "overlay", 0, data)
    os.chdir("/")
    context.root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _place_root(context: Context, path: str, tree: int) -> None:
    _make_parent_private(path)
    target = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.move_mount(tree, target)
    os.close(target)
    context.root = tree


def _make_parent_private(path: str) -> None:
    """The mount that holds `path` must not be shared, else pivot_root fails and our mounts would reach its peers."""
    where = path
    while True:
        try:
            syscalls.mount(None, where, None, mounts.MS_PRIVATE)
            return
        except OSError as error:
            if error.errno != errno.EINVAL or where == "/":  # EINVAL: not a mount point
                raise
            where = os.path.dirname(where)


def bind(
    context: Context,
    origin: str,
    destination: str,
    recursive: bool,
    set: int,
    clear: int,
    propagation: list[int],
    tree_set: int,
    tree_clear: int,
) -> None:
    """A bind mount, complete before it is attached: nobody sees it writable first and read-only later."""
    flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | (syscalls.AT_RECURSIVE if recursive else 0)
    try:
        tree = syscalls.open_tree(syscalls.AT_FDCWD, origin, flags)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (the mount's source)", origin) from None
    if set or clear:
        syscalls.mount_setattr(tree, 0, set_=set, clear=clear)
    if tree_set or tree_clear:
        syscalls.mount_setattr(tree, syscalls.AT_RECURSIVE, set_=tree_set, clear=tree_clear)
    for kind in propagation or [mounts.MS_PRIVATE | mounts.MS_REC]:
        deep = syscalls.AT_RECURSIVE if kind & mounts.MS_REC else 0
        syscalls.mount_setattr(tree, deep, propagation=kind & ~mounts.MS_REC)
    directory = stat.S_ISDIR(os.fstat(tree).st_mode)
    _attach(context, tree, destination, directory)


def _attach(context: Context, tree: int, destination: str, directory: bool) -> None:
    target = _target(context, destination, directory)
    try:
        syscalls.move_mount(tree, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, destination) from None
    finally:
        os.close(target)
        os.close(tree)


def _target(context: Context, destination: str, directory: bool) -> int:
    """The mount's target, made when missing; refused where a symlink led it into a procfs (CVE-2019-19921)."""
    make = inroot.make_directories if directory else inroot.make_file
    try:
        target = make(context.root, destination)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (the mount's target)", destination) from None
    landed, root = (os.readlink(f"/proc/self/fd/{fd}") for fd in (target, context.root))
    inside = "/" + landed.removeprefix(root).lstrip("/")
    if inside != destination and (inside == "/" or inside.startswith("/proc/")):
        raise Refused(destination, f"resolves to {inside} inside the root file system", errno.EPERM)
    return target


def mount(
    context: Context,
    origin: str,
    destination: str,
    fstype: str,
    flags: int,
    data: str,
    copy_up: bool,
    propagation: list[int],
    tree_set: int,
    tree_clear: int,
) -> None:
    target = _target(context, destination, True)
    copied = _copy_out(target) if copy_up else ""
    try:
        syscalls.mount(origin, f"/proc/self/fd/{target}", fstype, flags, data or None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (type {fstype}, options {data!r})", destination) from None
    finally:
        os.close(target)
    if not (propagation or tree_set or tree_clear or copied):
        return
    mounted = inroot.open_in_root(context.root, destination, os.O_PATH)
    try:
        if tree_set or tree_clear:
            syscalls.mount_setattr(mounted, syscalls.AT_RECURSIVE, set_=tree_set, clear=tree_clear)
        for kind in propagation:
            deep = syscalls.AT_RECURSIVE if kind & mounts.MS_REC else 0
            syscalls.mount_setattr(mounted, deep, propagation=kind & ~mounts.MS_REC)
    finally:
        os.close(mounted)


def _copy_out(target: int) -> str:
    raise Refused("", f"tmpcopyup is not supported on descriptor {target}", errno.ENOTSUP)


def cgroup_v1(context: Context, destination: str, directories: dict[str, str], set: int) -> None:
    """The container's own group of each v1 hierarchy, bound below a tmpfs.

    Not mounted anew: every mount of a v1 hierarchy in a new cgroup namespace makes a superblock, which takes the
    kernel a millisecond, and often ten more to wait for one that is going away.
    """
    _attach(context, _detached_tmpfs("mode=755", "size=64k"), destination, True)
    top = inroot.open_in_root(context.root, destination, os.O_PATH | os.O_DIRECTORY)
    for name, directory in directories.items():
        os.mkdir(name, 0o755, dir_fd=top)
        target = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
        tree = syscalls.open_tree(syscalls.AT_FDCWD, directory, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
        syscalls.mount_setattr(tree, 0, set_=set, propagation=mounts.MS_PRIVATE)
        syscalls.move_mount(tree, target)
        os.close(tree)
        os.close(target)
        for alias in name.split(",") if "," in name else ():
            os.symlink(name, alias, dir_fd=top)
    syscalls.mount_setattr(top, 0, set_=set)
    os.close(top)


_NODE_TYPE = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def make_devices(context: Context, nodes: list[dict[str, Any]]) -> None:
    for node in nodes:
        parent_path, _, name = node["path"].rpartition("/")
        parent = inroot.make_directories(context.root, parent_path)
        kind, number = _NODE_TYPE[node["type"]], os.makedev(node["major"], node["minor"])
        try:
            _make_node(parent, name, kind, number, node)
        except OSError as error:
            raise OSError(error.errno, error.strerror, node["path"]) from None
        finally:
            os.close(parent)


def _make_node(parent: int, name: str, kind: int, number: int, node: dict[str, Any]) -> None:
    try:
        os.mknod(name, kind | node["mode"], number, dir_fd=parent)
    except FileExistsError:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_IFMT(found.st_mode) != kind or (kind != stat.S_IFIFO and found.st_rdev != number):
            raise Refused(node["path"], "is something else already", errno.EEXIST) from None
        return
    if node["uid"] or node["gid"]:
        os.chown(name, node["uid"], node["gid"], dir_fd=parent, follow_symlinks=False)


def link_devices(context: Context, links: list[list[str]]) -> None:
    for path, target in links:
        parent_path, _, name = path.rpartition("/")
        parent = inroot.make_directories(context.root, parent_path)
        try:
            os.symlink(target, name, dir_fd=parent)
        except FileExistsError:
            pass  # a mounted /dev, or the image, has its own
        finally:
            os.close(parent)


def console(context: Context, height: int, width: int) -> None:
    """A pty of the container's own devpts; its master goes to the monitor, the slave becomes stdio and /dev/console."""
    master = inroot.open_in_root(context.root, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    if not stat.S_ISCHR(os.fstat(master).st_mode):
        raise Refused("/dev/pts/ptmx", "is not a character device", errno.ENODEV)
    fcntl.ioctl(master, termios.TIOCSPTLCK, struct.pack("i", 0)) if hasattr(termios, "TIOCSPTLCK") else fcntl.ioctl(
        master, 0x40045431, struct.pack("i", 0)
    )
    context.terminal = fcntl.ioctl(master, _GPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if height or width:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    assert context.sync is not None
    wire.send(context.sync, b"C", [master])
    os.close(master)
    tree = syscalls.open_tree(
        context.terminal, "", syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_EMPTY_PATH
    )
    _attach(context, tree, "/dev/console", False)
    fcntl.ioctl(context.terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(context.terminal, number)


def make_working_directory(context: Context, path: str) -> None:
    os.close(inroot.make_directories(context.root, path))


def read_only_paths(context: Context, paths: list[str]) -> None:
    for path in paths:
        try:
            found = inroot.open_in_root(context.root, path, os.O_PATH)
        except (FileNotFoundError, NotADirectoryError):
            continue
        flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_RECURSIVE | syscalls.AT_EMPTY_PATH
        tree = syscalls.open_tree(found, "", flags)
        syscalls.mount_setattr(tree, syscalls.AT_RECURSIVE, set_=mounts.MOUNT_ATTR_RDONLY)
        syscalls.move_mount(tree, found)
        os.close(tree)
        os.close(found)


def mask_paths(context: Context, paths: list[str]) -> None:
    """Files get a null device, directories one shared, empty, read-only tmpfs."""
    directories: list[int] = []
    files: list[int] = []
    for path in paths:
        try:
            found = inroot.open_in_root(context.root, path, os.O_PATH)
        except (FileNotFoundError, NotADirectoryError):
            continue
        (directories if stat.S_ISDIR(os.fstat(found).st_mode) else files).append(found)
    # Read-only also for files: root inside could otherwise change the mode of a null device that is the host's.
    if files:
        null = _null_device(context)
        for target in files:
            _cover(_clone_read_only(null), target)
        os.close(null)
    if directories:
        empty = _empty_directory()
        for target in directories[1:]:
            _cover(_clone_read_only(empty), target)
        # The last use attaches the mount itself: a detached one that is closed costs an RCU grace period.
        _cover(empty, directories[0])


def _clone_read_only(fd: int) -> int:
    flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_EMPTY_PATH
    tree = syscalls.open_tree(fd, "", flags)
    syscalls.mount_setattr(tree, 0, set_=mounts.MOUNT_ATTR_RDONLY)
    return tree


def _cover(tree: int, target: int) -> None:
    syscalls.move_mount(tree, target)
    os.close(tree)
    os.close(target)


def _empty_directory() -> int:
    fd = _detached_tmpfs("mode=755", "nr_blocks=1", "nr_inodes=1")
    syscalls.mount_setattr(
        fd,
        0,
        set_=mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC,
    )
    return fd


def _detached_tmpfs(*options: str) -> int:
    configuration = syscalls.fsopen("tmpfs")
    try:
        for option in options:
            syscalls.fsconfig_set(configuration, *option.split("="))
        syscalls.fsconfig_create(configuration)
        return syscalls.fsmount(configuration, 0)
    finally:
        os.close(configuration)


def _null_device(context: Context) -> int:
    """A null device, proven to be one: an image's could be anything (CVE-2025-31133)."""
    try:
        fd = inroot.open_in_root(context.root, "/dev/null", os.O_PATH | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        fd = os.open("/dev/null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not _is_null(fd):
        os.close(fd)
        raise Refused("/dev/null", "is not the null device", errno.ENODEV)
    return fd


def _is_null(fd: int) -> bool:
    found = os.fstat(fd)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)


def read_only_root(context: Context) -> None:
    syscalls.mount_setattr(context.root, 0, set_=mounts.MOUNT_ATTR_RDONLY)


def pivot_root(context: Context) -> None:
    """Both arguments "." stack the old root under the new one, where it is detached at once; no directory is needed."""
    os.fchdir(context.root)
    old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.pivot_root(".", ".")
    os.fchdir(old)
    # The old root must not carry our unmounting to the host.
    syscalls.mount(None, ".", None, mounts.MS_SLAVE | mounts.MS_REC)
    syscalls.umount2(".", mounts.MNT_DETACH)
    os.close(old)
    os.close(context.root)
    context.root = -1
    os.chdir("/")


def reopen_null(context: Context) -> None:
    """Standard streams on the host's /dev/null become the container's own: root inside could change the host's mode
    and owner through them."""
    try:
        fd = os.open("/dev/null", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # a container without devices keeps the streams it has
    if _is_null(fd):
        for number in (0, 1, 2):
            if _is_null(number):
                os.dup2(fd, number)
    os.close(fd)


# -- the process itself ------------------------------------------------------------------------------------------


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


def limit_resource(context: Context, resource: int, name: str, soft: int, hard: int) -> None:
    try:
        _set_limit(resource, (soft, hard))
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EPERM
        raise OSError(number, f"{os.strerror(number)} ({name} soft {soft}, hard {hard})") from None


_set_limit = resource.setrlimit


def no_new_privileges(context: Context) -> None:
    prctl.set_no_new_privs(1)


def seccomp(context: Context, program: bytes, flags: int) -> None:
    syscalls.seccomp_filter(program, flags)


def limit_bounding_set(context: Context, keep: int, last: int) -> None:
    capabilities.limit_bounding(keep, last)


def change_user(context: Context, umask: int) -> None:
    """Supplementary groups, then gid, then uid: each needs what the next one gives up."""
    user = context.user
    for number in (0, 1, 2):  # so that /dev/stdout can be opened; only ever a pipe or a pty of ours
        if context.terminal >= 0 or stat.S_ISFIFO(os.fstat(number).st_mode):
            os.fchown(number, user.uid, -1)
    prctl.set_keepcaps(1)
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    prctl.set_keepcaps(0)
    os.umask(umask)


def set_capabilities(context: Context, effective: int, permitted: int, inheritable: int, ambient: int) -> None:
    syscalls.capset(effective, permitted, inheritable)
    capabilities.set_ambient(ambient)


def change_directory(context: Context, path: str) -> None:
    """Enter the directory as the user, and prove that it is in the root: a leaked descriptor of the host's, reached
    by /proc/self/fd, would show as unreachable (CVE-2024-21626)."""
    try:
        os.chdir(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
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
        os.write(fd, (f"exec {label}" if module == "apparmor" else label).encode())
        os.close(fd)


def enter_container(context: Context) -> None:
    """All namespaces of the init at once, by its pidfd: none can be swapped in between."""
    kinds = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
    syscalls.setns(context.container, kinds | syscalls.CLONE_NEWCGROUP)
    os.close(context.container)


def wait_for_start(context: Context) -> None:
    sync = context.sync
    assert sync is not None
    user = context.user
    resolved = {"uid": user.uid, "gid": user.gid, "groups": user.groups, "home": user.home}
    sync.send(b"R" + wire.encode(resolved).encode())
    if sync.recv(16) != b"S":
        os._exit(0)  # the monitor is gone, and with it whoever could want us to start


def execute(context: Context, args: list[str]) -> None:
    environment = context.environment
    path = _search(args[0], environment.get("PATH", ""))
    restore_signals()
    syscalls.close_range(3, flags=syscalls.CLOSE_RANGE_CLOEXEC)
    os.execve(path, args, environment)


def open_pause_program(context: Context, path: str) -> None:
    context.program = process.unwritable_executable(path)


def execute_pause(context: Context) -> None:
    """Exec a program of the host by a descriptor that was opened before the host went out of view."""
    restore_signals()
    os.execve(context.program, ["pause", "pause"], {})


def restore_signals() -> None:
    """What Python or a launcher changed goes back to how a program expects it."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGINT, _signal.SIGCHLD):
        _signal.signal(number, _signal.SIG_DFL)


def _search(name: str, path: str) -> str:
    """execvp(3)'s search; the refusal that weighs most is the one reported."""
    if "/" in name:
        return name
    denied = False
    for directory in path.split(":"):
        candidate = f"{directory or '.'}/{name}"
        try:
            if stat.S_ISDIR(os.stat(candidate).st_mode):
                continue
        except OSError:
            continue
        if os.access(candidate, os.X_OK, effective_ids=True):
            return candidate
        denied = True
    if denied:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), name)
    raise OSError(errno.ENOENT, f"executable file not found in $PATH ({path!r})", name)


STEPS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        new_session,
        join_cgroup,
        join_namespaces,
        new_namespaces,
        set_hostname,
        set_domainname,
        set_sysctls,
        oom_score,
        open_labels,
        session_keyring,
        root_propagation,
        bind_root,
        overlay_root,
        bind,
        mount,
        cgroup_v1,
        make_devices,
        link_devices,
        console,
        make_working_directory,
        read_only_paths,
        mask_paths,
        read_only_root,
        pivot_root,
        environment,
        take_user,
        find_user,
        limit_resource,
        no_new_privileges,
        seccomp,
        limit_bounding_set,
        change_user,
        set_capabilities,
        change_directory,
        write_labels,
        enter_container,
        wait_for_start,
        execute,
        open_pause_program,
        execute_pause,
        reopen_null,
    )
}
