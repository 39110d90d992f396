"""The commands of `crio-oci`, their flags and their help: data, and the text that is made of it.

A function is named as "module:function" and imported when its command is called; it takes the parsed options (with
`command`, `arguments` and the global flags) and returns the exit code.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Flag:
    """One flag.  kind: "switch", "text", "number" or "list"; unset it is False, "", None, []."""

    __slots__ = ("help", "kind", "name", "short")

    def __init__(self, name: str, kind: str, help: str, short: str = "") -> None:
        self.name, self.kind, self.help, self.short = name, kind, help, short

    @property
    def takes_value(self) -> bool:
        return self.kind != "switch"

    def default(self) -> object:
        return {"switch": False, "text": "", "number": None, "list": []}[self.kind]


class Verb:
    """One command.  arguments: how many it takes, least and most (-1: any number)."""

    __slots__ = ("arguments", "flags", "function", "help", "name", "synopsis")

    def __init__(
        self, name: str, function: str, help: str, synopsis: str, arguments: tuple[int, int], *flags: Flag
    ) -> None:
        self.name, self.function, self.help, self.synopsis, self.arguments = name, function, help, synopsis, arguments
        self.flags = flags

    @property
    def interspersed(self) -> bool:
        return self.name != "exec"  # whose arguments are another command with flags of its own


def table(flags: tuple[Flag, ...]) -> Mapping[str, Flag]:
    """Flags by long and short name."""
    return {name: flag for flag in flags for name in (flag.name, flag.short) if name}


_HERE = "crio_native.oci.builtin.standalone"

GLOBAL = (
    Flag("root", "text", "directory of the containers' states (default: /run/crio-oci)"),
    Flag("log", "text", "file that errors and warnings are appended to (default: standard error)"),
    Flag("log-format", "text", "text or json (default: text)"),
    Flag("log-level", "text", "debug, info, warning or error (default: info)"),
    Flag("debug", "switch", "log what is done"),
    Flag("systemd-cgroup", "switch", "let systemd make the cgroups; cgroupsPath has the form slice:prefix:name"),
    Flag("cgroup-manager", "text", "cgroupfs, systemd or disabled (default: cgroupfs)"),
    Flag("rootless", "text", "true, false or auto: do without what an unprivileged user cannot have (default: auto)"),
    Flag("trace", "text", "write each step of create, run and exec to this file, as JSON lines"),
    Flag("fail", "text", "let a step of create, run or exec fail: STEP, STEP=ERRNO or STEP#2=ERRNO"),
    Flag("version", "switch", "print the version", "v"),
)

_BUNDLE = Flag("bundle", "text", "directory with config.json (default: the current one)", "b")
_CONSOLE = Flag("console-socket", "text", "unix socket that the terminal's master is sent to")
_PIDFD = Flag("pidfd-socket", "text", "unix socket that a pidfd of the process is sent to")
_PID_FILE = Flag("pid-file", "text", "file to write the process id to")
_DETACH = Flag("detach", "switch", "do not wait for the process's end", "d")
_PRESERVE = Flag("preserve-fds", "number", "pass on this many descriptors from 3 on, after those of $LISTEN_FDS")
_MAKING = (
    _BUNDLE,
    _CONSOLE,
    _PIDFD,
    _PID_FILE,
    Flag("no-pivot", "switch", "enter the root by chroot: for a root file system in an initramfs"),
    Flag("no-new-keyring", "switch", "share the session keyring of the caller"),
    _PRESERVE,
)
_NO_SUBREAPER = Flag("no-subreaper", "switch", "do not reap the container's orphans")
_FORMAT = Flag("format", "text", "table or json (default: table)", "f")
_CRIU = (
    Flag("image-path", "text", "directory of the checkpoint (default: ./checkpoint)"),
    Flag("work-path", "text", "directory of CRIU's log (default: the image directory)"),
    Flag("tcp-established", "switch", "allow open TCP connections"),
    Flag("ext-unix-sk", "switch", "allow unix sockets connected to the outside"),
    Flag("shell-job", "switch", "allow a terminal of the caller's"),
    Flag("file-locks", "switch", "allow file locks"),
    Flag("manage-cgroups-mode", "text", "soft, full, strict or ignore (default: soft)"),
    Flag("empty-ns", "text", "network: make the namespace, restore nothing in it"),
    Flag("auto-dedup", "switch", "remove what a newer image has"),
    Flag("lazy-pages", "switch", "move memory when it is touched"),
)

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("create", f"{_HERE}.create:create", "make a container up to its command", "ID", (1, 1), *_MAKING),
        Verb("start", f"{_HERE}.control:start", "let a created container's command run", "ID", (1, 1)),
        Verb(
            "run",
            f"{_HERE}.create:run",
            "create, start, and wait for the end",
            "ID",
            (1, 1),
            *_MAKING,
            _DETACH,
            Flag("keep", "switch", "do not delete the container when it has ended"),
            _NO_SUBREAPER,
        ),
        Verb(
            "exec",
            f"{_HERE}.exec:exec_",
            "run another process in a running container",
            "ID COMMAND [ARG...]",
            (1, -1),
            _CONSOLE,
            _PIDFD,
            Flag("cwd", "text", "working directory in the container"),
            Flag("env", "list", "NAME=VALUE; may be repeated", "e"),
            Flag("tty", "switch", "give the process a terminal", "t"),
            Flag("user", "text", "UID or UID:GID", "u"),
            Flag("additional-gids", "list", "supplementary group, a number; may be repeated", "g"),
            Flag("process", "text", "file with the process object; the other flags change it", "p"),
            _DETACH,
            _PID_FILE,
            Flag("process-label", "text", "SELinux label of the process"),
            Flag("apparmor", "text", "AppArmor profile of the process"),
            Flag("no-new-privs", "switch", "the process can gain no privileges"),
            Flag("cap", "list", "give the process this capability too; may be repeated", "c"),
            _PRESERVE,
            Flag("cgroup", "list", "run in this group below the container's: [CONTROLLER:]PATH"),
            Flag("ignore-paused", "switch", "start it in a paused container, where it will wait"),
        ),
        Verb(
            "kill",
            f"{_HERE}.control:kill",
            "send a signal (default: TERM) to the container's first process",
            "ID [SIGNAL]",
            (1, 2),
            Flag("all", "switch", "send it to every process of the container", "a"),
        ),
        Verb(
            "delete",
            f"{_HERE}.control:delete",
            "remove what is left of a stopped container",
            "ID",
            (1, 1),
            Flag("force", "switch", "kill it first where it lives", "f"),
        ),
        Verb("pause", f"{_HERE}.control:pause", "stop all processes of a container", "ID", (1, 1)),
        Verb("resume", f"{_HERE}.control:resume", "let them go on", "ID", (1, 1)),
        Verb("state", f"{_HERE}.control:state_", "print a container's state as JSON", "ID", (1, 1)),
        Verb(
            "list",
            f"{_HERE}.show:list_",
            "list the containers below --root",
            "",
            (0, 0),
            _FORMAT,
            Flag("quiet", "switch", "only their ids", "q"),
        ),
        Verb("ps", f"{_HERE}.resources:ps", "show a container's processes", "ID [PS-OPTIONS...]", (1, -1), _FORMAT),
        Verb(
            "update",
            f"{_HERE}.resources:update",
            "change a live container's limits",
            "ID",
            (1, 1),
            Flag("resources", "text", "file with a linux.resources object, or - ; other flags are not read then", "r"),
            Flag("blkio-weight", "number", "weight of block I/O, 10 to 1000"),
            Flag("cpu-period", "number", "microseconds in which cpu-quota may be used"),
            Flag("cpu-quota", "number", "microseconds of CPU time in each period; -1: no limit"),
            Flag("cpu-burst", "number", "microseconds that may be saved up beyond the quota"),
            Flag("cpu-share", "number", "relative weight, 2 to 262144"),
            Flag("cpu-rt-period", "number", "microseconds in which cpu-rt-runtime may be used"),
            Flag("cpu-rt-runtime", "number", "microseconds of real-time CPU time in each period"),
            Flag("cpu-idle", "number", "1: run when nobody else wants to"),
            Flag("cpuset-cpus", "text", "CPUs to use, as in 0-3,7"),
            Flag("cpuset-mems", "text", "memory nodes to use"),
            Flag("memory", "text", "bytes of memory; -1: no limit"),
            Flag("memory-reservation", "text", "bytes of memory that are kept for it"),
            Flag("memory-swap", "text", "bytes of memory and swap together; -1: no limit"),
            Flag("kernel-memory", "text", "not limited apart any more: refused"),
            Flag("kernel-memory-tcp", "text", "not limited apart any more: refused"),
            Flag("pids-limit", "number", "processes and threads; -1: no limit"),
            Flag("l3-cache-schema", "text", "Intel RDT: L3 cache schema"),
            Flag("mem-bw-schema", "text", "Intel RDT: memory bandwidth schema"),
        ),
        Verb(
            "events",
            f"{_HERE}.resources:events",
            "print statistics, and when memory ran out, as JSON lines",
            "ID",
            (1, 1),
            Flag("interval", "text", "time between statistics, as in 5s (default) or 500ms"),
            Flag("stats", "switch", "print statistics once"),
        ),
        Verb("features", f"{_HERE}.show:features", "print what this build can do here, as JSON", "", (0, 0)),
        Verb(
            "spec",
            f"{_HERE}.show:spec",
            "write a config.json to start from",
            "",
            (0, 0),
            _BUNDLE,
            Flag("rootless", "switch", "for an unprivileged user"),
        ),
        Verb(
            "checkpoint",
            f"{_HERE}.checkpoint:checkpoint",
            "save a running container to files",
            "ID",
            (1, 1),
            *_CRIU,
            Flag("parent-path", "text", "earlier checkpoint that this one adds to"),
            Flag("leave-running", "switch", "let the container go on"),
            Flag("pre-dump", "switch", "save memory only, and let it go on"),
            Flag("status-fd", "number", "descriptor that CRIU writes to when it serves pages"),
            Flag("page-server", "text", "ADDRESS:PORT to send pages to"),
        ),
        Verb(
            "restore",
            f"{_HERE}.checkpoint:restore",
            "make a container from such files",
            "ID",
            (1, 1),
            *_CRIU,
            _BUNDLE,
            _DETACH,
            _PID_FILE,
            _CONSOLE,
            _NO_SUBREAPER,
            Flag("no-pivot", "switch", "enter the root by chroot"),
            Flag("lsm-profile", "text", "TYPE:NAME to restore with"),
            Flag("lsm-mount-context", "text", "SELinux label of the mounts to restore with"),
        ),
        Verb("explain", "", "show the plan of a bundle, step by step; nothing is done", "BUNDLE", (0, -1)),
        Verb("diff", "", "say what isolates two bundles differently", "BUNDLE_A BUNDLE_B", (0, -1)),
        Verb("isolation", "", "compare a running container's isolation with what was asked", "ID", (0, -1)),
    )
}


def help_text(verb: Verb | None = None) -> str:
    """Of one command, or of the program."""
    if verb is None:
        rows = [(name, known.help) for name, known in VERBS.items()]
        return (
            "NAME:\n   crio-oci - run containers as the Open Container Initiative specifies\n\n"
            "USAGE:\n   crio-oci [global options] COMMAND [options] [arguments]\n\n"
            f"COMMANDS:\n{_columns(rows)}\n\nGLOBAL OPTIONS:\n{_columns([_row(flag) for flag in GLOBAL])}\n"
        )
    text = f"NAME:\n   crio-oci {verb.name} - {verb.help}\n\nUSAGE:\n   crio-oci {verb.name}"
    text += (" [options]" if verb.flags else "") + (f" {verb.synopsis}" if verb.synopsis else "") + "\n"
    if verb.flags:
        text += f"\nOPTIONS:\n{_columns([_row(flag) for flag in verb.flags])}\n"
    return text


def _row(flag: Flag) -> tuple[str, str]:
    value = "" if flag.kind == "switch" else " value"
    return f"--{flag.name}{value}" + (f", -{flag.short}{value}" if flag.short else ""), flag.help


def _columns(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"   {name:{width}}{text}" for name, text in rows)
