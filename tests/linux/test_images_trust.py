"""Simple signing: what gpg and skopeo signed is pulled, and everything else is refused with the rule that says so."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import FailedPrecondition, InvalidArgument, UntrustedImage
from crio_native.images import ImageStore, Settings
from crio_native.images.credentials import Keychain
from crio_native.images.manifests import OCI_INDEX
from crio_native.images.registries_conf import Paths

from ..images_support import (
    BASE,
    HostileRegistry,
    Picture,
    Registry,
    assert_nothing_left,
    hostile,
    picture,
    registry,
    reply,
    skopeo,
    write_layout,
)
from ..trust_support import ACCEPT, REJECT, Gpg, Node, lookaside_file, payload, run

__all__ = ["hostile", "registry"]

pytestmark = pytest.mark.root

ALICE, BOB = "alice@example.com", "bob@example.com"


@pytest.fixture(scope="module")
def gpg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpg]:
    made = Gpg(tmp_path_factory.mktemp("gpg") / "home")
    made.key(ALICE)
    made.key(BOB, algorithm="rsa2048")
    yield made
    made.close()


@pytest.fixture
def node(tmp_path: Path, gpg: Gpg) -> Node:
    made = Node(tmp_path / "node")
    made.keep("alice.gpg", gpg.public(ALICE))
    made.keep("bob.asc", gpg.public(BOB, armor=True))
    return made


def signed_by(node: Node, *keys: str, **more: Any) -> dict[str, Any]:
    paths = [f"{node.directory}/{key}" for key in keys or ("alice.gpg",)]
    given = {"keyPath": paths[0]} if len(paths) == 1 else {"keyPaths": paths}
    return {"type": "signedBy", "keyType": "GPGKeys", **given, **more}


def push(registry: Registry | HostileRegistry, repository: str, tag: str = "v1") -> tuple[str, str, Picture]:
    """An image of its own in a registry: its name, its digest."""
    image = picture(BASE, config={"author": repository})
    if isinstance(registry, HostileRegistry):
        name = registry.serve(repository, image, tag)
    else:
        name = registry.push(repository, tag, image)
    return name, image.manifest["digest"], image


def refusal(node: Node, name: str, namespace: str = "") -> str:
    """Why an image is refused; nothing of it stays."""
    with node.store() as store:
        with pytest.raises(UntrustedImage) as caught:
            store.pull(name, namespace=namespace)
        assert not store.list()
        assert_nothing_left(node.directory / "store")
    text = str(caught.value)
    assert text.startswith("SignatureValidationFailed: ") and len(text) < 1500 and text.isprintable()
    return text


# Who signed


def test_what_skopeo_signed_is_pulled(registry: Registry, node: Node, gpg: Gpg, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE))
    name = f"{registry.address}/signed/by-skopeo:v1"
    command = ["skopeo", "--insecure-policy", "--registries.d", node.directory / "registries.d", "copy"]
    command += ["--dest-tls-verify=false", "--sign-by", ALICE, f"oci:{layout}:latest", f"docker://{name}"]
    run(*command, home=gpg.home)
    node.require(signed_by(node), scope=f"{registry.address}/signed")
    with node.store() as store:
        assert name in store.pull(name).names
    node.require(signed_by(node, "bob.asc"), scope=f"{registry.address}/signed")
    with node.store("other") as store, pytest.raises(UntrustedImage, match="made with another key"):
        store.pull(name)


@pytest.mark.parametrize("key", ["alice.gpg", "bob.asc"])
def test_keys_are_binary_or_armored(registry: Registry, node: Node, gpg: Gpg, key: str) -> None:
    name, digest, _ = push(registry, "signed/forms")
    lookaside_file(node, name, digest).write_bytes(gpg.sign(key[:3], payload(digest, name)))
    node.require(signed_by(node, key))
    with node.store() as store:
        store.pull(name)


def test_any_of_several_keys_will_do(registry: Registry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(registry, "signed/several")
    lookaside_file(node, name, digest).write_bytes(gpg.sign(BOB, payload(digest, name)))
    node.require(signed_by(node, "alice.gpg", "bob.asc"))
    with node.store() as store:
        store.pull(name)


def test_keys_may_be_in_the_policy_itself(registry: Registry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(registry, "signed/data")
    lookaside_file(node, name, digest).write_bytes(gpg.sign(ALICE, payload(digest, name)))
    data = base64.b64encode(gpg.public(ALICE)).decode()
    node.require({"type": "signedBy", "keyType": "GPGKeys", "keyData": data})
    with node.store() as store:
        store.pull(name)


def test_each_requirement_has_to_be_met(registry: Registry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(registry, "signed/both")
    lookaside_file(node, name, digest).write_bytes(gpg.sign(ALICE, payload(digest, name)))
    node.require(ACCEPT, signed_by(node), signed_by(node, "bob.asc"))
    assert '.docker[""][2] (signedBy)' in refusal(node, name)
    lookaside_file(node, name, digest, 2).write_bytes(gpg.sign(BOB, payload(digest, name)))
    with node.store() as store:
        store.pull(name)


# What is not signed right


def test_no_signature_is_a_refusal_that_names_the_rule(registry: Registry, node: Node) -> None:
    name, _, _ = push(registry, "unsigned/app")
    node.require(signed_by(node), scope=f"{registry.address}/unsigned")
    expected = f'{node.directory}/policy.json: transports.docker["{registry.address}/unsigned"][0] (signedBy): '
    assert (
        f"image {name} is refused by {expected}a signature (simple signing) is required, and there is none"
        in refusal(node, name)
    )


def spoil(gpg: Gpg, digest: str, name: str, how: str) -> bytes:
    """A signature of ALICE's that is wrong in one way."""
    good = payload(digest, name)
    if how == "flipped":
        message = bytearray(gpg.sign(ALICE, good, "--compress-algo", "none"))
        message[message.index(b"atomic")] ^= 1
        return bytes(message)
    if how == "detached":
        return gpg.gpg("--local-user", ALICE, "--output", "-", "--detach-sign", stdin=good)
    if how == "unsigned before it":
        return gpg.gpg("--output", "-", "--store", stdin=good) + gpg.sign(
            ALICE, payload(digest, "example.com/other:v1")
        )
    if how == "unsigned after it":
        return gpg.sign(ALICE, payload(digest, "example.com/other:v1")) + gpg.gpg(
            "--output", "-", "--store", stdin=good
        )
    if how == "unsigned alone":
        return gpg.gpg("--output", "-", "--store", stdin=good)
    if how == "armored":
        return gpg.sign(ALICE, good, "--armor")
    if how == "two signers":
        return gpg.sign(ALICE, good, "--local-user", BOB)
    if how == "cleartext":
        return gpg.gpg("--local-user", ALICE, "--output", "-", "--clear-sign", stdin=good)
    if how == "bomb":
        return gpg.sign(ALICE, bytes(20 << 20), "--compress-algo", "zlib")
    if how == "truncated":
        return gpg.sign(ALICE, good)[:-20]
    others: dict[str, Callable[[], bytes]] = {
        "another digest": lambda: gpg.sign(ALICE, payload("sha256:" + "0" * 64, name)),
        "another name": lambda: gpg.sign(ALICE, payload(digest, name.replace("signed/", "other/"))),
        "another tag": lambda: gpg.sign(ALICE, payload(digest, name[:-1] + "2")),
        "no tag": lambda: gpg.sign(ALICE, payload(digest, name.rpartition(":")[0])),
        "no name": lambda: gpg.sign(ALICE, payload(digest, "not a name")),
        "a long digest": lambda: gpg.sign(ALICE, payload("sha256:\n\ud800" + "0" * 100_000, name)),
        "another type": lambda: gpg.sign(ALICE, payload(digest, name, "something else")),
        "more that is critical": lambda: gpg.sign(ALICE, payload(digest, name, critical={"expires": 1})),
        "a field twice": lambda: gpg.sign(ALICE, good[:-1] + b',"critical":{}}'),
        "no json": lambda: gpg.sign(ALICE, b"{"),
        "a list": lambda: gpg.sign(ALICE, b"[" * 100_000),
        "not signed": lambda: good,
        "by another": lambda: gpg.sign(BOB, good),
        "junk": lambda: b"\xff" * 100,
        "unknown kind": lambda: b"\0something-new\nX",
    }
    return others[how]()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("another digest", "it is for the image sha256:0000"),
        ("another name", "which matchRepoDigestOrExact does not accept"),
        ("another tag", "which matchRepoDigestOrExact does not accept"),
        ("no tag", "which matchRepoDigestOrExact does not accept"),
        ("no name", "which matchRepoDigestOrExact does not accept"),
        ("a long digest", "it is for the image sha256:??0000"),
        ("another type", "not 'atomic container signature'"),
        ("more that is critical", "is no field of what is critical"),
        ("a field twice", "comes twice"),
        ("no json", "not valid JSON"),
        ("a list", "not valid JSON"),
        ("not signed", "no signed OpenPGP message"),
        ("cleartext", "in its binary form"),
        ("by another", "made with another key"),
        ("flipped", "does not fit what was signed"),
        ("detached", "no signature (simple signing) counts"),
        ("unsigned before it", "no signature (simple signing) counts"),
        ("unsigned after it", "no signature (simple signing) counts"),
        ("unsigned alone", "no signature (simple signing) counts"),
        ("armored", "in its binary form"),
        ("two signers", "no signature (simple signing) counts"),
        ("truncated", "no signature (simple signing) counts"),
        ("junk", "no signature (simple signing) counts"),
        ("bomb", "larger than 1048576 bytes"),
        ("unknown kind", "there is none"),
    ],
)
def test_a_wrong_signature_is_refused(registry: Registry, node: Node, gpg: Gpg, how: str, why: str) -> None:
    name, digest, _ = push(registry, "signed/wrong")
    lookaside_file(node, name, digest).write_bytes(spoil(gpg, digest, name, how))
    node.require(signed_by(node))
    assert why in refusal(node, name)
    # The reason was the signature alone: beside it a right one counts.
    lookaside_file(node, name, digest, 2).write_bytes(gpg.sign(ALICE, payload(digest, name)))
    with node.store() as store:
        store.pull(name)


