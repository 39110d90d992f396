"""The requirements of a policy: each kind, how it is written, and how it judges an image.

A requirement that is not met says why in words; which requirement it was, and for what image, is added by `judging`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from crio_native.errors import InvalidArgument
from crio_native.images.references import Reference
from crio_native.images.trust import documents, gpg, identities, signatures, sigstore
from crio_native.images.trust.documents import Fields
from crio_native.images.trust.identities import Identity
from crio_native.images.trust.signatures import SIGSTORE, SIMPLE, Invalid, Signature, Unmet
from crio_native.images.trust.sigstore import Signer

_SEVERAL = ("Path", "Paths", "Data", "Datas")
REASONS = 4  # of refused signatures that a message tells


class Subject(Protocol):
    """An image that is judged.  reference: None for one without a name."""

    @property
    def reference(self) -> Reference | None: ...

    def signatures(self, kind: str) -> Iterator[tuple[str, Signature]]:
        """Its signatures of a kind, each with the digest of the image's that it was found with."""


@dataclass(frozen=True, slots=True)
class Material:
    """Keys or certificates, in files or in the policy itself.  where: what they are in words."""

    where: str
    paths: tuple[str, ...] = ()
    data: tuple[bytes, ...] = ()

    def read(self) -> list[tuple[str, bytes]]:
        """Each with what it is in words.  Raises FailedPrecondition for a file that cannot be read."""
        files = [(f"{self.where} {path}", documents.read(path, self.where)) for path in self.paths]
        return files + [(self.where, data) for data in self.data]

    def __bool__(self) -> bool:
        return bool(self.paths or self.data)


class Rule(Protocol):
    """A requirement of a policy.  kind: its `type`."""

    @property
    def kind(self) -> str: ...

    def check(self, subject: Subject) -> None:
        """Raises Unmet; FailedPrecondition where the node lacks what it takes to judge."""

    def material(self) -> tuple[Material, ...]:
        """All keys and certificates that it stands on."""


