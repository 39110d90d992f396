"""The system calls that a step makes, as text, from the step's arguments alone.

One function a step, of the step's name and with its arguments; `DESCRIPTIONS` has them all, and a test that it has one
for every step.  Calls are written as strace does: symbolic flags, quoted strings; a variable stands for a descriptor
that an earlier call gave.  Left out: looking (stat, readlink), reading and closing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from crio_native.linux import capabilities, mounts, syscalls

if TYPE_CHECKING:
    from crio_native.oci.builtin.plan import Step

_SHOWN = 200  # characters of a string
_CLONE_NAMES = {value: name for name, value in vars(syscalls).items() if name.startswith("CLONE_")}
_OPEN_ROOT = "RESOLVE_IN_ROOT|RESOLVE_NO_MAGICLINKS"
_INFINITY = (-1, 2**64 - 1)

DESCRIPTIONS: dict[str, Callable[..., Iterable[str]]] = {}


def of_step(step: Step) -> list[str]:
    return list(DESCRIPTIONS[step.name](**step.args))


def quoted(value: object) -> str:
    text = json.dumps(str(value), ensure_ascii=False)
    return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}"...'


def clone_flags(flags: int) -> str:
    known = [name for value, name in sorted(_CLONE_NAMES.items()) if flags & value]
    rest = flags & ~sum(value for value in _CLONE_NAMES if flags & value)
    return "|".join(known + ([hex(rest)] if rest else [])) or "0"


def capability_set(mask: int) -> str:
    return "|".join(capabilities.names(mask)) or "0"


def device_rules(rules: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the device controller is told, in words; of those that match a device the last decides."""
    return [f"device rule: {'allow' if rule['allow'] else 'deny'} {device_rule(rule)}" for rule in rules]


def device_rule(rule: Mapping[str, Any]) -> str:
    """A rule's devices and accesses: "c 10:200 rw"."""
    numbers = ("*" if rule.get(name, -1) in (None, -1) else str(rule[name]) for name in ("major", "minor"))
    return f"{rule.get('type') or 'a'} {':'.join(numbers)} {rule.get('access') or 'rwm'}"


def describes(function: Callable[..., Iterable[str]]) -> Callable[..., Iterable[str]]:
    DESCRIPTIONS[function.__name__.rstrip("_")] = function
    return function


def _write(path: str, text: object) -> list[str]:
    return [f"open({quoted(path)}, O_WRONLY|O_CLOEXEC)", f"write(fd, {quoted(text)})"]


def _in_root(path: str, name: str, flags: str = "O_PATH") -> str:
    return f"{name} = openat2(root, {quoted(path.lstrip('/') or '.')}, {flags}, {_OPEN_ROOT})"


def _made(path: str, name: str, directory: bool) -> list[str]:
    if directory:
        return [_in_root(path, name, "O_PATH|O_DIRECTORY") + ", each missing component by mkdirat"]
    return [_in_root(path, name) + ", made by openat(O_CREAT|O_EXCL|O_NOFOLLOW) when missing"]


def _propagation(kind: int) -> tuple[str, str]:
    """(flag of mount_setattr, propagation)."""
    return ("AT_RECURSIVE" if kind & mounts.MS_REC else "0"), mounts.flag_names(kind & ~mounts.MS_REC)


def _set_attributes(fd: str, to_set: int, to_clear: int, flags: str = "0") -> list[str]:
    if not (to_set or to_clear):
        return []
    attributes = f"set={mounts.attribute_names(to_set)}"
    if to_clear:
        attributes += f", clear={mounts.attribute_names(to_clear)}"
    return [f"mount_setattr({fd}, {flags}, {attributes})"]


def _set_propagation(fd: str, kinds: Iterable[int]) -> list[str]:
    return [f"mount_setattr({fd}, {deep}, propagation={kind})" for deep, kind in map(_propagation, kinds)]


def _attached(tree: str, destination: str, directory: bool) -> list[str]:
    return [*_made(destination, "target", directory), f"move_mount({tree}, target)"]


def _open_tree(path: str, recursive: bool = False) -> str:
    return f"tree = open_tree({path}, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC{'|AT_RECURSIVE' if recursive else ''})"


# -- the process's surroundings ----------------------------------------------------------------------------------


@describes
def new_session() -> list[str]:
    return ["setsid()"]


@describes
def join_cgroup(files: list[str]) -> list[str]:
    return [f'write({quoted(path)}, "0")' for path in files]


@describes
def join_namespaces(namespaces: list[list[str]]) -> list[str]:
    return [f"setns({quoted(path)}), of kind {kind}" for kind, path in namespaces]


@describes
def new_namespaces(flags: int) -> list[str]:
    return [f"unshare({clone_flags(flags)})"]


@describes
def set_hostname(name: str) -> list[str]:
    return [f"sethostname({quoted(name)})"]


@describes
def set_domainname(name: str) -> list[str]:
    return [f"setdomainname({quoted(name)})"]


@describes
def set_sysctls(values: Mapping[str, str]) -> list[str]:
    from crio_native.oci.builtin.steps import sysctl_path

    return [f"write({quoted('/proc/sys/' + sysctl_path(name))}, {quoted(value)})" for name, value in values.items()]


