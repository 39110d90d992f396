"""The calls of the steps that make the process, what is around it, and its dialogue with others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crio_native.linux import capabilities, syscalls
from crio_native.oci.calls.words import capability_set, clone_flags, describes, in_root, quoted, write

_INFINITY = (-1, 2**64 - 1)


@describes
def new_session() -> list[str]:
    return ["setsid()"]


@describes
def await_cgroup() -> list[str]:
    return ["read(gate): one byte from who makes the control groups"]


@describes
def join_cgroup(files: list[str]) -> list[str]:
    return [f'write({quoted(path)}, "0")' for path in files]


@describes
def join_namespaces(namespaces: list[list[str]]) -> list[str]:
    return [f"setns({quoted(path)}), of kind {kind}" for kind, path in namespaces]


@describes
def open_mount_namespace(path: str) -> list[str]:
    return [f"namespace = open({quoted(path)}, O_RDONLY|O_CLOEXEC), refused when it is our own or no namespace"]


@describes
def join_mount_namespace() -> list[str]:
    return ["setns(namespace, CLONE_NEWNS)"]


@describes
def new_namespaces(flags: int) -> list[str]:
    return [f"unshare({clone_flags(flags)})"]


@describes
def new_time_namespace(offsets: str) -> list[str]:
    lines = write("/proc/self/timens_offsets", offsets) if offsets else []
    return ["unshare(CLONE_NEWTIME)", *lines, 'setns("/proc/self/ns/time_for_children", CLONE_NEWTIME)']


@describes
def user_namespace(uid_map: str, gid_map: str, path: str) -> list[str]:
    if path:
        return [f"user_namespace = open({quoted(path)}, O_RDONLY|O_CLOEXEC)"]
    return [
        "clone3(flags=CLONE_NEWUSER), a child that only holds the namespace",
        f'write("/proc/CHILD/uid_map", {quoted(uid_map)})',
        f'write("/proc/CHILD/gid_map", {quoted(gid_map)})',
        'user_namespace = open("/proc/CHILD/ns/user", O_RDONLY|O_CLOEXEC)',
    ]


@describes
def enter_user_namespace(new_pid: bool, join_pid: str, keep_groups: bool = False) -> list[str]:
    lines = [f"setns({quoted(join_pid)}, CLONE_NEWPID)"] if join_pid else []
    lines.append("setns(user_namespace, CLONE_NEWUSER), unless it is our own")
    if new_pid or join_pid:
        flags = syscalls.CLONE_PARENT | (syscalls.CLONE_NEWPID if new_pid else 0)
        lines.append(f"clone3(flags={clone_flags(flags)}, exit_signal=0), the child goes on as the init")
        lines.append("_exit(0), in the parent, when it has told its own parent the child's pid")
    lines += [] if keep_groups else ["setgroups([])"]
    return [*lines, "setresgid(0, 0, 0)", "setresuid(0, 0, 0)"]


@describes
def pin_namespaces(
    paths: Mapping[str, str], uid_map: str, gid_map: str, hostname: str, sysctls: Mapping[str, str]
) -> list[str]:
    kinds = "|".join(f"CLONE_NEW{kind.upper()}" for kind in paths if kind != "user")
    inside = [f"sethostname({quoted(hostname)})"] if "uts" in paths else []
    inside += set_sysctls(sysctls)
    inside += ["socket(AF_NETLINK, SOCK_RAW), sent through descriptor 0"] if "net" in paths else []
    return [
        *user_namespace(uid_map, gid_map, ""),
        "clone3(flags=0), a child that makes the namespaces",
        *(f"in the child: {line}" for line in ("setns(user_namespace, CLONE_NEWUSER)", f"unshare({kinds})", *inside)),
        *(f'mount("/proc/CHILD/ns/{kind}", {quoted(path)}, NULL, MS_BIND, NULL)' for kind, path in paths.items()),
        "_exit(0)",
    ]


@describes
def own_streams(uid: int, gid: int) -> list[str]:
    return [f"fchown(N, {uid}, {gid}) for each standard stream that is a pipe"]


@describes
def raise_limits(limits: list[list[int]]) -> list[str]:
    return [f"prlimit64(0, limit {number}, hard {hard}), when ours is below" for number, hard in limits]


@describes
def raise_loopback() -> list[str]:
    return ['ioctl(socket(AF_INET, SOCK_DGRAM), SIOCSIFFLAGS, {"lo", IFF_UP})']


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
    return write("/proc/self/oom_score_adj", value)


@describes
def open_labels() -> list[str]:
    paths = ("/proc/self/attr/exec", "/proc/self/attr/apparmor/exec")
    return [f"label = open({quoted(path)}, O_WRONLY|O_CLOEXEC), where there is one" for path in paths]


@describes
def find_own_pid() -> list[str]:
    return ['readlink("/proc/self")']


@describes
def set_affinity(cpus: list[int]) -> list[str]:
    return [f"sched_setaffinity(0, {sorted(cpus)})"]


@describes
def connect_listener(path: str) -> list[str]:
    return ["listener = socket(AF_UNIX, SOCK_STREAM|SOCK_CLOEXEC)", f"connect(listener, {quoted(path)})"]


@describes
def session_keyring(name: str) -> list[str]:
    return [f"keyctl(KEYCTL_JOIN_SESSION_KEYRING, {quoted(name)})"]


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
        in_root("/etc/passwd", "file", "O_RDONLY|O_NONBLOCK|O_NOCTTY") + f", for the user {quoted(user or '0')}",
        in_root("/etc/group", "file", "O_RDONLY|O_NONBLOCK|O_NOCTTY") + f", for the group {quoted(group)}",
    ]


@describes
def find_home() -> list[str]:
    return [in_root("/etc/passwd", "file", "O_RDONLY|O_NONBLOCK|O_NOCTTY") + ", for the user's HOME"]


@describes
def find_command(name: str) -> list[str]:
    where = quoted(name) if "/" in name else f"each directory of $PATH + {quoted('/' + name)}"
    return [f"access({where}, X_OK), refused when it is a directory"]


@describes
def limit_resource(resource: int, name: str, soft: int, hard: int) -> list[str]:
    words = ("RLIM_INFINITY" if value in _INFINITY else str(value) for value in (soft, hard))
    return [f"prlimit64(0, {name}, {{{', '.join(words)}}})"]


@describes
def no_new_privileges() -> list[str]:
    return ["prctl(PR_SET_NO_NEW_PRIVS, 1)"]


@describes
def scheduling(
    policy: int, flags: int, nice: int, priority: int, runtime: int, deadline: int, period: int
) -> list[str]:
    times = f"runtime={runtime}, deadline={deadline}, period={period}"
    return [f"sched_setattr(0, policy={policy}, flags={flags:#x}, nice={nice}, priority={priority}, {times})"]


@describes
def io_priority(priority: int) -> list[str]:
    return [f"ioprio_set(IOPRIO_WHO_PROCESS, 0, class {priority >> 13}, level {priority & 0x1FFF})"]


@describes
def memory_policy(mode: int, nodes: int) -> list[str]:
    return [f"set_mempolicy({mode:#x}, nodes {nodes:#b})"]


@describes
def personality(domain: int) -> list[str]:
    return [f"personality({domain:#x})"]


@describes
def seccomp(program: bytes, flags: int, notice: Mapping[str, Any] | None = None) -> list[str]:
    count = len(program) // 8  # of struct sock_filter
    load = f"seccomp(SECCOMP_SET_MODE_FILTER, {flags:#x}, a program of {count} instructions)"
    if notice is None:
        return [load]
    return [f"notify = {load}", "sendmsg(listener, the container process state, SCM_RIGHTS notify)"]


@describes
def limit_bounding_set(keep: int, last: int) -> list[str]:
    dropped = ((1 << last + 1) - 1) & ~keep
    return [f"prctl(PR_CAPBSET_DROP, each of {capability_set(dropped)})"] if dropped else []


@describes
def change_user(umask: int, keep_groups: bool = False) -> list[str]:
    return [
        "fchown(N, uid, gid) for each standard stream that is a pipe; fchown(N, uid, -1) for the terminal",
        "prctl(PR_SET_KEEPCAPS, 1)",
        *([] if keep_groups else ["setgroups(groups)"]),
        "setresgid(gid, gid, gid)",
        "setresuid(uid, uid, uid)",
        "prctl(PR_SET_KEEPCAPS, 0)",
        f"umask({umask:#o})",
    ]


@describes
def set_capabilities(effective: int, permitted: int, inheritable: int, ambient: int | None) -> list[str]:
    sets = {"effective": effective, "permitted": permitted, "inheritable": inheritable}
    words = ", ".join(f"{name}={capability_set(mask)}" for name, mask in sets.items())
    if ambient is None:
        return [f"capset({words})"]
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
def enter_container(flags: int) -> list[str]:
    lines = ["prctl(PR_SET_DUMPABLE, 0)", f"setns(pidfd, {clone_flags(flags)})"]
    if flags & syscalls.CLONE_NEWUSER:
        lines += ["setgroups([])", "setresgid(0, 0, 0)", "setresuid(0, 0, 0)"]
    return lines


@describes
def enter_pid_namespace() -> list[str]:
    return [
        "prctl(PR_SET_DUMPABLE, 0)",
        "setns(pidfd, CLONE_NEWUSER|CLONE_NEWPID)",
        "setgroups([])",
        "setresgid(0, 0, 0)",
        "setresuid(0, 0, 0)",
        *appear(),
    ]


@describes
def appear() -> list[str]:
    return [
        "clone3(flags=CLONE_PARENT, exit_signal=0), the child goes on",
        "_exit(0), in the parent, when it has told its own parent the child's pid",
    ]


@describes
def ask_parent(duty: str) -> list[str]:
    return [f'send(sync, "{duty}")', "recv(sync), which waits until the parent has done it"]


@describes
def release_parent() -> list[str]:
    return ['send(sync, "D")']


@describes
def run_hooks(kind: str, entries: list[Mapping[str, Any]], state: Mapping[str, Any]) -> list[str]:
    return hook_calls(entries)


def hook_calls(entries: list[Mapping[str, Any]]) -> list[str]:
    """Hooks run one after another, each with the container's state as its input."""
    return [
        f"execve({quoted(entry['path'])}, [{', '.join(map(quoted, entry.get('args') or [entry['path']]))}]) in a child"
        + (f", killed after {entry['timeout']} s" if entry.get("timeout") else "")
        for entry in entries
    ]


@describes
def wait_for_start() -> list[str]:
    return ["send(sync, ready)", "recv(sync), which waits for `start`"]


@describes
def default_signals() -> list[str]:
    return [
        "rt_sigprocmask(SIG_SETMASK, [])",
        *(f"rt_sigaction({name}, SIG_DFL)" for name in ("SIGPIPE", "SIGXFSZ", "SIGINT", "SIGCHLD")),
    ]


@describes
def execute(args: list[str]) -> list[str]:
    words = ", ".join(quoted(word) for word in args)
    return [f"execve({quoted(args[0])} as it was found, [{words}])"]


@describes
def open_pause_program(path: str) -> list[str]:
    return [
        f"program = open_tree({quoted(path)}, OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC)",
        "mount_setattr(program, 0, set=MOUNT_ATTR_RDONLY|MOUNT_ATTR_NOSUID|MOUNT_ATTR_NODEV)",
    ]


@describes
def execute_pause() -> list[str]:
    return ['execve(program, ["pause", "pause"]), by its descriptor']
