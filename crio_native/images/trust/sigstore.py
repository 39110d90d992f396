"""Sigstore signatures: who signed, by a public key or by a certificate, and what a transparency log says of it.

A certificate of Fulcio lives for minutes, so only the log's word (Rekor's SignedEntryTimestamp) says that it was used
while it lived; one of an organisation's own PKI has to be valid now.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.images.trust import documents
from crio_native.images.trust.documents import Fields
from crio_native.images.trust.signatures import Invalid, Signature

if TYPE_CHECKING:  # cryptography is heavy, and most nodes verify nothing
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from cryptography.x509 import Certificate

PREFIX = "dev.sigstore.cosign/"
SIGNATURE = "dev.cosignproject.cosign/signature"
CERTIFICATE, CHAIN, BUNDLE = PREFIX + "certificate", PREFIX + "chain", PREFIX + "bundle"
MAX_CERTIFICATES = 16  # of one signature
MIN_RSA = 2048  # bits
# Fulcio's extensions for the issuer of the signer's identity: the older one as mere text, the newer as DER.
_ISSUER_TEXT, _ISSUER_DER = "1.3.6.1.4.1.57264.1.1", "1.3.6.1.4.1.57264.1.8"
_DER_UTF8 = 0x0C

Named = Sequence[tuple[str, bytes]]  # what it is in words, and its PEM


@dataclass(frozen=True, slots=True)
class Signer:
    """Who may sign with a certificate.  issuer: of OpenID Connect, of Fulcio's only."""

    email: str = ""
    hostname: str = ""
    issuer: str = ""


def by_key(signature: Signature, keys: Named, logs: Named | None) -> bytes:
    """The payload, if one of the keys has signed it, and, where logs are given, one of them knows of it.

    Raises Invalid; FailedPrecondition for keys that are none.
    """
    raw = _raw(signature)
    for key in [public_key(pem, what) for what, pem in keys]:
        if _signed(key, raw, signature.data):
            if logs is not None:
                with _foreign():
                    _logged(signature, raw, _der(key), logs)
            return signature.data
    raise Invalid("it was made with another key")


def by_fulcio(signature: Signature, roots: Named, signer: Signer, logs: Named) -> bytes:
    """The payload, if a certificate below the roots, given to the signer, has signed it while it was valid.

    Raises Invalid; FailedPrecondition for roots or keys that are none.
    """
    with _foreign():
        leaf, chain, raw = _certificate(signature), _certificates(signature, CHAIN), _raw(signature)
        time = _logged(signature, raw, _der(leaf.public_key()), logs, leaf)
        _check_chain(leaf, chain, trusted(roots), time)
        if _issuer(leaf) != signer.issuer:
            raise Invalid(f"its certificate is for an identity of {_issuer(leaf)!r}, not of {signer.issuer!r}")
        _check_names(leaf, signer)
        return _by(leaf, raw, signature.data)


def by_pki(signature: Signature, roots: Named, intermediates: Named, signer: Signer) -> bytes:
    """The payload, if a certificate below the roots that is valid now, given to the signer, has signed it.

    Raises Invalid; FailedPrecondition for roots that are none.
    """
    with _foreign():
        leaf, chain, raw = _certificate(signature), _certificates(signature, CHAIN), _raw(signature)
        now = datetime.datetime.now(datetime.UTC)
        _check_chain(leaf, [*chain, *trusted(intermediates)], trusted(roots), now)
        _check_names(leaf, signer)
        return _by(leaf, raw, signature.data)


@contextlib.contextmanager
def _foreign() -> Iterator[None]:
    """What a stranger's certificate or key makes the library raise is a signature that does not count."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.x509 import DuplicateExtension

    try:
        yield
    except (ValueError, UnsupportedAlgorithm, DuplicateExtension) as error:
        raise Invalid(f"it cannot be read: {error}") from None


# What the policy names


def public_key(pem: bytes, what: str) -> PublicKeyTypes:
    """Raises FailedPrecondition for what is no public key that signatures are made for."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FailedPrecondition(f"{what} is no public key in PEM: {error}") from None
    strong = isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA
    if not strong and not isinstance(key, (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)):
        raise FailedPrecondition(f"{what} is no key of ECDSA, Ed25519, or RSA with {MIN_RSA} bits")
    return key


