"""crioctl, the CRI client for people: the group of commands, and how it ends.

It speaks only CRI over a unix socket, so it works with any CRI runtime on the same node.  Exit codes: a container's
own from `run` and `exec`; else 0, 1 after an error (one line on stderr), 2 for a wrong command line, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys

import click

from crio_native import __version__
from crio_native.cli import standard_streams
from crio_native.cli.ctl import containers, images, interactive, isolation, node, parse, run, show, usage
from crio_native.cli.ctl.client import Client
from crio_native.errors import CrioError

DEFAULT_SOCKET = "unix:///var/run/crio/crio.sock"
SOCKET_VARIABLES = ["CRIO_NATIVE_SOCKET", "CONTAINER_RUNTIME_ENDPOINT"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "-r",
    "--socket",
    type=parse.Parsed("PATH", parse.socket),
    envvar=SOCKET_VARIABLES,
    default=DEFAULT_SOCKET,
    show_default=True,
    show_envvar=True,
    metavar="PATH",
    help="The runtime's CRI socket.",
)
@click.option(
    "--timeout",
    type=parse.Seconds(0.1, 86400),
    default=60.0,
    show_default=True,
    help="Seconds that a call may take beyond the time its own work is given; pulls have no limit.",
)
@click.version_option(__version__, prog_name="crioctl")
@click.pass_context
def cli(context: click.Context, socket: str, timeout: float) -> None:
    """Run and look at pods, containers and images through a CRI socket.

    Containers and pods are named by id, by an unambiguous beginning of an id, or by name (POD/CONTAINER,
    NAMESPACE/POD).
    """
    context.obj = Client(socket, timeout)
    context.call_on_close(context.obj.close)


for command in (
    run.run,
    containers.pods,
    containers.ps,
    containers.start,
    containers.stop,
    containers.rm,
    interactive.exec_,
    interactive.attach,
    interactive.port_forward,
    containers.checkpoint,
    containers.logs,
    containers.inspect,
    isolation.isolation,
    images.images,
    images.pull,
    images.load,
    images.save,
    images.rmi,
    usage.stats,
    usage.update,
    node.version,
    node.info,
    node.events,
):
    cli.add_command(command)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """The entry point.  Always leaves by SystemExit."""
    standard_streams.open_closed()
    # A terminated `run` stops and removes what it made, as after Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        code = cli.main(arguments, prog_name="crioctl", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        show.note(f"{error.format_message().rstrip('.')}; see {context.command_path if context else 'crioctl'} --help")
        code = 2 if isinstance(error, click.UsageError) else 1
    except CrioError as error:
        show.note(str(error))
        code = 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail again
        code = 1  # click ends so, too, when the pipe closes earlier
    except UnicodeEncodeError:
        show.note("the command line is not UTF-8, which the CRI's strings are")
        code = 2
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        show.note(f"{error.filename}: {words}" if error.filename else words)
        code = 1
    except (KeyboardInterrupt, click.Abort):
        code = 128 + signal.SIGINT
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
