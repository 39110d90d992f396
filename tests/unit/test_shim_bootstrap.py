"""Finding a shim, and understanding what it answers to `start`; the drop-in for Kata."""

from __future__ import annotations

from pathlib import Path

import pytest

from crio_native.api.shim.v1 import bootstrap_pb2
from crio_native.config import load
from crio_native.errors import FailedPrecondition, NotFound, StepFailed, Unavailable, Unimplemented
from crio_native.oci.shim import bootstrap
from crio_native.oci.shim.bootstrap import Address, parse_answer

MESSAGE = bootstrap_pb2.BootstrapResult(version=3, address="unix:///run/s", protocol="ttrpc").SerializeToString()


@pytest.mark.parametrize(
    ("answer", "address"),
    [
        (b"unix:///run/containerd/s/0123\n", Address("unix:///run/containerd/s/0123", 2)),
        (b"/containerd-shim/default/x/shim.sock", Address("/containerd-shim/default/x/shim.sock", 2)),
        (b'{"version":2,"address":"unix:///run/s","protocol":"ttrpc"}', Address("unix:///run/s", 2)),
        (b'{"version":3,"address":"unix:///run/s","protocol":"ttrpc","more":[1]}', Address("unix:///run/s", 3)),
        (MESSAGE, Address("unix:///run/s", 3)),
    ],
)
def test_answers_of_every_age(answer: bytes, address: Address) -> None:
    assert parse_answer(answer, "shim") == address


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\n",
        b"unix://",
        b"tcp://1.2.3.4:5",
        b"unix:///run/a b",
        b"x" * 108,
        b"{",
        b'{"version":"x"}',
        b'{"version":2,"address":5,"protocol":"ttrpc"}',
        b"[" * 100_000,
        b"\x08\x03\x12\xff",
        b"\xff\xfe",
    ],
)
def test_answers_that_are_none(answer: bytes) -> None:
    with pytest.raises(StepFailed, match=r"shim start.*/a/shim"):
        parse_answer(answer, "/a/shim")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"version":3,"address":"unix:///run/s","protocol":"grpc"}', "speaks 'grpc'"),
        (b'{"version":4,"address":"unix:///run/s","protocol":"ttrpc"}', "version 4"),
        (b'{"address":"unix:///run/s","protocol":"ttrpc"}', "version 0"),
    ],
)
def test_what_this_program_does_not_speak(answer: bytes, words: str) -> None:
    with pytest.raises(Unimplemented, match=words):
        parse_answer(answer, "shim")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=f"no shim listens on unix://{tmp_path}/s"):
        Address(f"unix://{tmp_path}/s").connect(0.05)


def test_a_program_is_found_by_the_handler_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("containerd-shim-kata-v2", "containerd-shim-mine-v2"):
        (tmp_path / name).write_text("#!/bin/true\n")
        (tmp_path / name).chmod(0o755)
    assert bootstrap.find_program("mine", "") == str(tmp_path / "containerd-shim-mine-v2")
    assert bootstrap.find_program("cc", "") == str(tmp_path / "containerd-shim-kata-v2")
    assert bootstrap.find_program("any", "containerd-shim-mine-v2") == str(tmp_path / "containerd-shim-mine-v2")
    with pytest.raises(NotFound, match=r"containerd-shim-other-v2.*not in PATH"):
        bootstrap.find_program("other", "")
    (tmp_path / "containerd-shim-kata-v2").unlink()
    with pytest.raises(NotFound, match="Clear Containers has become Kata Containers"):
        bootstrap.find_program("cc", "")
    with pytest.raises(FailedPrecondition, match="not an executable file"):
        bootstrap.find_program("x", str(tmp_path))


def test_kata_without_virtualisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: False)
    with pytest.raises(FailedPrecondition, match="needs hardware virtualisation: this host has no /dev/kvm"):
        bootstrap.check_virtualisation("/opt/kata/bin/containerd-shim-kata-v2")
    bootstrap.check_virtualisation("/usr/bin/containerd-shim-runc-v2")
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/kvm")
    bootstrap.check_virtualisation("/opt/kata/bin/containerd-shim-kata-v2")


def test_the_drop_in_for_kata(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "conf" / "30-kata.conf"
    (tmp_path / "crio.conf").write_text("")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / source.name).write_text(source.read_text())
    loaded = load(tmp_path / "crio.conf", tmp_path / "d")
    handlers = loaded.config.runtime.runtimes
    assert {name: handler.runtime_type for name, handler in handlers.items()} == {
        "builtin": "builtin",
        "kata": "vm",
        "cc": "vm",
    }
    assert handlers["cc"] == handlers["kata"]
    assert not loaded.warnings
