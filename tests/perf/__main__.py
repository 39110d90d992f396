"""`make bench`: run the measurements, print the table, write build/bench.json.

python -m tests.perf [--rounds N] [--pods N] [run] [command] [exec] [monitor] [daemon] [sandboxes] [probes] [handlers]
                     [lists] [streaming] [pull]
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from crio_native.cli.scratch import ScratchDaemon
from crio_native.errors import CrioError
from crio_native.linux.cgroup import Cgroup
from crio_native.oci import seccomp_profile
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime
from tests.perf import command, containers, crowd, daemon, handlers, images, lists, probes, report, sandboxes, streaming
from tests.perf.host import in_memory, private_mounts
from tests.perf.peers import Bundle
from tests.perf.report import Result

EXECUTOR = ("run", "command", "volumes", "crowd", "exec", "monitor")
KINDS = (*EXECUTOR, "daemon", "sandboxes", "probes", "handlers", "lists", "streaming", "pull")
PULLS = 3  # rounds: each takes a minute
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)


@click.command()
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS))
@click.option("--rounds", default=100, show_default=True, help="Rounds of each timed comparison.")
@click.option("--pods", default=1000, show_default=True, help="Pods made and removed to see the daemon grow.")
def main(kinds: Sequence[str], rounds: int, pods: int) -> None:
    """Measure ours beside crun, runc and conmon; without KINDS, everything."""
    chosen = kinds or KINDS
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    console.print(
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors: much load blurs all that follows"
    )
    try:
        results = _measure(chosen, rounds, pods)
    except CrioError as error:
        raise click.ClickException(str(error)) from error
    report.show(results, console)
    report.write(results)
    console.print(f"written: {report.BENCH_FILE}")


def _interrupt(number: int, frame: object) -> None:
    """Leave by way of every `finally`; a second signal must not cut that short."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _measure(chosen: Sequence[str], rounds: int, pods: int) -> list[Result]:
    results: list[Result] = []
    with private_mounts(), _scratch() as directory:
        bundle = Bundle(directory / "bundle")
        if set(chosen) & set(EXECUTOR):
            with in_memory(bundle.directory / "state") as state:  # where /run is, for all sides
                results += _executor(chosen, bundle, state, rounds)
        if "streaming" in chosen:
            results += _on_daemon(lambda server, tell: streaming.measure(daemon.Client(server), tell))
        if "daemon" in chosen:
            results += _daemon(bundle, rounds, pods)
        if "handlers" in chosen:
            with console.status("handlers") as status:
                results += handlers.measure(directory, rounds, status.update)
        if "sandboxes" in chosen:
            results += _on_daemon(lambda server, tell: sandboxes.measure(server, directory, rounds, tell))
        if "probes" in chosen:
            results += _on_daemon(lambda server, tell: probes.measure(server, directory, tell))
        if "lists" in chosen:
            results += _on_daemon(lambda server, tell: lists.measure(server, directory, tell))
        if "pull" in chosen:
            with console.status("pull") as status:
                results += images.measure(directory, min(rounds, PULLS), status.update)
    return results


def _executor(chosen: Sequence[str], bundle: Bundle, directory: Path, rounds: int) -> Iterator[Result]:
    launchers = Launchers()
    launchers.start()
    try:
        ours = containers.Ours(BuiltinRuntime(launchers), bundle, directory)
        if "run" in chosen:
            for profile in (None, _default_seccomp()):
                with console.status("create, start, /bin/true, exit, delete: ours, crun, runc"):
                    yield from containers.measure_run(ours, bundle, rounds, profile)
        if "command" in chosen:
            with console.status("crio-oci as a command: ours, runc"):
                yield from command.measure(bundle, rounds)
        if "volumes" in chosen:
            with console.status("a container with many volumes: ours, crun"):
                yield from crowd.measure_volumes(ours, bundle, directory, rounds, _default_seccomp())
        if "crowd" in chosen:
            with console.status("many containers at once: ours, crun under our monitor"):
                yield from crowd.measure_crowd(launchers, bundle, directory)
        if "exec" in chosen:
            with console.status("exec: ours, crun"):
                yield from containers.measure_exec(ours, bundle, rounds)
        if "monitor" in chosen:
            yield from containers.measure_monitor(ours, bundle)
    finally:
        launchers.stop()


def _daemon(bundle: Bundle, rounds: int, pods: int) -> list[Result]:
    server = ScratchDaemon()
    try:
        server.start()
        Cgroup(server.cgroup_parent).create()  # a kubelet's is there before its pods
        results = daemon.measure_rest(server)
        client = daemon.Client(server)
        with console.status("ExecSync: ours, crun"):
            results += daemon.measure_exec_sync(client, bundle, rounds)
        with console.status("pods") as status:
            results += daemon.measure_growth(client, pods, status.update)
        return results
    finally:
        for problem in server.close():
            console.print(f"[red]left behind:[/] {problem}")


def _on_daemon(act: Callable[[ScratchDaemon, Callable[[str], None]], list[Result]]) -> list[Result]:
    """What `act` measures with a daemon of its own; it is also given how to tell its progress."""
    server = ScratchDaemon()
    try:
        server.start()
        Cgroup(server.cgroup_parent).create()  # a kubelet's is there before its pods
        with console.status("a daemon") as status:
            return act(server, status.update)
    finally:
        for problem in server.close():
            console.print(f"[red]left behind:[/] {problem}")


def _default_seccomp() -> dict[str, Any]:
    """RuntimeDefault as the daemon resolves it for a container with `runc spec`'s capabilities."""
    return seccomp_profile.resolve(
        seccomp_profile.default_profile(), ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="crio-native-bench-", dir="/var/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
