"""Signatures as data: what kinds there are, how they are stored, and what the payload that is signed says.

Nothing here says that a signature is right; the fields of one are a stranger's until `gpg` or `sigstore` has judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crio_native.errors import InvalidArgument
from crio_native.images.trust import documents
from crio_native.images.trust.documents import Fields

MAX_SIGNATURE = 1 << 20  # bytes, of one with all that belongs to it
MAX_SIGNATURES = 64  # of one image and kind that are looked at
SIMPLE, SIGSTORE = "simple signing", "sigstore"
SIGSTORE_PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
_SIGSTORE_HEAD, _SIMPLE_HEAD = b"\0sigstore-json\n", b"\0simple-signing\n"
_TYPES = {SIMPLE: "atomic container signature", SIGSTORE: "cosign container image signature"}


class Invalid(Exception):
    """One signature does not count; says why, and never crosses this room's border."""


class Unmet(Exception):
    """An image does not meet a requirement; says why, and never crosses this room's border."""


@dataclass(frozen=True, slots=True)
class Signature:
    """kind: SIMPLE or SIGSTORE.  data: the OpenPGP message, or the payload, to which the annotations belong."""

    kind: str
    data: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)


def from_blob(blob: bytes) -> Signature | None:
    """A signature as lookaside stores and directories keep it; None for one of a kind that is not known."""
    if not blob.startswith(b"\0"):
        return Signature(SIMPLE, blob)
    if blob.startswith(_SIMPLE_HEAD):
        return Signature(SIMPLE, blob[len(_SIMPLE_HEAD) :])
    if not blob.startswith(_SIGSTORE_HEAD):
        return None
    try:
        fields = documents.parse(blob[len(_SIGSTORE_HEAD) :], "signature")
        media_type, payload = fields.text("mimeType"), documents.decoded(fields.take("payload", str), "payload")
        annotations = texts(fields.take("annotations", dict))
    except InvalidArgument:
        return None
    return Signature(SIGSTORE, payload, annotations) if media_type == SIGSTORE_PAYLOAD else None


def texts(annotations: object) -> dict[str, str]:
    """Annotations as they should be; what is none is left out."""
    if not isinstance(annotations, dict):
        return {}
    return {key: value for key, value in annotations.items() if isinstance(value, str)}


@dataclass(frozen=True, slots=True)
class Claim:
    """What a payload says: an image of this digest may be called so."""

    digest: str
    reference: str


def claim(payload: bytes, kind: str) -> Claim:
    """A payload's claim (containers-signature(5)).  Raises Invalid for one that says more, or less, than is known."""
    try:
        document = documents.parse(payload, "payload")
        critical = document.object("critical")
        document.take("optional", object, None)
        document.done("a signature's payload")
        found = _critical(critical, kind)
    except InvalidArgument as error:
        raise Invalid(str(error)) from None
    return found


def _critical(critical: Fields, kind: str) -> Claim:
    said = critical.text("type")
    if said != _TYPES[kind]:
        raise InvalidArgument(critical.path("type"), said, f"not {_TYPES[kind]!r}")
    image, identity = critical.object("image"), critical.object("identity")
    made = Claim(image.text("docker-manifest-digest"), identity.text("docker-reference"))
    fields: Any
    for fields in (image, identity, critical):
        fields.done("what is critical of a signature")
    return made
