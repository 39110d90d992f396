"""What is written beside images: settings, credentials, schema 1, tables of zstd:chunked.  Each is read or refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crio_native.errors import CrioError, InvalidArgument
from crio_native.images import (
    chunked,
    credentials,
    encryption,
    jsonstream,
    proxies,
    references,
    registries_conf,
    schema1,
)
from crio_native.images.manifests import LAYERS, Descriptor

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

DIGEST = "sha256:" + "0" * 64
words = st.sampled_from(["docker.io", "*.a.com", "a.com:5000/x", "busybox", "all", "", "../x", DIGEST, "x" * 300])
values = st.recursive(
    st.one_of(st.booleans(), st.integers(-5, 1 << 70), words, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                "prefix location mirror insecure blocked registry aliases type name size digest offset endOffset auth "
                "identitytoken fsLayers history blobSum v1Compatibility signatures protected throwaway busybox".split()
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)


@QUICK
@given(
    st.dictionaries(st.sampled_from(["registry", "aliases", "short-name-mode", "credential-helpers"]), values), words
)
def test_registries_conf(document: dict[str, Any], name: str) -> None:
    try:
        read = registries_conf._Reader("file").file(document)
        reference = references.parse(name)
        for endpoint in read.endpoints(reference):
            assert (endpoint.reference.tag, endpoint.reference.digest) == (reference.tag, reference.digest)
            assert ".." not in endpoint.reference.name.split("/")
    except CrioError as error:
        assert str(error)


@pytest.mark.parametrize("text", ["a" * 100_000, "[" * 50_000, "a = " + "[" * 50_000, 'a."" = 1'])
def test_deep_or_odd_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    try:
        registries_conf.load(registries_conf.Paths(tmp_path / "f", tmp_path, tmp_path / "none"))
    except InvalidArgument as error:
        assert str(tmp_path) in str(error)


@QUICK
@given(values)
def test_credentials(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "auth.json"
    path.write_text(json.dumps({"auths": document}))
    try:
        credentials.Keychain(files=(path,)).find(references.parse("docker.io/library/busybox"))
    except InvalidArgument as error:
        assert "auth" in str(error)


@QUICK
@given(values, values)
def test_schema_1(document: Any, signatures: Any) -> None:
    raw = json.dumps({"schemaVersion": 1, "fsLayers": document, "history": document, "signatures": signatures}).encode()
    try:
        assert schema1.unsigned(raw)
        list(schema1._history(json.loads(raw)))
    except InvalidArgument as error:
        assert "schema 1" in str(error)


@QUICK
@given(st.lists(values, max_size=5))
def test_tables_of_chunked_layers(entries: list[Any]) -> None:
    layer = Descriptor(LAYERS[0], DIGEST, 1 << 20)
    try:
        for file in (chunked._files(entries, layer) or {}).values():
            assert 0 <= file.start < file.end <= layer.size and file.end - file.start <= chunked.MAX_FILE
    except InvalidArgument as error:
        assert "zstd:chunked" in str(error)


@QUICK
@given(st.dictionaries(st.text(max_size=8), st.lists(values, max_size=4), max_size=4), st.integers(1, 9), st.booleans())
def test_documents_that_come_in_pieces(document: dict[str, Any], size: int, indented: bool) -> None:
    raw = json.dumps(document, ensure_ascii=False, indent=indented or None).encode("utf-8", "surrogatepass")
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    try:
        expected = json.loads(raw.decode())
    except UnicodeDecodeError:
        return
    read = jsonstream.Document(pieces, 1 << 20, 1000)
    assert {name: list(read.elements()) for name in read.members()} == expected


@QUICK
@given(st.text('{}[],:"a1 \\', max_size=30))
def test_documents_that_are_none(text: str) -> None:
    read = jsonstream.Document([text.encode()], 1000, 1000)
    try:
        found = {name: read.value() for name in read.members()}
    except ValueError:
        return
    assert json.loads(text[: read._at]) == found


@QUICK
@given(st.binary(max_size=200))
def test_lines_of_a_tar_split(line: bytes) -> None:
    try:
        chunked._split_entry(line)
    except InvalidArgument as error:
        assert "tar-split" in str(error)


@QUICK
@given(values, values)
def test_annotations_of_encrypted_layers(wrapped: Any, public: Any) -> None:
    packed = [base64.b64encode(json.dumps(value).encode()).decode() for value in (wrapped, public)]
    layer = Descriptor(LAYERS[0], DIGEST, 1, annotations={encryption.WRAPPED: packed[0], encryption.PUBLIC: packed[1]})
    with pytest.raises(CrioError, match="layer sha256"):
        encryption.secret_of(layer, None)
    with pytest.raises(InvalidArgument, match="layer sha256"):
        encryption._secret(layer, packed[0].encode())


@QUICK
@given(st.text(max_size=40), st.sampled_from(["https://r.com/x", "http://10.0.0.1:80/", "https://[fd00::1]/"]))
def test_variables_of_proxies(value: str, url: str) -> None:
    try:
        proxies.proxy_for(url, {"HTTPS_PROXY": "http://p:1", "HTTP_PROXY": "p", "NO_PROXY": value})
        proxies.proxy_for(url, {"HTTPS_PROXY": value, "HTTP_PROXY": value})
    except InvalidArgument as error:
        assert "_PROXY" in str(error)
