"""Where signatures are found: a registry (as attachments, or by its extension for signatures), a lookaside store, and
the directory of an image on disk.

All of it is a stranger's, and bounded; what cannot be read as a signature is passed over, as another one may do.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from crio_native.errors import InvalidArgument, NotFound, PermissionRefused, Unavailable
from crio_native.images import references
from crio_native.images.directories import read_file
from crio_native.images.manifests import OCI_MANIFEST, Descriptor, verified
from crio_native.images.trust import documents, registries_d
from crio_native.images.trust.documents import Fields
from crio_native.images.trust.signatures import (
    MAX_SIGNATURE,
    MAX_SIGNATURES,
    SIGSTORE,
    SIGSTORE_PAYLOAD,
    SIMPLE,
    Signature,
    Unmet,
    from_blob,
    texts,
)

if TYPE_CHECKING:
    from crio_native.images.registry import Repository

log = logging.getLogger(__name__)


class FromRegistry:
    """The signatures of images of one repository.  directory: registries.d's.

    All methods raise what the registry's client raises, InvalidArgument and FailedPrecondition for registries.d, and
    Unmet for documents that are none.
    """

    def __init__(self, repository: Repository, directory: str) -> None:
        self._repository = repository
        self._place = registries_d.load(directory).of(repository.reference)

    def __call__(self, kind: str, digest: str) -> Iterator[Signature]:
        if kind == SIGSTORE and self._place.attachments:
            yield from self._attached(digest)
        elif kind == SIMPLE:
            yield from _bounded(self._listed(digest))
        yield from _bounded(s for s in self._lookaside(digest) if s.kind == kind)

    def _attached(self, digest: str) -> Iterator[Signature]:
        """As cosign attaches them: an image, named after the digest, each of whose layers is a payload."""
        tag = digest.replace(":", "-") + ".sig"
        try:
            raw, media_type, _ = self._repository.manifest(tag)
        except NotFound:
            return
        try:
            layers = list(_payloads(raw, media_type, f"signatures {tag}"))
        except InvalidArgument as error:
            raise Unmet(f"its signatures are damaged: {error}") from None
        for layer in layers:
            try:
                payload = b"".join(verified(self._repository.blob(layer), layer, f"signatures {tag}"))
            except NotFound as error:
                log.warning("a signature of %s is passed over: %s", digest, error)
                continue
            yield Signature(SIGSTORE, payload, layer.annotations)

    def _listed(self, digest: str) -> Iterator[Signature]:
        """By the registry's extension for signatures (OpenShift's), where it says that it has it."""
        raw = self._repository.signature_list(digest)
        if raw is None:
            return
        try:
            entries = documents.parse(raw, "signatures").take("signatures", list)
            for number, entry in enumerate(entries):
                fields = Fields(entry, f"signatures[{number}]", top=False)
                if (fields.take("schemaVersion", int), fields.text("type")) == (2, "atomic"):
                    content = documents.decoded(fields.text("content"), fields.path("content"))
                    yield Signature(SIMPLE, content)
        except InvalidArgument as error:
            raise Unmet(f"the registry's list of its signatures is damaged: {error}") from None

    def _lookaside(self, digest: str) -> Iterator[Signature]:
        """BASE/REPOSITORY@ALGORITHM=HEX/signature-N, N from 1 until there is none."""
        name = f"{self._repository.reference.repository}@{digest.replace(':', '=')}"
        base = self._place.lookaside.rstrip("/")
        for number in range(1, MAX_SIGNATURES + 1):
            url = f"{base}/{name}/signature-{number}"
            blob = _local(unquote(urlsplit(url).path)) if url.startswith("file:") else self._remote(url)
            if blob is None:
                return
            if signature := from_blob(blob):
                yield signature

    def _remote(self, url: str) -> bytes | None:
        try:
            return self._repository.elsewhere(url, MAX_SIGNATURE)
        except NotFound:
            return None
        except (PermissionRefused, Unavailable) as error:
            raise type(error)(f"the signature {url} cannot be fetched: {error}") from None


def _payloads(raw: bytes, media_type: str, what: str) -> Iterator[Descriptor]:
    """The layers of an OCI manifest that are payloads of signatures; the others are nothing to us."""
    if media_type != OCI_MANIFEST:
        raise InvalidArgument(what, media_type, "is no OCI manifest")
    for number, entry in enumerate(documents.parse(raw, what).take("layers", list)[:MAX_SIGNATURES]):
        fields = Fields(entry, f"{what}: layers[{number}]", top=False)
        kind, size = fields.text("mediaType"), fields.take("size", int)
        digest = references.check_digest(fields.text("digest"), fields.path("digest"))
        if kind == SIGSTORE_PAYLOAD and 0 < size <= MAX_SIGNATURE:
            yield Descriptor(kind, digest, size, annotations=texts(fields.take("annotations", dict, {})))


def _bounded(found: Iterator[Signature]) -> Iterator[Signature]:
    return (signature for _, signature in zip(range(MAX_SIGNATURES), found, strict=False))


def _local(path: str) -> bytes | None:
    try:
        with open(path, "rb", opener=documents.open_at_once) as file:
            raw = file.read(MAX_SIGNATURE + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise Unmet(f"the signature {path} cannot be read: {(error.strerror or '').lower()}") from None
    if not raw or len(raw) > MAX_SIGNATURE:
        raise Unmet(f"the signature {path} is not a file of 1 to {MAX_SIGNATURE} bytes")
    return raw


def of_directory(path: str) -> Iterator[Signature]:
    """The signatures that skopeo's `dir` keeps beside an image; path: "" for an image of another kind."""
    if not path:
        return
    root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number in range(1, MAX_SIGNATURES + 1):
            try:
                blob = read_file(root, f"signature-{number}", MAX_SIGNATURE)
            except NotFound:
                return
            if signature := from_blob(blob):
                yield signature
    except InvalidArgument as error:
        raise Unmet(f"a signature beside it is unusable: {error}") from None
    finally:
        os.close(root)
