"""The commands about images."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import click

from crio_native.api.runtime.v1 import api_pb2 as api
from crio_native.cli.ctl import parse, show
from crio_native.cli.ctl.client import Client
from crio_native.cli.ctl.find import SHORT
from crio_native.cli.ctl.targets import for_each
from crio_native.errors import CrioError, InvalidArgument, NotFound, printable

PROGRESS_INTERVAL = 0.2
"""Seconds between two looks at a pull."""
NOT_FOUND_HINT = "`crioctl images` lists what there is"
MEMBERS_MAX = 100_000
"""Entries of an archive to look through for the one that says its kind."""


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """`text` with the elapsed time on the terminal's stderr while the body runs; one line elsewhere."""
    if not sys.stderr.isatty():
        show.note(text)
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(printable(text), total=None)
        yield


def pull_image(client: Client, image: str, auth: api.AuthConfig | None = None) -> str:
    """Pull, without a deadline, and return the runtime's reference for the image."""
    with layers_shown(client, image):
        answer = client.call(api.PullImageRequest(image=api.ImageSpec(image=image), auth=auth), grant=None)
    _warn_of(client, image, answer.image_ref)
    return str(answer.image_ref)


def _warn_of(client: Client, image: str, ref: str) -> None:
    """Say what our daemon has to say of an image that was pulled; the answer to a pull has no room for it."""
    with suppress(CrioError):
        answer = client.call(api.ImageStatusRequest(image=api.ImageSpec(image=ref), verbose=True))
        if warning := answer.info.get("warning"):
            show.note(f"{image}: {warning}")


@contextmanager
def layers_shown(client: Client, image: str) -> Iterator[None]:
    """A line with a bar for each layer of a pull, on the terminal's stderr; one line in all elsewhere.

    The CRI tells nothing of a pull while it runs.  Our daemon says it in ImageStatus's verbose information; of another
    runtime only the elapsed time is shown.
    """
    if not sys.stderr.isatty():
        show.note(f"pulling {image}")
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
    ended = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(f"pulling {printable(image)}", total=None)
        watcher = threading.Thread(target=_watch, args=(client, image, progress, ended), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(1)


def _watch(client: Client, image: str, progress: Any, ended: threading.Event) -> None:
    request = api.ImageStatusRequest(image=api.ImageSpec(image=image), verbose=True)
    tasks: dict[str, Any] = {}
    while not ended.wait(PROGRESS_INTERVAL):
        try:
            layers = json.loads(client.call(request).info.get("pull", "[]"))
        except (CrioError, ValueError):
            continue  # the pull itself says what is wrong
        for layer in layers:
            digest = layer["digest"]
            if digest not in tasks:
                tasks[digest] = progress.add_task(digest.partition(":")[2][:SHORT], total=layer["total"])
            progress.update(tasks[digest], completed=layer["current"])


def archive_reference(path: str, tag: str = "") -> str:
    """The reference by which the daemon reads a local image: its transport, the absolute path, and the tag.

    Raises InvalidArgument when `path` is none of the forms that `load` reads.
    """
    absolute = os.path.abspath(path)
    if ":" in absolute:
        raise InvalidArgument("PATH", absolute, "has a ':', which ends a path in image references; rename it")
    return f"{_transport(absolute)}:{absolute}" + (f":{tag}" if tag else "")


def _transport(path: str) -> str:
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "oci-layout")):
            return "oci"
        if os.path.isfile(os.path.join(path, "version")) and os.path.isfile(os.path.join(path, "manifest.json")):
            return "dir"
        if any(os.path.isfile(os.path.join(path, f"{driver}-images/images.json")) for driver in ("overlay", "vfs")):
            return "containers-storage"
        raise InvalidArgument(
            "PATH", path, "is a directory without an oci-layout file, and neither skopeo's dir nor a containers/storage"
        )
    try:
        with tarfile.open(path) as archive:
            names = {member.name.removeprefix("./") for member in islice(archive, MEMBERS_MAX)}
    except OSError as error:
        raise InvalidArgument("PATH", path, f"cannot be read: {error.strerror or error}") from None
    except (tarfile.TarError, EOFError):
        raise InvalidArgument("PATH", path, "cannot be read as a directory or a tar file") from None
    # docker save writes both; manifest.json is the one that has the names.
    if "manifest.json" in names:
        return "docker-archive"
    if "oci-layout" in names:
        return "oci-archive"
    raise InvalidArgument("PATH", path, "has neither oci-layout nor manifest.json in it")


