"""Checkpoints that an attacker wrote: what reading one costs, and what may come out of it.  All without CRIU."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crio_native.cli.scratch import wait_for
from crio_native.errors import CrioError, InvalidArgument, PermissionRefused, ResourceExhausted
from crio_native.linux import process
from crio_native.linux.cgroup import cgroup_of, hierarchy
from crio_native.oci.builtin import restoring as executor
from crio_native.pods import restoring
from crio_native.pods.records import Layout
from crio_native.pods.values import ContainerConfig, ImageSpec

from ..images_support import member, tar
from ..oci.conftest import PARENT, Container
from .conftest import Lab, laboratory

pytestmark = pytest.mark.root

GIB = 1 << 30


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Any]:
    """One with a place for what is unpacked, of which nothing stays."""
    layout = Layout(tmp_path / "root", tmp_path / "run", tmp_path / "ns", tmp_path / "logs")
    for directory in layout.directories():
        directory.mkdir(exist_ok=True, parents=True)
    yield SimpleNamespace(layout=layout)
    assert list((layout.root / "containers").iterdir()) == []


def archive(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "saved.tar"
    path.write_bytes(data)
    return str(path)


def content(node: Any, tmp_path: Path, data: bytes, look: Callable[[Path], Any] = lambda place: None) -> Any:
    with restoring.unpacked(node, archive(tmp_path, data)) as place:
        return look(place)


def extended(size: int) -> bytes:
    header = tarfile.TarInfo("extended")
    header.type, header.size = tarfile.XHDTYPE, size
    return header.tobuf(tarfile.USTAR_FORMAT)


def test_cve_2025_58183_an_extended_header_without_end(node: Any, tmp_path: Path) -> None:
    """Its size is believed to be what is worth reading by none: it would be in memory at once."""
    with pytest.raises(ResourceExhausted, match=r"an extended header of 3221225472 bytes; the most is"):
        content(node, tmp_path, extended(3 * GIB) + bytes(1 << 20))


def test_cve_2025_58183_members_without_end(node: Any, tmp_path: Path) -> None:
    many = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT) * 100_001
    with pytest.raises(ResourceExhausted, match="more than 100000 entries"):
        content(node, tmp_path, gzip.compress(many, 1))


def test_cve_2025_58183_holes_take_no_disk(node: Any, tmp_path: Path) -> None:
    """A sparse image is sparse on the disk, too; and one beyond the bound is none."""

    def sparse(size: int) -> bytes:
        headers = {"major": "1", "minor": "0", "name": "checkpoint/pages-1.img", "realsize": str(size)}
        info = tarfile.TarInfo("sparse")
        info.size, info.pax_headers = 512, {f"GNU.sparse.{name}": value for name, value in headers.items()}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as changed:
            changed.addfile(info, io.BytesIO(b"1\n%d\n0\n".ljust(512, b"\0") % size))
        return buffer.getvalue()

    found = content(node, tmp_path, sparse(20 * GIB), lambda place: (place / "checkpoint/pages-1.img").stat())
    assert (found.st_size, found.st_blocks) == (20 * GIB, 0)
    with pytest.raises(ResourceExhausted, match="a sparse file of"):
        content(node, tmp_path, sparse(100 * GIB))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("name", ["config.dump", "checkpoint", "checkpoint/pages-1.img", "rootfs-diff.tar", "other"])
def test_only_files_come_out(node: Any, tmp_path: Path, name: str, kind: bytes) -> None:
    with pytest.raises(InvalidArgument, match="is neither a file nor a directory"):
        content(node, tmp_path, tar(member(name, kind, linkname="/etc")))


def test_nobody_else_reads_what_is_unpacked(node: Any, tmp_path: Path) -> None:
    """It is the memory of processes, and the archive says what mode and owner its own top has."""
    top = member(".", tarfile.DIRTYPE, mode=0o777, uid=1000)
    assert content(node, tmp_path, tar(top), lambda place: stat.S_IMODE(place.parent.stat().st_mode)) == 0o700


@pytest.mark.parametrize("path", ["/dev/zero", "/", "fifo"])
def test_what_is_no_file_is_not_read(node: Any, tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    where = str(tmp_path / path)
    with pytest.raises(InvalidArgument, match="not a regular file"), restoring.unpacked(node, where):
        pass


def changed(node: Any, tmp_path: Path, changes: bytes, deleted: object) -> Path:
    upper = tmp_path / "upper"
    upper.mkdir()
    files = [member("rootfs-diff.tar", data=changes), member("deleted.files", data=json.dumps(deleted).encode())]
    content(node, tmp_path, tar(*files), lambda place: restoring.apply_changes(place, upper))
    return upper


def test_changes_and_what_was_deleted(node: Any, tmp_path: Path) -> None:
    changes = tar(member("etc", tarfile.DIRTYPE, mode=0o751), member("etc/new", data=b"new"))
    upper = changed(node, tmp_path, changes, ["etc/group", "/var/caf\udce9", "x" * 150])
    assert (upper / "etc/new").read_bytes() == b"new" and stat.S_IMODE((upper / "etc").stat().st_mode) == 0o751
    for name in ("etc/group", "var/caf\udce9", "x" * 150):
        found = (upper / name).lstat()
        assert stat.S_ISCHR(found.st_mode) and found.st_rdev == 0, name


def test_cve_2025_58183_changes_are_bounded_too(node: Any, tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="an extended header"):
        changed(node, tmp_path, extended(3 * GIB) + bytes(1024), [])


@pytest.mark.parametrize("deleted", [["../../../etc"], ["a/.."], [5], {}, ["\ud800"], ["a\0b"], ["x" * (5 << 20)]])
def test_deleted_files_that_are_none(node: Any, tmp_path: Path, deleted: object) -> None:
    with pytest.raises(CrioError, match=r"deleted\.files|'\.\.'|whiteout of no name"):
        changed(node, tmp_path, tar(), deleted)
    assert sorted(os.listdir(tmp_path / "upper")) in ([], ["a"])


def test_a_checkpoint_does_not_name_its_image_for_the_trust_policy(tmp_path: Path) -> None:
    image = SimpleNamespace(id="sha256:1", names=["localhost/untrusted/x:1", "localhost/also/x:1"])
    node: Any = SimpleNamespace(images=SimpleNamespace(get=lambda name: image))
    config = ContainerConfig(image=ImageSpec(image="/saved.tar"))
    for called, name in (("localhost/trusted/x:1", ""), ("localhost/also/x:1", "localhost/also/x:1")):
        description = {"rootfsImageRef": image.id, "rootfsImageName": called}
        (tmp_path / "config.dump").write_text(json.dumps(description))
        found = restoring.with_base_image(node, config, tmp_path).image
        assert (found.image, found.user_specified_image) == (image.id, name)


# -- what CRIU makes of hostile images: processes that stand for it, stopped, of containers that were asked for less ---


@pytest.fixture
def lab(tools: Path) -> Iterator[Lab]:
    with laboratory("", tools) as lab:
        yield lab


def grouped(lab: Lab, *args: str) -> dict[str, Any]:
    spec = lab.spec(*args)
    spec["linux"]["cgroupsPath"] = f"{PARENT}/restored"
    return spec


def stopped(lab: Lab, spec: dict[str, Any], says: str = "ready") -> Container:
    container = lab.create(spec).start()
    wait_for(lambda: says in container.output(), 10, "the command")
    for pid in cgroup_of(container.cgroup, "cgroupfs").processes():
        os.kill(pid, signal.SIGSTOP)
    return container


def take_over(container: Container, asked: dict[str, Any]) -> None:
    executor.take_over(cgroup_of(container.cgroup, "cgroupfs"), container.process.pid, asked)


READY = ("sh", "-c", "echo ready; while :; do sleep 1000; done")
FILTER = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat", "unshare"], "action": "SCMP_ACT_ERRNO"}],
}


def test_processes_as_asked_go_on(lab: Lab) -> None:
    spec = grouped(lab, *READY)
    spec["linux"]["seccomp"] = FILTER
    container = stopped(lab, spec)
    cgroup = cgroup_of(container.cgroup, "cgroupfs")
    take_over(container, spec)
    assert cgroup.frozen()
    cgroup.thaw()
    wait_for(lambda: not process.is_stopped(container.process.pid), 10, "the process")
    assert container.exec("true") == (0, "")


def test_a_thread_behind_a_harmless_leader(lab: Lab) -> None:
    spec = grouped(lab, "/bin/hostile", "behind")
    asked = json.loads(json.dumps(spec))
    asked["process"]["capabilities"] = {}
    for given in spec["process"]["capabilities"].values():
        given.append("CAP_SETPCAP")
    del spec["process"]["noNewPrivileges"]
    container = stopped(lab, spec, "behind")
    with pytest.raises(PermissionRefused, match=r"thread [0-9]+: process\.capabilities\.bounding"):
        take_over(container, asked)


def test_a_user_namespace_that_nobody_asked_for(lab: Lab) -> None:
    """Its maps could make anybody outside of the user who was asked for."""
    asked = grouped(lab, *READY)
    spec = json.loads(json.dumps(asked))
    mapping = [{"containerID": 0, "hostID": 0, "size": 65536}]
    spec["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}
    spec["linux"]["namespaces"].append({"type": "user"})
    with pytest.raises(PermissionRefused, match=r"linux\.namespaces user is its own, with 0\+65536 at 0"):
        take_over(stopped(lab, spec), asked)


def test_a_process_of_another_control_group(lab: Lab) -> None:
    """Whose limits it would be without; it does not outlive the refusal."""
    spec = grouped(lab, "sh", "-c", "sleep 1000 & echo ready; wait")
    container = stopped(lab, spec)
    other = cgroup_of(f"{PARENT}/other", "cgroupfs")
    other.create()
    try:
        [fled] = process.descendants(container.process.pid)
        for directory in set(hierarchy().directories(other.path).values()):
            Path(directory, "cgroup.procs").write_text(str(fled))
        with pytest.raises(PermissionRefused, match=f"process {fled} is not in the control group {PARENT}/restored"):
            take_over(container, spec)
        wait_for(lambda: process.start_time(fled) is None, 10, "its end")
    finally:
        other.kill()
        other.remove()


def test_another_filter_than_the_one_that_was_asked_for(lab: Lab) -> None:
    asked = grouped(lab, *READY)
    asked["linux"]["seccomp"] = FILTER
    spec = json.loads(json.dumps(asked))
    spec["linux"]["seccomp"]["syscalls"][0]["names"] = ["swapon"]
    with pytest.raises(PermissionRefused, match=r"linux\.seccomp is another filter"):
        take_over(stopped(lab, spec), asked)


def with_volume(lab: Lab) -> tuple[dict[str, Any], Path]:
    volume = lab.directory / "volume"
    (volume / "x").mkdir(parents=True)
    spec = grouped(lab, *READY)
    spec["mounts"].append({"destination": "/vol", "type": "bind", "source": str(volume), "options": ["rbind"]})
    return spec, volume


def test_a_mount_below_a_volume_that_the_volume_has_not(lab: Lab) -> None:
    """A process that CRIU made has it although it may not mount."""
    spec, _ = with_volume(lab)
    container = stopped(lab, spec)
    enter = ["nsenter", "--mount", "--target", str(container.process.pid), "/bin/mount"]
    subprocess.run([*enter, "-t", "proc", "proc", "/vol/x"], check=True)
    with pytest.raises(PermissionRefused, match="mount /vol/x is proc from proc/, not what the source has there"):
        take_over(container, spec)


def test_mounts_that_nobody_could_compare(lab: Lab) -> None:
    """A link that leads to itself in a place that is looked at."""
    spec = grouped(lab, "sh", "-c", "ln -s console /dev/console; echo ready; while :; do sleep 1000; done")
    with pytest.raises(PermissionRefused, match=r"mounted is cannot be read: .*symbolic links"):
        take_over(stopped(lab, spec), spec)


def test_another_volume_than_the_one_that_was_asked_for(lab: Lab) -> None:
    spec, _ = with_volume(lab)
    asked = json.loads(json.dumps(spec))
    asked["mounts"][-1]["source"] = str(lab.outside)
    with pytest.raises(PermissionRefused, match=r"mount /vol is .*, not what the source has there"):
        take_over(stopped(lab, spec), asked)


REMOUNT = """
import os, sys
from crio_native.linux import mounts, syscalls
syscalls.setns(os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY), syscalls.CLONE_NEWNS)
syscalls.mount(None, "/vol/x", None, mounts.MS_REMOUNT | mounts.MS_BIND | mounts.MS_NOSUID)
"""


def test_a_mount_below_a_volume_that_is_the_volumes_own(lab: Lab) -> None:
    """With what its flags forbid."""
    spec, volume = with_volume(lab)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,noexec", "tmpfs", volume / "x"], check=True)
    try:
        take_over(stopped(lab, spec), spec)
        lab.remove_containers()
        container = stopped(lab, spec)
        subprocess.run([sys.executable, "-c", REMOUNT, str(container.process.pid)], check=True)
        with pytest.raises(PermissionRefused, match="mount /vol/x is without the source's noexec"):
            take_over(container, spec)
    finally:
        lab.remove_containers()
        subprocess.run(["umount", volume / "x"], check=True)


BIND = """
import os, sys
from crio_native.linux import staging
place, volume, here = sys.argv[1], sys.argv[2], os.stat(sys.argv[3])
told = set()
for turn in range(300):
    directory = f"{place}/{turn}"
    os.mkdir(directory)
    try:
        staging.bind_beneath(directory, [(volume, "/x")])
        told.add("bound" if os.path.samestat(os.stat(f"{directory}/0"), here) else "led away")
    except OSError as error:
        told.add(error.strerror)
print(*sorted(told), sep=", ")
"""


def test_what_is_below_a_volume_is_not_swapped_for_a_link(lab: Lab, tmp_path: Path) -> None:
    """Its owner does so again and again while CRIU's mounts are prepared."""
    _, volume = with_volume(lab)
    (volume / "link").symlink_to(lab.outside)
    (lab.directory / "here").mkdir()
    subprocess.run(["mount", "--bind", volume / "x", lab.directory / "here"], check=True)
    line: list[str | Path] = [
        "unshare",
        "--mount",
        "--propagation",
        "slave",
        sys.executable,
        "-c",
        BIND,
        tmp_path,
        volume,
    ]
    try:
        with subprocess.Popen([lab.tools / "hostile", "swap", volume / "x", volume / "link"]) as swapping:
            try:
                told = subprocess.run(
                    [*line, lab.directory / "here"], check=True, capture_output=True, text=True
                ).stdout
            finally:
                swapping.kill()
    finally:
        subprocess.run(["umount", lab.directory / "here"], check=True)
    assert told == "Too many levels of symbolic links, bound\n"
