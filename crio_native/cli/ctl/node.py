"""The commands about the node as a whole: numbers, versions, state, events."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import click
from google.protobuf import json_format

from crio_native import __version__
from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import show
from crio_native.cli.ctl.client import Client
from crio_native.cli.ctl.find import SHORT, Node
from crio_native.errors import Unimplemented

STATS_TITLES = ["CONTAINER", "NAME", "CPU %", "MEMORY", "WORKING SET", "SWAP", "WRITTEN"]
Sample = Mapping[str, api.ContainerStats]


def read_stats(client: Client, wanted: set[str]) -> dict[str, api.ContainerStats]:
    """Stats by container id; of all running containers when `wanted` is empty."""
    listed = client.call(api.ListContainerStatsRequest()).stats
    return {item.attributes.id: item for item in listed if not wanted or item.attributes.id in wanted}


def cpu_percent(before: api.ContainerStats | None, now: api.ContainerStats) -> str:
    """CPU time between two readings in percent of one CPU; the runtime's own figure where there is no earlier one."""
    if before and now.cpu.timestamp > before.cpu.timestamp:
        used = now.cpu.usage_core_nano_seconds.value - before.cpu.usage_core_nano_seconds.value
        return f"{max(0, used) / (now.cpu.timestamp - before.cpu.timestamp):.1%}".rstrip("%")
    if now.cpu.HasField("usage_nano_cores"):
        return f"{now.cpu.usage_nano_cores.value / 1e7:.1f}"
    return "-"


def optional_size(message: Any, field: str) -> str:
    return show.size(getattr(message, field).value) if message.HasField(field) else "-"


def stats_row(before: api.ContainerStats | None, now: api.ContainerStats) -> list[str]:
    return [
        now.attributes.id[:SHORT],
        now.attributes.metadata.name,
        cpu_percent(before, now),
        optional_size(now.memory, "usage_bytes"),
        optional_size(now.memory, "working_set_bytes"),
        optional_size(now.swap, "swap_usage_bytes"),
        optional_size(now.writable_layer, "used_bytes"),
    ]


def stats_rows(before: Sample, now: Sample) -> list[list[str]]:
    return [stats_row(before.get(id_), item) for id_, item in now.items()]


@click.command()
@click.argument("container", nargs=-1)
@click.option("-w", "--watch", is_flag=True, help="Repeat until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between.")
@show.output_option
@click.pass_obj
def stats(client: Client, container: tuple[str, ...], watch: bool, interval: float, output: str) -> None:
    """Print CPU and memory of running containers.

    The CPU column is measured over the interval, in percent of one CPU.
    """
    if watch and output == "json":
        raise click.UsageError("--watch prints tables; repeat the command for JSON")
    node = Node.read(client) if container else None
    wanted = {node.container(reference).id for reference in container} if node else set()
    now = read_stats(client, wanted)
    if output == "json":
        show.as_json({"stats": [show.as_dict(item) for item in now.values()]})
        return
    if watch:
        watch_stats(client, wanted, interval)
        return
    time.sleep(interval if now else 0)
    show.print_table(STATS_TITLES, stats_rows(now, read_stats(client, wanted)))


def watch_stats(client: Client, wanted: set[str], interval: float) -> None:
    from rich.live import Live

    before: Sample = {}
    with Live(auto_refresh=False, screen=sys.stdout.isatty()) as live:
        while True:
            now = read_stats(client, wanted)
            live.update(show.table(STATS_TITLES, stats_rows(before, now)), refresh=True)
            before = now
            time.sleep(interval)


@click.command()
@show.output_option
@click.pass_obj
def version(client: Client, output: str) -> None:
    """Print the versions of crioctl and of the runtime."""
    answer = client.call(api.VersionRequest(version="v1"))
    if output == "json":
        show.as_json({"crioctl": __version__, "runtime": show.as_dict(answer)})
        return
    rows = [
        ["crioctl", __version__],
        [answer.runtime_name, answer.runtime_version],
        ["CRI", answer.runtime_api_version],
    ]
    show.print_table(["PROGRAM", "VERSION"], rows)


def runtime_config(client: Client) -> api.RuntimeConfigResponse | None:
    """What the kubelet must agree with; None from the many runtimes that are older than the call."""
    try:
        answer: api.RuntimeConfigResponse = client.call(api.RuntimeConfigRequest())
    except Unimplemented:
        return None
    return answer


@click.command()
@show.output_option
@click.pass_obj
def info(client: Client, output: str) -> None:
    """Print the runtime's state: conditions, handlers, cgroup driver, room for images."""
    status = client.call(api.StatusRequest(verbose=True))
    config = runtime_config(client)
    room = client.call(api.ImageFsInfoRequest())
    if output == "json":
        known = show.as_dict(config) if config else None
        show.as_json({**show.with_info(status), "config": known, "imageFs": show.as_dict(room)})
        return
    rows = [
        [c.type, "yes" if c.status else "no", ": ".join(filter(None, (c.reason, c.message)))]
        for c in status.status.conditions
    ]
    for handler in status.runtime_handlers:
        features = [field.name for field, value in handler.features.ListFields() if value]
        rows.append(["handler", handler.name or "(default)", ", ".join(features)])
    if config:
        rows.append(["cgroup driver", api.CgroupDriver.Name(config.linux.cgroup_driver).lower(), ""])
    for use in room.image_filesystems:
        rows.append(["images", show.size(use.used_bytes.value), use.fs_id.mountpoint])
    show.print_table(["WHAT", "VALUE", "DETAIL"], rows)


@click.command()
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="json: one object a line.")
@click.pass_obj
def events(client: Client, output: str) -> None:
    """Print what happens to containers and pods, until Ctrl-C."""
    for event in client.events():
        if output == "json":
            click.echo(json_format.MessageToJson(event, indent=None))
        else:
            word = api.ContainerEventType.Name(event.container_event_type).split("_")[1].lower()
            moment = time.strftime("%H:%M:%S", time.localtime(event.created_at / 1e9))
            pod = event.pod_sandbox_status.metadata
            click.echo(show.clean(f"{moment} {word:8} {event.container_id[:SHORT]} in {pod.namespace}/{pod.name}"))