@describes
def oom_score(value: int) -> list[str]:
    return _write("/proc/self/oom_score_adj", value)


@describes
def open_labels() -> list[str]:
    paths = ("/proc/self/attr/exec", "/proc/self/attr/apparmor/exec")
    return [f"label = open({quoted(path)}, O_WRONLY|O_CLOEXEC), where there is one" for path in paths]


@describes
def session_keyring(name: str) -> list[str]:
    return [f"keyctl(KEYCTL_JOIN_SESSION_KEYRING, {quoted(name)})"]


# -- the root file system ----------------------------------------------------------------------------------------


@describes
def root_propagation(flags: int) -> list[str]:
    return [f'mount(NULL, "/", NULL, {mounts.flag_names(flags)}, NULL)']


def _private_parent(path: str) -> str:
    return f"mount(NULL, {quoted(path)} or the mount point above it, NULL, MS_PRIVATE, NULL)"


@describes
def bind_root(path: str) -> list[str]:
    return [
        "root = " + _open_tree(quoted(path), True).removeprefix("tree = "),
        _private_parent(path),
        f"move_mount(root, {quoted(path)})",
    ]


@describes
def overlay_root(path: str, base: str, data: str) -> list[str]:
    return [
        _private_parent(path),
        f"chdir({quoted(base)})",
        f'mount("overlay", {quoted(path)}, "overlay", 0, {quoted(data)})',
        'chdir("/")',
    ]


@describes
def bind(
    origin: str,
    destination: str,
    recursive: bool,
    set: int,
    clear: int,
    propagation: list[int],
    tree_set: int,
    tree_clear: int,
) -> list[str]:
    return [
        _open_tree(quoted(origin), recursive),
        *_set_attributes("tree", set, clear),
        *_set_attributes("tree", tree_set, tree_clear, "AT_RECURSIVE"),
        *_set_propagation("tree", propagation or [mounts.MS_PRIVATE | mounts.MS_REC]),
        *_attached("tree", destination, os.path.isdir(origin)),
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
) -> list[str]:
    return [
        *_made(destination, "target", True),
        f"mount({quoted(origin)}, target, {quoted(fstype)}, {mounts.flag_names(flags)}, {quoted(data)})",
        *_set_attributes("target", tree_set, tree_clear, "AT_RECURSIVE"),
        *_set_propagation("target", propagation),
    ]


def _new_tmpfs(*options: str) -> list[str]:
    set_ = [
        f'fsconfig(fs, FSCONFIG_SET_STRING, "{name}", "{value}")' for name, value in (o.split("=") for o in options)
    ]
    return ['fs = fsopen("tmpfs")', *set_, "fsconfig(fs, FSCONFIG_CMD_CREATE)", "tree = fsmount(fs)"]


@describes
def cgroup_v1(destination: str, directories: Mapping[str, str], set: int) -> list[str]:
    lines = [*_new_tmpfs("mode=755", "size=64k"), *_attached("tree", destination, True)]
    for name, directory in directories.items():
        lines += [
            f"mkdirat(target, {quoted(name)}, 0755)",
            _open_tree(quoted(directory)),
            f"mount_setattr(tree, 0, set={mounts.attribute_names(set)}, propagation=MS_PRIVATE)",
            f"move_mount(tree, target/{name})",
        ]
        lines += [f"symlinkat({quoted(name)}, target, {quoted(alias)})" for alias in name.split(",") if "," in name]
    return [*lines, *_set_attributes("target", set, 0)]


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
def link_devices(links: list[list[str]]) -> list[str]:
    return [f"symlinkat({quoted(target)}, root, {quoted(path)}), unless it is there" for path, target in links]


@describes
def console(height: int, width: int) -> list[str]:
    size = [f"ioctl(master, TIOCSWINSZ, {height} rows, {width} columns)"] if height or width else []
    return [
        _in_root("/dev/pts/ptmx", "master", "O_RDWR|O_NOCTTY"),
        "ioctl(master, TIOCSPTLCK, 0)",
        "slave = ioctl(master, TIOCGPTPEER, O_RDWR|O_NOCTTY|O_CLOEXEC)",
        *size,
        "sendmsg(sync, SCM_RIGHTS master)",
        "tree = open_tree(slave, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|AT_EMPTY_PATH)",
        *_attached("tree", "/dev/console", False),
        "ioctl(slave, TIOCSCTTY, 0)",
        "dup2(slave, 0), dup2(slave, 1), dup2(slave, 2)",
    ]


@describes
def make_working_directory(path: str) -> list[str]:
    return _made(path, "directory", True)


@describes
def read_only_paths(paths: list[str]) -> list[str]:
    lines = []
    for path in paths:
        lines += [
            _in_root(path, "found") + ", nothing when missing",
            "tree = open_tree(found, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|AT_RECURSIVE|AT_EMPTY_PATH)",
            "mount_setattr(tree, AT_RECURSIVE, set=MOUNT_ATTR_RDONLY)",
            "move_mount(tree, found)",
        ]
    return lines


