"""What a container can write to has a bound, or is its writable layer, which is measured and can have a limit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.cli.scratch import mounts_below

from ..cri.conftest import Client, log_text
from ..cri.images import variant

pytestmark = pytest.mark.root

FILES = ("/etc/hosts", "/etc/resolv.conf", "/etc/hostname")


@pytest.fixture(scope="module")
def cri() -> Iterator[Client]:
    with Client.serving('[crio.image]\nimage_volumes = "bind"\n') as client:
        yield client


def allocated(directory: Path) -> int:
    """Bytes of the files on the very disk that the directory is on."""
    disk = directory.stat().st_dev
    found = [path.lstat() for path in directory.rglob("*")]
    return sum(info.st_blocks * 512 for info in found if info.st_dev == disk)


def test_the_pods_files_take_nothing_from_the_disk(cri: Client) -> None:
    """The class of CVE-2020-8557."""
    pod = cri.pod()
    container = cri.start(pod, "sleep", "600")
    before = allocated(cri.daemon.directory)
    for path in FILES:
        told = cri.exec(container, "dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=64")
        assert told.exit_code != 0 and b"No space left on device" in told.stderr
    assert allocated(cri.daemon.directory) < before + (1 << 20)
    cri.remove_pod(pod)


def test_the_pods_files_can_be_written_and_outlive_the_daemon(cri: Client) -> None:
    pod = cri.pod()
    first = cri.start(pod, "sleep", "600")
    for path in FILES:
        assert cri.exec(first, "sh", "-c", f"echo 10.0.0.1 added >> {path}").exit_code == 0
    cri.restart(signal.SIGKILL)
    second = cri.start(pod, "cat", *FILES)
    assert log_text(cri.ended(second).log_path).count("10.0.0.1 added") == 3
    cri.remove_pod(pod)
    assert mounts_below(cri.daemon.directory / "root") == []


def test_volumes_that_an_image_declares_are_measured(cri: Client) -> None:
    """They are on the disk, beside the writable layer."""
    pod = cri.pod()
    container = cri.start(pod, "sleep", "600", image=variant(cri, "declaring", Volumes={"/data": {}}))
    assert cri.exec(container, "dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=8").exit_code == 0
    stats = cri.call("ContainerStats", container_id=container).stats
    assert stats.writable_layer.used_bytes.value >= 8 << 20
    cri.remove_pod(pod)
