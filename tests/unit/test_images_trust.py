"""policy.json and registries.d: what is read from them, and what is refused with its file and path."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crio_native.errors import CrioError, FailedPrecondition, InvalidArgument, UntrustedImage
from crio_native.images import references
from crio_native.images.sources import from_config
from crio_native.images.trust import gpg, identities, judging, policy, registries_d, signatures, sigstore
from crio_native.images.trust.documents import Fields
from crio_native.images.trust.judging import Trust
from crio_native.images.trust.registries_d import DEFAULT_LOOKASIDE, Place
from crio_native.images.trust.sigstore import Signer

from ..trust_support import Authority, pem, public_pem, signature_of, signed

ACCEPT, REJECT = {"type": "insecureAcceptAnything"}, {"type": "reject"}
GPG = {"type": "signedBy", "keyType": "GPGKeys"}
SIGSTORE = {"type": "sigstoreSigned"}
KEY = {"keyPath": "/key"}
AUTHORITY = Authority()
LEAF = AUTHORITY.issue(AUTHORITY.key)


def data(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def load(tmp_path: Path, document: object) -> policy.Policy:
    path = tmp_path / "policy.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return policy.load(str(path))


# policy.json


@pytest.mark.parametrize(
    ("rule", "where"),
    [
        ({}, r"default\[0\].type: is missing"),
        ({"type": 1}, r"default\[0\].type: not a text"),
        ({"type": "signedMaybe"}, r"default\[0\].type: not one of insecureAcceptAnything, reject, signedBy"),
        ("reject", r"default\[0\]: not an object"),
        (REJECT | {"why": ""}, r"default\[0\].why: is no field of a requirement of the type reject"),
        (GPG, r"default\[0\]: needs one of keyPath, keyPaths and keyData"),
        (GPG | {"keyPath": "/a", "keyData": "AAAA"}, r"default\[0\]: has more than one of these"),
        (GPG | {"keyType": "X509"} | KEY, r"default\[0\].keyType: not GPGKeys"),
        ({"type": "signedBy"} | KEY, r"default\[0\].keyType: is missing"),
        (GPG | {"keyPath": "keys"}, r"default\[0\].keyPath: not an absolute path"),
        (GPG | {"keyPath": ""}, r"default\[0\].keyPath: is empty"),
        (GPG | {"keyPaths": []}, r"default\[0\].keyPaths: not a list of at least one text"),
        (GPG | {"keyPaths": ["/a", 1]}, r"default\[0\].keyPaths: not a list of at least one text"),
        (GPG | {"keyData": "?"}, r"default\[0\].keyData: not base64"),
        (GPG | {"keyDatas": ["AAAA"]}, r"default\[0\]: needs one of"),
        (GPG | KEY | {"signedIdentity": {"type": "any"}}, r"default\[0\].signedIdentity.type: not one of matchExact"),
        (GPG | KEY | {"signedIdentity": {"type": "matchExact", "x": 1}}, r"signedIdentity.x: is no field"),
        (GPG | KEY | {"signedIdentity": {"type": "exactReference"}}, r"signedIdentity.dockerReference: is missing"),
        (
            GPG | KEY | {"signedIdentity": {"type": "exactReference", "dockerReference": "a.example/b"}},
            "dockerReference: has neither a tag nor a digest",
        ),
        (
            GPG | KEY | {"signedIdentity": {"type": "exactRepository", "dockerRepository": "a.example/b:1"}},
            "dockerRepository: has a tag or a digest",
        ),
        (
            GPG | KEY | {"signedIdentity": {"type": "remapIdentity", "prefix": "a.example/b:1", "signedPrefix": "c"}},
            r"signedIdentity.prefix: not HOST",
        ),
        (SIGSTORE, r"default\[0\]: needs exactly one of keyPath"),
        (SIGSTORE | KEY | {"fulcio": {}}, r"default\[0\]: needs exactly one of keyPath"),
        (SIGSTORE | KEY | {"keyData": "AAAA"}, r"default\[0\]: needs exactly one of keyPath"),
        (SIGSTORE | {"fulcio": {"caPath": "/ca"}}, r"default\[0\]: fulcio needs a rekorPublicKey"),
        (SIGSTORE | {"rekorPublicKeyPath": "/r", "fulcio": {}}, r"fulcio: needs caPath or caData"),
        (SIGSTORE | {"rekorPublicKeyPath": "/r", "fulcio": {"caPath": "/c"}}, r"fulcio.subjectEmail: is missing"),
        (
            SIGSTORE | {"rekorPublicKeyPath": "/r", "fulcio": {"caPath": "/c", "subjectEmail": "a@b"}},
            r"fulcio.oidcIssuer: is missing",
        ),
        (SIGSTORE | {"pki": {"caRootsPath": "/c"}}, r"pki: needs subjectEmail or subjectHostname"),
        (SIGSTORE | {"pki": {"subjectEmail": "a@b"}}, r"pki: needs caRootsPath or caRootsData"),
        (
            SIGSTORE | {"pki": {"caRootsPath": "/c", "subjectEmail": "a@b"}, "rekorPublicKeyPath": "/r"},
            "a rekorPublicKey does not go with pki",
        ),
        (SIGSTORE | {"pki": {"caRootsPath": "/c", "subjectEmail": "a@b", "ca": 1}}, r"pki.ca: is no field of pki"),
        ({"type": "signedBaseLayer"}, r"default\[0\].baseLayerIdentity: is missing"),
    ],
)
def test_a_wrong_requirement_is_named_with_its_path(tmp_path: Path, rule: Any, where: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{tmp_path}/policy.json: .*{where}|^{tmp_path}/policy.json: {where}"):
        load(tmp_path, {"default": [rule]})


@pytest.mark.parametrize(
    ("document", "where"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "not an object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"default":[{"type":"reject"}],"default":[]}', "the key 'default' comes twice"),
        (b'{"default":NaN}', "NaN is no value of JSON"),
        ({}, "default: is missing"),
        ({"default": []}, "default: not a list of 1 to 256"),
        ({"default": [REJECT] * 1000}, "default: not a list of 1 to 256"),
        ({"default": [ACCEPT], "transport": {}}, "transport: is no field of a trust policy"),
        ({"default": [ACCEPT], "transports": []}, "transports: not an object"),
        ({"default": [ACCEPT], "transports": {"docker": {"a.example": []}}}, r'docker\["a.example"\]: not a list of 1'),
        ({"default": [ACCEPT], "transports": {"docker": {"a*.example": [REJECT]}}}, "a wildcard is"),
        ({"default": [ACCEPT], "transports": {"docker": {"*.example/app": [REJECT]}}}, "a wildcard is"),
        ({"default": [ACCEPT], "transports": {"docker": {"https://a.example": [REJECT]}}}, "docker"),
        ({"default": [ACCEPT], "transports": {"docker": {"a.example/App": [REJECT]}}}, "lower-case"),
        ({"default": [ACCEPT], "transports": {"dir": {"images": [REJECT]}}}, "not an absolute path"),
        ({"default": [ACCEPT], "transports": {"oci": {"/": [REJECT]}}}, "not an absolute path"),
        ({"default": [ACCEPT], "transports": {"oci": {"/a/../b": [REJECT]}}}, "not an absolute path"),
    ],
)
def test_a_wrong_policy_is_named_with_its_path(tmp_path: Path, document: object, where: str) -> None:
    with pytest.raises(InvalidArgument, match=where) as caught:
        load(tmp_path, document)
    assert str(caught.value).startswith(f"{tmp_path}/policy.json: ")


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="larger than 1048576 bytes"):
        load(tmp_path, b" " * (1 << 20) + b"{}")
    with pytest.raises(FailedPrecondition, match="is not a regular file"):
        policy.load("/dev/zero")
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        policy.load(str(tmp_path / "none"))


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["default", "transports", "docker", "type", "keyType", "keyPath", "signedIdentity", "fulcio", ""]
                ),
                x,
            )
        ),
    )
)
def test_any_json_is_a_policy_or_an_error_of_ours(value: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        try:
            load(Path(directory), {"default": [value]})
        except CrioError as error:
            assert "policy.json" in str(error)


def test_every_key_of_every_requirement_is_known(tmp_path: Path) -> None:
    data = base64.b64encode(b"x").decode()
    identity = {"signedIdentity": {"type": "remapIdentity", "prefix": "a.example", "signedPrefix": "b.example/c"}}
    fulcio = {"caData": data, "oidcIssuer": "https://i", "subjectEmail": "a@b"}
    roots = {"caRootsData": data, "caIntermediatesData": data, "subjectHostname": "h", "subjectEmail": "a@b"}
    rules: list[dict[str, Any]] = [
        ACCEPT,
        REJECT,
        GPG | {"keyPaths": ["/a", "/b"]} | identity,
        GPG | {"keyData": data},
        SIGSTORE | {"keyPaths": ["/a"], "rekorPublicKeyPaths": ["/r"]} | identity,
        SIGSTORE | {"keyDatas": [data], "rekorPublicKeyDatas": [data, data]},
        SIGSTORE | {"keyData": data},
        SIGSTORE | {"fulcio": fulcio, "rekorPublicKeyData": data},
        SIGSTORE | {"pki": roots},
        {"type": "signedBaseLayer", "baseLayerIdentity": {"type": "matchExact"}},
    ]
    found = load(
        tmp_path, {"default": rules, "transports": {"atomic": {"a.example": [REJECT]}, "tarball": {"": [ACCEPT]}}}
    )
    assert [rule.kind for rule, _ in found.default.rules] == [rule["type"] for rule in rules]


# Scopes


@pytest.mark.parametrize(
    ("scopes", "counts"),
    [
        (["", "a.example", "a.example:5000", "a.example:5000/t", "a.example:5000/t/app"], "a.example:5000/t/app"),
        (["", "a.example:5000/t/app", "a.example:5000/t/app:v1"], "a.example:5000/t/app:v1"),
        (["", "a.example:5000/t/ap", "a.example:5000/t"], "a.example:5000/t"),
        (["", "a.example", "*.example:5000"], "*.example:5000"),
        (["", "*.example"], ""),
        (["", "*.a.example:5000"], ""),
        (["*.example:5000", "a.example:5000"], "a.example:5000"),
    ],
)
def test_scopes_of_a_name(tmp_path: Path, scopes: list[str], counts: str) -> None:
    found = load(tmp_path, {"default": [REJECT], "transports": {"docker": {scope: [ACCEPT] for scope in scopes}}})
    of = list(policy.of_reference(references.parse("a.example:5000/t/app:v1")))
    assert found.find("docker", of).where.endswith(f'["{counts}"]')
    assert found.find("oci", of).where.endswith(": default")


def test_scopes_of_a_file() -> None:
    assert list(policy.of_file("oci", "/a/b", "v1")) == ["/a/b:v1", "/a/b", "/a"]
    assert list(policy.of_file("docker-archive", "/a/b", "v1")) == []


def test_a_wildcard_is_for_each_domain_above() -> None:
    of = list(policy.of_reference(references.parse("x.y.example.com/app")))
    assert of[-3:] == ["*.y.example.com", "*.example.com", "*.com"]


# Identities


@pytest.mark.parametrize(
    ("kind", "signed", "asked", "fits"),
    [
        ("matchExact", "docker.io/library/app:1", "app:1", True),
        ("matchExact", "app:1", "app:1", True),
        ("matchExact", "app", "app:latest", False),
        ("matchExact", "app:latest@sha256:" + "a" * 64, "app:latest", False),
        ("matchRepoDigestOrExact", "app", "app@sha256:" + "a" * 64, True),
        ("matchRepoDigestOrExact", "b.example/app:1", "a.example/app:1", False),
        ("matchRepository", "app", "app:1", True),
        ("matchRepository", "APP", "app:1", False),
        ("matchRepository", "x" * 5000, "app:1", False),
    ],
)
def test_names_that_fit(kind: str, signed: str, asked: str, fits: bool) -> None:
    identity = identities.parse(Fields({"type": kind}, "x"))
    assert identity.accepts(signed, references.parse(asked)) == fits
    assert not identity.accepts(signed, None)


# Which policy counts


def test_without_a_policy_there_is_the_programs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = references.parse("a.example/app:1")
    monkeypatch.setattr(judging, "DEFAULT_POLICY", str(tmp_path / "policy.json"))
    assert Trust().pulled(reference, "").found.where.endswith("conf/policy.json: default")
    (tmp_path / "policy.json").write_text(json.dumps({"default": [REJECT]}))
    with pytest.raises(UntrustedImage, match=f"refused by {tmp_path}/policy.json: default"):
        Trust().pulled(reference, "")
    (tmp_path / "policy.json").unlink()
    (tmp_path / "policy.json").symlink_to("nowhere")  # one that was to be there
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        Trust().pulled(reference, "")


def test_the_configuration_names_the_policies() -> None:
    from crio_native.config import Config

    trust = from_config(Config()).trust
    assert trust == Trust("", "/etc/crio/policies")


def test_a_namespaces_file_that_cannot_be_read_is_no_reason_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "ns.json").symlink_to("nowhere")
    (tmp_path / "policy.json").write_text(json.dumps({"default": [ACCEPT]}))
    trust = Trust(str(tmp_path / "policy.json"), str(tmp_path))
    with pytest.raises(FailedPrecondition, match=r"ns.json cannot be read"):
        trust.pulled(references.parse("a.example/app:1"), "ns")
    trust.pulled(references.parse("a.example/app:1"), "other")


# registries.d


def test_registries_d_by_the_narrowest_namespace(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("default-docker: {sigstore: 'file:///old', use-sigstore-attachments: true}\n")
    (tmp_path / "b.yaml").write_text(
        "docker:\n  a.example/team: {lookaside: 'https://sigs.example/team'}\n"
        "  a.example: {lookaside: 'https://sigs.example', sigstore: 'file:///x', use-sigstore-attachments: false}\n"
    )
    (tmp_path / "c.conf").write_text("{")
    found = registries_d.load(str(tmp_path))
    assert found.of(references.parse("a.example/team/app")) == Place("https://sigs.example/team", False)
    assert found.of(references.parse("a.example/app")) == Place("https://sigs.example", False)
    assert found.of(references.parse("b.example/app")) == Place("file:///old", True)
    assert registries_d.load(str(tmp_path / "none")).of(references.parse("app")) == Place(DEFAULT_LOOKASIDE, False)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("docker: {a.example: {lookasside: 'file:///x'}}", "docker.a.example.lookasside: is no field"),
        ("docker: {a.example: {lookaside: '/x'}}", "docker.a.example.lookaside: not an address of file"),
        ("docker: {a.example: {use-sigstore-attachments: 'yes'}}", "use-sigstore-attachments: not a boolean"),
        ("docker: []", "docker: not an object"),
        ("podman: {}", "podman: is no field of registries.d"),
        ("docker: {", "not valid YAML"),
        ("default-docker: {}", "default-docker: is in another file already"),
        ("docker: {b.example: {}}", "docker.b.example: is in another file already"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_wrong_file_of_registries_d_is_named(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "a.yaml").write_text("default-docker: {}\ndocker: {b.example: {}}\n")
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(InvalidArgument, match=where) as caught:
        registries_d.load(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/b.yaml")


# What strangers write


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\0sigstore-json\n", b"\0simple-signing\n"]))
def test_any_bytes_are_a_signature_or_none(data: bytes, head: bytes) -> None:
    found = signatures.from_blob(head + data)
    for kind in (signatures.SIMPLE, signatures.SIGSTORE):
        with pytest.raises(signatures.Invalid):
            signatures.claim(found.data if found else data, kind)


@pytest.mark.parametrize("key", [b"", b"x", b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n?\n", b"\0" * 8 + b"KBXf"])
def test_what_is_no_keyring_is_named(key: bytes) -> None:
    with pytest.raises(FailedPrecondition, match="the key "):
        gpg.keyring(key, "the key")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60), st.data())
def test_any_annotations_are_a_signature_that_does_not_count(
    certificate: str, chain: str, bundle: str, more: st.DataObject
) -> None:
    key, text = AUTHORITY.key, b"{}"
    leaf = pem(LEAF)
    cut = more.draw(st.integers(0, len(leaf)))
    spoilt = more.draw(st.sampled_from([certificate, leaf, leaf[:cut] + certificate + leaf[cut + 1 :], leaf[:cut]]))
    entry = {"body": data(bundle.encode("utf-8", "replace")), "integratedTime": 1, "logIndex": 1, "logID": "00"}
    stamp = data(signed(key, json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()))
    word = more.draw(st.sampled_from([bundle, json.dumps({"SignedEntryTimestamp": stamp, "Payload": entry})]))
    found = signatures.Signature(
        "sigstore", text, signature_of(key, text, certificate=spoilt, chain=chain, bundle=word)
    )
    public, roots = [("log", public_pem(key))], [("root", pem(AUTHORITY.root).encode())]
    with pytest.raises(signatures.Invalid):
        sigstore.by_key(found, public, public)
    with pytest.raises(signatures.Invalid):
        sigstore.by_fulcio(found, roots, Signer("a@b", issuer="c"), public)
    with pytest.raises(signatures.Invalid):
        sigstore.by_pki(found, roots, [], Signer("a@b"))