def test_a_signature_of_an_expired_key_is_refused(registry: Registry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(registry, "signed/expired")
    then = "--faked-system-time=20200101T000000"
    gpg.key("short@example.com", then, expires="1d")
    signature = gpg.sign("short@example.com", payload(digest, name), then)
    lookaside_file(node, name, digest).write_bytes(signature)
    node.keep("alice.gpg", gpg.public("short@example.com"))
    node.require(signed_by(node))
    assert "its key has expired" in refusal(node, name)


def test_a_signature_of_a_revoked_key_is_refused(registry: Registry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(registry, "signed/revoked")
    fingerprint = gpg.key("gone@example.com")
    lookaside_file(node, name, digest).write_bytes(gpg.sign("gone@example.com", payload(digest, name)))
    certificate = (
        (gpg.home / "openpgp-revocs.d" / f"{fingerprint}.rev").read_text().replace(":-----BEGIN", "-----BEGIN")
    )
    gpg.gpg("--import", stdin=certificate.encode())
    node.keep("alice.gpg", gpg.public("gone@example.com"))
    node.require(signed_by(node))
    assert "its key has been revoked" in refusal(node, name)


def test_a_message_that_gpgv_hangs_at_is_refused(registry: Registry, node: Node, gpg: Gpg) -> None:
    """An encrypted one: gpgv has nobody to ask for the word."""
    name, digest, _ = push(registry, "signed/encrypted")
    options = ("--passphrase", "x", "--pinentry-mode", "loopback", "--output", "-", "--symmetric")
    message = gpg.gpg(*options, stdin=payload(digest, name))
    for number in range(1, 9):
        lookaside_file(node, name, digest, number).write_bytes(message)
    node.require(signed_by(node))
    before = time.monotonic()
    refusal(node, name)
    assert time.monotonic() - before < 20


def test_a_huge_signature_is_refused(registry: Registry, node: Node) -> None:
    name, digest, _ = push(registry, "signed/huge")
    lookaside_file(node, name, digest).write_bytes(bytes(2 << 20))
    node.require(signed_by(node))
    assert "not a file of 1 to 1048576 bytes" in refusal(node, name)


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "cannot be read: no such file"), (b"what?", "no OpenPGP public key"), (bytes(2 << 20), "larger than")],
)
def test_a_key_that_is_none_is_named(registry: Registry, node: Node, content: bytes | None, why: str) -> None:
    name, _, _ = push(registry, "signed/keyless")
    key = Path(node.keep("alice.gpg", content or b""))
    if content is None:
        key.unlink()
    node.require(signed_by(node))
    text = refusal(node, name)
    assert why in text and str(key) in text


