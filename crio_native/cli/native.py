"""`crio-native`: the daemon and its own verbs.

Here belong the flags (made from the configuration's schema), the verbs and their output.  Nothing heavy is imported
before `daemon.main` runs: it starts the launchers, and they must be started by a process without threads.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from crio_native import __version__
from crio_native.cli import standard_streams
from crio_native.config import Config, Loaded, load
from crio_native.config.render import to_toml
from crio_native.config.schema import Option, members
from crio_native.errors import CrioError, Unavailable, printable

SHORT = {"root": "-r", "storage_driver": "-s", "log_level": "-l"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where this run's configuration comes from."""

    path: Path | None
    directory: Path | None
    overrides: Mapping[str, Any]
    variables: Mapping[str, str]

    def load(self) -> Config:
        """The configuration; what is odd about it goes to stderr."""
        return self._load().config

    def load_to_serve(self) -> Config:
        """The same, once the files that it names have been looked at."""
        from crio_native import named_files

        loaded = self._load()
        named_files.check(loaded)
        return loaded.config

    def _load(self) -> Loaded:
        loaded: Loaded = load(self.path, self.directory, self.overrides, self.variables)
        for warning in loaded.warnings:
            click.echo(f"warning: {warning}", err=True)
        return loaded


class Program(click.Group):
    """A group whose failures are one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standard_streams.open_closed()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            words = (error.strerror or str(error)).lower()
            click.echo(f"Error: {error.filename}: {words}" if error.filename else f"Error: {words}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CrioError as error:
            raise click.ClickException(str(error)) from None


def configuration_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for each option, and a CONTAINER_ variable of the environment, named as CRI-O's."""
    for key, option in reversed(all_options()):
        command = _flag(key, option)(command)
    return command


def all_options() -> list[tuple[str, Option]]:
    """Every option by its key, but for those of tables that the operator names."""
    found = []
    for table, cls in members(Config).items():
        at = "crio" if table == "crio" else f"crio.{table}"
        options = members(cls).items()  # type: ignore[arg-type]  # Config has no options and no named tables
        found += [(f"{at}.{name}", option) for name, option in options if isinstance(option, Option)]
    return found


def _flag(key: str, option: Option) -> Callable[..., Any]:
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
        envvar="CONTAINER_" + flag.replace("-", "_").upper(),
        help=option.doc,
        hidden=bool(option.deprecated),
        **kind,
    )


def _variables(ctx: click.Context) -> dict[str, str]:
    """The variable of the environment by the key of each option that has its value from there."""
    return {
        str(parameter.name).replace("__", "."): str(parameter.envvar)
        for parameter in ctx.command.params
        if ctx.get_parameter_source(str(parameter.name)) is ParameterSource.ENVIRONMENT
    }


def _overrides(flags: Mapping[str, Any]) -> dict[str, Any]:
    given = {name.replace("__", "."): value for name, value in flags.items() if value not in (None, ())}
    return {
        key: [part for item in value for part in item.split(",")] if isinstance(value, tuple) else value
        for key, value in given.items()
    }


@click.group(cls=Program, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "-c", "path", type=click.Path(path_type=Path), envvar="CONTAINER_CONFIG", help="Configuration file."
)
@click.option(
    "--config-dir",
    "-d",
    "directory",
    type=click.Path(path_type=Path),
    envvar="CONTAINER_CONFIG_DIR",
    help="Directory of files that are read after it, in lexical order.",
)
@configuration_flags
@click.version_option(__version__, "--version", "-v", prog_name="crio-native")
@click.pass_context
def main(ctx: click.Context, /, path: Path | None, directory: Path | None, **flags: Any) -> None:
    """Run Kubernetes pods: serve the CRI to a kubelet, on the socket of --listen.

    Every flag is an option of crio.conf and wins over it; a list's flag may be repeated, or hold commas.
    """
    ctx.obj = Source(path, directory, _overrides(flags), _variables(ctx))
    if ctx.invoked_subcommand is None:
        ctx.invoke(serve)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise click.ClickException("must run as root: it makes namespaces, mounts and cgroups")


@main.command()
@click.pass_obj
def serve(source: Source) -> None:
    """Run the daemon in the foreground (the default)."""
    _require_root()
    config = source.load_to_serve()
    from crio_native import daemon

    sys.exit(daemon.main(config, read=source.load_to_serve))