def short_image_id(id_: str) -> str:
    return id_.removeprefix("sha256:")[:SHORT]


def image_row(image: api.Image) -> list[str]:
    names = list(image.repo_tags) or list(image.repo_digests) or ["<none>"]
    return [
        ", ".join(names),
        short_image_id(image.id),
        show.size(image.size),
        "yes" if image.pinned else "",
    ]


@click.command()
@click.argument("image", required=False)
@show.quiet_option
@show.output_option
@click.pass_obj
def images(client: Client, image: str | None, quiet: bool, output: str) -> None:
    """List images, or the one that IMAGE names."""
    request = api.ListImagesRequest()
    if image:
        request.filter.image.image = image
    found = client.call(request).images
    if image and not found:
        raise NotFound("image", image, NOT_FOUND_HINT)
    show.listing(found, "images", quiet, output, ["IMAGE", "ID", "SIZE", "PINNED"], image_row)


@click.command()
@click.argument("image")
@click.option(
    "--creds",
    type=parse.Parsed("USER[:PASSWORD]", parse.credentials),
    help="Credentials; asks for a password left out.",
)
@click.pass_obj
def pull(client: Client, image: str, creds: api.AuthConfig | None) -> None:
    """Fetch IMAGE from its registry and print its reference."""
    click.echo(pull_image(client, image, creds))


@click.command()
@click.argument("path", type=click.Path(exists=True))
@click.option("--tag", default="", help="Which image, when an OCI layout holds several.")
@click.pass_obj
def load(client: Client, path: str, tag: str) -> None:
    """Import an image from PATH: an OCI layout (directory or tar file), a docker-archive, skopeo's `dir`, or the
    containers/storage of podman and CRI-O.

    The CRI has no call for this: it is a pull of the daemon's own reference `oci:`, `oci-archive:`,
    `docker-archive:`, `dir:` or `containers-storage:`, which another runtime may not know.
    """
    click.echo(pull_image(client, archive_reference(path, tag)))


@click.command()
@click.argument("image")
@click.argument("path", type=click.Path())
@click.option(
    "--format",
    "transport",
    type=click.Choice(["oci", "oci-archive", "docker-archive", "dir"]),
    default="docker-archive",
    show_default=True,
    help="An OCI layout as directory or as tar file, what `docker load` reads, or skopeo's directory.",
)
@click.pass_obj
def save(client: Client, image: str, path: str, transport: str) -> None:
    """Write IMAGE to PATH, which must not exist, on the daemon's machine.

    Layers are archived anew from the store's directories: the files are the same, the image's id is another.  The CRI
    has no call for this: it is a pull of the daemon's own word `save:`, which another runtime does not know.
    """
    absolute = os.path.abspath(path)
    if ":" in absolute:
        raise InvalidArgument("PATH", absolute, "has a ':', which ends a path in image references; choose another")
    with spinner(f"saving {image}"):
        spec = api.ImageSpec(image=f"save:{transport}:{absolute}:{image}")
        client.call(api.PullImageRequest(image=spec), grant=None)
    click.echo(absolute)


@click.command()
@click.argument("image", nargs=-1, required=True)
@click.pass_obj
def rmi(client: Client, image: tuple[str, ...]) -> None:
    """Remove images, with all their names."""

    def remove(name: str) -> None:
        spec = api.ImageSpec(image=name)
        if not client.call(api.ImageStatusRequest(image=spec)).HasField("image"):
            raise NotFound("image", name, NOT_FOUND_HINT)
        client.call(api.RemoveImageRequest(image=spec))

    for_each(image, remove)
