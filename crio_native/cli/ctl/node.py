"""The commands about the node as a whole: versions, state, events."""

from __future__ import annotations

import time

import click
from google.protobuf import json_format

from crio_native import __version__
from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import show
from crio_native.cli.ctl.client import Client
from crio_native.cli.ctl.find import SHORT
from crio_native.errors import Unimplemented, printable


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
            click.echo(printable(f"{moment} {word:8} {event.container_id[:SHORT]} in {pod.namespace}/{pod.name}"))
