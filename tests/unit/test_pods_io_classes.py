"""Files of block I/O classes: what is taken of them, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.pods.io_classes import BlockIo, class_of, rdt_group


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Classes: {a: [{Devices: [/dev/x], Throttle: 1}]}", "'throttle', which is none of"),
        ("Classes: {a: [{Devices: /dev/x}]}", "devices must be a list"),
        ("Classes: {a: [{ThrottleReadBps: 1M}]}", "throttles need devices"),
        ("Classes: {a: [{Devices: [], ThrottleReadBps: -1}]}", "-1 is no quantity"),
        ("Classes: {a: [{Devices: [], ThrottleReadBps: 1e99}]}", "is no quantity"),
        ("Classes: {a: 3}", "not iterable"),
        ("Classes: [", "is not YAML"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("- " * 100_000, "nested more than 64 deep"),
        ("[]", "no attribute 'items'"),
        ("a" * (1 << 20 | 1), "more than 1048576 bytes"),
    ],
    ids=range(11),
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(FailedPrecondition, match=f"crio.runtime.blockio_config_file: {file}") as caught:
        BlockIo().classes(str(file))
    assert words in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FailedPrecondition, match="it is no file"):
        BlockIo().classes(str(tmp_path / "fifo"))


def test_a_class_of_weights_and_devices_that_are_not_there(tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text("classes: {a: [{weight: 80}, {devices: [/dev/no*], weight: 90, throttlewritebps: 5k}], empty: }")
    block_io = BlockIo()
    assert block_io.limits(str(file), "field", "a", again=False) == {"weight": 80}
    assert block_io.limits(str(file), "field", "empty", again=False) == {}
    file.write_text("classes: {b: [{weight: 2000}]}")
    assert "a" in block_io.classes(str(file)), "it was read once"
    with pytest.raises(InvalidArgument, match="there are: b"):
        block_io.limits(str(file), "field", "a", again=True)
    with pytest.raises(FailedPrecondition, match="2000 is not within"):
        block_io.limits(str(file), "field", "b", again=False)


def test_whose_annotation_counts() -> None:
    prefix = "rdt.resources.beta.kubernetes.io"
    of_pod = {f"{prefix}/pod": "p", f"{prefix}/container.c": "c"}
    assert class_of("rdt", "c", {"io.kubernetes.cri.rdt-class": "own"}, of_pod)[1] == "own"
    assert class_of("rdt", "c", {}, of_pod)[1] == "c"
    assert class_of("rdt", "d", {}, of_pod)[1] == "p"
    assert class_of("blockio", "c", {}, of_pod) == ("", "")


@pytest.mark.parametrize("name", ["", "/", "..", "a/b", "a\nb", "x" * 129])
def test_groups_of_rdt_that_are_none(name: str) -> None:
    with pytest.raises(InvalidArgument, match="no name of a group"):
        rdt_group("field", name)