def trusted(pems: Named) -> list[Certificate]:
    """The certificates of files that the policy names.  Raises FailedPrecondition."""
    from cryptography import x509

    found: list[Certificate] = []
    for what, pem in pems:
        try:
            found += x509.load_pem_x509_certificates(pem)
        except ValueError as error:
            raise FailedPrecondition(f"{what} holds no certificates in PEM: {error}") from None
    return found


# What the signature brings


def _raw(signature: Signature) -> bytes:
    try:
        return documents.decoded(signature.annotations.get(SIGNATURE, ""), SIGNATURE)
    except InvalidArgument as error:
        raise Invalid(str(error)) from None


def _certificate(signature: Signature) -> Certificate:
    found = _certificates(signature, CERTIFICATE)
    if len(found) != 1:
        raise Invalid(f"it brings {len(found) or 'no'} certificates in {CERTIFICATE}, not one")
    return found[0]


def _certificates(signature: Signature, annotation: str) -> list[Certificate]:
    from cryptography import x509

    pem = signature.annotations.get(annotation, "").encode()
    if not pem.strip():
        return []
    if pem.count(b"-----BEGIN") > MAX_CERTIFICATES:
        raise Invalid(f"{annotation} has more than {MAX_CERTIFICATES} certificates")
    return x509.load_pem_x509_certificates(pem)


