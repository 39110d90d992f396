"""The commands of `crio-oci`, their flags and their help: data, and the text that is made of it.

A function is named as "module:function", in `Verb.package`, and imported when its command is called; it takes the
parsed options (with `command`, `arguments` and the global flags) and returns the exit code.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


DEFAULT_ROOT = "/run/crio-oci"
LABORATORY = ("explain", "diff", "isolation")  # which engines never call


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

    def __init__(self, name: str) -> None:
        """Raises KeyError for a command that there is not."""
        self.name = name
        self.function, self.help, self.synopsis, self.arguments, *flags = _VERBS[name]
        self.flags = tuple(Flag(*flag) for flag in flags)

    @property
    def package(self) -> str:
        return "crio_native.cli" if self.name in LABORATORY else "crio_native.oci.builtin.standalone"

    @property
    def interspersed(self) -> bool:
        return self.name not in ("exec", "ps")  # whose arguments are another command's, with flags of its own


def global_flags() -> tuple[Flag, ...]:
    return tuple(Flag(*flag) for flag in _GLOBAL)


def table(flags: tuple[Flag, ...]) -> Mapping[str, Flag]:
    """Flags by long and short name."""
    return {name: flag for flag in flags for name in (flag.name, flag.short) if name}


# Tuples, of which objects are made for the command that is called: they are there when the module is read.
_GLOBAL = (
    ("root", "text", f"directory of the containers' states (default: {DEFAULT_ROOT})"),
    ("log", "text", "file that errors and warnings are appended to (default: standard error)"),
    ("log-format", "text", "text or json (default: text)"),
    ("log-level", "text", "debug, info, warning or error (default: info)"),
    ("debug", "switch", "log what is done"),
    ("systemd-cgroup", "switch", "let systemd make the cgroups; cgroupsPath has the form slice:prefix:name"),
    ("cgroup-manager", "text", "cgroupfs, systemd or disabled (default: cgroupfs)"),
    ("rootless", "text", "true, false or auto: do without what an unprivileged user cannot have (default: auto)"),
    ("criu", "text", "as runc had it: ignored, for CRIU is the `criu` in $PATH"),
    ("trace", "text", "write each step of create, run and exec to this file, as JSON lines"),
    ("fail", "text", "let a step of create, run or exec fail: STEP, STEP=ERRNO or STEP#2=ERRNO"),
    ("version", "switch", "print the version", "v"),
)

_BUNDLE = ("bundle", "text", "directory with config.json (default: the current one)", "b")
_CONSOLE = ("console-socket", "text", "unix socket that the terminal's master is sent to")
_PIDFD = ("pidfd-socket", "text", "unix socket that a pidfd of the process is sent to")
_PID_FILE = ("pid-file", "text", "file to write the process id to")
_DETACH = ("detach", "switch", "do not wait for the process's end", "d")
_PRESERVE = (
    "preserve-fds",
    "number",
    "pass on this many descriptors from 3 on, after sockets to listen on ($LISTEN_FDS)",
)
_VARIANTS = (
    ("no-pivot", "switch", "enter the root by chroot: for a root file system in an initramfs"),
    ("no-new-keyring", "switch", "share the session keyring of the caller"),
)
_MAKING = (
    _BUNDLE,
    ("config", "text", "file to read instead of the bundle's config.json"),
    _CONSOLE,
    _PIDFD,
    _PID_FILE,
    *_VARIANTS,
    _PRESERVE,
)
_NO_SUBREAPER = ("no-subreaper", "switch", "do not reap the container's orphans")
_FORMAT = ("format", "text", "table or json (default: table)", "f")
_JSON = ("json", "switch", "for programs")
_CRIU = (
    ("image-path", "text", "directory of the checkpoint (default: ./checkpoint)"),
    ("work-path", "text", "directory of CRIU's log (default: the image directory)"),
    ("tcp-established", "switch", "allow open TCP connections"),
    ("ext-unix-sk", "switch", "allow unix sockets connected to the outside"),
    ("shell-job", "switch", "allow a terminal of the caller's"),
    ("file-locks", "switch", "allow file locks"),
    ("manage-cgroups-mode", "text", "soft, full, strict or ignore (default: soft)"),
    ("empty-ns", "text", "network: make the namespace, restore nothing in it"),
    ("auto-dedup", "switch", "remove what a newer image has"),
    ("lazy-pages", "switch", "move memory when it is touched"),
)

_VERBS: dict[str, tuple[Any, ...]] = {
    "create": ("create:create", "make a container up to its command", "ID", (1, 1), *_MAKING),
    "start": ("control:start", "let a created container's command run", "ID", (1, 1)),
    "run": (
        "create:run",
        "create, start, and wait for the end",
        "ID",
        (1, 1),
        *_MAKING,
        _DETACH,
        ("keep", "switch", "do not delete the container when it has ended"),
        _NO_SUBREAPER,
    ),
    "exec": (
        "exec:exec_",
        "run another process in a running container",
        "ID COMMAND [ARG...]",
        (1, -1),
        _CONSOLE,
        _PIDFD,
        ("cwd", "text", "working directory in the container"),
        ("env", "list", "NAME=VALUE; may be repeated", "e"),
        ("tty", "switch", "give the process a terminal", "t"),
        ("user", "text", "UID or UID:GID", "u"),
        ("additional-gids", "list", "supplementary group, a number; may be repeated", "g"),
        ("process", "text", "file with the process object; the other flags change it", "p"),
        _DETACH,
        _PID_FILE,
        ("process-label", "text", "SELinux label of the process"),
        ("apparmor", "text", "AppArmor profile of the process"),
        ("no-new-privs", "switch", "the process can gain no privileges"),
        ("cap", "list", "give the process this capability too; may be repeated", "c"),
        _PRESERVE,
        ("cgroup", "list", "run in this group below the container's: [CONTROLLER:]PATH"),
        ("ignore-paused", "switch", "start it in a paused container, where it will wait"),
    ),
    "kill": (
        "control:kill",
        "send a signal (default: TERM) to the container's first process",
        "ID [SIGNAL]",
        (1, 2),
        ("all", "switch", "send it to every process of the container", "a"),
    ),
    "delete": (
        "control:delete",
        "remove what is left of a stopped container",
        "ID",
        (1, 1),
        ("force", "switch", "kill it first where it lives", "f"),
        ("regex", "switch", "ID is a regular expression: remove all containers that it is found in"),
    ),
    "pause": ("control:pause", "stop all processes of a container", "ID", (1, 1)),
    "resume": ("control:resume", "let them go on", "ID", (1, 1)),
    "state": ("control:state_", "print a container's state as JSON", "ID", (1, 1)),
    "list": (
        "show:list_",
        "list the containers below --root",
        "",
        (0, 0),
        _FORMAT,
        ("quiet", "switch", "only their ids", "q"),
    ),
    "ps": ("resources:ps", "show a container's processes", "ID [PS-OPTIONS...]", (1, -1), _FORMAT),
    "update": (
        "resources:update",
        "change a live container's limits",
        "ID",
        (1, 1),
        ("resources", "text", "file with a linux.resources object, or - ; other flags are not read then", "r"),
        ("blkio-weight", "number", "weight of block I/O, 10 to 1000"),
        ("cpu-period", "number", "microseconds in which cpu-quota may be used"),
        ("cpu-quota", "number", "microseconds of CPU time in each period; -1: no limit"),
        ("cpu-burst", "number", "microseconds that may be saved up beyond the quota"),
        ("cpu-share", "number", "relative weight, 2 to 262144"),
        ("cpu-rt-period", "number", "microseconds in which cpu-rt-runtime may be used"),
        ("cpu-rt-runtime", "number", "microseconds of real-time CPU time in each period"),
        ("cpu-idle", "number", "1: run when nobody else wants to"),
        ("cpuset-cpus", "text", "CPUs to use, as in 0-3,7"),
        ("cpuset-mems", "text", "memory nodes to use"),
        ("memory", "text", "bytes of memory; -1: no limit"),
        ("memory-reservation", "text", "bytes of memory that are kept for it"),
        ("memory-swap", "text", "bytes of memory and swap together; -1: no limit"),
        ("kernel-memory", "text", "not limited apart any more: a warning"),
        ("kernel-memory-tcp", "text", "not limited apart any more: a warning"),
        ("pids-limit", "number", "processes and threads; -1: no limit"),
        ("l3-cache-schema", "text", "Intel RDT: L3 cache schema"),
        ("mem-bw-schema", "text", "Intel RDT: memory bandwidth schema"),
    ),
    "events": (
        "resources:events",
        "print statistics, and when memory ran out, as JSON lines",
        "ID",
        (1, 1),
        ("interval", "text", "time between statistics, as in 5s (default) or 500ms"),
        ("stats", "switch", "print statistics once"),
    ),
    "features": ("show:features", "print what this build can do here, as JSON", "", (0, 0)),
    "spec": (
        "show:spec",
        "write a config.json to start from",
        "",
        (0, 0),
        _BUNDLE,
        ("rootless", "switch", "for an unprivileged user"),
    ),
    "checkpoint": (
        "checkpoint:checkpoint",
        "save a running container to files",
        "ID",
        (1, 1),
        *_CRIU,
        ("parent-path", "text", "earlier checkpoint that this one adds to"),
        ("leave-running", "switch", "let the container go on"),
        ("pre-dump", "switch", "save memory only, and let it go on"),
        ("status-fd", "number", "descriptor that CRIU writes to when it serves pages"),
        ("page-server", "text", "ADDRESS:PORT to send pages to"),
    ),
    "restore": (
        "checkpoint:restore",
        "make a container from such files",
        "ID",
        (1, 1),
        *_CRIU,
        _BUNDLE,
        _DETACH,
        _PID_FILE,
        _CONSOLE,
        _NO_SUBREAPER,
        ("no-pivot", "switch", "enter the root by chroot"),
        ("lsm-profile", "text", "TYPE:NAME to restore with"),
        ("lsm-mount-context", "text", "SELinux label of the mounts to restore with"),
    ),
    "explain": (
        "lab:explain",
        "show the plan of a bundle, step by step; nothing is done",
        "[BUNDLE]",
        (0, 1),
        ("id", "text", "the id that the container will have, which its group is named by (default: ID)"),
        *_VARIANTS,
        _JSON,
    ),
    "diff": (
        "lab:diff",
        "say what isolates two bundles differently; exit with 1 when something does, with 2 for an error",
        "BUNDLE_A BUNDLE_B",
        (2, 2),
        _JSON,
    ),
    "isolation": (
        "lab:isolation",
        "compare a running container's isolation with what was asked; exit with 1 when something is weaker",
        "[ID]",
        (0, 1),
        ("pid", "number", "any process, instead of ID"),
        ("config", "text", "config.json, or its directory, to compare --pid with"),
        _JSON,
    ),
}


def help_text(verb: Verb | None = None) -> str:
    """Of one command, or of the program."""
    if verb is None:
        rows = [(name, known.help) for name, known in ((name, Verb(name)) for name in _VERBS)]
        return (
            "NAME:\n   crio-oci - run containers as the Open Container Initiative specifies\n\n"
            "USAGE:\n   crio-oci [global options] COMMAND [options] [arguments]\n\n"
            f"COMMANDS:\n{_columns(rows)}\n\nGLOBAL OPTIONS:\n{_columns([_row(flag) for flag in global_flags()])}\n"
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
