"""What containers and pods use, and what they may use: `stats` and `update`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import parse, show
from crio_native.cli.ctl.client import Client
from crio_native.cli.ctl.find import SHORT, Node
from crio_native.cli.ctl.targets import for_each

Sample = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the two tables.  figures: where a row's CPU and memory are.  read: stats by id."""

    titles: Sequence[str]
    figures: Callable[[Any], Any]
    rest: Callable[[Any], list[str]]
    read: Callable[[Client], Sequence[Any]]


def optional_size(message: Any, field: str) -> str:
    return show.size(getattr(message, field).value) if message.HasField(field) else "-"


def _container_rest(now: api.ContainerStats) -> list[str]:
    return [optional_size(now.swap, "swap_usage_bytes"), optional_size(now.writable_layer, "used_bytes")]


def _pod_rest(now: api.PodSandboxStats) -> list[str]:
    network, process = now.linux.network.default_interface, now.linux.process
    count = str(process.process_count.value) if process.HasField("process_count") else "-"
    return [optional_size(network, "rx_bytes"), optional_size(network, "tx_bytes"), count]


CONTAINERS = Kind(
    ["CONTAINER", "NAME", "CPU %", "MEMORY", "WORKING SET", "SWAP", "WRITTEN"],
    lambda item: item,
    _container_rest,
    lambda client: client.call(api.ListContainerStatsRequest()).stats,
)
PODS = Kind(
    ["POD", "NAME", "CPU %", "MEMORY", "WORKING SET", "RECEIVED", "SENT", "PROCESSES"],
    lambda item: item.linux,
    _pod_rest,
    lambda client: client.call(api.ListPodSandboxStatsRequest()).stats,
)


def read_stats(client: Client, kind: Kind, wanted: set[str]) -> dict[str, Any]:
    """Stats by id; of all when `wanted` is empty."""
    return {item.attributes.id: item for item in kind.read(client) if not wanted or item.attributes.id in wanted}


def cpu_percent(before: api.CpuUsage | None, now: api.CpuUsage) -> str:
    """CPU time between two readings in percent of one CPU; the runtime's own figure where there is no earlier one."""
    if before and now.timestamp > before.timestamp:
        used = now.usage_core_nano_seconds.value - before.usage_core_nano_seconds.value
        return f"{max(0, used) / (now.timestamp - before.timestamp):.1%}".rstrip("%")
    if now.HasField("usage_nano_cores"):
        return f"{now.usage_nano_cores.value / 1e7:.1f}"
    return "-"


def stats_rows(kind: Kind, before: Sample, now: Sample) -> list[list[str]]:
    rows = []
    for id_, item in now.items():
        figures = kind.figures(item)
        earlier = kind.figures(before[id_]).cpu if id_ in before else None
        sizes = [optional_size(figures.memory, field) for field in ("usage_bytes", "working_set_bytes")]
        name = item.attributes.metadata.name
        rows.append([id_[:SHORT], name, cpu_percent(earlier, figures.cpu), *sizes, *kind.rest(item)])
    return rows


@click.command()
@click.argument("target", nargs=-1)
@click.option("-p", "--pods", is_flag=True, help="Of pods, with their networks, instead of containers.")
@click.option("-w", "--watch", is_flag=True, help="Repeat until Ctrl-C.")
@click.option("--interval", type=parse.Seconds(0.1, 3600), default=1.0, show_default=True, help="Seconds between.")
@show.output_option
@click.pass_obj
def stats(client: Client, target: tuple[str, ...], pods: bool, watch: bool, interval: float, output: str) -> None:
    """Print CPU and memory of running containers, or of pods.

    The CPU column is measured over the interval, in percent of one CPU.
    """
    if watch and output == "json":
        raise click.UsageError("--watch prints tables; repeat the command for JSON")
    node, kind = Node.read(client) if target else None, PODS if pods else CONTAINERS
    wanted = {(node.pod(each) if pods else node.container(each)).id for each in target} if node else set()
    now = read_stats(client, kind, wanted)
    if output == "json":
        show.as_json({"stats": [show.as_dict(item) for item in now.values()]})
        return
    if watch:
        watch_stats(client, kind, wanted, interval)
        return
    time.sleep(interval if now else 0)
    show.print_table(kind.titles, stats_rows(kind, now, read_stats(client, kind, wanted)))


def watch_stats(client: Client, kind: Kind, wanted: set[str], interval: float) -> None:
    from rich.live import Live

    before: Sample = {}
    with Live(auto_refresh=False, screen=sys.stdout.isatty()) as live:
        while True:
            now = read_stats(client, kind, wanted)
            live.update(show.table(kind.titles, stats_rows(kind, before, now)), refresh=True)
            before = now
            time.sleep(interval)


@click.command()
@click.argument("container", nargs=-1, required=True)
@click.option("--memory", type=parse.Parsed("SIZE", parse.size), help="Memory limit, such as 64m.")
@click.option("--no-memory-limit", is_flag=True, help="Take the memory limit away.")
@click.option("--cpus", type=parse.Parsed("NUMBER", parse.cpus), help="CPU limit, such as 0.5.")
@click.option("--no-cpu-limit", is_flag=True, help="Take the CPU limit away.")
@click.option("--cpu-shares", type=click.IntRange(2, 262144), help="Share of the CPU where it is scarce.")
@click.option("--cpuset", default="", help="The CPUs to run on, such as 0-3,7.")
@click.pass_obj
def update(
    client: Client,
    container: tuple[str, ...],
    memory: int | None,
    no_memory_limit: bool,
    cpus: int | None,
    no_cpu_limit: bool,
    cpu_shares: int | None,
    cpuset: str,
) -> None:
    """Change the limits of containers while they run; what is not named stays as it is."""
    for given, taken, name in ((memory, no_memory_limit, "memory"), (cpus, no_cpu_limit, "cpu")):
        if given and taken:
            raise click.UsageError(f"--no-{name}-limit contradicts a limit")
    limits = api.LinuxContainerResources(
        memory_limit_in_bytes=-1 if no_memory_limit else memory or 0,
        cpu_quota=-1 if no_cpu_limit else cpus or 0,
        cpu_period=parse.CPU_PERIOD if cpus else 0,
        cpu_shares=cpu_shares or 0,
        cpuset_cpus=cpuset,
    )
    if not limits.ByteSize():
        raise click.UsageError("name a limit to change")

    def act(reference: str) -> None:
        id_ = Node.read(client).container(reference).id
        client.call(api.UpdateContainerResourcesRequest(container_id=id_, linux=limits))

    for_each(container, act)
