"""Reading the command line: flags in Go's and GNU's form, before and after the arguments, as runc's users write them.

Not a library's work, because argparse and click take longer to import than a container takes to make.  Which flags
there are is data, in `verbs`.
"""

from __future__ import annotations

from crio_native.errors import CrioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import SimpleNamespace

    from crio_native.oci.builtin.standalone.verbs import Flag

MAX_REPEATED = 4096  # values of one flag that may be repeated


class Usage(CrioError):
    """The command line itself is wrong; shown with where the help of what was called is."""


class NoSuchCommand(Usage):
    """There is no command of that name."""


class Help(CrioError):
    """--help was asked for."""


def parse(
    arguments: Sequence[str], flags: Mapping[str, Flag], into: SimpleNamespace, *, interspersed: bool = True
) -> list[str]:
    """Set the flags' values in `into` (names with underscores) and return the other arguments.

    interspersed: flags may follow arguments; else the first argument ends them (a command with its own flags follows).
    Raises Usage, Help.
    """
    for name, flag in flags.items():
        if name == flag.name:
            setattr(into, flag.name.replace("-", "_"), flag.default())
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return others + rest
        if not argument.startswith("-") or argument == "-":
            others.append(argument)
            if not interspersed:
                return others + rest
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        if name in ("help", "h"):
            raise Help()
        if name not in flags:
            raise Usage(f"flag provided but not defined: {argument.partition('=')[0]}")
        flag = flags[name]
        if flag.takes_value and not equals:
            if not rest:
                raise Usage(f"flag needs an argument: {argument}")
            value = rest.pop(0)
        _store(into, flag, value if equals or flag.takes_value else "true")
    return others


def _store(into: SimpleNamespace, flag: Flag, value: str) -> None:
    field = flag.name.replace("-", "_")
    if flag.kind == "list":
        values = getattr(into, field)
        if len(values) >= MAX_REPEATED:
            raise Usage(f"flag --{flag.name} may be given at most {MAX_REPEATED} times")
        values.append(value)
        return
    setattr(into, field, _converted(flag, value))


def _converted(flag: Flag, value: str) -> object:
    if flag.kind == "switch":
        if value.lower() not in ("true", "false", "1", "0", "t", "f"):
            raise Usage(f"invalid boolean value {value!r} for --{flag.name}")
        return value.lower() in ("true", "1", "t")
    if flag.kind == "number":
        try:
            return int(value, 0)
        except ValueError:
            raise Usage(f"invalid value {value!r} for flag --{flag.name}: must be a whole number") from None
    return value
