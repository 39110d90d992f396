"""Sigstore: signatures of public keys, of Fulcio's and a PKI's certificates, and what is wrong with them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from crio_native.errors import UntrustedImage
from crio_native.images.manifests import OCI_CONFIG, OCI_MANIFEST
from crio_native.images.trust.signatures import SIGSTORE_PAYLOAD

from ..images_support import BASE, Picture, Registry, assert_nothing_left, picture, registry
from ..trust_support import (
    ACCEPT,
    COSIGN,
    MINUTE,
    NOW,
    Authority,
    Log,
    Node,
    attach,
    new_key,
    payload,
    pem,
    public_pem,
    run,
    signature_of,
    signed,
)

__all__ = ["registry"]

pytestmark = pytest.mark.root

MAIL, ISSUER = "dev@example.com", "https://oidc.example"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path / "node")
    made.signatures_in(f"file://{made.directory}/lookaside", attachments=True)
    return made


@pytest.fixture
def app(registry: Registry) -> tuple[str, str]:
    """An image in the registry: its name and its digest."""
    image = picture(BASE, config={"author": "sigstore"})
    return registry.push("sigstore/app", "v1", image), image.manifest["digest"]


def claim(app: tuple[str, str], **more: Any) -> bytes:
    return payload(app[1], app[0], COSIGN, **more)


def data(text: bytes | str) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def by_key(key: Any, **more: Any) -> dict[str, Any]:
    return {"type": "sigstoreSigned", "keyData": data(public_pem(key)), **more}


def judge(node: Node, name: str) -> str:
    """ "" where the image is pulled, else why not."""
    with node.store() as store:
        try:
            store.pull(name)
        except UntrustedImage as error:
            assert_nothing_left(node.directory / "store")
            return str(error)
    return ""


def test_what_openssl_signed_is_pulled(registry: Registry, node: Node, app: tuple[str, str]) -> None:
    """Key and signature by a tool that knows neither us nor the library that we judge with."""
    private, public = node.keep("key", b""), node.keep("key.pub", b"")
    run("openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", private)
    run("openssl", "ec", "-in", private, "-pubout", "-out", public)
    raw = run("openssl", "dgst", "-sha256", "-sign", private, stdin=claim(app))
    attach(registry, *app, (claim(app), {"dev.cosignproject.cosign/signature": data(raw)}))
    node.require({"type": "sigstoreSigned", "keyPath": public}, scope=f"{registry.address}/sigstore")
    right = Path(public).read_bytes()
    Path(public).write_bytes(public_pem(new_key()))
    assert "it was made with another key" in judge(node, app[0])
    Path(public).write_bytes(right)
    assert judge(node, app[0]) == ""


# What skopeo 1.22 (`copy --sign-by-sigstore-private-key`) attached to an image; Debian's skopeo is built without that.
BY_SKOPEO = {
    "name": "127.0.0.1:34489/sigstore/by-skopeo:v1",
    "key": (
        "-----BEGIN PUBLIC KEY-----\n"
        "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEywCBM5PQZfdxc6Sr/o0+WjFa1ls8\n"
        "YTcvH2airQ+XwFh+Ub3TQ4eh1MJGogFByOjzvmPRAp66FWNSiuva1qe6cw==\n"
        "-----END PUBLIC KEY-----\n"
    ),
    "signature": "MEYCIQDtNn5RcQ64lbu8YrL6pUqjbjBz27hVsdVm3+pkLp44MQIhAInjxMSjeTINDBj64U06C9pSK9AVrfqRYEvsx/RwlVB+",
    "payload": (
        '{"critical":{"identity":{"docker-reference":"127.0.0.1:34489/sigstore/by-skopeo:v1"},"image":{"d'
        'ocker-manifest-digest":"sha256:1d03b10080c88150b3a169d2aa8e3c127fd51170f3e111382fd335e38466f2f3"'
        '},"type":"cosign container image signature"},"optional":{"creator":"containers/image 5.40.0-dev"'
        ',"timestamp":1795384373}}'
    ),
    "config": (
        '{"architecture":"","os":"","rootfs":{"type":"layers","diff_ids":["sha256:6da037a12429d8c938fd317'
        'eadd93471d60b8f0ee96bcc25b4af035974479127"]}}'
    ),
}


@pytest.mark.parametrize("how", ["right", "another key", "another name", "another signature", "another payload"])
def test_what_skopeo_signed_with_sigstore_is_pulled(registry: Registry, node: Node, how: str) -> None:
    image = picture(BASE, compress=False, config={"architecture": "amd64", "os": "linux", "author": "skopeo"})
    repository = f"sigstore/by-skopeo-{how.replace(' ', '-')}"
    name = registry.push(repository, "v1", image)
    key, text, signature = BY_SKOPEO["key"], BY_SKOPEO["payload"], base64.b64decode(BY_SKOPEO["signature"])
    assert image.manifest["digest"] in text
    if how == "another key":
        key = public_pem(new_key()).decode()
    elif how == "another signature":
        signature = signature[:-1] + bytes([signature[-1] ^ 1])
    elif how == "another payload":
        text = text.replace("containers/image", "containers/Image")
    attachment = Picture()
    layer = attachment.put(SIGSTORE_PAYLOAD, text.encode())
    layer["annotations"] = {"dev.cosignproject.cosign/signature": data(signature)}
    config = attachment.put(OCI_CONFIG, BY_SKOPEO["config"].encode())
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer]}
    attachment.manifest = {"digest": ""}
    registry.push(repository, image.manifest["digest"].replace(":", "-") + ".sig", attachment, document=document)
    whom = "example.com/other:v1" if how == "another name" else BY_SKOPEO["name"]
    identity = {"type": "exactReference", "dockerReference": whom}
    node.require({"type": "sigstoreSigned", "keyData": data(key), "signedIdentity": identity})
    said = judge(node, name)
    assert said == "" if how == "right" else "no signature (sigstore) counts" in said


def test_without_attachments_in_registries_d_there_are_none(
    registry: Registry, node: Node, app: tuple[str, str]
) -> None:
    key = new_key()
    attach(registry, *app, (claim(app), signature_of(key, claim(app))))
    node.require(by_key(key))
    node.signatures_in(f"file://{node.directory}/lookaside")
    assert "a signature (sigstore) is required, and there is none" in judge(node, app[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["P-256", "P-384", "RSA", "Ed25519"],
)
def test_keys_of_each_algorithm(registry: Registry, node: Node, app: tuple[str, str], make: Any) -> None:
    key = make()
    attach(registry, *app, (claim(app), signature_of(key, claim(app))))
    node.require(by_key(key))
    assert judge(node, app[0]) == ""


def test_one_right_signature_among_wrong_ones_will_do(registry: Registry, node: Node, app: tuple[str, str]) -> None:
    key, other = new_key(), new_key()
    wrong = payload(app[1], "elsewhere.example/app:v1", COSIGN)
    layers = [(wrong, signature_of(key, wrong)), (claim(app), {}), (claim(app), signature_of(key, claim(app)))]
    attach(registry, *app, *layers)
    keys = [data(public_pem(other)), data(public_pem(key))]
    node.require({"type": "sigstoreSigned", "keyDatas": keys})
    assert judge(node, app[0]) == ""


def test_a_signature_of_the_repository_alone_is_for_matchRepository(
    registry: Registry, node: Node, app: tuple[str, str]
) -> None:
    key, text = new_key(), payload(app[1], app[0][:-3], COSIGN)  # as cosign writes it
    attach(registry, *app, (text, signature_of(key, text)))
    node.require(by_key(key))
    assert "which matchRepoDigestOrExact does not accept" in judge(node, app[0])
    node.require(by_key(key, signedIdentity={"type": "matchRepository"}))
    assert judge(node, app[0]) == ""


def test_sigstore_signatures_in_a_lookaside_store(node: Node, app: tuple[str, str]) -> None:
    key = new_key()
    document = {
        "mimeType": "application/vnd.dev.cosign.simplesigning.v1+json",
        "payload": data(claim(app)),
        "annotations": signature_of(key, claim(app)),
    }
    path = node.directory / f"lookaside/sigstore/app@{app[1].replace(':', '=')}/signature-1"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0sigstore-json\n" + json.dumps(document).encode())
    node.require(by_key(key))
    assert judge(node, app[0]) == ""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("no signature", "it was made with another key"),
        ("no base64", "not base64"),
        ("another payload", "it was made with another key"),
        ("another digest", "it is for the image sha256:0000"),
        ("simple signing", "not 'cosign container image signature'"),
        ("huge", "there is none"),
        ("other media type", "there is none"),
        ("no manifest", "its signatures are damaged"),
    ],
)
def test_a_wrong_attachment_is_refused(
    registry: Registry, node: Node, app: tuple[str, str], how: str, why: str
) -> None:
    key, good = new_key(), claim(app)
    right = signature_of(key, good)
    other = payload("sha256:" + "0" * 64, app[0], COSIGN)
    simple = payload(app[1], app[0])
    huge = claim(app, optional={"x": "y" * (2 << 20)})
    layers: dict[str, tuple[bytes, Mapping[str, str]]] = {
        "no signature": (good, {}),
        "no base64": (good, {"dev.cosignproject.cosign/signature": "?"}),
        "another payload": (claim(app, optional={"replaced": True}), right),
        "another digest": (other, signature_of(key, other)),
        "simple signing": (simple, signature_of(key, simple)),
        "huge": (huge, signature_of(key, huge)),
    }
    if how in layers:
        attach(registry, *app, layers[how])
    else:
        image = picture(BASE)
        document = json.loads(image.blobs[image.manifest["digest"]])
        if how == "no manifest":
            document = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}
        registry.push("sigstore/app", app[1].replace(":", "-") + ".sig", image, document=document)
    node.require(by_key(key))
    text = judge(node, app[0])
    assert text.startswith("SignatureValidationFailed: ") and why in text


@pytest.mark.parametrize("kind", ["weak", "P-256 private", "text", "X25519"])
def test_a_key_that_cannot_sign_is_named(node: Node, app: tuple[str, str], kind: str) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    keys: dict[str, bytes] = {
        "weak": public_pem(rsa.generate_private_key(65537, 1024)),
        "P-256 private": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "text": b"key",
        "X25519": public_pem(X25519PrivateKey.generate()),  # type: ignore[arg-type]
    }
    path = node.keep("key.pub", keys[kind])
    node.require({"type": "sigstoreSigned", "keyPath": path})
    assert f"public key {path} is no " in judge(node, app[0])


# The transparency log


def logged(key: Any, text: bytes, log: Log, key_pem: bytes, **spoilt: Any) -> dict[str, str]:
    notes = signature_of(key, text)
    raw = base64.b64decode(notes["dev.cosignproject.cosign/signature"])
    return notes | {"dev.sigstore.cosign/bundle": log.bundle(text, raw, key_pem, **spoilt)}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("right", ""),
        ("missing", "the log's entry is unusable"),
        ("another log", "not signed by the log"),
        ("changed", "not signed by the log"),
        ("another payload", "about another payload"),
        ("another signature", "about another signature"),
        ("another key", "about another key"),
        ("another kind", "no hashedrekord"),
        ("no key", "it cannot be read"),
        ("unknown curve", "it cannot be read"),
    ],
)
def test_the_logs_word(registry: Registry, node: Node, app: tuple[str, str], how: str, why: str) -> None:
    key, log, text = new_key(), Log(), claim(app)
    own = public_pem(key)
    notes = {
        "right": lambda: logged(key, text, log, own),
        "missing": lambda: signature_of(key, text),
        "another log": lambda: logged(key, text, Log(), own),
        "changed": lambda: logged(key, text, log, own, logIndex=8),
        "another payload": lambda: signature_of(key, text, bundle=log.bundle(b"other", signed(key, text), own)),
        "another signature": lambda: signature_of(key, text, bundle=log.bundle(text, signed(key, text), own)),
        "another key": lambda: logged(key, text, log, public_pem(new_key())),
        "another kind": lambda: logged(key, text, log, own, body={"kind": "intoto"}),
        "no key": lambda: logged(key, text, log, b"-----"),
        "unknown curve": lambda: logged(key, text, log, unknown_curve(own)),
    }[how]()
    attach(registry, *app, (text, notes))
    node.require(by_key(key, rekorPublicKeyData=data(public_pem(log.key))))
    assert why in (found := judge(node, app[0])) and bool(found) == bool(why)


def unknown_curve(text: bytes) -> bytes:
    """The same key or certificate, on a curve that nobody knows."""
    first, *lines, last = text.decode().splitlines()
    der = base64.b64decode("".join(lines)).replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d03017f"))
    return f"{first}\n{base64.encodebytes(der).decode()}{last}\n".encode()


# Certificates


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("right", ""),
        ("signed after its end", "its certificate does not count at"),
        ("signed before its start", "its certificate does not count at"),
        ("another email", "is for other@example.com, not for dev@example.com"),
        ("no email", "is for nobody"),
        ("another issuer", "for an identity of 'https://evil.example'"),
        ("two issuers", "contradicts itself"),
        ("another authority", "its certificate does not count"),
        ("no chain", "its certificate does not count"),
        ("not for code", "not for signing code"),
        ("critical and unknown", "1.2.3.4"),
        ("another key", "does not fit its certificate's key"),
        ("a leaf that issues", "its certificate does not count"),
        ("no certificate", "no certificates in dev.sigstore.cosign/certificate"),
        ("two certificates", "2 certificates in dev.sigstore.cosign/certificate"),
        ("damaged", "it cannot be read"),
        ("unknown curve", "it cannot be read"),
        ("a hundred in the chain", "more than 16 certificates"),
        ("not logged", "the log's entry is unusable"),
        ("logged for another certificate", "about another key"),
    ],
)
def test_fulcios_certificates(registry: Registry, node: Node, app: tuple[str, str], how: str, why: str) -> None:
    authority, log, key, text = Authority(), Log(), new_key(), claim(app)
    issued: dict[str, dict[str, Any]] = {
        "another email": {"email": "other@example.com"},
        "no email": {"email": "", "host": "example.com"},
        "another issuer": {"issuer": "https://evil.example"},
        "two issuers": {"contradiction": "https://evil.example"},
        "not for code": {"usage": ExtendedKeyUsageOID.SERVER_AUTH},
        "critical and unknown": {"unknown": True},
    }
    leaf = authority.issue(key, **issued.get(how, {}))
    chain = [authority.intermediate]
    if how == "another authority":
        leaf, chain = (other := Authority()).issue(key), [other.intermediate, other.root]
    elif how == "no chain":
        chain = []
    elif how == "a hundred in the chain":
        chain = chain * 100
    elif how == "a leaf that issues":
        below = Authority(key=key)
        chain, key = [leaf, authority.intermediate], new_key()
        leaf = below.issue(key)
    notes = signature_of(new_key() if how == "another key" else key, text, certificate=pem(leaf), chain=pem(*chain))
    raw = base64.b64decode(notes["dev.cosignproject.cosign/signature"])
    moments = {"signed after its end": NOW + 501 * MINUTE, "signed before its start": NOW - 501 * MINUTE}
    logged_as = pem(authority.issue(key) if how == "logged for another certificate" else leaf).encode()
    notes["dev.sigstore.cosign/bundle"] = log.bundle(text, raw, logged_as, time=moments.get(how, NOW))
    notes |= {
        "no certificate": {"dev.sigstore.cosign/certificate": ""},
        "two certificates": {"dev.sigstore.cosign/certificate": pem(leaf, leaf)},
        "damaged": {"dev.sigstore.cosign/certificate": pem(leaf)[:200]},
        "unknown curve": {"dev.sigstore.cosign/certificate": unknown_curve(pem(leaf).encode()).decode()},
        "not logged": {"dev.sigstore.cosign/bundle": "{}"},
    }.get(how, {})
    attach(registry, *app, (text, notes))
    fulcio = {"caData": data(pem(authority.root)), "oidcIssuer": ISSUER, "subjectEmail": MAIL}
    node.require({"type": "sigstoreSigned", "fulcio": fulcio, "rekorPublicKeyData": data(public_pem(log.key))})
    found = judge(node, app[0])
    assert why in found and bool(found) == bool(why)


def test_a_certificate_that_has_ended_counts_when_it_was_used(
    registry: Registry, node: Node, app: tuple[str, str]
) -> None:
    authority, log, key, text = Authority(), Log(), new_key(), claim(app)
    leaf = authority.issue(key, start=NOW - 60 * MINUTE, end=NOW - 50 * MINUTE)
    notes = logged(key, text, log, pem(leaf).encode(), time=NOW - 55 * MINUTE)
    notes |= {"dev.sigstore.cosign/certificate": pem(leaf), "dev.sigstore.cosign/chain": pem(authority.intermediate)}
    attach(registry, *app, (text, notes))
    root, log_key = node.keep("root.pem", pem(authority.root).encode()), node.keep("log.pub", public_pem(log.key))
    fulcio = {"caPath": root, "oidcIssuer": ISSUER, "subjectEmail": MAIL}
    node.require({"type": "sigstoreSigned", "fulcio": fulcio, "rekorPublicKeyPath": log_key})
    assert judge(node, app[0]) == ""


@pytest.mark.parametrize(
    ("issued", "asked", "between", "why"),
    [
        ({}, {"subjectEmail": MAIL}, True, ""),
        ({"host": "ci.example.com"}, {"subjectHostname": "ci.example.com"}, True, ""),
        ({"host": "*.example.com"}, {"subjectHostname": "ci.example.com"}, True, ""),
        ({"host": "*.example.com"}, {"subjectHostname": "a.b.example.com"}, True, "not for a.b.example.com"),
        ({"host": "evil.example"}, {"subjectEmail": MAIL, "subjectHostname": "ci.example.com"}, True, "not for ci."),
        ({"email": "other@example.com"}, {"subjectEmail": MAIL}, True, "not for dev@example.com"),
        ({}, {"subjectEmail": MAIL}, False, "does not count"),
        ({"start": NOW - 9 * MINUTE, "end": NOW - MINUTE}, {"subjectEmail": MAIL}, True, "does not count at"),
        ({"usage": ExtendedKeyUsageOID.CLIENT_AUTH}, {"subjectEmail": MAIL}, True, "not for signing code"),
    ],
)
def test_certificates_of_ones_own(
    registry: Registry,
    node: Node,
    app: tuple[str, str],
    issued: dict[str, Any],
    asked: dict[str, str],
    between: bool,
    why: str,
) -> None:
    authority, key, text = Authority(), new_key(), claim(app)
    attach(registry, *app, (text, signature_of(key, text, certificate=pem(authority.issue(key, **issued)))))
    pki = asked | {"caRootsData": data(pem(authority.root))}
    if between:
        pki["caIntermediatesPath"] = node.keep("between.pem", pem(authority.intermediate).encode())
    node.require(ACCEPT, {"type": "sigstoreSigned", "pki": pki})
    found = judge(node, app[0])
    assert why in found and bool(found) == bool(why)
