"""Shims' handlers and processes, for the tests of runtime_type "vm"."""

from __future__ import annotations

from pathlib import Path

from tests.cri.conftest import Client

RUNC_SHIM = "/usr/bin/containerd-shim-runc-v2"

HANDLERS = f"""\
[crio.runtime.runtimes.shim]
runtime_type = "vm"
runtime_path = "{RUNC_SHIM}"
allowed_annotations = ["org.example.allowed", "io.kubernetes.cri."]
"""


def shim_processes(client: Client, pod: str = "") -> list[int]:
    """The shims of the daemon's pods, or of one: processes that work in a bundle and are not of a container."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            where, name = (directory / "cwd").readlink(), (directory / "cmdline").read_bytes()
        except OSError:
            continue
        bundles = client.daemon.directory / "root" / "containers"
        if where.is_relative_to(bundles) and b"shim" in name and pod in where.parts[-1]:
            found.append(int(directory.name))
    return found
