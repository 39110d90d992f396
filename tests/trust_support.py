"""What the tests of trust share: keys and signatures by gpg and skopeo; keys, certificates and a transparency log made
with `cryptography`, so that each part of them can be spoiled.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crio_native.images import ImageStore, Settings
from crio_native.images.manifests import OCI_CONFIG, OCI_MANIFEST
from crio_native.images.trust.judging import Trust
from crio_native.images.trust.signatures import SIGSTORE_PAYLOAD

from .images_support import Picture, Registry

ACCEPT, REJECT = {"type": "insecureAcceptAnything"}, {"type": "reject"}


@dataclass
class Node:
    """Where a test's node keeps its policies, keys and registries.d."""

    directory: Path

    def __post_init__(self) -> None:
        for name in ("registries.d", "policies", "lookaside"):
            (self.directory / name).mkdir(parents=True)
        self.keep("registries.d/default.yaml", b"default-docker: {}\n")
        self.signatures_in(f"file://{self.directory}/lookaside")

    def signatures_in(self, lookaside: str = "", attachments: bool = False, staging: str = "") -> None:
        """What registries.d says of every registry."""
        said: dict[str, Any] = {"use-sigstore-attachments": attachments}
        if lookaside:
            said |= {"lookaside": lookaside, "lookaside-staging": staging or lookaside}
        self.keep("registries.d/default.yaml", json.dumps({"default-docker": said}).encode())

    def keep(self, name: str, data: bytes) -> str:
        path = self.directory / name
        path.write_bytes(data)
        return str(path)

    def policy(self, document: object, namespace: str = "") -> None:
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.keep(f"policies/{namespace}.json" if namespace else "policy.json", raw)

    def require(
        self, *rules: Mapping[str, Any], scope: str = "", transport: str = "docker", namespace: str = ""
    ) -> None:
        """These of the images of a scope; everything else is rejected."""
        self.policy({"default": [REJECT], "transports": {transport: {scope: list(rules)}}}, namespace)

    @property
    def trust(self) -> Trust:
        return Trust(f"{self.directory}/policy.json", f"{self.directory}/policies", f"{self.directory}/registries.d")

    @contextmanager
    def store(self, name: str = "store") -> Iterator[ImageStore]:
        made = ImageStore(self.directory / name, settings=Settings(trust=self.trust))
        try:
            yield made
        finally:
            made.close()


