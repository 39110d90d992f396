"""crio-oci under containerd's runc shim: Debian's containerd, started for the test, with our program as its runc."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.cli.scratch import wait_for

from .command_line import PROGRAM

pytestmark = pytest.mark.root
IMAGE = "registry.invalid/busybox:1"
CONFIG = """
version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{0}/sock"
"""


class Containerd:
    """A daemon of its own, in a mount namespace of its own: the snapshots that it mounts are nobody else's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "config.toml").write_text(CONFIG.format(directory))
        with (directory / "log").open("wb") as log:
            line = ["unshare", "--mount", "--propagation", "private", "containerd", "-c", f"{directory}/config.toml"]
            self.process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for((directory / "sock").exists, 30, "containerd's socket")

    def ctr(self, *words: str, code: int = 0) -> str:
        line = [
            "nsenter",
            f"--mount=/proc/{self.process.pid}/ns/mnt",
            "ctr",
            "-a",
            str(self.directory / "sock"),
            *words,
        ]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, container: str, *command: str, detach: bool = False, code: int = 0) -> str:
        how = ["--detach"] if detach else ["--rm"]
        ours = ["--snapshotter", "native", "--runtime", "io.containerd.runc.v2", "--runc-binary", str(PROGRAM)]
        return self.ctr("run", *how, *ours, IMAGE, container, *command, code=code)

    def status(self, container: str) -> str:
        return next(line.split()[2] for line in self.ctr("task", "ls").splitlines() if line.split()[0] == container)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def image(path: Path) -> Path:
    """An archive as `docker save` writes it: busybox alone."""

    def packed(files: dict[str, bytes]) -> bytes:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o755
                tar.addfile(entry, io.BytesIO(content))
        return archive.getvalue()

    layer = packed({"bin/busybox": Path("/bin/busybox").read_bytes()})
    diff_id = "sha256:" + hashlib.sha256(layer).hexdigest()
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    config = json.dumps(
        {"architecture": machine, "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]).encode()
    path.write_bytes(packed({"config.json": config, "layer.tar": layer, "manifest.json": manifest}))
    return path


@pytest.fixture
def containerd() -> Iterator[Containerd]:
    if not shutil.which("containerd") or not shutil.which("ctr"):
        pytest.skip("Debian's package containerd is not installed")
    directory = Path(tempfile.mkdtemp(prefix="crio-native-containerd-"))
    daemon = Containerd(directory)
    try:
        daemon.ctr("images", "import", "--snapshotter", "native", str(image(directory / "image.tar")))
        yield daemon
    finally:
        daemon.close()
        subprocess.run(["rm", "-rf", "--one-file-system", str(directory)], check=True)


def test_containerds_shim_drives_it(containerd: Containerd) -> None:
    assert containerd.run("once", "/bin/busybox", "echo", "hello") == "hello\n"
    containerd.run("fails", "/bin/busybox", "sh", "-c", "exit 7", code=7)
    containerd.run("c", "/bin/busybox", "sleep", "1000", detach=True)
    try:
        words = ("task", "exec", "--exec-id", "e", "c", "/bin/busybox", "sh", "-c", "echo inside; exit 5")
        assert containerd.ctr(*words, code=5) == "inside\n"
        containerd.ctr("task", "pause", "c")
        assert containerd.status("c") == "PAUSED"
        containerd.ctr("task", "resume", "c")
        assert containerd.status("c") == "RUNNING"
        assert len(containerd.ctr("task", "ps", "c").splitlines()) == 2  # a title and the one process
        assert "memory" in containerd.ctr("task", "metrics", "c")
    finally:
        containerd.ctr("task", "kill", "--signal", "KILL", "c")
        wait_for(lambda: containerd.status("c") == "STOPPED", 20, "the end of the container")
        containerd.ctr("task", "rm", "c")
    containerd.ctr("containers", "rm", "c")
