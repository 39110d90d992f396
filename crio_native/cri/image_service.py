"""ImageService: each call in CRI words, what it asks of `images/`, and the answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from typing import Any

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cri.counting import Counts
from crio_native.cri.jobs import Jobs
from crio_native.cri.listing import framed, pages
from crio_native.cri.messages import filesystem_usage
from crio_native.cri.server import Call
from crio_native.errors import CrioError, InvalidArgument, NotFound
from crio_native.images import Credentials, Image, ImageStore
from crio_native.images.credentials import decode
from crio_native.images.manifests import of_another_machine
from crio_native.images.model import Progress
from crio_native.pods.store import Store, images_in_use

# Words of our own beside registry references: CRI has no call that imports an image from a file.
IMPORTS = ("oci:", "oci-archive:", "docker-archive:", "dir:", "containers-storage:")
SAVE = "save:"  # SAVE TRANSPORT:PATH:IMAGE writes an image to a file; no kubelet takes any of these for a reference
MAX_DIGITS = 18  # of a user's number; the CRI's field has 64 bits


class ImageService:
    """The CRI's images."""

    def __init__(self, images: ImageStore, store: Store, jobs: Jobs, pulls: Executor, counts: Counts) -> None:
        self._images = images
        self._store = store
        self._jobs = jobs
        self._pulls = pulls
        self._counts = counts
        self._pulling: dict[str, dict[str, Progress]] = {}  # by reference, then by layer

    async def ListImages(self, request: Any, call: Call) -> Any:
        response = pb.ListImagesResponse()
        for image in await self._listed(request, call):
            _fill(response.images.add(), image)
        return response

    async def StreamImages(self, request: Any, call: Call) -> AsyncIterator[bytes]:
        images = await self._listed(request, call)
        for page in pages(framed(_fill(pb.Image(), image)) for image in images):
            yield page

    async def _listed(self, request: Any, call: Call) -> Sequence[Image]:
        wanted = request.filter.image.image
        if not wanted:
            images: Sequence[Image] = await call.thread(self._images.list)
            return images
        found = await call.thread(self._get, wanted)
        return [found] if found else []

    async def ImageStatus(self, request: Any, call: Call) -> Any:
        """An image that is not there is an empty answer, not an error; one that is there, the same by all its names.

        Verbose, the answer tells how far each layer is while the reference is being pulled: the CRI has no other word.
        """
        reference = _reference(request.image)
        image = await call.thread(self._get, reference)
        response = pb.ImageStatusResponse()
        if image is not None:
            _fill(response.image, image)
            if request.verbose:
                response.info["info"] = json.dumps({"imageSpec": dict(image.config)})
                if another := of_another_machine(image.config):
                    response.info["warning"] = another
        if request.verbose and reference in self._pulling:
            response.info["pull"] = json.dumps([asdict(layer) for layer in list(self._pulling[reference].values())])
        return response

    async def PullImage(self, request: Any, call: Call) -> Any:
        reference = _reference(request.image)
        credentials = _credentials(request.auth)
        namespace = request.sandbox_config.metadata.namespace

        def work(stage: Any) -> Image:
            stage("pulling")
            if reference.startswith(IMPORTS):
                images = self._images.load(reference, namespace=namespace)
                if not images:
                    raise InvalidArgument("image.image", reference, "holds no image")
                return images[0]
            if reference.startswith(SAVE):
                transport, path, name = (*reference.removeprefix(SAVE).split(":", 2), "", "")[:3]
                return self._images.save(name, f"{transport}:{path}")
            heard = self._pulling.setdefault(reference, {})
            try:
                image = self._images.pull(
                    reference,
                    credentials=credentials,
                    namespace=namespace,
                    progress=lambda layer: heard.update({layer.digest: layer}),
                )
            except CrioError as error:
                self._counts.pull_failed(error)
                raise
            finally:
                self._pulling.pop(reference, None)
            self._counts.pull_succeeded(heard)
            return image

        image = await self._jobs.run(
            self._pulls,
            ("pull", reference, credentials, namespace),
            f"pulling {reference}",
            work,
            seconds=call.seconds(),
        )
        return pb.PullImageResponse(image_ref=image.id)

    async def RemoveImage(self, request: Any, call: Call) -> Any:
        reference = _reference(request.image)
        await call.thread(self._remove, reference)
        return pb.RemoveImageResponse()

    async def ImageFsInfo(self, request: Any, call: Call) -> Any:
        usage = await call.thread(self._images.usage)
        response = pb.ImageFsInfoResponse()
        message = filesystem_usage(usage.timestamp, str(usage.mountpoint), usage.bytes, usage.inodes)
        response.image_filesystems.append(message)
        response.container_filesystems.append(message)
        return response

    def _get(self, reference: str) -> Image | None:
        try:
            return self._images.get(reference)
        except NotFound:
            return None

    def _remove(self, reference: str) -> None:
        try:
            self._images.remove(reference, in_use=lambda: images_in_use(self._store))
        except NotFound:
            pass  # removed already


def _reference(spec: Any) -> str:
    if not spec.image:
        raise InvalidArgument("image.image", "", "names no image")
    if len(spec.image) > 4096 or "\0" in spec.image:
        raise InvalidArgument("image.image", spec.image, "is no image reference")
    return str(spec.image)


def _credentials(auth: Any) -> Credentials | None:
    """One of: a token, name and password, base64 of ``name:password``; an empty message says nothing."""
    if auth.registry_token:
        return Credentials(registry_token=auth.registry_token, server=auth.server_address)
    if auth.identity_token:
        return Credentials(identity_token=auth.identity_token, server=auth.server_address)
    if auth.username:
        return Credentials(auth.username, auth.password, server=auth.server_address)
    return replace(decode(auth.auth, "auth.auth"), server=auth.server_address) if auth.auth else None


def _fill(message: Any, image: Image) -> Any:
    """Fill an Image message.  The user of the image's config is a number in `uid` or a name in `username`.

    A number that the field has no room for is as good as a name: nobody has it, and a container of it is refused.
    """
    message.id, message.size, message.pinned = image.id, image.size, image.pinned
    message.repo_tags.extend(image.names)
    message.repo_digests.extend(image.digests)
    user = str((image.config.get("config") or {}).get("User") or "").partition(":")[0]
    if user.isascii() and user.isdecimal() and len(user) <= MAX_DIGITS:
        message.uid.value = int(user)
    else:
        message.username = user
    return message
