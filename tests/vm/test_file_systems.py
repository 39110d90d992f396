"""Containers on file systems of their own: project quotas of ext4 and xfs, snapshots of btrfs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import ScratchDaemon
from crio_native.images import roots
from crio_native.linux import quota, syscalls

from ..cri.conftest import Client
from ..cri.images import variant

pytestmark = pytest.mark.vm

MIB = 1 << 20
SIZE, INODES = 4 * MIB, 40
QUOTAS = f'[crio]\nstorage_option = ["overlay.size={SIZE >> 20}m", "overlay.inodes={INODES}"]\n'
SNAPSHOTS = '[crio]\nstorage_driver = "btrfs"\n'
FileSystem = Callable[[Path], AbstractContextManager[Path]]
DISK_SIZE = 400 * MIB  # mkfs.xfs makes none below 300


@contextlib.contextmanager
def ext4(directory: Path) -> Iterator[Path]:
    """The guest's disk."""
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "project,quota", "/dev/ubda"], check=True)
    with mounted("/dev/ubda", "ext4", directory) as target:
        yield target


@contextlib.contextmanager
def xfs(directory: Path) -> Iterator[Path]:
    with loop_device(directory) as device:
        subprocess.run(["mkfs.xfs", "-q", device], check=True)
        with mounted(device, "xfs", directory) as target:
            yield target


@contextlib.contextmanager
def btrfs(directory: Path) -> Iterator[Path]:
    with loop_device(directory) as device:
        subprocess.run(["mkfs.btrfs", "-q", device], check=True)
        with mounted(device, "btrfs", directory, "") as target:
            yield target


@contextlib.contextmanager
def loop_device(directory: Path) -> Iterator[str]:
    """A file that is a disk: the guest's own is too small."""
    disk = directory / "disk"
    with disk.open("wb") as file:
        file.truncate(DISK_SIZE)
    subprocess.run([Path("/proc/sys/kernel/modprobe").read_text().strip(), "loop"], check=True)
    loop = subprocess.run(["losetup", "--show", "-f", disk], check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield loop
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


@contextlib.contextmanager
def mounted(device: str, kind: str, directory: Path, options: str = "prjquota") -> Iterator[Path]:
    target = directory / kind
    target.mkdir()
    syscalls.mount(device, str(target), kind, 0, options)
    try:
        yield target
    finally:
        syscalls.umount2(str(target), 0)


@contextlib.contextmanager
def daemon(place: Path, settings: str) -> Iterator[Client]:
    """One whose files are all there."""
    scratch = ScratchDaemon(place, settings)
    try:
        scratch.start()
        client = Client(scratch)
        client.load_image()
        yield client
        client.channel.close()
    finally:
        problems = scratch.close()
    assert problems == []


@pytest.mark.parametrize("file_system", [ext4, xfs])
def test_a_container_has_so_much_of_its_root_and_no_more(tmp_path: Path, file_system: FileSystem) -> None:
    with file_system(tmp_path) as place, daemon(place, QUOTAS) as client:
        judge(client, client.daemon.directory)


def test_what_is_mounted_for_an_images_volumes_has_the_same_bound(tmp_path: Path) -> None:
    with ext4(tmp_path) as place, daemon(place, f'{QUOTAS}[crio.image]\nimage_volumes = "bind"\n') as client:
        pod = client.pod()
        image = variant(client, "declaring", Volumes={"/data": {}})
        container = client.start(pod, "sleep", "1000", image=image)
        assert client.exec(container, "dd", "if=/dev/zero", "of=/data/big", "bs=64k", "count=100").exit_code == 1
        assert client.exec(container, "dd", "if=/dev/zero", "of=/big", "bs=64k", "count=32").exit_code == 1
        client.remove_pod(pod)


def judge(client: Client, directory: Path) -> None:
    pod = client.pod()
    greedy, modest = (client.start(pod, "sleep", "1000") for _ in range(2))
    bundle = next(path for path in directory.rglob(greedy) if (path / "diff").is_dir())
    project = roots.project(bundle)
    assert quota.project_of(str(bundle / "diff")) == project
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

    # The bound holds who writes too much, and in a user namespace also who wants to leave it.
    assert leave_project(client, modest) == ""
    ids = [pb.IDMapping(host_id=200000, container_id=0, length=65536)]
    shut_in = client.pod(namespaces={"userns_options": pb.UserNamespace(mode=pb.POD, uids=ids, gids=ids)})
    mapped = client.start(shut_in, "sleep", "1000")
    assert client.exec(mapped, "dd", "if=/dev/zero", "of=/big", "bs=64k", "count=100").exit_code == 1
    assert "Invalid argument" in leave_project(client, mapped, mapped=True)
    client.remove_pod(shut_in)

    client.remove_pod(pod)
    assert limits_left(directory, project) == (0, 0)


def leave_project(client: Client, container: str, *, mapped: bool = False) -> str:
    """Give /big of a container another project, as its root; why that is not done."""
    status = client.call("ContainerStatus", container_id=container, verbose=True)
    pid = json.loads(status.info["info"])["pid"]
    script = f"""
import fcntl, os, sys
from crio_native.linux import quota
fd = os.open("/proc/{pid}/root/big", os.O_RDWR)
fields = [*quota._ATTRIBUTES.unpack(fcntl.ioctl(fd, quota._FS_GET, bytes(quota._ATTRIBUTES.size)))]
fields[3] = 5
fcntl.ioctl(fd, quota._FS_SET, quota._ATTRIBUTES.pack(*fields))
"""
    enter = ["nsenter", "-t", str(pid), "--user", "-S", "0", "-G", "0"] if mapped else []
    return subprocess.run([*enter, sys.executable, "-c", script], capture_output=True, text=True).stderr


def limits_left(directory: Path, project: int) -> tuple[int, int]:
    """xfs says of a project that it has forgotten that there is none."""
    try:
        return quota.limits(str(directory), project)
    except OSError:
        return 0, 0


def test_containers_are_snapshots(tmp_path: Path) -> None:
    with btrfs(tmp_path) as place, daemon(place, SNAPSHOTS) as client:
        pod = client.pod()
        writer = client.start(pod, "sh", "-c", "rm /bin/ls; echo mine >/etc/mine; sleep 1000")
        client.until(lambda: client.exec(writer, "cat", "/etc/mine").stdout == b"mine\n")
        assert client.run("cat", "/etc/mine", pod=pod)[0] == 1
        assert client.run("test", "-e", "/bin/ls", pod=pod)[0] == 0
        listed = subprocess.run(
            ["btrfs", "subvolume", "list", place], check=True, capture_output=True, text=True
        ).stdout
        assert listed.count("/rootfs\n") == 3 and listed.count("/wholes/") == 1
        client.remove_pod(pod)
        client.call("RemoveImage", image={"image": client.image})
        assert not subprocess.run(["btrfs", "subvolume", "list", place], check=True, capture_output=True).stdout
