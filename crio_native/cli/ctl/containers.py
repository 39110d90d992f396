"""The commands about pods and containers that exist."""

from __future__ import annotations

import os

import click

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import logs as log_files
from crio_native.cli.ctl import parse, show
from crio_native.cli.ctl.client import CallNotFound, Client
from crio_native.cli.ctl.find import SHORT, Container, Node, Pod, match
from crio_native.cli.ctl.images import short_image_id
from crio_native.cli.ctl.run import STOP_GRACE, has_ended, remove_logs, remove_pod, stop_pod
from crio_native.cli.ctl.targets import for_each
from crio_native.errors import FailedPrecondition, NotFound

label_option = click.option(
    "--label", "labels", multiple=True, type=parse.Parsed("KEY=VALUE", parse.pair), help="Only those with this label."
)


def state_word(value: str) -> str:
    """ "CONTAINER_RUNNING" -> "running"."""
    return value.split("_", 1)[1].lower()


def image_word(image: api.ImageSpec) -> str:
    """The image's name, or the beginning of its id where the runtime knows no name."""
    name = image.user_specified_image or image.image
    return short_image_id(name) if name.startswith("sha256:") else name


def addresses(client: Client, pod: api.PodSandbox) -> str:
    """The pod's addresses, which only its status has; a pod may be gone by now."""
    try:
        network = client.call(api.PodSandboxStatusRequest(pod_sandbox_id=pod.id)).status.network
    except CallNotFound:
        return ""
    return ", ".join(filter(None, [network.ip, *(further.ip for further in network.additional_ips)]))


CHECKPOINT_GRANT = 3600  # seconds: as long as the memory takes to be written


@click.command()
@label_option
@show.quiet_option
@show.output_option
@click.pass_obj
def pods(client: Client, labels: tuple[tuple[str, str], ...], quiet: bool, output: str) -> None:
    """List pods."""
    request = api.ListPodSandboxRequest(filter=api.PodSandboxFilter(label_selector=dict(labels)))
    found = sorted(client.call(request).items, key=lambda pod: -pod.created_at)

    def row(pod: api.PodSandbox) -> list[str]:
        return [
            pod.id[:SHORT],
            pod.metadata.name,
            pod.metadata.namespace,
            state_word(api.PodSandboxState.Name(pod.state)),
            show.age(pod.created_at),
            addresses(client, pod) if pod.state == api.SANDBOX_READY else "",
            pod.runtime_handler or "(default)",
        ]

    titles = ["POD", "NAME", "NAMESPACE", "STATE", "AGE", "ADDRESS", "HANDLER"]
    show.listing(found, "items", quiet, output, titles, row)


@click.command()
@click.option("-a", "--all", "every", is_flag=True, help="Ended ones too.")
@click.option("--pod", "pod_reference", help="Only those of this pod.")
@label_option
@show.quiet_option
@show.output_option
@click.pass_obj
def ps(
    client: Client,
    every: bool,
    pod_reference: str | None,
    labels: tuple[tuple[str, str], ...],
    quiet: bool,
    output: str,
) -> None:
    """List containers."""
    request = api.ListContainersRequest(filter=api.ContainerFilter(label_selector=dict(labels)))
    if pod_reference:
        request.filter.pod_sandbox_id = Node.read(client).pod(pod_reference).id
    listed = client.call(request).containers
    found = [item for item in listed if every or item.state != api.CONTAINER_EXITED]
    found.sort(key=lambda item: -item.created_at)

    def row(item: api.Container) -> list[str]:
        return [
            item.id[:SHORT],
            item.metadata.name,
            image_word(item.image),
            state_word(api.ContainerState.Name(item.state)),
            show.age(item.created_at),
            item.pod_sandbox_id[:SHORT],
        ]

    show.listing(found, "containers", quiet, output, ["CONTAINER", "NAME", "IMAGE", "STATE", "AGE", "POD"], row)


@click.command()
@click.argument("container", nargs=-1, required=True)
@click.pass_obj
def start(client: Client, container: tuple[str, ...]) -> None:
    """Start containers that were created.  (An ended container does not start again: the CRI makes a new one.)"""

    def act(reference: str) -> None:
        client.call(api.StartContainerRequest(container_id=Node.read(client).container(reference).id))

    for_each(container, act)


def stop_container(client: Client, container_id: str, grace: int) -> None:
    client.call(api.StopContainerRequest(container_id=container_id, timeout=grace), grant=grace)


