"""crioctl, called here, and the small CRI runtime that it talks to."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crio_native.cli import crioctl

from .fake_runtime import FakeRuntime

COMMAND = [sys.executable, "-m", "crio_native.cli.crioctl"]


@dataclass
class Result:
    code: int
    out: str
    err: str


Crioctl = Callable[..., Result]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
    socket = tmp_path / "cri.sock"
    monkeypatch.setenv("CRIO_NATIVE_SOCKET", f"unix://{socket}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with FakeRuntime(socket) as runtime:
        yield runtime


@pytest.fixture
def ctl(capfd: pytest.CaptureFixture[str]) -> Iterator[Crioctl]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def invoke(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as leaving:
            crioctl.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(leaving.value.code, int)
        return Result(leaving.value.code, out, err)

    yield invoke
    for number, handler in handlers.items():
        signal.signal(number, handler)


def leftovers(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("crioctl-*/*"))
