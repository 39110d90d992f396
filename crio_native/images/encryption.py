"""Encrypted layers (ocicrypt's format, image media types with `+encrypted`): opened with this node's private keys.

A layer's archive is AES-256-CTR with an HMAC of what is sent; the secret for it is in the manifest's annotations,
wrapped for each recipient as a JWE (RFC 7516).  Other wrappings (PGP, PKCS#7, key providers) are not opened.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crio_native.errors import InvalidArgument, PermissionRefused, Unavailable
from crio_native.images.manifests import ENCRYPTED, Descriptor

KEYS = "org.opencontainers.image.enc.keys."
WRAPPED = f"{KEYS}jwe"
PUBLIC = "org.opencontainers.image.enc.pubopts"
CIPHER = "AES_256_CTR_HMAC_SHA256"
ALGORITHMS = ["RSA-OAEP", "RSA-OAEP-256", "ECDH-ES+A128KW", "ECDH-ES+A192KW", "ECDH-ES+A256KW", "A256GCM"]
MAX_RECIPIENTS = 64
MAX_KEYS, MAX_KEY_FILE = 64, 1 << 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Secret:
    """What opens one layer."""

    key: bytes = field(repr=False)
    nonce: bytes
    mac: bytes


def is_encrypted(layer: Descriptor) -> bool:
    return layer.media_type.endswith(ENCRYPTED)


def secret_of(layer: Descriptor, keys: Path | None) -> Secret:
    """Unwrap a layer's secret with one of the private keys (PEM) in a directory.

    Raises PermissionRefused if none fits, InvalidArgument for malformed annotations.
    """
    wrapped = layer.annotations.get(WRAPPED, "").split(",")
    if not wrapped[0]:
        others = ", ".join(sorted(key.removeprefix(KEYS) for key in layer.annotations if key.startswith(KEYS)))
        raise _refused(layer, f"it is encrypted for {others or 'nobody'}, and only JWE recipients can be served")
    private = list(_private_keys(keys))
    if not private:
        raise _refused(layer, f"there is no private key in {keys or 'decryption_keys_path, which is not set'}")
    for document in wrapped[:MAX_RECIPIENTS]:
        for envelope in _envelopes(_json(layer, WRAPPED, document)):
            for key in private:
                if (plain := _unwrap(envelope, key)) is not None:
                    return _secret(layer, plain)
    raise _refused(layer, f"none of the {len(private)} private keys in {keys} is one that it was encrypted for")


def decrypted(pieces: Iterable[bytes], layer: Descriptor, secret: Secret) -> Iterator[bytes]:
    """The layer's archive.  Raises Unavailable at the end if what came was not what was encrypted."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES256(secret.key), modes.CTR(secret.nonce)).decryptor()
    mac = hmac.new(secret.key, digestmod=hashlib.sha256)
    for piece in pieces:
        mac.update(piece)
        yield cipher.update(piece)
    if not hmac.compare_digest(mac.digest(), secret.mac):
        raise Unavailable(f"layer {layer.digest} is not what was encrypted: its authentication code is another")


def _refused(layer: Descriptor, why: str) -> PermissionRefused:
    return PermissionRefused(f"layer {layer.digest} is encrypted ({layer.media_type}) and cannot be opened: {why}")


def _private_keys(directory: Path | None) -> Iterator[Any]:
    """The keys of a directory; a file that is none is passed over, and logged."""
    from joserfc.errors import JoseError
    from joserfc.jwk import ECKey, RSAKey

    if not directory or not directory.is_dir():
        return
    for path in sorted(path for path in directory.iterdir() if path.is_file())[:MAX_KEYS]:
        with path.open("rb") as file:
            raw = file.read(MAX_KEY_FILE)
        for kind in (RSAKey, ECKey):
            try:
                key = kind.import_key(raw)
            except (JoseError, ValueError):
                continue
            if key.is_private:
                yield key
                break
        else:
            log.warning("%s is no private RSA or EC key in PEM, and opens no image", path)


def _envelopes(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A JWE for each recipient: the library opens one of several only with the keys of all."""
    recipients = document.pop("recipients", None)
    if not isinstance(recipients, list):
        yield document
        return
    yield from ({**document, **recipient} for recipient in recipients[:MAX_RECIPIENTS] if isinstance(recipient, dict))


def _unwrap(envelope: Any, key: Any) -> bytes | None:
    from joserfc import jwe
    from joserfc.errors import JoseError

    try:
        return jwe.decrypt_json(envelope, key, algorithms=ALGORITHMS).plaintext
    except (JoseError, ValueError, KeyError, TypeError):  # for another key, or of no sense
        return None


def _secret(layer: Descriptor, plain: bytes) -> Secret:
    public = _json(layer, PUBLIC, layer.annotations.get(PUBLIC, ""))
    try:
        private = json.loads(plain)
        key, nonce = base64.b64decode(private["symkey"]), base64.b64decode(private["cipheroptions"]["nonce"])
        mac, cipher = base64.b64decode(public["hmac"]), public["cipher"]
    except (ValueError, KeyError, TypeError, RecursionError):
        key = nonce = mac = cipher = b""
    if cipher != CIPHER or (len(key), len(nonce), len(mac)) != (32, 16, 32):
        raise InvalidArgument(f"layer {layer.digest}", cipher, f"malformed encryption options; the cipher is {CIPHER}")
    return Secret(key, nonce, mac)


def _json(layer: Descriptor, name: str, encoded: str) -> dict[str, Any]:
    try:
        document = json.loads(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InvalidArgument(f"layer {layer.digest}: annotation {name}", encoded, "not a JSON object in base64")
    return document
