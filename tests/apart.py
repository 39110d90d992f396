"""The run's own network, mounts and temporary directory, and a look at what it leaves there.

A run of the tests (each worker, where it has several) works in network and mount namespaces of its own: it changes
nothing of the machine's network, no two runs meet in a port, an address or a link's name, and every link, rule or mount
that is there at the end was left by this run.  Control groups have no such place: those of a run carry its mark in
their names, and so does what has to be in a place that everybody uses.  Not here: what one test could leave
(`machine`), and which tests may run at once (`workers`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from crio_native.linux import syscalls
from crio_native.linux.mounts import MNT_DETACH, MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC

from .machine import assert_machine_unchanged, machine_state

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MARK = f"crio-native-{os.getpid()}-"  # how the names of this run's control groups begin
SHARED_PLACES = ("/etc", "/run", "/var/lib", "/var/log", "/var/tmp", "/dev/shm")


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Work in namespaces and a temporary directory of one's own; at the end, AssertionError names what is left there.

    For root and the main thread; threads that exist already stay where they are.
    """
    from crio_native.cli import scratch  # here, because it takes long to import, and a guest needs only our mark

    _enter_namespaces()
    before, places = machine_state(group=MARK), _shared_places()
    with _temporary_directory() as directory:
        scratch.PREFIX = MARK
        yield
        left = sorted(_shared_places() - places) + _files(directory) + _rules()
        assert_machine_unchanged(before, group=MARK, also=left)


def _enter_namespaces() -> None:
    syscalls.unshare(CLONE_NEWNS | CLONE_NEWNET)
    syscalls.mount(None, "/", None, MS_REC | MS_PRIVATE)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    _mount_sysfs()


def _mount_sysfs() -> None:
    """/sys shows the links of the network namespace that mounted it.  What is mounted in the old one moves along."""
    with open("/proc/self/mountinfo") as file:
        targets = [line.split(" ")[4] for line in file]
    below: list[str] = []  # the mounts directly in /sys; each brings those that are in it
    for target in targets:
        if target.startswith("/sys/") and not target.startswith(tuple(f"{other}/" for other in below)):
            below.append(target)
    new = tempfile.mkdtemp()
    syscalls.mount("sysfs", new, "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for target in dict.fromkeys(below):
        syscalls.mount(target, new + target.removeprefix("/sys"), None, MS_BIND | MS_REC)
    syscalls.umount2("/sys", MNT_DETACH)
    syscalls.mount(new, "/sys", None, MS_MOVE)
    os.rmdir(new)


@contextlib.contextmanager
def _temporary_directory() -> Iterator[Path]:
    """For our tempfile, and for the programs that the tests start."""
    usual = tempfile.gettempdir()
    directory = Path(tempfile.mkdtemp(prefix=MARK))
    directory.chmod(0o711)  # some tests run programs of other users below it
    # A pytest that a test starts keeps the directories of its last runs, on purpose.
    environment = {"TMPDIR": str(directory), "PYTEST_DEBUG_TEMPROOT": usual}
    try:
        with mock.patch.object(tempfile, "tempdir", str(directory)), mock.patch.dict(os.environ, environment):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _shared_places() -> set[str]:
    """What is ours by its name; of what is in temporary directories, only this run's."""
    return {
        str(path)
        for place in map(Path, SHARED_PLACES)
        for path in place.glob(f"{MARK}*" if place.name in ("tmp", "shm") else "*crio*")
    }


def _files(directory: Path) -> list[str]:
    """All that is in it but for where crioctl keeps logs, which stays when they go."""
    return sorted(str(path) for path in directory.rglob("*") if path != directory / f"crioctl-{os.geteuid()}")


def _rules() -> list[str]:
    """The tables of nf_tables that are there."""
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout.splitlines()
