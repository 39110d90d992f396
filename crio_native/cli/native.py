"""`crio-native`: the daemon and its own verbs.

Here belong the verbs and their output; the flags are in `flags`.  Nothing heavy is imported before `daemon.main` runs:
it starts the launchers, and they must be started by a process without threads.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from crio_native import __version__
from crio_native.cli import flags, standard_streams
from crio_native.config import Config, Loaded, load, socket_anyway
from crio_native.config.render import to_toml
from crio_native.errors import CrioError, Unavailable, printable


@dataclass(frozen=True, slots=True)
class Source:
    """Where this run's configuration comes from."""

    path: Path | None
    directory: Path | None
    overrides: Mapping[str, Any]
    variables: Mapping[str, str]

    def under(self, path: Path | None, directory: Path | None, given: Mapping[str, Any]) -> Source:
        """The same with what flags behind the verb say."""
        overrides = flags.overrides(given)
        variables = {key: name for key, name in self.variables.items() if key not in overrides}
        return Source(path or self.path, directory or self.directory, {**self.overrides, **overrides}, variables)

    def socket(self) -> str:
        """Of the CRI, also where the configuration is wrong: the running daemon has another one, and is asked why."""
        try:
            return self.load().api.listen
        except CrioError as error:
            path = socket_anyway(self.path, self.directory, self.overrides)
            click.echo(f"warning: {error}; asking on {path}", err=True)
            return path

    def load(self) -> Config:
        """The configuration; what is odd about it goes to stderr."""
        return self.loaded().config

    def load_to_change(self) -> Config:
        """The same, once it is sure that its directories are ours."""
        return self._load_checked().config

    def load_to_serve(self) -> Config:
        """The same, once also the files that it names have been looked at."""
        from crio_native import foreign_storage, named_files

        loaded = self._load_checked()
        named_files.check(loaded)
        for warning in (*foreign_storage.warnings(loaded), *named_files.warnings(loaded)):
            click.echo(f"warning: {warning}", err=True)
        return loaded.config

    def _load_checked(self) -> Loaded:
        from crio_native import foreign_storage

        loaded = self.loaded()
        foreign_storage.check(loaded)
        return loaded

    def loaded(self) -> Loaded:
        """The same, with what is known of its files."""
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, flags.without_go_booleans(args, [self, *self.commands.values()]))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CrioError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Program, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@flags.configuration_flags
@click.version_option(__version__, "--version", "-v", prog_name="crio-native")
@click.pass_context
def main(ctx: click.Context, /, path: Path | None, directory: Path | None, **given: Any) -> None:
    """Run Kubernetes pods: serve the CRI to a kubelet, on the socket of --listen.

    Every flag is an option of crio.conf and wins over it; a list's flag may be repeated, or hold commas.
    """
    ctx.obj = Source(path, directory, flags.overrides(given), flags.variables(ctx))
    if ctx.invoked_subcommand is None:
        ctx.invoke(serve)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise click.ClickException("must run as root: it makes namespaces, mounts and cgroups")


@main.command()
@flags.repeated_flags
@click.pass_obj
def serve(source: Source, /, path: Path | None, directory: Path | None, **given: Any) -> None:
    """Run the daemon in the foreground (the default).  Takes the flags of `crio-native --help`."""
    _require_root()
    source = source.under(path, directory, given)
    config = source.load_to_serve()
    from crio_native import daemon

    sys.exit(daemon.main(config, read=source.load_to_serve))


@main.command("config")
@click.option("--default", is_flag=True, help="The defaults, whatever the files say.")
@click.option("--changed", is_flag=True, help="Only what differs from the defaults, without comments.")
@flags.repeated_flags
@click.pass_obj
def show_config(
    source: Source, /, default: bool, changed: bool, path: Path | None, directory: Path | None, **given: Any
) -> None:
    """Print the configuration in force as TOML; options at their default are commented out.

    Takes the flags of `crio-native --help`.
    """
    config = Config() if default else source.under(path, directory, given).load()
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
    path = socket or source.socket()
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

    What the daemon does by itself at its start, unless internal_wipe is off; run it before that start.
    """
    _require_root()
    config = source.load_to_change()
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
    loaded = source.loaded()
    from crio_native.cli import host

    findings = host.examine(loaded)
    for finding in findings:
        click.echo(printable(f"{finding.state:<9}{finding.subject}: {finding.detail}"))
    damaged = _examine_images(loaded.config, repair=repair) if images or repair else False
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
