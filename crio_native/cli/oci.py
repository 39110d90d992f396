"""`crio-oci`: the command line of the built-in executor as an OCI runtime, in runc's words.

Reads the line, finds the command, reports its error.  What the commands do is in `crio_native.oci.builtin.standalone`,
the flags are in its `verbs`.  Exit codes: the container's own for run and exec; 1 for an error, 255 for one of exec, 2
for one of diff, 3 for a command that there is not.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import os
import sys
from types import SimpleNamespace

from crio_native.cli import standard_streams
from crio_native.errors import CrioError, InvalidArgument
from crio_native.oci.builtin.standalone import archive, log, options, verbs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from crio_native.oci.builtin.standalone.verbs import Verb

ENTERING = ("create", "run", "exec", "restore")  # as in helpers/crio-oci.c
ERROR_CODES = {"exec": 255, "diff": 2}  # where 1 may be the command's own answer


def main(view: int = -1, archives: str = "") -> NoReturn:
    """Run the command line and end the process with its exit code.

    view: descriptor of the interpreter's read-only view, if this process was started from one.  archives: directory of
    the commands' modules as `archive` loads them; without it, they are imported as any other.
    """
    standard_streams.open_closed()  # for a start by the script that pip installs; helpers/crio-oci.c does the same
    code = command(sys.argv[1:], view, archives)
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            log.error(f"standard output cannot be written: {_words(error)}")
        code = code or 1
    os._exit(code)  # the interpreter's own way out tidies up what the kernel does at once


def command(arguments: Sequence[str], view: int = -1, archives: str = "") -> int:
    """The exit code of one command line; errors are reported."""
    given = SimpleNamespace()
    verb: Verb | None = None
    try:
        rest = options.parse(arguments, verbs.table(verbs.global_flags()), given, interspersed=False)
        if given.version:
            return _version()
        if not rest or rest[0] in ("help", "h"):
            verb = _verb(rest[1]) if len(rest) > 1 else None
            raise options.Help()
        verb = _verb(rest[0])
        _settle(given)
        given.command = verb.name
        given.arguments = options.parse(rest[1:], verbs.table(verb.flags), given, interspersed=verb.interspersed)
        least, most = verb.arguments
        if not least <= len(given.arguments) or 0 <= most < len(given.arguments):
            raise options.Usage(f"{verb.name!r} takes {_count(least, most)}, {len(given.arguments)} were given")
        module, _, function = verb.function.partition(":")
        if archives:
            archive.load(f"{archives}/{module}")
        if verb.name in ENTERING:
            from crio_native.oci.builtin.standalone import interpreter

            given.view = interpreter.protect(view)
            # As Ctrl-C does: what is half made is undone.
            _signal.signal(_signal.SIGTERM, _signal.default_int_handler)
            if _signal.getsignal(_signal.SIGHUP) == _signal.SIG_DFL:  # nohup(1) wants it ignored
                _signal.signal(_signal.SIGHUP, _signal.default_int_handler)
        package = __import__(f"{verb.package}.{module}", fromlist=[function])
        code: int = getattr(package, function)(given)
        return code
    except options.Help:
        sys.stdout.write(verbs.help_text(verb))
        return 0
    except options.Usage as error:
        log.error(f"{error}; see crio-oci help{f' {verb.name}' if verb is not None else ''}")
        if isinstance(error, options.NoSuchCommand):
            return 3
        return 2 if verb is not None and verb.name == "diff" else 1
    except KeyboardInterrupt:
        log.error("interrupted")
    except CrioError as error:
        log.error(str(error))
    except OSError as error:
        if not (isinstance(error, BrokenPipeError) and _nobody_reads()):
            log.error(_words(error))
    except Exception as error:  # a fault of ours: engines want one line, and --debug has the rest
        log.error(f"internal error: {type(error).__name__}: {error}")
        if given.debug:
            raise
    return ERROR_CODES.get(verb.name, 1) if verb is not None else 1


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has seen enough."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _verb(name: str) -> Verb:
    try:
        return verbs.Verb(name)
    except KeyError:
        raise options.NoSuchCommand(f"no such command: {name!r}") from None


def _settle(given: SimpleNamespace) -> None:
    """The global flags' values, checked, with their defaults."""
    log.configure(given)
    if given.criu:
        log.warning("--criu is ignored: CRIU is the `criu` in $PATH")
    if given.systemd_cgroup:
        given.cgroup_manager = "systemd"
    given.cgroup_manager = given.cgroup_manager or "cgroupfs"
    if given.cgroup_manager not in ("cgroupfs", "systemd", "disabled"):
        raise InvalidArgument("--cgroup-manager", given.cgroup_manager, "must be cgroupfs, systemd or disabled")
    if given.rootless not in ("", "true", "false", "auto"):
        raise InvalidArgument("--rootless", given.rootless, "must be true, false or auto")
    given.rootless = given.rootless == "true" or (given.rootless != "false" and os.geteuid() != 0)
    root = verbs.DEFAULT_ROOT
    if os.geteuid() != 0 and os.environ.get("XDG_RUNTIME_DIR"):
        root = os.environ["XDG_RUNTIME_DIR"] + "/crio-oci"
    given.root = os.path.abspath(given.root or root)


def _count(least: int, most: int) -> str:
    if most < 0:
        return f"at least {least} argument{'s' if least != 1 else ''}"
    return f"{least} argument{'s' if least != 1 else ''}" if least == most else f"{least} to {most} arguments"


def _version() -> int:
    from crio_native import __version__
    from crio_native.oci.builtin.standalone.show import OCI_VERSION

    print(f"crio-oci version {__version__}\nspec: {OCI_VERSION}")
    return 0


def _words(error: OSError) -> str:
    text = (error.strerror or str(error)).lower()
    return f"{os.fsdecode(error.filename)}: {text}" if error.filename else text


if __name__ == "__main__":
    main()
