"""A registry as a source of images: the OCI Distribution API, reading only.

How to talk to it is `transport`'s.  Which mirror to ask, and whom to trust, is decided before (`sources`); what the
documents mean is `manifests`'s.  Content is checked against its digest by whoever consumes it (`manifests.verified`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from crio_native.errors import CrioError, NotFound, Unavailable
from crio_native.images import schema1
from crio_native.images.manifests import ACCEPTED, MAX_DOCUMENT, SCHEMA1, Descriptor
from crio_native.images.references import DIGEST_LENGTHS, Reference
from crio_native.images.transport import Transport, cause
from crio_native.images.work import Stop

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

PROBLEMS_TOLD = 5
RESUMES = 4  # of one blob, one after the other without much between them
WORTH_RESUMING = 1 << 20  # bytes
LARGE = 64 << 20  # bytes; from here a blob is fetched in ranges
RANGE = 4 << 20  # bytes of one, held in memory until those before it have come
RANGES_AT_ONCE = 3

log = logging.getLogger(__name__)


class Repository:
    """One repository of a registry, for the time of one pull.  Safe to use from several threads.

    reference, stop, and the further arguments are `Transport`'s.
    """

    def __init__(self, reference: Reference, stop: Stop, **transport: Any) -> None:
        self.reference, self._stop = reference, stop
        self._transport = Transport(reference, stop, **transport)
        self._path = f"/v2/{reference.repository}"

    def close(self) -> None:
        self._transport.close()

    def manifest(self, wanted: str) -> tuple[bytes, str, str]:
        """The document of a tag or a digest: (bytes, media type, the digest that the registry states, or "")."""
        headers = {"Accept": ", ".join((*ACCEPTED, *SCHEMA1))}
        return self._transport.get(f"{self._path}/manifests/{wanted}", headers, self._read_manifest)

    def _read_manifest(self, response: BaseHTTPResponse) -> tuple[bytes, str, str]:
        raw = self._transport.read_all(response, MAX_DOCUMENT)
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        stated = response.headers.get("Docker-Content-Digest", "")
        if media_type in SCHEMA1:
            raw = schema1.unsigned(raw)  # its digest does not cover the signatures
        return raw, media_type, stated if stated.partition(":")[0] in DIGEST_LENGTHS else ""

    def signature_list(self, digest: str) -> bytes | None:
        """What a registry with OpenShift's extension for signatures has for an image; None from one without it."""
        try:
            mark = self._transport.get("/v2/", {}, _signature_mark)
        except NotFound:
            return None
        if mark != "1":
            return None
        path = f"/extensions/v2/{self.reference.repository}/signatures/{digest}"
        return self._transport.get(path, {}, lambda response: self._transport.read_all(response, MAX_DOCUMENT))

    def elsewhere(self, url: str, most: int) -> bytes:
        """What the node's configuration says is at an address, of up to so many bytes.  Raises NotFound, too."""
        return self._transport.configured(url, lambda response: self._transport.read_all(response, most))

    def blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes, unchecked.  A connection that breaks is taken up where it broke.

        A large one comes in several ranges at once, if the registry knows ranges.  A foreign one comes from the
        addresses that its descriptor names, should the registry not have it.
        """
        if descriptor.size >= LARGE and self.knows_ranges(descriptor):
            return self._in_ranges(descriptor)
        return self.part(descriptor, 0, descriptor.size)

    def size(self, digest: str) -> int:
        """How many bytes a blob has, for a document that does not say.  Raises Unavailable where nobody does."""
        headers = {"Range": "bytes=0-0"}
        response = self._transport.get(f"{self._path}/blobs/{digest}", headers, lambda response: response)
        response.close()
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        total = total if response.status == 206 else response.headers.get("Content-Length", "")
        if not total.isdigit():
            raise Unavailable(f"registry {self.reference.registry} does not say how large {digest} is")
        return int(total)

    def part(self, descriptor: Descriptor, start: int, end: int) -> Iterator[bytes]:
        """The bytes from start to end, in as many requests as it takes.  Raises Unavailable."""
        done = mark = start
        failures = 0
        while True:
            try:
                for piece in self._from(descriptor, done, end):
                    yield piece
                    done += len(piece)
            except self._transport.errors.HTTPError as error:
                problem = cause(error)
            else:
                if done >= end:
                    return
                problem = "the connection was closed"
            log.info("blob %s of %s broke after %d bytes: %s", descriptor.digest, self.reference.name, done, problem)
            failures = 1 if done - mark >= WORTH_RESUMING else failures + 1
            if failures > RESUMES:
                raise Unavailable(
                    f"registry {self.reference.registry} cut {descriptor.digest} of {self.reference.repository} "
                    f"short at {done} of {descriptor.size} bytes, {failures} times ({problem}); try again later"
                )
            mark = done
            self._stop.pause(self._transport.backoff * min(2 ** (failures - 1), 16))

    def _from(self, descriptor: Descriptor, start: int, end: int) -> Iterator[bytes]:
        whole = end == descriptor.size
        headers = {"Range": f"bytes={start}-{'' if whole else end - 1}"} if start or not whole else {}
        response = self._request(descriptor, headers)
        with contextlib.closing(response):
            ranged = response.status == 206
            skip = 0 if ranged else start  # a server may answer a range with the whole
            if ranged and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise Unavailable(
                    f"{self.reference.registry} answered another range than asked for of {descriptor.digest}"
                )
            self._check_length(response, end - start if ranged else descriptor.size, descriptor)
            left = math.inf if whole else end - start  # of the whole the digest judges the length
            for piece in self._transport.pieces(response):
                dropped = min(skip, len(piece))
                skip -= dropped
                wanted = piece[dropped:] if left >= len(piece) else piece[dropped : dropped + int(left)]
                left -= len(wanted)
                if wanted:
                    yield wanted
                if left <= 0:
                    return

    def _request(self, descriptor: Descriptor, headers: dict[str, str]) -> BaseHTTPResponse:
        try:
            return self._transport.get(f"{self._path}/blobs/{descriptor.digest}", headers, lambda response: response)
        except CrioError as error:
            if not descriptor.urls:
                raise
            problems = [str(error)]
            for url in descriptor.urls:
                try:
                    return self._transport.elsewhere(url, headers)
                except CrioError as other:
                    problems.append(f"{url[:200]!r}: {other}")
            raise Unavailable(
                f"{descriptor.digest} of {self.reference.name} is nowhere where its manifest says: "
                + "; ".join(problems[:PROBLEMS_TOLD])
            ) from None

    def _check_length(self, response: BaseHTTPResponse, expected: int, descriptor: Descriptor) -> None:
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and int(announced) != expected:
            raise Unavailable(
                f"registry {self.reference.registry} announces {announced} bytes for {descriptor.digest} of "
                f"{self.reference.repository}, whose manifest says {expected}: the image is damaged there"
            )

    # Ranges at once

    def knows_ranges(self, descriptor: Descriptor) -> bool:
        """Whether a part of a blob can be had alone."""
        response = self._request(descriptor, {"Range": "bytes=0-0"})
        response.close()
        return response.status == 206

    def _in_ranges(self, descriptor: Descriptor) -> Iterator[bytes]:
        """The ranges in order, some of them ahead of the one that is being handed out."""
        starts = iter(range(0, descriptor.size, RANGE))
        ahead: deque[Future[bytes]] = deque()
        pool = ThreadPoolExecutor(RANGES_AT_ONCE, "range")
        try:
            while True:
                while len(ahead) < RANGES_AT_ONCE and (start := next(starts, None)) is not None:
                    ahead.append(pool.submit(self.range, descriptor, start, min(start + RANGE, descriptor.size)))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def range(self, descriptor: Descriptor, start: int, end: int) -> bytes:
        """A part of a blob.  Raises Unavailable where the registry gives another length."""
        data = b"".join(self.part(descriptor, start, end))
        if len(data) != end - start:
            raise Unavailable(
                f"registry {self.reference.registry} gave {len(data)} bytes for {start}..{end} of {descriptor.digest}"
            )
        return data


def _signature_mark(response: BaseHTTPResponse) -> str:
    response.close()
    return response.headers.get("X-Registry-Supports-Signatures", "")
