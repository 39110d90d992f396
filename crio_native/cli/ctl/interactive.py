"""The commands that talk to a container or a pod while it runs: exec, attach, port-forward."""

from __future__ import annotations

import os
import socket
import sys

import click

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import parse, show
from crio_native.cli.ctl.client import Client
from crio_native.cli.ctl.find import Node
from crio_native.cli.ctl.streams import Command, Forwarding, Streams

interactive_option = click.option("-i", "--interactive", is_flag=True, help="Send our stdin.")
tty_option = click.option("-t", "--tty", is_flag=True, help="The command has a terminal.")


def streams_of(interactive: bool, tty: bool) -> Streams:
    """Raises click.UsageError when a terminal is wanted and our own stdin is none."""
    if interactive and tty and not os.isatty(0):
        raise click.UsageError("-t with -i needs a terminal on stdin: leave out -t")
    return Streams(stdin=interactive, terminal=tty)


@click.command("exec", context_settings={"allow_interspersed_args": False})
@interactive_option
@tty_option
@click.option(
    "--timeout",
    type=click.IntRange(1),
    help="Kill the command after so many seconds.  Its output comes when it has ended, and there is no input.",
)
@click.argument("container")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def exec_(
    client: Client, interactive: bool, tty: bool, timeout: int | None, container: str, command: tuple[str, ...]
) -> None:
    """Run COMMAND in a running container and exit with its exit code."""
    if timeout and (interactive or tty):
        raise click.UsageError("--timeout excludes -i and -t")
    streams = streams_of(interactive, tty)
    found = Node.read(client).container(container)
    if timeout:
        sys.exit(_exec_sync(client, found.id, command, timeout))
    request = api.ExecRequest(
        container_id=found.id, cmd=command, stdin=interactive, stdout=True, stderr=not tty, tty=tty
    )
    sys.exit(Command(client.call(request).url, streams).run())


def _exec_sync(client: Client, container_id: str, command: tuple[str, ...], timeout: int) -> int:
    request = api.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
    answer = client.call(request, grant=timeout)
    for stream, data in ((sys.stdout, answer.stdout), (sys.stderr, answer.stderr)):
        stream.buffer.write(data)
        stream.flush()
    return int(answer.exit_code)


@click.command()
@interactive_option
@tty_option
@click.argument("container")
@click.pass_obj
def attach(client: Client, interactive: bool, tty: bool, container: str) -> None:
    """Show what a running container writes from now on, until it ends; with -i, write to its input.

    -t is for containers that were made with a terminal.  Ctrl-C ends the attachment, not the container (with -t it
    goes to the container).
    """
    streams = streams_of(interactive, tty)
    session(client, Node.read(client).container(container).id, streams).run()


def session(client: Client, container_id: str, streams: Streams) -> Command:
    """An attachment."""
    request = api.AttachRequest(
        container_id=container_id,
        stdin=streams.stdin,
        stdout=True,
        stderr=not streams.terminal,
        tty=streams.terminal,
    )
    return Command(client.call(request).url, streams)


@click.command("port-forward")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address of this node to listen on.")
@click.argument("pod")
@click.argument(
    "port", nargs=-1, required=True, type=parse.Parsed("[LOCAL:]REMOTE", parse.forward), metavar="[LOCAL:]REMOTE..."
)
@click.pass_obj
def port_forward(client: Client, address: str, pod: str, port: tuple[tuple[int, int], ...]) -> None:
    """Lead connections to ports of this node to ports in a pod, until Ctrl-C.

    LOCAL is REMOTE where it is not given; 0 takes any free port.
    """
    found = Node.read(client).pod(pod)
    listeners = [(socket.create_server((address, local)), remote) for local, remote in port]
    forwarding = Forwarding(client.call(api.PortForwardRequest(pod_sandbox_id=found.id)).url, show.note)
    for listener, remote in listeners:
        click.echo(f"{address}:{listener.getsockname()[1]} -> {remote}")
    sys.stdout.flush()
    forwarding.serve(listeners)
