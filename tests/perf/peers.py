"""The peers, from Debian's packages: crun, runc and conmon, and the bundle that all of us run.

The bundle's config.json is `runc spec`'s own, so that no side has written the task; changed are the command, the
terminal, the limits, the cgroup, and ambient capabilities.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from crio_native.cli import busybox
from crio_native.cli.scratch import wait_for
from crio_native.errors import NotFound

SLEEP = ("/bin/sleep", "1000")
CGROUP = f"/crio-native-bench-{os.getpid()}"  # two benchmarks at once must not kill each other


def program(name: str) -> str:
    """The path of a peer.  Raises NotFound."""
    path = shutil.which(name)
    if path is None:
        raise NotFound("program", name, f"install Debian's package {name}")
    return path


class Bundle:
    """A root file system of busybox, and configurations that differ by the command alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        busybox.populate_root(directory / "rootfs")
        subprocess.run([program("runc"), "spec", "--bundle", directory], check=True)
        self._spec = json.loads((directory / "config.json").read_text())
        self._spec["process"]["terminal"] = False
        self._spec["process"]["capabilities"]["ambient"] = []  # the kernel grants none without inheritable ones
        self._spec["linux"]["resources"] |= {"memory": {"limit": 64 << 20}, "pids": {"limit": 64}}

    def spec(self, args: Sequence[str], *, cgroup: str, seccomp: dict[str, Any] | None = None) -> dict[str, Any]:
        """A config.json as parsed JSON."""
        spec: dict[str, Any] = deepcopy(self._spec)
        spec["process"]["args"] = list(args)
        spec["linux"]["cgroupsPath"] = f"{CGROUP}/{cgroup}"
        if seccomp:
            spec["linux"]["seccomp"] = seccomp
        return spec

    def sibling(self, name: str, spec: dict[str, Any]) -> Path:
        """A bundle directory for a runtime that reads its configuration from there; the root is shared."""
        directory = self.directory / name
        directory.mkdir()
        shared = {**spec, "root": {**spec["root"], "path": str(self.directory / "rootfs")}}
        (directory / "config.json").write_text(json.dumps(shared))
        return directory


def run(*command: str | Path) -> None:
    """Run a peer to its end.  Started by vfork, it costs what posix_spawn costs.  Raises CalledProcessError."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def proportional_set_size(pid: int) -> float:
    """PSS in KiB: private memory, and its share of what is shared."""
    return _kib(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss:")


def resident_set_size(pid: int) -> float:
    """RSS in KiB."""
    return _kib(Path(f"/proc/{pid}/status").read_text(), "VmRSS:")


def _kib(text: str, field: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(field)).split()[1])


def conmon_container(bundle: Path, container_id: str) -> int:
    """Start the bundle's container under conmon with crun, as CRI-O does; returns conmon's pid."""
    files = {name: bundle / name for name in ("pid", "conmon-pid", "log", "exits", "persist")}
    for name in ("exits", "persist"):
        files[name].mkdir()
    crun, root = program("crun"), bundle / "state"
    command = [program("conmon"), "--cid", container_id, "--cuuid", container_id, "--name", container_id]
    command += [
        "--runtime",
        crun,
        "--runtime-arg",
        f"--root={root}",
        "--bundle",
        str(bundle),
        "--socket-dir-path",
        str(bundle),
    ]
    command += ["--container-pidfile", str(files["pid"]), "--conmon-pidfile", str(files["conmon-pid"])]
    command += ["--log-path", f"k8s-file:{files['log']}", "--exit-dir", str(files["exits"])]
    command += ["--persist-dir", str(files["persist"])]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=20)
    wait_for(lambda: files["pid"].exists() and files["pid"].read_text() != "", 10, "conmon's container")
    run(crun, "--root", root, "start", container_id)
    return int(files["conmon-pid"].read_text())