def _der(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    made: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return made


def _signed(key: PublicKeyTypes, raw: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(raw, data, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA:
            key.verify(raw, data, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(raw, data)
        else:
            return False
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _by(leaf: Certificate, raw: bytes, data: bytes) -> bytes:
    if not _signed(leaf.public_key(), raw, data):
        raise Invalid("it does not fit its certificate's key")
    return data


# Certificates


def _check_chain(
    leaf: Certificate, chain: Sequence[Certificate], roots: Sequence[Certificate], time: datetime.datetime
) -> None:
    """RFC 5280's path validation at a time, for a certificate that may sign code (or nothing it says it may not)."""
    from cryptography import x509
    from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

    def is_authority(policy: object, certificate: object, extension: x509.BasicConstraints) -> None:
        if not extension.ca:
            raise ValueError("a certificate above it is no authority's")

    def may_certify(policy: object, certificate: object, extension: x509.KeyUsage | None) -> None:
        if extension is not None and not extension.key_cert_sign:
            raise ValueError("a certificate above it may not certify")

    def may_sign_code(policy: object, certificate: object, extension: x509.ExtendedKeyUsage) -> None:
        if x509.oid.ExtendedKeyUsageOID.CODE_SIGNING not in extension:
            raise ValueError("it is not for signing code")

    either = Criticality.AGNOSTIC
    authority = (
        ExtensionPolicy.permit_all()
        .require_present(x509.BasicConstraints, either, is_authority)
        .may_be_present(x509.KeyUsage, either, may_certify)
    )
    signer = ExtensionPolicy.permit_all().require_present(x509.ExtendedKeyUsage, either, may_sign_code)
    try:
        for certificate in (leaf, *chain):
            for extension in certificate.extensions:
                if extension.critical and isinstance(extension.value, x509.UnrecognizedExtension):
                    raise Invalid(f"its certificate has a critical extension {extension.oid.dotted_string}, unknown")
        builder = PolicyBuilder().store(Store([*roots])).time(time)
        policies = builder.extension_policies(ca_policy=authority, ee_policy=signer)
        policies.build_client_verifier().verify(leaf, [*chain])
    except VerificationError as error:
        raise Invalid(f"its certificate does not count at {time:%Y-%m-%dT%H:%M:%SZ}: {error}") from None


def _issuer(leaf: Certificate) -> str:
    """Who vouched for the signer's identity, as Fulcio writes it down; twice, then both must agree."""
    from cryptography import x509

    found = []
    for extension in leaf.extensions:
        if not isinstance(extension.value, x509.UnrecognizedExtension):
            continue
        value = extension.value.value
        if extension.oid.dotted_string == _ISSUER_DER:
            # Longer ones have a length of several bytes; no address of an issuer needs them.
            if len(value) < 2 or value[0] != _DER_UTF8 or value[1] != len(value) - 2 or value[1] > 127:
                raise Invalid("its certificate's issuer of the identity is damaged")
            found.append(value[2:])
        elif extension.oid.dotted_string == _ISSUER_TEXT:
            found.append(value)
    if not found or len(set(found)) != 1:
        raise Invalid("its certificate does not say, or contradicts itself on, who issued the identity")
    return found[0].decode("utf-8", "replace")


def _check_names(leaf: Certificate, signer: Signer) -> None:
    from cryptography import x509

    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        emails, hosts = names.get_values_for_type(x509.RFC822Name), names.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        emails, hosts = [], []
    if signer.email and signer.email not in emails:
        raise Invalid(f"its certificate is for {', '.join(emails) or 'nobody'}, not for {signer.email}")
    if signer.hostname and not any(_matches(host, signer.hostname) for host in hosts):
        raise Invalid(f"its certificate is for {', '.join(hosts) or 'no host'}, not for {signer.hostname}")


def _matches(pattern: str, host: str) -> bool:
    """RFC 6125: a star stands for the whole first label."""
    pattern, host = pattern.lower().rstrip("."), host.lower().rstrip(".")
    return pattern == host or (pattern.startswith("*.") and pattern[2:] == host.partition(".")[2] != "")


# The transparency log


def _logged(
    signature: Signature, raw: bytes, key: bytes, logs: Named, leaf: Certificate | None = None
) -> datetime.datetime:
    """When a log took this very signature down, by this key or certificate.  Raises Invalid, FailedPrecondition."""
    keys = [public_key(pem, what) for what, pem in logs]
    try:
        bundle = documents.parse(signature.annotations.get(BUNDLE, "").encode(), BUNDLE)
        promise = documents.decoded(bundle.text("SignedEntryTimestamp"), "SignedEntryTimestamp")
        entry = bundle.object("Payload")
        said = {
            "body": entry.text("body"),
            "integratedTime": entry.take("integratedTime", int),
            "logID": entry.text("logID"),
            "logIndex": entry.take("logIndex", int),
        }
        entry.done("a log entry")
        bundle.done("a log's bundle")
        # RFC 8785, whose rules for texts like these and for whole numbers are json's.
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if not any(_signed(log, promise, canonical) for log in keys):
            raise Invalid("the log's entry is not signed by the log")
        body = documents.parse(documents.decoded(said["body"], "body"), "log entry")
        _check_entry(body, raw, signature.data, key, leaf)
        return datetime.datetime.fromtimestamp(said["integratedTime"], datetime.UTC)
    except (InvalidArgument, OverflowError, OSError) as error:
        raise Invalid(f"the log's entry is unusable: {error}") from None


def _check_entry(body: Fields, raw: bytes, data: bytes, key: bytes, leaf: Certificate | None) -> None:
    """That a log's entry (hashedrekord 0.0.1) is about this signature of this payload, and no other."""
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key
    from cryptography.x509 import load_pem_x509_certificate

    if (body.text("kind"), body.text("apiVersion")) != ("hashedrekord", "0.0.1"):
        raise Invalid("the log's entry is no hashedrekord 0.0.1")
    spec = body.object("spec")
    hashed, signed = spec.object("data").object("hash"), spec.object("signature")
    if (hashed.text("algorithm"), hashed.text("value")) != ("sha256", hashlib.sha256(data).hexdigest()):
        raise Invalid("the log's entry is about another payload")
    if signed.text("content") != base64.b64encode(raw).decode():
        raise Invalid("the log's entry is about another signature")
    pem = documents.decoded(signed.object("publicKey").text("content"), "publicKey.content")
    if leaf is not None:
        same = load_pem_x509_certificate(pem).public_bytes(Encoding.DER) == leaf.public_bytes(Encoding.DER)
    else:
        same = _der(load_pem_public_key(pem)) == key
    if not same:
        raise Invalid("the log's entry is about another key")