@main.command("config")
@click.option("--default", is_flag=True, help="The defaults, whatever the files say.")
@click.option("--changed", is_flag=True, help="Only what differs from the defaults, without comments.")
@click.pass_obj
def show_config(source: Source, default: bool, changed: bool) -> None:
    """Print the configuration in force as TOML; options at their default are commented out."""
    config = Config() if default else source.load()
    click.echo(to_toml(config, changed_only=changed), nl=False)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def version(as_json: bool) -> None:
    """Print the version of the program and of what it runs on."""
    facts = {
        "version": __version__,
        "cri": "v1",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo("\n".join(f"{name + ':':<9}{value}" for name, value in facts.items()))


@main.command()
@click.argument("what", type=click.Choice(["info", "config"]), default="info")
@click.option("--socket", help="CRI socket of the daemon; without it that of the configuration.")
@click.option("--timeout", type=click.FloatRange(0.1, 600), default=10.0, show_default=True, help="Seconds to wait.")
@click.pass_obj
def status(source: Source, what: str, socket: str | None, timeout: float) -> None:
    """Ask the running daemon for its state, or for the configuration that it runs with."""
    path = socket or source.load().api.listen
    answer = _status(path.removeprefix("unix://"), timeout)
    if what == "config":
        if "toml" not in answer.info:
            raise click.ClickException(f"the daemon on {path} does not tell its configuration")
        click.echo(answer.info["toml"], nl=False)
        return
    for condition in answer.status.conditions:
        state = "yes" if condition.status else f"no: {condition.reason} {condition.message}".rstrip()
        click.echo(f"{condition.type}: {state}")
    for line in _handler_lines(json.loads(answer.info.get("handlers", "{}"))):
        click.echo(line)
    for name, value in sorted(answer.info.items()):
        if name not in ("config", "toml", "handlers"):
            click.echo(f"{name}: {value}")


def _handler_lines(handlers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each runtime handler: what makes its containers, and what that can do, or why it cannot run."""
    lines = []
    for name, told in sorted(handlers.items()):
        can = {
            "recursive read-only mounts": told["recursiveReadOnlyMounts"],
            "user namespaces": told["userNamespaces"],
        }
        words = ", ".join([word for word, true in can.items() if true] or ["no features told"])
        state = f"cannot run: {told['problem']}" if told["problem"] else f"{told['version']}; {words}"
        lines.append(f"handler {name} ({told['type']}{', ' + told['program'] if told['program'] else ''}): {state}")
    return lines


def _status(path: str, timeout: float) -> Any:
    import grpc

    from crio_native.api.runtime.v1 import api_pb2, api_pb2_grpc

    with grpc.insecure_channel(f"unix://{path}") as channel:
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        try:
            return stub.Status(api_pb2.StatusRequest(verbose=True), timeout=timeout)
        except grpc.RpcError as error:
            raise Unavailable(f"the daemon on {path} did not answer: {error.details()}") from None


@main.command()
@click.option("--force", "-f", is_flag=True, help="All pods and all images, whatever the version files say.")
@click.pass_obj
def wipe(source: Source, force: bool) -> None:
    """Remove pods of an earlier boot, and images of an older version; the daemon must not run.

    What the daemon does by itself at its start, unless internal_wipe is off.
    """
    _require_root()
    config = source.load()
    from crio_native import wiping

    pods, images = wiping.wipe(config, force=force)
    click.echo(f"removed {pods} pods and {images} images")


@main.command()
@click.option("--images", is_flag=True, help="Look at the files of every image, too; the daemon must not run.")
@click.option(
    "--repair", is_flag=True, help="As --images; remove images with damaged layers, so that they are pulled anew."
)
@click.pass_obj
def check(source: Source, images: bool, repair: bool) -> None:
    """Look whether this host has what the daemon needs; exit with 1 if something is missing, or damage is left."""
    _require_root()
    config = source.load()
    from crio_native.cli import host

    findings = host.examine(config)
    for finding in findings:
        click.echo(printable(f"{finding.state:<9}{finding.subject}: {finding.detail}"))
    damaged = _examine_images(config, repair=repair) if images or repair else False
    if damaged or any(finding.state == host.MISSING for finding in findings):
        raise click.exceptions.Exit(1)


def _examine_images(config: Config, *, repair: bool) -> bool:
    """Whether damage is left."""
    from crio_native import repairing

    damage, left = repairing.examine(config, repair=repair)
    for found in damage:
        click.echo(printable(f"damaged  {found}"))
    for reason in left:
        click.echo(printable(f"left     {reason}"))
    if not damage:
        click.echo("ok       images: every layer has its files")
    return bool(left) if repair else bool(damage)


if __name__ == "__main__":
    main()
