"""Builds of the executor, whole and weakened, and what attackers bring along."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from crio_native.errors import CrioError
from crio_native.linux import process
from crio_native.oci.builtin import launchers as warm
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime

from ..oci.conftest import Box, Container
from . import weaknesses

HERE = Path(__file__).parent


class Lab(Box):
    """A box whose image and volumes are an attacker's.

    outside: a directory of the host with a file `secret`; nothing else may ever appear there.  hostile: hostile.c.
    interpreter: what the launchers run, a copy that an attack may destroy.
    """

    def __init__(self, runtime: BuiltinRuntime, launchers: Launchers, directory: Path, tools: Path) -> None:
        super().__init__(runtime, directory / "box")
        self.launchers, self.tools = launchers, tools
        self.interpreter = directory / "python"
        self.outside = directory / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("the host's secret\n")
        shutil.copy(tools / "hostile", self.root / "bin/hostile")

    def made_outside(self) -> set[str]:
        return {path.name for path in self.outside.iterdir()} - {"secret"}

    def bare_spec(self, *args: str) -> dict[str, Any]:
        """Without a /dev of its own: the image's is used, as it is."""
        spec = self.spec(*args)
        spec["mounts"] = [mount for mount in spec["mounts"] if not mount["destination"].startswith("/dev")]
        return spec

    def output_of(self, *args: str, spec: Mapping[str, Any] | None = None, **more: Any) -> str:
        container = self.run(*args, spec=spec, **more)
        return container.output() + container.output("stderr")

    def try_create(self, spec: Mapping[str, Any], **more: Any) -> Container | None:
        """None when the executor refuses."""
        try:
            return self.create(spec, **more)
        except CrioError:
            return None


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    build = [["musl-gcc", "-static", "-O1", "-Wall", "-Werror", HERE / "hostile.c", "-o", directory / "hostile"]]
    flags = ["-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-O1"]
    build.append(["gcc", *flags, HERE / "loader.c", "-o", directory / "loader"])
    for command in build:
        subprocess.run([str(word) for word in command], check=True)
    return directory


@contextlib.contextmanager
def laboratory(weakness: str, tools: Path) -> Iterator[Lab]:
    """An executor with its own launchers, and a box; weakness "" for the executor as it is."""
    directory = Path(tempfile.mkdtemp(prefix="crio-native-attack-"))
    interpreter = shutil.copy(Path(sys.executable).resolve(), directory / "python")
    open_executable = process.unwritable_executable
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        if weakness in weaknesses.DAEMON:
            stack.enter_context(weaknesses.DAEMON[weakness]())
            open_executable = process.unwritable_executable
        elif weakness:
            stack.enter_context(mock.patch.object(warm, "BOOT", weaknesses.BOOT.format(weakness)))
        with mock.patch.object(process, "unwritable_executable", lambda path: open_executable(str(interpreter))):
            launchers = Launchers(1)
            launchers.start()
        stack.callback(launchers.stop)
        box = Lab(BuiltinRuntime(launchers), launchers, directory, tools)
        stack.callback(box.remove_all)
        yield box
