"""A daemon with shim handlers, for the tests of runtime_type "vm"."""

from __future__ import annotations

from pathlib import Path

from crio_native.cli.scratch import ScratchDaemon
from tests.cri.conftest import Client

RUNC_SHIM = "/usr/bin/containerd-shim-runc-v2"

HANDLERS = f"""\
[crio.runtime.runtimes.shim]
runtime_type = "vm"
runtime_path = "{RUNC_SHIM}"
allowed_annotations = ["org.example.allowed", "io.kubernetes.cri."]
"""


class ShimDaemon(ScratchDaemon):
    """more: configuration beside the scratch daemon's own."""

    def __init__(self, more: str = HANDLERS) -> None:
        super().__init__()
        self.more = more

    def _write_config(self) -> None:
        super()._write_config()
        (self.directory / "crio.conf.d" / "50-shims.conf").write_text(self.more)


def new_client(more: str = HANDLERS) -> Client:
    daemon = ShimDaemon(more)
    try:
        daemon.start()
        client = Client(daemon)
        client.load_image()
    except BaseException:
        print(daemon.log_tail() if daemon.log.exists() else "")
        daemon.close()
        raise
    return client


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
