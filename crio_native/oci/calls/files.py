"""The calls of the steps that make the file tree: root, mounts, masks, devices, terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from crio_native.linux import mounts
from crio_native.oci.calls.words import (
    attached,
    describes,
    in_root,
    made,
    open_tree,
    quoted,
    set_attributes,
    set_propagation,
)


@describes
def root_propagation(flags: int) -> list[str]:
    return [f'mount(NULL, "/", NULL, {mounts.flag_names(flags)}, NULL)']


def _private_parent(path: str) -> str:
    return f"mount(NULL, {quoted(path)} or the mount point above it, NULL, MS_PRIVATE, NULL)"


@describes
def bind_root(path: str, pivots: bool = True) -> list[str]:
    return [
        "root = " + open_tree(quoted(path), True).removeprefix("tree = "),
        "mount_setattr(root, 0, propagation=MS_SLAVE)",
        *([_private_parent(path)] if pivots else []),
        f"move_mount(root, {quoted(path)})",
    ]


@describes
def map_layers(base: str) -> list[str]:
    return [
        open_tree(quoted(base)),
        "mount_setattr(tree, 0, set=MOUNT_ATTR_IDMAP, userns_fd of the container's user namespace)",
        "mount_setattr(tree, 0, propagation=MS_PRIVATE)",
        f"move_mount(tree, {quoted(base)})",
    ]


@describes
def overlay_root(path: str, base: str, data: str, flags: int) -> list[str]:
    return [
        _private_parent(path),
        f"chdir({quoted(base)})",
        f'mount("overlay", {quoted(path)}, "overlay", {mounts.flag_names(flags)}, {quoted(data)})',
        'chdir("/")',
    ]


@describes
def open_root(path: str) -> list[str]:
    return [
        open_tree(quoted(path), True).replace("tree", "root", 1),
        "mount_setattr(root, AT_RECURSIVE, propagation=MS_PRIVATE)",
    ]


@describes
def place_root() -> list[str]:
    return ['mount(NULL, "/", NULL, MS_PRIVATE, NULL)', 'move_mount(root, "/")']


@describes
def bind(destination: str, follow: bool = True, **what: Any) -> list[str]:
    opened = open_bind("", **what)
    if what.get("links") == "copy" and os.path.islink(what["origin"]):
        return [*opened, f"symlinkat(what it leads to, root, {quoted(destination)})"]
    return [*opened, *attached("tree", destination, os.path.isdir(what["origin"]), follow)]


@describes
def open_bind(
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
) -> list[str]:
    if links == "copy" and os.path.islink(origin):
        return [f"readlink({quoted(origin)})"]
    lines = [open_tree(quoted(origin), recursive, follow=links != "mount")]
    if id_map is not None:
        deep = "AT_RECURSIVE" if map_all else "0"
        by = f"users {quoted(id_map[0])}, groups {quoted(id_map[1])}" if id_map[0] else "the container's user namespace"
        lines.append(f"mount_setattr(tree, {deep}, set=MOUNT_ATTR_IDMAP, userns_fd of {by})")
    return [
        *lines,
        *set_attributes("tree", set, clear),
        *set_attributes("tree", tree_set, tree_clear, "AT_RECURSIVE"),
        *set_propagation("tree", propagation or [mounts.MS_PRIVATE | mounts.MS_REC]),
    ]


@describes
def attach_bind(name: str, destination: str, follow: bool = True) -> list[str]:
    return [
        *made(destination, "target", True, follow),
        f"move_mount(tree of {name}, target), which is a file where the source is one",
    ]


@describes
def mount(
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
) -> list[str]:
    lines = [
        *made(destination, "target", True),
        f"mount({quoted(origin)}, target, {quoted(fstype)}, {mounts.flag_names(flags)}, {quoted(data)})"
        + (f", on EPERM instead the host's {or_bind} bound" if or_bind else ""),
        *set_attributes("target", tree_set, tree_clear, "AT_RECURSIVE"),
        *set_propagation("target", propagation),
    ]
    return [*lines, "what it covers is copied into it"] if copy_up else lines


@describes
def remount(
    destination: str, flags: int, data: str, propagation: list[int], tree_set: int, tree_clear: int
) -> list[str]:
    return [
        in_root(destination, "mounted"),
        f"mount(NULL, mounted, NULL, {mounts.flag_names(flags)}, {quoted(data)})",
        *set_attributes("mounted", tree_set, tree_clear, "AT_RECURSIVE"),
        *set_propagation("mounted", propagation),
    ]


def _new_tmpfs(*options: str) -> list[str]:
    set_ = [
        f'fsconfig(fs, FSCONFIG_SET_STRING, "{name}", "{value}")' for name, value in (o.split("=") for o in options)
    ]
    return ['fs = fsopen("tmpfs")', *set_, "fsconfig(fs, FSCONFIG_CMD_CREATE)", "tree = fsmount(fs)"]


@describes
def cgroup_v1(
    destination: str, directories: Mapping[str, str], set: int, clear: int, propagation: list[int]
) -> list[str]:
    lines = [*_new_tmpfs("mode=755", "size=64k"), *attached("tree", destination, True)]
    for name, directory in directories.items():
        lines += [
            f"mkdirat(target, {quoted(name)}, 0755)",
            open_tree(quoted(directory)),
            *set_attributes("tree", set, clear),
            *set_propagation("tree", [mounts.MS_PRIVATE]),
            f"move_mount(tree, target/{name})",
        ]
        lines += [f"symlinkat({quoted(name)}, target, {quoted(alias)})" for alias in name.split(",") if "," in name]
    return [*lines, *set_attributes("target", set, clear), *set_propagation("target", propagation)]


@describes
def make_devices(nodes: list[Mapping[str, Any]]) -> list[str]:
    kinds = {"c": "S_IFCHR", "u": "S_IFCHR", "b": "S_IFBLK", "p": "S_IFIFO"}
    lines = []
    for node in nodes:
        number = "" if node["type"] == "p" else f", makedev({node['major']}, {node['minor']})"
        lines.append(f"mknodat(root, {quoted(node['path'])}, {kinds[node['type']]}|{node['mode']:#o}{number})")
        if node["uid"] or node["gid"]:
            lines.append(f"fchownat(root, {quoted(node['path'])}, {node['uid']}, {node['gid']}, AT_SYMLINK_NOFOLLOW)")
    return lines


@describes
def open_devices(nodes: list[Mapping[str, Any]]) -> list[str]:
    return [
        line
        for node in nodes
        for line in (
            f"tree = open_tree({quoted(node['path'])}, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC), refused unless it is "
            f"{node['type']} {node['major']}:{node['minor']}",
            *set_attributes("tree", mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NOEXEC, 0),
        )
    ]


@describes
def prepare_devices(nodes: list[Mapping[str, Any]], label: str) -> list[str]:
    lines = [f"hidden = fsmount(a new tmpfs, mode 700{', context ' + quoted(label) if label else ''})"]
    lines += ['mount(NULL, "/", NULL, MS_PRIVATE, NULL)', 'move_mount(hidden, "/"), until the nodes are made']
    for number, node in enumerate(nodes):
        device = f"{'S_IFBLK' if node['type'] == 'b' else 'S_IFCHR'}|{node['mode']:#o}"
        lines += [
            f'mknodat(hidden, "{number}", {device}, makedev({node["major"]}, {node["minor"]})), for {node["path"]}',
            f'fchownat(hidden, "{number}", {node["uid"]}, {node["gid"]}, AT_SYMLINK_NOFOLLOW)',
            f'tree = open_tree(hidden, "{number}", OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC)',
            *set_attributes("tree", mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NOEXEC, 0),
        ]
    return [*lines, "umount2(hidden, MNT_DETACH)"]


@describes
def bind_devices(paths: list[str]) -> list[str]:
    return [line for path in paths for line in attached("tree", path, False)]


@describes
def link_devices(links: list[list[str]]) -> list[str]:
    return [f"symlinkat({quoted(target)}, root, {quoted(path)}), unless it is there" for path, target in links]


@describes
def console(height: int, width: int) -> list[str]:
    return [
        *_terminal(height, width),
        "tree = open_tree(slave, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|AT_EMPTY_PATH)",
        *attached("tree", "/dev/console", False),
        *control_terminal(),
        *_ON_STREAMS,
    ]


@describes
def exec_console(height: int, width: int, leader: bool = True) -> list[str]:
    return [*_terminal(height, width), *(control_terminal() if leader else ()), *_ON_STREAMS]


def _terminal(height: int, width: int) -> list[str]:
    size = [f"ioctl(master, TIOCSWINSZ, {height} rows, {width} columns)"] if height or width else []
    return [
        in_root("/dev/pts/ptmx", "master", "O_RDWR|O_NOCTTY"),
        "ioctl(master, TIOCSPTLCK, 0)",
        "slave = ioctl(master, TIOCGPTPEER, O_RDWR|O_NOCTTY|O_CLOEXEC)",
        *size,
        "sendmsg(sync, SCM_RIGHTS master)",
    ]


@describes
def control_terminal() -> list[str]:
    return ["ioctl(slave, TIOCSCTTY, 0)"]


_ON_STREAMS = ["dup2(slave, 0), dup2(slave, 1), dup2(slave, 2)"]


@describes
def make_working_directory(path: str) -> list[str]:
    return made(path, "directory", True)


@describes
def read_only_paths(paths: list[str]) -> list[str]:
    lines = []
    for path in paths:
        lines += [
            in_root(path, "found") + ", nothing when missing",
            "tree = open_tree(found, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|AT_RECURSIVE|AT_EMPTY_PATH)",
            "mount_setattr(tree, AT_RECURSIVE, set=MOUNT_ATTR_RDONLY)",
            "move_mount(tree, found)",
        ]
    return lines


@describes
def mask_paths(paths: list[str]) -> list[str]:
    empty = _new_tmpfs("mode=755", "nr_blocks=1", "nr_inodes=1")
    harmless = "MOUNT_ATTR_RDONLY|MOUNT_ATTR_NOSUID|MOUNT_ATTR_NODEV|MOUNT_ATTR_NOEXEC"
    clone = "open_tree({}, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|AT_EMPTY_PATH)"
    return [
        *(in_root(path, "found") + ", nothing when missing" for path in paths),
        in_root("/dev/null", "null", "O_PATH|O_NOFOLLOW") + ", refused unless it is character device 1:3",
        f"for each file: tree = {clone.format('null')}",
        "for each file: mount_setattr(tree, 0, set=MOUNT_ATTR_RDONLY)",
        "for each file: move_mount(tree, found)",
        *(f"when one is a directory: {line}" for line in empty),
        f"when one is a directory: mount_setattr(tree, 0, set={harmless})",
        "when one is a directory: move_mount(tree, found)",
        f"for each further directory: copy = {clone.format('tree')}",
        "for each further directory: mount_setattr(copy, 0, set=MOUNT_ATTR_RDONLY)",
        "for each further directory: move_mount(copy, found)",
    ]


@describes
def read_only_root() -> list[str]:
    return ["mount_setattr(root, 0, set=MOUNT_ATTR_RDONLY)"]


@describes
def pivot_root() -> list[str]:
    return [
        "fchdir(root)",
        'pivot_root(".", ".")',
        "fchdir(old)",
        'mount(NULL, ".", NULL, MS_SLAVE|MS_REC, NULL)',
        'umount2(".", MNT_DETACH), and again while there is something to unmount',
        'chdir("/")',
    ]


@describes
def move_root() -> list[str]:
    return ["fchdir(root)", 'mount(".", "/", NULL, MS_MOVE, NULL)', 'chroot(".")', 'chdir("/")']


@describes
def change_root() -> list[str]:
    return ["fchdir(root)", 'chroot(".")', 'chdir("/")']


@describes
def propagate_root(flags: int) -> list[str]:
    return [f'mount(NULL, "/", NULL, {mounts.flag_names(flags)}, NULL)']


@describes
def reopen_null() -> list[str]:
    return [
        "close_range(3 and what is passed on, ~0, CLOSE_RANGE_CLOEXEC)",
        'null = open("/dev/null", O_RDWR|O_NOFOLLOW|O_NONBLOCK|O_CLOEXEC)',
        "dup2(null, N) for each standard stream that is a null device",
    ]