@describes
def mask_paths(paths: list[str]) -> list[str]:
    return [
        *(_in_root(path, "found") + ", nothing when missing" for path in paths),
        'for files: null = openat2(root, "dev/null", O_PATH|O_NOFOLLOW), refused unless it is character device 1:3; '
        "each: open_tree(null, OPEN_TREE_CLONE), mount_setattr(tree, 0, set=MOUNT_ATTR_RDONLY), "
        "move_mount(tree, found)",
        "for directories: one empty tmpfs by fsopen, fsconfig, fsmount; mount_setattr(tree, 0, set=MOUNT_ATTR_RDONLY|"
        "MOUNT_ATTR_NOSUID|MOUNT_ATTR_NODEV|MOUNT_ATTR_NOEXEC); each: open_tree(tree, OPEN_TREE_CLONE), "
        "move_mount(tree, found)",
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
        'umount2(".", MNT_DETACH)',
        'chdir("/")',
    ]


@describes
def reopen_null() -> list[str]:
    return [
        'null = open("/dev/null", O_RDWR|O_NOFOLLOW|O_NONBLOCK|O_CLOEXEC)',
        "dup2(null, N) for each standard stream that is a null device",
    ]


# -- the process itself ------------------------------------------------------------------------------------------


@describes
def environment(entries: list[str]) -> list[str]:
    names = ", ".join(entry.partition("=")[0] for entry in entries)
    return [f"no call: the environment is {names or 'empty'}"]


@describes
def take_user(uid: int, gid: int, groups: list[int]) -> list[str]:
    return [f"no call: the user is {uid}:{gid}, groups {groups}"]


@describes
def find_user(user: str, group: str, supplementary: list[int], merge: bool) -> list[str]:
    return [
        _in_root("/etc/passwd", "file", "O_RDONLY|O_NONBLOCK|O_NOCTTY") + f", for the user {quoted(user or '0')}",
        _in_root("/etc/group", "file", "O_RDONLY|O_NONBLOCK|O_NOCTTY") + f", for the group {quoted(group)}",
    ]


@describes
def limit_resource(resource: int, name: str, soft: int, hard: int) -> list[str]:
    words = ("RLIM_INFINITY" if value in _INFINITY else str(value) for value in (soft, hard))
    return [f"prlimit64(0, {name}, {{{', '.join(words)}}})"]


@describes
def no_new_privileges() -> list[str]:
    return ["prctl(PR_SET_NO_NEW_PRIVS, 1)"]


@describes
def seccomp(program: str, flags: int) -> list[str]:
    return [f"seccomp(SECCOMP_SET_MODE_FILTER, {flags:#x}, a program of {len(program) // 16} instructions)"]


@describes
def limit_bounding_set(keep: int, last: int) -> list[str]:
    dropped = ((1 << last + 1) - 1) & ~keep
    return [f"prctl(PR_CAPBSET_DROP, each of {capability_set(dropped)})"] if dropped else []


@describes
def change_user(umask: int) -> list[str]:
    return [
        "fchown(N, uid, -1) for each standard stream that is a pipe or the terminal",
        "prctl(PR_SET_KEEPCAPS, 1)",
        "setgroups(groups)",
        "setresgid(gid, gid, gid)",
        "setresuid(uid, uid, uid)",
        "prctl(PR_SET_KEEPCAPS, 0)",
        f"umask({umask:#o})",
    ]


@describes
def set_capabilities(effective: int, permitted: int, inheritable: int, ambient: int) -> list[str]:
    sets = {"effective": effective, "permitted": permitted, "inheritable": inheritable}
    words = ", ".join(f"{name}={capability_set(mask)}" for name, mask in sets.items())
    raised = [f"prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, {name})" for name in capabilities.names(ambient)]
    return [f"capset({words})", "prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)", *raised]


@describes
def change_directory(path: str) -> list[str]:
    return [f"chdir({quoted(path)})", "getcwd(), refused when it is not below /"]


@describes
def write_labels(labels: Mapping[str, str]) -> list[str]:
    return [
        f"write(label, {quoted(('exec ' if module == 'apparmor' else '') + label)}), for {module}"
        for module, label in labels.items()
    ]


@describes
def enter_container() -> list[str]:
    return ["setns(pidfd, CLONE_NEWNS|CLONE_NEWNET|CLONE_NEWIPC|CLONE_NEWUTS|CLONE_NEWCGROUP)"]


@describes
def wait_for_start() -> list[str]:
    return ["send(sync, ready)", "recv(sync), which waits for `start`"]


@describes
def execute(args: list[str]) -> list[str]:
    words = ", ".join(quoted(word) for word in args)
    return ["close_range(3, ~0, CLOSE_RANGE_CLOEXEC)", f"execve({quoted(args[0])}, [{words}])"]


@describes
def open_pause_program(path: str) -> list[str]:
    return [
        f"program = open_tree({quoted(path)}, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC)",
        "mount_setattr(program, 0, set=MOUNT_ATTR_RDONLY|MOUNT_ATTR_NOSUID|MOUNT_ATTR_NODEV)",
    ]


@describes
def execute_pause() -> list[str]:
    return ['execve(program, ["pause", "pause"]), by its descriptor']
