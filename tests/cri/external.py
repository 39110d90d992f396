"""The handlers that the tests of pods and containers run with beside the built-in one, as fixtures in place of
`conftest`'s, and what this host lacks for them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Client

HUGETLB = Path("/sys/fs/cgroup/hugetlb")
PROGRAMS = {
    "runc": "runc",
    "crun": "crun",
    "conmon": "runc",
    "crio-oci": str(Path(sys.executable).with_name("crio-oci")),
    "shim": "containerd-shim-runc-v2",  # over runc
}


def settings(handler: str) -> str:
    """The daemon's configuration with one external handler, which is the default."""
    return f"""
[crio.runtime]
container_exits_dir = "{{directory}}/run/exits"
container_attach_socket_dir = "{{directory}}/run/attach"
default_runtime = "{handler}"
{table(handler)}"""


def table(handler: str) -> str:
    """The handler's own table."""
    program = PROGRAMS[handler]
    path = "" if program == handler else f'runtime_path = "{shutil.which(program)}"'
    path += f'\nmonitor_path = "{shutil.which("conmon")}"' if handler == "conmon" else ""
    path += '\nruntime_type = "vm"' if handler == "shim" else ""
    return f"""
[crio.runtime.runtimes.{handler}]
{path}
runtime_root = "{{directory}}/run/{handler}"
container_min_memory = "500 KiB"
"""


def prepare_host() -> None:
    """Older crun want every v1 controller of the kernel to be mounted; adding one disturbs nobody."""
    if Path("/sys/fs/cgroup/cpu").is_dir() and not HUGETLB.is_mount():
        HUGETLB.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "cgroup", "-o", "hugetlb", "cgroup", HUGETLB], check=True)


@pytest.fixture(scope="module", params=sorted(PROGRAMS))
def handler(request: Any) -> str:
    prepare_host()
    return str(request.param)


@pytest.fixture(scope="module")
def shared(handler: str) -> Iterator[Client]:
    with Client.serving(settings(handler)) as client:
        yield client


@pytest.fixture
def fresh(shared: Client) -> Iterator[Client]:
    """The same daemon: who restarts and breaks it leaves one behind that serves, and a start costs more than a test."""
    yield shared
    assert shared.daemon.process is not None
    (shared.daemon.directory / "crio.conf.d/50-test.conf").unlink(missing_ok=True)
    if shared.daemon.process.poll() is not None:
        shared.start_daemon()
    shared.remove_pods()


class OfHandler(Client):
    """Pods are of `handler`, unless a test names another: one daemon serves the tests of them all."""

    handler = ""

    def pod(self, config: Any = None, *, handler: str = "", **fields: Any) -> str:
        return super().pod(config, handler=handler or self.handler, **fields)
