"""`crio-oci` as an engine calls it: the built program, its own --root, bundles of Debian's static busybox."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ..apart import MARK
from ..machine import assert_machine_unchanged, machine_state
from .conftest import make_root, spec_of

PROGRAM = Path(__file__).parents[2] / "build" / "crio-oci"
SECONDS = 30


class Oci:
    """One scratch directory with a root file system; `call` runs a command line."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.root, self.state = directory, directory / "rootfs", directory / "state"
        self.name = f"oci-{directory.name[-8:]}"
        make_root(self.root)

    def spec(self, *args: str, **changes: Any) -> dict[str, Any]:
        """The configuration of a container that runs args in a group of its own; changes: to the process object."""
        spec = spec_of(str(self.root), args)
        spec["linux"]["cgroupsPath"] = f"/{self.name}/c"
        spec["process"] |= changes
        return spec

    def bundle(self, *args: str, **changes: Any) -> Path:
        return self.write(self.spec(*args, **changes))

    def write(self, spec: Mapping[str, Any]) -> Path:
        path = Path(tempfile.mkdtemp(dir=self.directory, prefix="bundle-"))
        (path / "config.json").write_text(json.dumps(spec))
        return path

    def line(self, *words: str | Path) -> list[str]:
        return [str(PROGRAM), "--root", str(self.state), *map(str, words)]

    def call(self, *words: str | Path, given: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
        line = self.line(*words)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            # Files, not pipes: a container that is left running would keep a pipe open.
            stdin = {"input": given} if given else {"stdin": subprocess.DEVNULL}
            done = subprocess.run(line, stdout=out, stderr=errors, text=True, timeout=SECONDS, **stdin, **more)
            out.seek(0), errors.seek(0)
            return subprocess.CompletedProcess(line, done.returncode, out.read(), errors.read())

    def ok(self, *words: str | Path, **more: Any) -> str:
        done = self.call(*words, **more)
        assert done.returncode == 0, f"{words}: {done.returncode}: {done.stderr}"
        return done.stdout

    def refused(self, *words: str | Path, code: int = 1, **more: Any) -> str:
        done = self.call(*words, **more)
        assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stderr

    def status(self, container: str) -> str:
        status: str = json.loads(self.ok("state", container))["status"]
        return status

    def running(self, container: str = "c", *args: str) -> str:
        """Create and start a container that sleeps."""
        self.ok("run", "--detach", "--bundle", self.bundle(*(args or ("sleep", "1000"))), container)
        return container

    def left(self) -> list[str]:
        """What there still is of containers: states, cgroups."""
        states = [path.name for path in self.state.glob("*") if not path.name.startswith("@")]
        return states + [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{self.name}*")]

    def remove_all(self) -> None:
        for path in self.state.glob("*"):
            if not path.name.startswith("@"):
                self.call("delete", "--force", path.name)
        subprocess.run(["rm", "-rf", "--one-file-system", str(self.directory)], check=True)


@pytest.fixture
def oci() -> Iterator[Oci]:
    """A scratch directory; what its containers leave on the machine is the test's failure."""
    assert PROGRAM.exists(), "build it with: make build"
    directory = Path(tempfile.mkdtemp(prefix=f"{MARK}oci-"))
    before = machine_state(directory.name[-8:])
    scratch = Oci(directory)
    yield scratch
    scratch.remove_all()
    assert_machine_unchanged(before, directory.name[-8:])


class Receiver:
    """A unix socket to which one descriptor is sent, as conmon listens for a terminal."""

    def __init__(self, path: Path) -> None:
        self.path, self._listener = path, socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(SECONDS)

    def take(self) -> int:
        connection, _ = self._listener.accept()
        with connection:
            fds = array.array("i")
            _, rights, _, _ = connection.recvmsg(64, socket.CMSG_LEN(fds.itemsize))
            fds.frombytes(rights[0][2])
        self._listener.close()
        return fds[0]


def end(pid: int) -> None:
    """An exec'ed process is an orphan, so ours; until it is reaped its PID namespace's init cannot end."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