# Under which name


@pytest.mark.parametrize(
    ("identity", "signed", "asked", "fits"),
    [
        ({"type": "matchExact"}, "{repo}:v1", "{repo}:v1", True),
        ({"type": "matchExact"}, "{repo}:v1", "{repo}@{digest}", False),
        ({"type": "matchExact"}, "{repo}@{digest}", "{repo}@{digest}", True),
        ({"type": "matchRepoDigestOrExact"}, "{repo}:v2", "{repo}@{digest}", True),
        ({"type": "matchRepoDigestOrExact"}, "{repo}:v2", "{repo}:v1", False),
        ({"type": "matchRepository"}, "{repo}:v2", "{repo}:v1", True),
        ({"type": "matchRepository"}, "{repo}x:v1", "{repo}:v1", False),
        (
            {"type": "exactReference", "dockerReference": "vendor.example/app:1"},
            "vendor.example/app:1",
            "{repo}:v1",
            True,
        ),
        (
            {"type": "exactReference", "dockerReference": "vendor.example/app:1"},
            "vendor.example/app:2",
            "{repo}:v1",
            False,
        ),
        (
            {"type": "exactRepository", "dockerRepository": "vendor.example/app"},
            "vendor.example/app:9",
            "{repo}:v1",
            True,
        ),
        ({"type": "exactRepository", "dockerRepository": "vendor.example/app"}, "{repo}:v1", "{repo}:v1", False),
        (
            {"type": "remapIdentity", "prefix": "{host}", "signedPrefix": "v.example"},
            "v.example/{path}:v1",
            "{repo}:v1",
            True,
        ),
        ({"type": "remapIdentity", "prefix": "{host}", "signedPrefix": "v.example"}, "{repo}:v1", "{repo}:v1", False),
        (
            {"type": "remapIdentity", "prefix": "{host}/signe", "signedPrefix": "v.example"},
            "{repo}:v1",
            "{repo}:v1",
            True,
        ),
    ],
)
def test_the_name_in_a_signature(
    registry: Registry, node: Node, gpg: Gpg, identity: dict[str, str], signed: str, asked: str, fits: bool
) -> None:
    name, digest, _ = push(registry, "signed/named")
    words = {"host": registry.address, "path": "signed/named", "repo": name[:-3], "digest": digest}
    lookaside_file(node, name, digest).write_bytes(gpg.sign(ALICE, payload(digest, signed.format(**words))))
    rule = signed_by(node, signedIdentity={key: value.format(**words) for key, value in identity.items()})
    node.require(rule)
    if fits:
        with node.store() as store:
            store.pull(asked.format(**words))
    else:
        assert f"which {identity['type']} does not accept" in refusal(node, asked.format(**words))