@dataclass(frozen=True, slots=True)
class Accept:
    kind: str = "insecureAcceptAnything"

    def check(self, subject: Subject) -> None:
        pass

    def material(self) -> tuple[Material, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Reject:
    """Nothing meets it.  why: in words."""

    kind: str = "reject"
    why: str = "it rejects every image"

    def check(self, subject: Subject) -> None:
        raise Unmet(self.why)

    def material(self) -> tuple[Material, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class SignedBy:
    """Simple signing, by OpenPGP keys."""

    keys: Material
    identity: Identity
    kind: str = "signedBy"

    def check(self, subject: Subject) -> None:
        ring = b"".join(gpg.keyring(key, what) for what, key in self.keys.read())
        _one_of(subject, SIMPLE, self.identity, lambda signature: gpg.verified(signature.data, ring))

    def material(self) -> tuple[Material, ...]:
        return (self.keys,)


@dataclass(frozen=True, slots=True)
class SigstoreSigned:
    """Sigstore, by one of: public keys, Fulcio's certificates, certificates of another PKI."""

    identity: Identity
    keys: Material | None = None
    fulcio: Material | None = None
    roots: Material | None = None
    intermediates: Material | None = None
    signer: Signer = field(default_factory=Signer)
    logs: Material | None = None
    kind: str = "sigstoreSigned"

    def check(self, subject: Subject) -> None:
        _one_of(subject, SIGSTORE, self.identity, self._judge())

    def _judge(self) -> Callable[[Signature], bytes]:
        logs = self.logs.read() if self.logs else None
        if self.keys:
            keys = self.keys.read()
            for what, pem in keys:  # a file that holds none is named, whatever else would do
                sigstore.public_key(pem, what)
            return lambda signature: sigstore.by_key(signature, keys, logs)
        if self.fulcio:
            authorities = self.fulcio.read()
            return lambda signature: sigstore.by_fulcio(signature, authorities, self.signer, logs or [])
        assert self.roots
        roots, between = self.roots.read(), self.intermediates.read() if self.intermediates else []
        return lambda signature: sigstore.by_pki(signature, roots, between, self.signer)

    def material(self) -> tuple[Material, ...]:
        return tuple(m for m in (self.keys, self.fulcio, self.roots, self.intermediates, self.logs) if m)


def _one_of(subject: Subject, kind: str, identity: Identity, judge: Callable[[Signature], bytes]) -> None:
    """That one signature at least is right, about this image, and about its name."""
    reasons: dict[str, None] = {}  # in order, each once
    for digest, signature in subject.signatures(kind):
        try:
            claim = signatures.claim(judge(signature), kind)
            if claim.digest != digest:
                raise Invalid(f"it is for the image {claim.digest}, not {digest}")
            if not identity.accepts(claim.reference, subject.reference):
                raise Invalid(f"it is for the name {claim.reference!r}, which {identity.kind} does not accept")
            return
        except Invalid as error:
            reasons[str(error)] = None
    if not reasons:
        raise Unmet(f"a signature ({kind}) is required, and there is none")
    told = list(reasons)[:REASONS]
    raise Unmet(f"no signature ({kind}) counts: " + "; ".join(told) + (", ..." if len(reasons) > REASONS else ""))


# Reading them


def parse(value: object, where: str) -> Rule:
    """A requirement of a policy.  Raises InvalidArgument with the path of what is wrong."""
    fields = Fields(value, where, top=False)
    kind = fields.text("type")
    if kind not in _PARSERS:
        raise InvalidArgument(fields.path("type"), kind, "not one of " + ", ".join(_PARSERS))
    rule = _PARSERS[kind](fields)
    fields.done(f"a requirement of the type {kind}")
    return rule


def _signed_by(fields: Fields) -> Rule:
    key_type = fields.text("keyType")
    if key_type != "GPGKeys":
        raise InvalidArgument(fields.path("keyType"), key_type, "not GPGKeys")
    keys = _material(fields, "key", "OpenPGP key", ("Path", "Paths", "Data"))
    if not keys:
        raise InvalidArgument(fields.where, None, "needs one of keyPath, keyPaths and keyData")
    return SignedBy(keys, _identity(fields))


def _sigstore_signed(fields: Fields) -> Rule:
    given = [key for key in fields.names() if key in ("keyPath", "keyPaths", "keyData", "keyDatas", "fulcio", "pki")]
    if len(given) != 1:
        known = "keyPath, keyPaths, keyData, keyDatas, fulcio and pki"
        raise InvalidArgument(fields.where, given, f"needs exactly one of {known}")
    logs = _material(fields, "rekorPublicKey", "key of the transparency log", _SEVERAL)
    if fields.has("fulcio"):
        if not logs:
            raise InvalidArgument(
                fields.where, None, "fulcio needs a rekorPublicKey, whose log says when it was signed"
            )
        return _fulcio(fields.object("fulcio"), _identity(fields), logs)
    if fields.has("pki"):
        if logs:
            raise InvalidArgument(fields.where, None, "a rekorPublicKey does not go with pki")
        return _pki(fields.object("pki"), _identity(fields))
    keys = _material(fields, "key", "public key", _SEVERAL)
    return SigstoreSigned(_identity(fields), keys=keys, logs=logs or None)


def _fulcio(fields: Fields, identity: Identity, logs: Material) -> Rule:
    roots = _authorities(fields, "ca", "authority of Fulcio")
    signer = Signer(fields.text("subjectEmail"), issuer=fields.text("oidcIssuer"))
    fields.done("fulcio")
    return SigstoreSigned(identity, fulcio=roots, signer=signer, logs=logs)


def _pki(fields: Fields, identity: Identity) -> Rule:
    roots = _authorities(fields, "caRoots", "root authority")
    between = _material(fields, "caIntermediates", "intermediate authority")
    names = {key: fields.text(key) for key in ("subjectEmail", "subjectHostname") if fields.has(key)}
    if not names:
        raise InvalidArgument(fields.where, None, "needs subjectEmail or subjectHostname, or anybody could sign")
    fields.done("pki")
    signer = Signer(names.get("subjectEmail", ""), names.get("subjectHostname", ""))
    return SigstoreSigned(identity, roots=roots, intermediates=between or None, signer=signer)


def _authorities(fields: Fields, stem: str, what: str) -> Material:
    found = _material(fields, stem, what)
    if not found:
        raise InvalidArgument(fields.where, None, f"needs {stem}Path or {stem}Data")
    return found


def _material(fields: Fields, stem: str, what: str, suffixes: tuple[str, ...] = ("Path", "Data")) -> Material:
    """What STEMPath, STEMPaths, STEMData or STEMDatas give, as far as they are known here; only one may be there."""
    keys = [stem + suffix for suffix in suffixes if fields.has(stem + suffix)]
    if not keys:
        return Material(what)
    if len(keys) > 1:
        raise InvalidArgument(fields.where, keys, "has more than one of these, which exclude each other")
    texts = fields.texts(keys[0]) if keys[0].endswith("s") else (fields.text(keys[0]),)
    if "Data" in keys[0]:
        return Material(what, data=tuple(documents.decoded(text, fields.path(keys[0])) for text in texts))
    for path in texts:
        if not path.startswith("/") or "\0" in path:
            raise InvalidArgument(fields.path(keys[0]), path, "not an absolute path")
    return Material(what, texts)


def _identity(fields: Fields) -> Identity:
    return identities.parse(fields.object("signedIdentity")) if fields.has("signedIdentity") else Identity()


def _signed_base_layer(fields: Fields) -> Rule:
    identities.parse(fields.object("baseLayerIdentity"))
    return Reject("signedBaseLayer", "signatures of base layers are not defined, so nothing meets it")


_PARSERS: dict[str, Callable[[Fields], Rule]] = {
    "insecureAcceptAnything": lambda fields: Accept(),
    "reject": lambda fields: Reject(),
    "signedBy": _signed_by,
    "signedBaseLayer": _signed_base_layer,
    "sigstoreSigned": _sigstore_signed,
}


def fingerprint(rules: Sequence[tuple[Rule, Any]]) -> str:
    """Of requirements (with their JSON) and all they stand on: another one when a key file has changed.

    Raises FailedPrecondition for a file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps([raw for _, raw in rules], sort_keys=True).encode())
    for rule, _ in rules:
        for material in rule.material():
            for _, content in material.read():
                digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
