"""Bounds of what a container may change of its root, on file systems that have project quotas: ext4 and xfs."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from crio_native.cli.scratch import ScratchDaemon
from crio_native.images import roots
from crio_native.linux import quota, syscalls

from ..cri.conftest import Client

pytestmark = pytest.mark.vm

MIB = 1 << 20
SIZE, INODES = 4 * MIB, 40
SETTINGS = f'[crio]\nstorage_option = ["overlay.size={SIZE >> 20}m", "overlay.inodes={INODES}"]\n'
FileSystem = Callable[[Path], AbstractContextManager[Path]]
XFS_SIZE = 400 * MIB  # mkfs.xfs makes none below 300


@contextlib.contextmanager
def ext4(directory: Path) -> Iterator[Path]:
    """The guest's disk."""
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "project,quota", "/dev/ubda"], check=True)
    with mounted("/dev/ubda", "ext4", directory) as target:
        yield target


@contextlib.contextmanager
def xfs(directory: Path) -> Iterator[Path]:
    """A file that is a disk: the guest's own is too small."""
    disk = directory / "xfs.disk"
    with disk.open("wb") as file:
        file.truncate(XFS_SIZE)
    subprocess.run(["mkfs.xfs", "-q", disk], check=True)
    subprocess.run([Path("/proc/sys/kernel/modprobe").read_text().strip(), "loop"], check=True)
    loop = subprocess.run(["losetup", "--show", "-f", disk], check=True, capture_output=True, text=True).stdout.strip()
    try:
        with mounted(loop, "xfs", directory) as target:
            yield target
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


@contextlib.contextmanager
def mounted(device: str, kind: str, directory: Path) -> Iterator[Path]:
    target = directory / kind
    target.mkdir()
    syscalls.mount(device, str(target), kind, 0, "prjquota")
    try:
        yield target
    finally:
        syscalls.umount2(str(target), 0)


@pytest.mark.parametrize("file_system", [ext4, xfs])
def test_a_container_has_so_much_of_its_root_and_no_more(tmp_path: Path, file_system: FileSystem) -> None:
    with file_system(tmp_path) as place:
        daemon = ScratchDaemon(place, SETTINGS)
        try:
            daemon.start()
            client = Client(daemon)
            client.load_image()
            judge(client, daemon.directory)
            client.channel.close()
        finally:
            problems = daemon.close()
        assert problems == []


def judge(client: Client, directory: Path) -> None:
    pod = client.pod()
    greedy, modest = (client.start(pod, "sleep", "1000") for _ in range(2))
    bundle = next(path for path in directory.rglob(greedy) if (path / "upper").is_dir())
    project = roots.project(bundle)
    assert quota.project_of(str(bundle / "upper")) == project
    assert quota.limits(str(bundle), project) == (SIZE, INODES)

    full = client.exec(greedy, "dd", "if=/dev/zero", "of=/big", "bs=64k", "count=100")
    assert full.exit_code == 1 and any(word in full.stderr for word in (b"No space left", b"quota exceeded"))
    assert SIZE // 2 < quota.usage(str(bundle), project)[0] <= SIZE
    assert client.exec(modest, "dd", "if=/dev/zero", "of=/big", "bs=64k", "count=32").exit_code == 0
    assert client.exec(greedy, "rm", "/big").exit_code == 0
    many = client.exec(
        greedy, "sh", "-c", "for n in 0 1 2 3 4 5 6 7 8 9; do touch /$n-a /$n-b /$n-c /$n-d || exit 7; done"
    )
    assert many.exit_code == 7
    told = client.exec(greedy, "df", "-k", "/").stdout.split()
    assert str(SIZE >> 10).encode() in told  # what a program in there sees is its bound

    client.remove_pod(pod)
    assert limits_left(directory, project) == (0, 0)


def limits_left(directory: Path, project: int) -> tuple[int, int]:
    """xfs says of a project that it has forgotten that there is none."""
    try:
        return quota.limits(str(directory), project)
    except OSError:
        return 0, 0
