"""The flags of `crio-native`: one for each option of the configuration's schema, spelt as CRI-O's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from crio_native.config import Config
from crio_native.config.schema import Option, members

SHORT = {"root": "-r", "storage_driver": "-s", "log_level": "-l", "timezone": "--tz"}
_STDERR = "the log goes to standard error, as text"
_PROFILER = "it is for the profiler of Go programs"
WITHOUT_EFFECT: Mapping[str, tuple[type, str]] = {
    "log": (str, _STDERR),
    "log-format": (str, _STDERR),
    "runtimes": (str, "write a table [crio.runtime.runtimes.NAME] for each handler"),
    "profile": (bool, _PROFILER),
    "profile-port": (str, _PROFILER),
    "profile-cpu": (str, _PROFILER),
    "profile-mem": (str, _PROFILER),
    "enable-profile-unix-socket": (bool, _PROFILER),
}
"""Flags of CRI-O's program that are no options of its files: the value's type, and why nothing follows from it here."""

# Go's strconv.ParseBool.
_BOOLEANS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "FALSE", "false", "False"), False
)


def configuration_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for each option, and a CONTAINER_ variable of the environment, named as CRI-O's."""
    return _flags(command, everywhere=True)


def repeated_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same flags behind a verb: without the variables, which count once, and not in its help."""
    return _flags(command, everywhere=False)


def _flags(command: Callable[..., Any], everywhere: bool) -> Callable[..., Any]:
    for name, (kind, reason) in WITHOUT_EFFECT.items():
        command = _without_effect(name, kind, reason)(command)
    for key, option in reversed(all_options()):
        command = _flag(key, option, everywhere)(command)
    for name, short, parameter, words in (
        ("config-dir", "-d", "directory", "Directory of files that are read after it, in lexical order."),
        ("config", "-c", "path", "Configuration file."),
    ):
        command = click.option(
            f"--{name}",
            short,
            parameter,
            type=click.Path(path_type=Path),
            envvar=_variable(name) if everywhere else None,
            help=words,
            hidden=not everywhere,
        )(command)
    return command


def all_options() -> list[tuple[str, Option]]:
    """Every option by its key, but for those of tables that the operator names."""
    found = []
    for table, cls in members(Config).items():
        at = "crio" if table == "crio" else f"crio.{table}"
        options = members(cls).items()  # type: ignore[arg-type]  # Config has no options and no named tables
        found += [(f"{at}.{name}", option) for name, option in options if isinstance(option, Option)]
    return found


def _flag(key: str, option: Option, everywhere: bool) -> Callable[..., Any]:
    name = key.rpartition(".")[2]
    flag = option.flag or name.replace("_", "-")
    kind: dict[str, Any] = {"type": option.kind.toml}
    if option.kind.toml is bool:
        kind = {"type": bool, "is_flag": True}
    elif option.kind.toml is list:
        kind = {"type": str, "multiple": True}
    spelling = f"--{flag}/--no-{flag}" if option.kind.toml is bool else f"--{flag}"
    return click.option(
        *filter(None, (SHORT.get(name), spelling, key.replace(".", "__"))),
        default=None,
        envvar=_variable(flag) if everywhere else None,
        help=option.doc,
        hidden=bool(option.deprecated) or not everywhere,
        **kind,
    )


def _variable(flag: str) -> str:
    return "CONTAINER_" + flag.replace("-", "_").upper()


def _without_effect(name: str, kind: type, reason: str) -> Callable[..., Any]:
    def warn(ctx: click.Context, parameter: click.Parameter, _: object) -> None:
        if ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
            click.echo(f"warning: command line: --{name} has no effect: {reason}", err=True)

    shape: dict[str, Any] = {"is_flag": True} if kind is bool else {"multiple": True}
    return click.option(f"--{name}", expose_value=False, hidden=True, callback=warn, **shape)


def without_go_booleans(arguments: Sequence[str], commands: Sequence[click.Command]) -> list[str]:
    """The command line with `--flag=true` and `--flag=false`, as Go has it, in click's spelling.

    Raises click.UsageError for another value.
    """
    options = [each for command in commands for each in command.params if isinstance(each, click.Option)]
    negations = {name: each.secondary_opts[:1] for each in options if each.is_bool_flag for name in each.opts}
    return [word for argument in arguments for word in _plain(argument, negations)]


def _plain(argument: str, negations: Mapping[str, Sequence[str]]) -> Sequence[str]:
    name, equals, value = argument.partition("=")
    if not equals or name not in negations:
        return [argument]
    if value not in _BOOLEANS:
        raise click.UsageError(f"{name}: must be true or false (got {value!r})")
    return [name] if _BOOLEANS[value] else negations[name]


def variables(ctx: click.Context) -> dict[str, str]:
    """The variable of the environment by the key of each option that has its value from there."""
    return {
        str(parameter.name).replace("__", "."): str(parameter.envvar)
        for parameter in ctx.command.params
        if ctx.get_parameter_source(str(parameter.name)) is ParameterSource.ENVIRONMENT
    }


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """TOML values by dotted key, of click's parameters."""
    values = {name.replace("__", "."): value for name, value in given.items() if value not in (None, ())}
    return {
        key: [part for item in value for part in item.split(",")] if isinstance(value, tuple) else value
        for key, value in values.items()
    }
