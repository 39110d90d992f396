"""What an OCI runtime, or conmon, says: whatever it is, it is understood or refused, and bounded."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from crio_native.errors import StepFailed
from crio_native.oci.external.conmon_runner import outcome
from crio_native.oci.external.making import SAID_MAX, Refusal
from crio_native.oci.external.program import WORDS_MAX, abilities_of, words
from crio_native.oci.runtime import Abilities

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FEATURES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("ociVersionMin", "ociVersionMax", "mountOptions", "linux"), JSON | st.just("1.0.0"))
)
LINES = st.lists(
    st.binary(max_size=80)
    | st.text(max_size=60).map(lambda text: f'time="t" level=error msg="{text}"'.encode())
    | JSON.map(lambda value: json.dumps({"level": "error", "msg": value}).encode()),
    max_size=6,
).map(b"\n".join)


@given(LINES)
@example(b'{"level":"error","msg":"no\\nforged"}')
def test_words(stderr: bytes) -> None:
    text = words(stderr)
    assert len(text) <= WORDS_MAX + 3 and "\n" not in text


@given(FEATURES)
def test_features(document: dict[str, Any]) -> None:
    try:
        assert isinstance(abilities_of("version", document, "/program"), Abilities)
    except StepFailed as error:
        assert error.step == "features" and len(str(error)) < 400


@given(
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | JSON.map(lambda value: json.dumps({"pid": value, "message": value}).encode())
)
def test_an_outcome(told: bytes) -> None:
    try:
        assert outcome(told) > 0
    except Refusal as refusal:
        assert len(refusal.said) <= SAID_MAX
