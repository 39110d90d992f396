"""Steps that mount: binds, file systems, control groups, and what hides or protects parts of them."""

from __future__ import annotations

import errno
import os
import stat

from crio_native.linux import copytree, inroot, mounts, namespaces, syscalls, trees
from crio_native.oci.builtin.steps.context import Context, Refused


def bind(context: Context, destination: str, follow: bool = True, **what: object) -> None:
    """A bind mount, complete before it is attached: nobody sees it writable first and read-only later."""
    open_bind(context, "bind", **what)  # type: ignore[arg-type]
    attach_bind(context, "bind", destination, follow)


def open_bind(
    context: Context,
    name: str,
    origin: str,
    recursive: bool,
    set: int,
    clear: int,
    propagation: list[int],
    tree_set: int,
    tree_clear: int,
    id_map: list[str] | None = None,
    map_all: bool = False,
    links: str = "follow",
) -> None:
    """The mount's tree; `attach_bind` mounts it.  id_map: (uid, gid) mappings to show it by, ("", "") for those of the
    container's user namespace; map_all: the mounts below it too.  links: whether an origin that is a symlink is
    followed, mounted itself ("mount"), or made anew in the container ("copy")."""
    if links == "copy" and os.path.islink(origin):
        context.links[name] = os.readlink(origin)
        return
    try:
        tree = trees.clone(syscalls.AT_FDCWD, origin, recursive=recursive, follow=links != "mount")
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (the mount's source)", origin) from None
    if id_map is not None:
        try:
            tree.map_ids(_id_map(context, id_map[0], id_map[1]), recursive=map_all)
        except OSError as error:
            why = " (its file system has no id-mapped mounts)" if error.errno == errno.EINVAL else ""
            raise OSError(error.errno, f"{error.strerror}{why}", origin) from None
    try:
        tree.change(set, clear)
        tree.change(tree_set, tree_clear, recursive=True)
        for kind in propagation or [mounts.MS_PRIVATE | mounts.MS_REC]:
            tree.change(propagation=kind & ~mounts.MS_REC, recursive=bool(kind & mounts.MS_REC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, origin) from None
    context.trees[name] = tree


def _id_map(context: Context, uid_map: str, gid_map: str) -> int:
    """A user namespace of these mappings; one is made but once."""
    if not uid_map:
        return context.user_namespace
    if (uid_map, gid_map) not in context.id_maps:
        context.id_maps[uid_map, gid_map] = namespaces.new_user_namespace(uid_map, gid_map)
    return context.id_maps[uid_map, gid_map]


def attach_bind(context: Context, name: str, destination: str, follow: bool = True) -> None:
    """follow: where the destination is a symlink, what it leads to is covered, not the link."""
    if name in context.links:
        _link(context, context.links.pop(name), destination)
        return
    tree = context.trees.pop(name)
    _attach(context, tree, destination, stat.S_ISDIR(os.fstat(tree.fd).st_mode), follow)


def _attach(context: Context, tree: trees.Tree, destination: str, directory: bool, follow: bool = True) -> None:
    target = _target(context, destination, directory, follow=follow)
    if not directory and stat.S_ISDIR(os.fstat(target).st_mode):
        os.close(target)
        tree.close()
        raise Refused(destination, "is a directory, which only a directory can be mounted on", errno.EISDIR)
    try:
        tree.attach(target)
        if destination == "/":  # no path leads to what covers the root: from now on that is the root
            os.dup2(tree.fd, context.root, inheritable=False)
    except OSError as error:
        raise OSError(error.errno, error.strerror, destination) from None
    finally:
        os.close(target)
        tree.close()


def _link(context: Context, target: str, destination: str) -> None:
    """The symlink at the destination; one that is there already must say the same."""
    parent_path, _, name = destination.rpartition("/")
    parent = inroot.make_directories(context.root, parent_path)
    try:
        os.symlink(target, name, dir_fd=parent)
    except FileExistsError:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        same = stat.S_ISLNK(os.fstat(found).st_mode) and os.readlink("", dir_fd=found) == target
        os.close(found)
        if not same:
            raise Refused(destination, "is there already, and is not the symlink to copy", errno.EEXIST) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, destination) from None
    finally:
        os.close(parent)


def _target(context: Context, destination: str, directory: bool, *, exact: bool = False, follow: bool = True) -> int:
    """The mount's target, made when missing; refused where a symlink led it into a procfs (CVE-2019-19921).

    exact: refused where it led anywhere: /proc and /sys have to be where masks and labels are looked for.  follow:
    whether it is what a symlink at the destination leads to, or the symlink itself.
    """
    make = inroot.make_directories if directory else inroot.make_file
    try:
        target = _itself(context, destination) if not follow else -1
        if target < 0:
            target = make(context.root, destination, links=inroot.MAX_LINKS)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (the mount's target)", destination) from None
    landed, root = (os.readlink(f"/proc/self/fd/{fd}") for fd in (target, context.root))
    inside = "/" + landed.removeprefix(root).lstrip("/")
    if inside != destination and (exact or inside == "/" or inside.startswith("/proc/")):
        raise Refused(destination, f"resolves to {inside} inside the root file system", errno.EPERM)
    return target


def _itself(context: Context, destination: str) -> int:
    """What is at the destination, be it a symlink; -1 for nothing."""
    try:
        return inroot.open_in_root(context.root, destination, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1


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
    or_bind: str = "",
) -> None:
    """or_bind: the host's own mount of this type, shown where a user namespace may not have one of its own: a procfs
    shows a PID namespace, a sysfs a network namespace, and that one belongs to others.  The host's has mounts below it,
    as the control groups, which a mount of one's own would not have: for them the options hold too."""
    if fstype == "tmpfs" and "mode=" not in data:
        data = f"{data},{_covered_mode(context, destination)}".strip(",")
    target = _target(context, destination, True, exact=fstype in ("proc", "sysfs"))
    try:
        _new_mount(target, origin, fstype, flags, data)
    except OSError as error:
        if not (or_bind and error.errno == errno.EPERM):
            raise OSError(error.errno, f"{error.strerror} (type {fstype}, options {data!r})", destination) from None
        os.close(target)
        to_set, to_clear = mounts.attributes(flags, 0)
        bind(
            context,
            destination,
            origin=or_bind,
            recursive=True,
            set=to_set,
            clear=to_clear,
            propagation=propagation,
            tree_set=tree_set | (to_set if trees.HAVE_SETATTR else 0),
            tree_clear=tree_clear,
        )
        return
    mounted = _change(context, destination, propagation, tree_set, tree_clear, copy_up)
    if mounted >= 0:
        try:
            if copy_up:
                _copy_up(target, mounted, destination, data)
        finally:
            os.close(mounted)
    os.close(target)


def _new_mount(target: int, origin: str, fstype: str, flags: int, data: str) -> None:
    """mount(2) refuses to cover a file system's mount by another of its own, as control groups meet with where the
    host's /sys was bound with all below it; move_mount(2) does not."""
    try:
        syscalls.mount(origin, f"/proc/self/fd/{target}", fstype, flags, data or None)
    except OSError as error:
        if error.errno != errno.EBUSY or not (trees.HAVE_TREES and trees.HAVE_FSOPEN):
            raise
        tree = trees.new(fstype, *(option for option in data.split(",") if option))
        tree.change(*mounts.attributes(flags, 0))
        tree.attach(target)
        tree.close()


def _covered_mode(context: Context, destination: str) -> str:
    """A tmpfs that covers a directory of the image has its mode, as runtimes agree; else the kernel's own."""
    try:
        covered = inroot.open_in_root(context.root, destination, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        return ""
    mode = stat.S_IMODE(os.fstat(covered).st_mode)
    os.close(covered)
    return f"mode={mode:o}"


def _change(
    context: Context, destination: str, propagation: list[int], tree_set: int, tree_clear: int, needed: bool
) -> int:
    """Give what is mounted there its attributes; returns a descriptor of it if there were any, or it is `needed`."""
    if not (needed or propagation or tree_set or tree_clear):
        return -1
    mounted = inroot.open_in_root(context.root, destination, os.O_PATH)
    if tree_set or tree_clear:
        trees.change_mounted(mounted, tree_set, tree_clear, recursive=True)
    for kind in propagation:
        trees.change_mounted(mounted, propagation=kind & ~mounts.MS_REC, recursive=bool(kind & mounts.MS_REC))
    return mounted


def _copy_up(covered: int, mounted: int, destination: str, data: str) -> None:
    """What the new file system hides is copied into it, but for the owner and mode of its top where the mount's options
    say them.  Both are open as paths only, and can be read through /proc."""
    readable: list[int] = []
    try:
        for fd in (covered, mounted):
            readable.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        status = os.fstat(readable[0])
        if "uid=" not in data and "gid=" not in data:
            os.fchown(readable[1], status.st_uid, status.st_gid)
        if "mode=" not in data:
            os.fchmod(readable[1], stat.S_IMODE(status.st_mode))
        copytree.copy(readable[0], readable[1])
    except OSError as error:
        where = f"{destination}/{error.filename}" if isinstance(error.filename, str) else destination
        raise OSError(error.errno, f"{error.strerror} (tmpcopyup)", where) from None
    finally:
        for fd in readable:
            os.close(fd)


def remount(
    context: Context,
    destination: str,
    flags: int,
    data: str,
    propagation: list[int],
    tree_set: int,
    tree_clear: int,
) -> None:
    """Change what is mounted at the destination already."""
    mounted = inroot.open_in_root(context.root, destination, os.O_PATH)
    try:
        syscalls.mount(None, f"/proc/self/fd/{mounted}", None, flags, data or None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (remount, options {data!r})", destination) from None
    finally:
        os.close(mounted)
    changed = _change(context, destination, propagation, tree_set, tree_clear, False)
    if changed >= 0:
        os.close(changed)


def cgroup_v1(
    context: Context, destination: str, directories: dict[str, str], set: int, clear: int, propagation: list[int]
) -> None:
    """The container's own group of each v1 hierarchy, bound below a tmpfs; all of them have the same attributes.

    Not mounted anew: every mount of a v1 hierarchy in a new cgroup namespace makes a superblock, which takes the
    kernel a millisecond, and often ten more to wait for one that is going away.
    """
    _attach(context, trees.new_tmpfs("mode=755", "size=64k"), destination, True)
    top = inroot.open_in_root(context.root, destination, os.O_PATH | os.O_DIRECTORY)
    for name, directory in directories.items():
        os.mkdir(name, 0o755, dir_fd=top)
        target = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
        tree = trees.clone(syscalls.AT_FDCWD, directory)
        tree.change(set, clear, mounts.MS_PRIVATE)
        _cover(tree, target)
        for alias in name.split(",") if "," in name else ():
            os.symlink(name, alias, dir_fd=top)
    trees.change_mounted(top, set, clear)
    for kind in propagation:
        trees.change_mounted(top, propagation=kind & ~mounts.MS_REC, recursive=bool(kind & mounts.MS_REC))
    os.close(top)


def read_only_paths(context: Context, paths: list[str]) -> None:
    for path in paths:
        try:
            found = inroot.open_in_root(context.root, path, os.O_PATH)
        except (FileNotFoundError, NotADirectoryError):
            continue
        tree = trees.clone(found, "", recursive=True)
        tree.change(mounts.MOUNT_ATTR_RDONLY, recursive=trees.HAVE_SETATTR)
        _cover(tree, found)


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
        # Attached before it is cloned: kernels before 6.15 clone no detached mount, and any kernel waits for an RCU
        # grace period when one is closed.
        empty = trees.new_tmpfs("mode=755", "nr_blocks=1", "nr_inodes=1")
        empty.change(_HARMLESS)
        empty.attach(directories[0])
        for target in directories[1:]:
            _cover(_clone_read_only(empty.fd), target)
        empty.close()
        os.close(directories[0])


_HARMLESS = mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC


def _clone_read_only(fd: int) -> trees.Tree:
    tree = trees.clone(fd, "")
    tree.change(mounts.MOUNT_ATTR_RDONLY)
    return tree


def _cover(tree: trees.Tree, target: int) -> None:
    tree.attach(target)
    tree.close()
    os.close(target)


def _null_device(context: Context) -> int:
    """A null device, proven to be one: an image's could be anything (CVE-2025-31133)."""
    try:
        fd = inroot.open_in_root(context.root, "/dev/null", os.O_PATH | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        fd = os.open("/dev/null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not is_null(fd):
        os.close(fd)
        raise Refused("/dev/null", "is not the null device", errno.ENODEV)
    return fd


def is_null(fd: int) -> bool:
    found = os.fstat(fd)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)


STEPS = (bind, open_bind, attach_bind, mount, remount, cgroup_v1, read_only_paths, mask_paths)