@click.command()
@click.argument("target", nargs=-1, required=True)
@click.option(
    "-t",
    "--time",
    "grace",
    type=click.IntRange(0),
    default=STOP_GRACE,
    show_default=True,
    help="Seconds until the kill.",
)
@click.pass_obj
def stop(client: Client, target: tuple[str, ...], grace: int) -> None:
    """Stop containers and pods, by id, beginning of an id, or name.

    What `run` made is stopped as a whole, pod and container.
    """

    def act(reference: str) -> None:
        node = Node.read(client)
        found = node.target(reference)
        if isinstance(found, Container):
            stop_container(client, found.id, grace)
            return
        for container in node.inside(found):
            if container.running:
                stop_container(client, container.id, grace)
        stop_pod(client, found.id)

    for_each(target, act)


@click.command()
@click.argument("container")
@click.argument("file", type=click.Path(dir_okay=False, resolve_path=True))
@click.option(
    "-t", "--time", "seconds", type=click.IntRange(0), default=0, help="Seconds until it is given up; 0: never."
)
@click.pass_obj
def checkpoint(client: Client, container: str, file: str, seconds: int) -> None:
    """Save a running container to a new FILE of the node, while it goes on.

    A container is made of the file where an image is asked for: CreateContainer takes its path.
    """
    found = Node.read(client).container(container)
    request = api.CheckpointContainerRequest(container_id=found.id, location=file, timeout=seconds)
    client.call(request, grant=seconds or CHECKPOINT_GRANT)
    click.echo(file)


@click.command()
@click.argument("target", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Also what is running: it is killed.")
@click.pass_obj
def rm(client: Client, target: tuple[str, ...], force: bool) -> None:
    """Remove containers and pods, by id, beginning of an id, or name.

    A pod goes with its containers.  What `run` made is removed as a whole, with its logs.
    """

    def act(reference: str) -> None:
        node = Node.read(client)
        found = node.target(reference)
        inside = node.inside(found) if isinstance(found, Pod) else [found]
        running = next((container for container in inside if container.running), None)
        if running and not force:
            raise FailedPrecondition(f"{running} is running: stop it first with `crioctl stop`, or use rm -f")
        if isinstance(found, Pod):
            remove_pod(client, found.id)
            remove_logs(found)
        else:
            client.call(api.RemoveContainerRequest(container_id=found.id))

    for_each(target, act)


@click.command()
@click.argument("container")
@click.option("-f", "--follow", is_flag=True, help="Go on until the container has ended.")
@click.option("--tail", type=click.IntRange(0), metavar="LINES", help="Only the last lines.")
@click.option("--timestamps", is_flag=True, help="Begin each line with its time.")
@click.option(
    "--since", type=parse.Parsed("TIME", parse.since), default=0, help="Only later lines: 10m, or an RFC 3339 time."
)
@click.pass_obj
def logs(client: Client, container: str, follow: bool, tail: int | None, timestamps: bool, since: int) -> None:
    """Print what a container wrote, from its current log file on this node."""
    request = api.ContainerStatusRequest(container_id=Node.read(client).container(container).id)
    status = client.call(request).status
    path = status.log_path
    if not path:
        raise FailedPrecondition(f"container {container!r} was created without a log")
    if status.state != api.CONTAINER_CREATED and not os.path.lexists(path):  # some runtimes make it at the start
        raise NotFound("log file", path, "somebody has removed it")
    with log_files.LogFile(path) as log:
        skip = 0
        if tail is not None:
            skip = max(0, log_files.count_lines(log.records()) - tail)
            log.rewind()
        printer = log_files.terminal(timestamps, since, skip)
        if not follow:
            printer.write(log.records())
            return
        log_files.follow(log, printer, lambda: has_ended(client.call(request, patient=True).status))


@click.command()
@click.argument("target")
@click.option(
    "--type", "kind", type=click.Choice(["container", "pod", "image"]), help="Instead of the first that fits."
)
@click.pass_obj
def inspect(client: Client, target: str, kind: str | None) -> None:
    """Print all that the runtime tells of a container, a pod or an image, as JSON."""
    node = Node.read(client)
    if kind in (None, "container") and match(target, node.containers):
        container = node.container(target)
        show.as_json(show.with_info(client.call(api.ContainerStatusRequest(container_id=container.id, verbose=True))))
    elif kind in (None, "pod") and match(target, node.pods):
        pod = node.pod(target)
        show.as_json(show.with_info(client.call(api.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True))))
    elif kind in (None, "image"):
        answer = client.call(api.ImageStatusRequest(image=api.ImageSpec(image=target), verbose=True))
        if not answer.HasField("image"):
            raise NotFound(kind or "container, pod or image", target)
        show.as_json(show.with_info(answer))
    else:
        raise NotFound(kind, target)