# Which policy


def test_what_is_rejected_is_asked_of_nobody(
    hostile: HostileRegistry, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No registry, and no credential helper."""
    monkeypatch.setattr(Keychain, "find", lambda *_, **__: pytest.fail("credentials are looked for"))
    name, _, _ = push(hostile, "bad/app")
    node.policy({"default": [ACCEPT], "transports": {"docker": {f"{hostile.address}/bad": [REJECT]}}})
    text = refusal(node, name)
    assert f'transports.docker["{hostile.address}/bad"][0] (reject): it rejects every image' in text
    assert not hostile.requests


def test_the_narrowest_scope_counts(hostile: HostileRegistry, node: Node) -> None:
    name, digest, _ = push(hostile, "team/app")
    repository = name[:-3]
    allowed = {"": [REJECT], hostile.address: [REJECT], f"{hostile.address}/team": [REJECT], repository: [REJECT]}
    node.policy({"default": [REJECT], "transports": {"docker": allowed | {name: [ACCEPT]}}})
    with node.store() as store:
        store.pull(name)
        with pytest.raises(UntrustedImage):
            store.pull(f"{repository}@{digest}")
        node.policy({"default": [REJECT], "transports": {"docker": allowed | {f"{repository}@{digest}": [ACCEPT]}}})
        store.pull(f"{repository}@{digest}")


def test_a_namespace_has_a_policy_of_its_own(hostile: HostileRegistry, node: Node) -> None:
    name, _, _ = push(hostile, "tenant/app")
    node.policy({"default": [ACCEPT]})
    node.require(signed_by(node), namespace="strict")
    assert f"{node.directory}/policies/strict.json: " in refusal(node, name, "strict")
    with node.store() as store:
        store.pull(name, namespace="lax")
        for wrong in ("../strict", "a/b", "Strict", "a\0"):
            with pytest.raises(InvalidArgument, match="not a namespace's name"):
                store.pull(name, namespace=wrong)


def test_a_policy_that_is_missing_or_wrong_refuses_everything(hostile: HostileRegistry, node: Node) -> None:
    name, _, _ = push(hostile, "any/app")
    with node.store() as store:
        with pytest.raises(FailedPrecondition, match=r"policy.json cannot be read: no such file"):
            store.pull(name)
        node.policy({"default": [{"type": "hope"}]})
        with pytest.raises(InvalidArgument, match=r"policy.json: default\[0\].type: not one of insecureAccept"):
            store.pull(name)
    assert not hostile.requests


# An image that is here


def test_an_image_is_judged_by_each_namespaces_policy(registry: Registry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(registry, "tenant/use")
    node.policy({"default": [ACCEPT]})
    node.require(signed_by(node), namespace="strict")
    with node.store() as store:
        image = store.pull(name)
        store.authorize(image, name, "lax")
        for asked in (name, image.id, image.id.removeprefix("sha256:")[:20], "", f"{name[:-3]}@{digest}"):
            with pytest.raises(UntrustedImage, match="there is none"):
                store.authorize(image, asked, "strict")
        signature = lookaside_file(node, name, digest)
        signature.write_bytes(gpg.sign(ALICE, payload(digest, name)))
        store.authorize(image, name, "strict")
        # What was met once is remembered, for these requirements with these keys.
        signature.unlink()
        store.authorize(image, name, "strict")
        node.keep("alice.gpg", gpg.public(BOB))
        with pytest.raises(UntrustedImage, match="there is none"):
            store.authorize(image, name, "strict")
        node.require(REJECT, namespace="strict")
        with pytest.raises(UntrustedImage, match="it rejects every image"):
            store.authorize(image, name, "strict")


def test_a_name_that_an_image_has_not_is_not_judged_for_it(registry: Registry, node: Node) -> None:
    """Whoever asks could choose the rule by it."""
    name, _, _ = push(registry, "tenant/refused")
    node.policy({"default": [ACCEPT]})
    node.require(ACCEPT, scope="localhost/trusted", namespace="strict")
    with node.store() as store:
        image = store.pull(name)
        with pytest.raises(UntrustedImage, match="asked for as localhost/trusted/x:1, and has no such name"):
            store.authorize(image, "localhost/trusted/x:1", "strict")


def test_what_a_pull_met_needs_no_registry_later(hostile: HostileRegistry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(hostile, "tenant/offline")
    lookaside_file(node, name, digest).write_bytes(gpg.sign(ALICE, payload(digest, name)))
    node.require(signed_by(node))
    with node.store() as store:
        store.pull(name, namespace="any")
    hostile.routes.clear()
    asked = len(hostile.requests)
    with node.store() as store:
        store.authorize(store.get(name), name, "any")
    assert len(hostile.requests) == asked


def test_a_short_name_is_not_taken_for_an_id(registry: Registry, node: Node) -> None:
    name, _, _ = push(registry, "tenant/short")
    node.policy({"default": [ACCEPT], "transports": {"docker": {"docker.io": [REJECT]}}})
    with node.store() as store:
        image = store.pull(name)
        store.authorize(image, image.id[:19], "any")
        with pytest.raises(UntrustedImage, match=r"docker.io/library/"):
            store.authorize(image, image.id[7:10], "any")


def test_an_image_without_a_name_is_judged_by_what_counts_for_all(node: Node, tmp_path: Path) -> None:
    skopeo("copy", f"oci:{write_layout(tmp_path / 'layout', picture(BASE))}:latest", f"dir:{tmp_path}/dir")
    node.policy({"default": [ACCEPT]})
    node.require(signed_by(node), namespace="strict")
    with node.store() as store:
        (image,) = store.load(f"dir:{tmp_path}/dir")
        store.authorize(image, image.id, "lax")
        with pytest.raises(UntrustedImage, match=r"image without a name is refused by .*there is none"):
            store.authorize(image, image.id, "strict")


# Where signatures are


def test_signatures_come_over_http(registry: Registry, hostile: HostileRegistry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(registry, "signed/http")
    node.signatures_in(f"http://{hostile.address}/sigs")
    base = f"/sigs/signed/http@{digest.replace(':', '=')}"
    hostile.routes[f"{base}/signature-1"] = reply(200, gpg.sign(BOB, payload(digest, name)))
    hostile.routes[f"{base}/signature-2"] = reply(200, gpg.sign(ALICE, payload(digest, name)))
    node.require(signed_by(node))
    with node.store() as store:
        store.pull(name)
    hostile.routes[f"{base}/signature-1"] = reply(200, bytes(2 << 20))
    with node.store("other") as store, pytest.raises(Exception, match=r"signature-1 cannot be fetched: .*larger than"):
        store.pull(name)


def test_signatures_come_by_the_registrys_extension(hostile: HostileRegistry, node: Node, gpg: Gpg) -> None:
    name, digest, _ = push(hostile, "signed/extension")
    signature = base64.b64encode(gpg.sign(ALICE, payload(digest, name))).decode()
    entry = {"schemaVersion": 2, "type": "atomic", "name": f"{digest}@x", "content": signature}
    path = f"/extensions/v2/signed/extension/signatures/{digest}"
    hostile.routes[path] = reply(200, json.dumps({"signatures": [entry]}).encode())
    node.require(signed_by(node))
    assert "there is none" in refusal(node, name)
    hostile.routes["/v2/"] = reply(200, b"", {"X-Registry-Supports-Signatures": "1"})
    with node.store() as store:
        store.pull(name)
    hostile.routes[path] = reply(200, b'{"signatures":[{}]}')
    with node.store("other") as store, pytest.raises(UntrustedImage, match="list of its signatures is damaged"):
        store.pull(name)


def test_a_mirrors_image_is_judged_by_its_own_name(
    registry: Registry, hostile: HostileRegistry, node: Node, gpg: Gpg
) -> None:
    """What a signature is for is the name that was asked for; where it is kept goes with who served the image."""
    image = picture(BASE, config={"author": "mirrored"})
    registry.push("cache/app", "v1", image)
    digest, name = image.manifest["digest"], "vendor.invalid/team/app:v1"
    mirror = (
        f'[[registry]]\nlocation = "vendor.invalid/team"\n[[registry.mirror]]\nlocation = "{registry.address}/cache"\n'
    )
    conf = Path(node.keep("registries.conf", mirror.encode()))
    signature = lookaside_file(node, f"{registry.address}/cache/app:v1", digest)
    node.require(signed_by(node), scope="vendor.invalid")
    paths = Paths(conf, node.directory / "none", node.directory / "none")
    store = ImageStore(node.directory / "store", settings=Settings(paths, trust=node.trust))
    try:
        signature.write_bytes(gpg.sign(ALICE, payload(digest, f"{registry.address}/cache/app:v1")))
        with pytest.raises(UntrustedImage, match=r"image vendor.invalid/team/app:v1 .*does not accept"):
            store.pull(name)
        signature.write_bytes(gpg.sign(ALICE, payload(digest, name)))
        assert store.pull(name).names == (name,)
    finally:
        store.close()


def test_a_signature_of_the_index_is_one_of_its_images(registry: Registry, node: Node, gpg: Gpg) -> None:
    _, digest, image = push(registry, "signed/index")
    config = json.loads(image.blobs[json.loads(image.blobs[digest])["config"]["digest"]])
    platform = {"os": config["os"], "architecture": config["architecture"]}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [image.manifest | {"platform": platform}]}
    name = registry.push("signed/index", "all", image, document=index)
    listed = json.loads(skopeo("inspect", "--tls-verify=false", "--format", '"{{.Digest}}"', f"docker://{name}"))
    lookaside_file(node, name, listed).write_bytes(gpg.sign(ALICE, payload(listed, name)))
    node.require(signed_by(node))
    with node.store() as store:
        assert store.pull(name).manifest_digest == digest


# From disk


def test_what_is_loaded_is_judged_by_its_transport(node: Node, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "images" / "layout", picture(BASE), "v1")
    node.require(ACCEPT, scope=str(tmp_path / "images"), transport="oci")
    with node.store() as store:
        store.load(f"oci:{layout}")
    node.policy({"default": [ACCEPT], "transports": {"oci": {f"{layout}:v1": [REJECT]}}})
    (tmp_path / "link").symlink_to(layout)
    with node.store("other") as store:
        for source in (f"oci:{layout}", f"{layout}", f"oci:{layout}:v1", f"oci:{tmp_path}/link"):
            with pytest.raises(UntrustedImage, match=r':v1"\]\[0\] \(reject\)'):
                store.load(source)
        assert_nothing_left(node.directory / "other")


def test_a_docker_archive_has_no_scopes_but_one(node: Node, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE))
    skopeo("copy", f"oci:{layout}:latest", f"docker-archive:{tmp_path}/a.tar:example.com/app:v1")
    node.policy({"default": [ACCEPT], "transports": {"docker-archive": {"": [REJECT]}}})
    with node.store() as store:
        with pytest.raises(UntrustedImage, match=r'docker-archive\[""\]'):
            store.load(f"docker-archive:{tmp_path}/a.tar")
        node.require(ACCEPT, transport="docker-archive")
        store.load(f"{tmp_path}/a.tar")


def test_an_archive_of_a_layout_is_judged_by_its_file(node: Node, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE))
    skopeo("copy", f"oci:{layout}:latest", f"oci-archive:{tmp_path}/a.tar:v1")
    node.require(ACCEPT, scope=f"{tmp_path}/b.tar", transport="oci-archive")
    with node.store() as store:
        for source in (f"oci-archive:{tmp_path}/a.tar", f"{tmp_path}/a.tar"):
            with pytest.raises(UntrustedImage, match=f"image oci-archive:{tmp_path}/a.tar:v1 is refused"):
                store.load(source)
        (tmp_path / "a.tar").rename(tmp_path / "b.tar")
        store.load(f"{tmp_path}/b.tar")


def test_a_directory_brings_its_signatures(node: Node, gpg: Gpg, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", picture(BASE))
    name = "vendor.example/app:v1"
    command = ["skopeo", "--insecure-policy", "copy", "--sign-by", ALICE, "--sign-identity", name]
    run(*command, f"oci:{layout}:latest", f"dir:{tmp_path}/dir", home=gpg.home)
    exact = {"type": "exactReference", "dockerReference": name}
    node.require(signed_by(node, signedIdentity=exact), transport="dir")
    with node.store() as store:
        store.load(f"dir:{tmp_path}/dir")
    node.require(signed_by(node), transport="dir")  # a directory has no name that it could match
    with node.store("other") as store, pytest.raises(UntrustedImage, match="matchRepoDigestOrExact does not accept"):
        store.load(f"dir:{tmp_path}/dir")