def run(*command: object, home: Path | None = None, stdin: bytes = b"") -> bytes:
    environment = os.environ | ({"GNUPGHOME": str(home)} if home else {})
    done = subprocess.run([*map(str, command)], input=stdin, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0, (command, done.stderr.decode())
    return done.stdout


class Gpg:
    """A GnuPG home with secret keys.  The agent that gpg starts ends with `close`."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700)
        self.home = home

    def gpg(self, *arguments: object, stdin: bytes = b"") -> bytes:
        return run("gpg", "--batch", "--quiet", "--yes", *arguments, home=self.home, stdin=stdin)

    def key(self, user: str, *options: str, expires: str = "0", algorithm: str = "ed25519") -> str:
        """Make a key; its fingerprint."""
        self.gpg(*options, "--passphrase", "", "--quick-gen-key", user, algorithm, "sign", expires)
        listed = self.gpg("--list-keys", "--with-colons", user).decode()
        return next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))

    def public(self, user: str, *, armor: bool = False) -> bytes:
        return self.gpg(*(["--armor"] if armor else []), "--export", user)

    def sign(self, user: str, payload: bytes, *options: str) -> bytes:
        return self.gpg("--local-user", user, *options, "--output", "-", "--sign", stdin=payload)

    def close(self) -> None:
        run("gpgconf", "--homedir", self.home, "--kill", "gpg-agent")


def payload(digest: str, name: str, kind: str = "atomic container signature", **more: Any) -> bytes:
    critical = {
        "type": kind,
        "image": {"docker-manifest-digest": digest},
        "identity": {"docker-reference": name},
        **more.pop("critical", {}),
    }
    return json.dumps({"critical": critical, "optional": None, **more}).encode()


def lookaside_file(node: Node, name: str, digest: str, number: int = 1) -> Path:
    """Where a signature of REGISTRY/REPOSITORY:TAG belongs."""
    repository = name.partition("/")[2].rpartition(":")[0]
    path = node.directory / "lookaside" / f"{repository}@{digest.replace(':', '=')}" / f"signature-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# Sigstore

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
COSIGN = "cosign container image signature"


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed(key: PrivateKey, data: bytes) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(hashes.SHA256()))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(data, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(data)


def signature_of(key: PrivateKey, data: bytes, **more: str) -> dict[str, str]:
    """The annotations of a layer of signatures.  more: certificate, chain, bundle."""
    extra = {f"dev.sigstore.cosign/{name}": value for name, value in more.items()}
    return {"dev.cosignproject.cosign/signature": base64.b64encode(signed(key, data)).decode()} | extra


def attach(registry: Registry, name: str, digest: str, *layers: tuple[bytes, Mapping[str, str]]) -> None:
    """Push signatures as cosign does: payloads and their annotations."""
    made = Picture()
    entries = [made.put(SIGSTORE_PAYLOAD, data) | {"annotations": dict(notes)} for data, notes in layers]
    config = {"architecture": "", "os": "", "rootfs": {"type": "layers", "diff_ids": []}, "config": {}}
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": made.put(OCI_CONFIG, json.dumps(config).encode()),
        "layers": entries,
    }
    made.manifest = {"digest": "", "mediaType": OCI_MANIFEST}
    repository = name.partition("/")[2].rpartition(":")[0]
    registry.push(repository, digest.replace(":", "-") + ".sig", made, document=document)


# The certificates outlast the longest run of the tests.
NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
MINUTE = datetime.timedelta(minutes=1)


@dataclass
class Authority:
    """A certificate authority: a root, and an intermediate that issues."""

    root_key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    def __post_init__(self) -> None:
        usage = [ExtendedKeyUsageOID.CODE_SIGNING]
        self.root = self._authority("root", self.root_key, "root", self.root_key)
        self.intermediate = self._authority("intermediate", self.key, "root", self.root_key, usage)

    @staticmethod
    def _authority(
        name: str, key: Any, issuer: str, issuer_key: Any, usage: Sequence[x509.ObjectIdentifier] = ()
    ) -> x509.Certificate:
        builder = _builder(name, key, issuer, NOW - 1000 * MINUTE, NOW + 1000 * MINUTE)
        builder = builder.add_extension(x509.BasicConstraints(True, None), True)
        bits = {"key_cert_sign": True, "crl_sign": True}
        names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement".split()
        off = dict.fromkeys([*names, "encipher_only", "decipher_only"], False)
        builder = builder.add_extension(x509.KeyUsage(**off, **bits), True)
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usage), False)
        return builder.sign(issuer_key, hashes.SHA256())

    def issue(
        self,
        key: PrivateKey,
        email: str = "dev@example.com",
        host: str = "",
        issuer: str = "https://oidc.example",
        *,
        start: datetime.datetime = NOW - 500 * MINUTE,
        end: datetime.datetime = NOW + 500 * MINUTE,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING,
        unknown: bool = False,
        contradiction: str = "",
    ) -> x509.Certificate:
        names: list[x509.GeneralName] = [x509.RFC822Name(email)] if email else []
        names += [x509.DNSName(host)] if host else []
        builder = _builder("", key, "intermediate", start, end)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        der = bytes([12, len(issuer)]) + issuer.encode()
        for oid, value in (("57264.1.8", der), ("57264.1.1", (contradiction or issuer).encode())):
            extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.3.6.1.4.1.{oid}"), value)
            builder = builder.add_extension(extension, False)
        if unknown:
            extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"?")
            builder = builder.add_extension(extension, True)
        return builder.sign(self.key, hashes.SHA256())


def _builder(
    name: str, key: Any, issuer: str, start: datetime.datetime, end: datetime.datetime
) -> x509.CertificateBuilder:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])

    builder = (
        x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer)).public_key(key.public_key())
    )
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return builder.add_extension(identifier, False)


def pem(*certificates: x509.Certificate) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


@dataclass
class Log:
    """A transparency log's word."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    def bundle(
        self, data: bytes, signature: bytes, key_pem: bytes, time: datetime.datetime = NOW, **spoilt: Any
    ) -> str:
        body = {
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": {"hash": {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}},
                "signature": {
                    "content": base64.b64encode(signature).decode(),
                    "publicKey": {"content": base64.b64encode(key_pem).decode()},
                },
            },
        } | spoilt.pop("body", {})
        entry = {
            "body": base64.b64encode(json.dumps(body).encode()).decode(),
            "integratedTime": int(time.timestamp()),
            "logIndex": 7,
            "logID": hashlib.sha256(public_pem(self.key)).hexdigest(),
        }
        canonical = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        stamp = base64.b64encode(signed(self.key, canonical)).decode()
        return json.dumps({"SignedEntryTimestamp": stamp, "Payload": entry | spoilt})
