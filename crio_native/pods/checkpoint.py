"""Checkpoints: a running container as one file, while it goes on.

The file is a tar of what CRI-O's has, and checkpointctl reads: `checkpoint/` (CRIU's images), `config.dump` (what
container this is), `spec.dump` (its config.json), `rootfs-diff.tar` and `deleted.files` (what it changed in its image's
root file system) and CRIU's log and statistics.  It holds the memory of processes, and is root's alone.

The container is frozen until all is read: its files must be those that its processes know, and what is hostile must not
change a tree under its reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import (
    AlreadyExists,
    CrioError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from crio_native.images import exporting
from crio_native.images.roots import UPPER
from crio_native.linux.cgroup import cgroup_of
from crio_native.oci import criu
from crio_native.oci.runtime import CheckpointSpec
from crio_native.pods import trees
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState, ProcessRecord

_DIRECTORY = "checkpoint"  # below the bundle, and in the file
_OF_CRIU = ("dump.log", "stats-dump")
ABOUT = "pod.json"  # in a pod's checkpoint
_ABOUT_MAX = 4 << 20
_fitting: set[tuple[str, int]] = set()  # programs, by path and time of change, that `criu check` was content with
_LEFT_SECONDS = 30.0  # that a daemon's start waits for the CRIU of the one before


def check_allowed(level: str, act: str, *, restore: bool) -> None:
    """level: `crio.checkpoint_restore.container_level_enabled`.  Raises FailedPrecondition."""
    if level == "none" or (restore and level == "checkpoint_only"):
        option = "crio.checkpoint_restore.container_level_enabled"
        raise FailedPrecondition(f"{act} is switched off on this node: {option} is {level!r}")


def check_criu(act: str) -> None:
    """Raises FailedPrecondition where CRIU is missing, or in its own words where it does not fit the kernel."""
    program = criu.program()
    version = program, os.stat(program).st_mtime_ns
    if version in _fitting:
        return
    if trouble := criu.trouble(program):
        raise FailedPrecondition(
            f"{act} needs CRIU, and `criu check` says that {program} does not work with this kernel: {trouble}; "
            "install a CRIU that fits it"
        )
    _fitting.add(version)


def write(node: Node, container_id: str, location: str, seconds: float | None) -> None:
    """Write a running container's checkpoint to a file that is not there yet.

    seconds: until it is given up; None for no limit.  Raises FailedPrecondition for a container that does not run or
    cannot be saved, AlreadyExists, InvalidArgument, StepFailed, DeadlineExceeded; then there is no file, and the
    container goes on.
    """
    began = time.monotonic()
    with node.locks.hold(container_id):
        container = node.store.get(Container, container_id)
        if container.state != ContainerState.RUNNING or container.process is None:
            raise FailedPrecondition(f"container {container_id} is {container.state}; a checkpoint is of a running one")
        bundle = node.layout.bundle(container_id)
        if not (bundle / UPPER).is_dir():
            why = "its storage driver does not keep what it changed in its root file system"
            raise FailedPrecondition(f"container {container_id} has no checkpoint: {why}")
        place = bundle / _DIRECTORY
        group = node.executor_of(container).freezer(container_id, container.cgroup)
        if group.frozen():
            raise FailedPrecondition(f"container {container_id} is paused: let it go on first")
        trees.remove_tree(place)  # of a daemon that was killed
        place.mkdir(mode=0o700)
        try:
            _dump(node, container, container.process, bundle, seconds)
            try:
                if seconds is not None and time.monotonic() - began > seconds:
                    raise DeadlineExceeded(f"the checkpoint of container {container_id} took more than {seconds:g} s")
                _pack(node, container, bundle, location)
            finally:
                group.thaw()
        finally:
            trees.remove_tree(place)


def write_pod(
    node: Node, containers: Sequence[Container], directory: str, about: Mapping[str, Any], seconds: float | None
) -> None:
    """Write the checkpoints of a pod's containers, one after the other, into a directory that is not there yet, and
    what the pod is (`about`, JSON) beside them.  Raises as `write`; then there is no directory."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        raise AlreadyExists(f"output_path {directory!r} exists; a checkpoint is not written over anything") from None
    except OSError as error:
        raise InvalidArgument("output_path", directory, f"cannot be made: {(error.strerror or '').lower()}") from None
    try:
        Path(directory, ABOUT).write_text(json.dumps(about, indent=1))
        for container in containers:
            write(node, container.id, file_of(directory, container.config.metadata.name), seconds)
    except BaseException:
        trees.remove_tree(directory)
        raise


def file_of(directory: str, name: str) -> str:
    """The file of a container of that name in a pod's checkpoint.  Raises InvalidArgument."""
    if "/" in name or name in ("", ".", ".."):
        raise InvalidArgument("metadata.name", name, "is no file's name")
    return f"{directory}/{name}.tar"


def about_pod(directory: str) -> dict[str, Any]:
    """What `write_pod` was told of the pod.  Raises NotFound, InvalidArgument."""
    path = Path(directory, ABOUT)
    try:
        found = json.loads(_read_file(path))
    except OSError as error:
        why = f"it has no readable {ABOUT} ({(error.strerror or '').lower()})"
        raise NotFound("checkpoint of a pod", directory, why) from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("checkpoint_path", str(path), f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument("checkpoint_path", str(path), "must be an object")
    return found


def _read_file(path: Path) -> bytes:
    """A stranger's: nothing but a file is opened, for opening may be waiting for a FIFO's other end."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise InvalidArgument("checkpoint_path", str(path), "must be a regular file")
        with open(f"/proc/self/fd/{place}", "rb") as file:
            content = file.read(_ABOUT_MAX + 1)
    finally:
        os.close(place)
    if len(content) > _ABOUT_MAX:
        raise InvalidArgument("checkpoint_path", str(path), f"may have at most {_ABOUT_MAX} bytes")
    return content


def forget(node: Node, container: Container) -> None:
    """After a restart: the container of a checkpoint that was cut off, frozen or still stopped, goes on.  A CRIU that
    is at work yet would leave it stopped at its end."""
    place = node.layout.bundle(container.id) / _DIRECTORY
    if not place.is_dir():
        return
    with contextlib.suppress(FileNotFoundError, DeadlineExceeded):
        criu.await_end(str(place / "log"), _LEFT_SECONDS)
    with contextlib.suppress(CrioError):
        node.executor_of(container).freezer(container.id, container.cgroup).thaw()
    for pid in cgroup_of(container.cgroup, node.settings.cgroup_manager).processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    trees.remove_tree(place)


def _dump(node: Node, container: Container, process: ProcessRecord, bundle: Path, seconds: float | None) -> None:
    images, log = bundle / _DIRECTORY / "images", bundle / _DIRECTORY / "log"
    for directory in (images, log):
        directory.mkdir(mode=0o700)
    node.executor_of(container).checkpoint(
        CheckpointSpec(
            container.id,
            process.process(),
            container.cgroup,
            json.loads((bundle / "config.json").read_bytes()),
            bundle / "rootfs",
            images,
            log,
            seconds,
        )
    )


def _pack(node: Node, container: Container, bundle: Path, location: str) -> None:
    place = bundle / _DIRECTORY
    (place / "config.dump").write_text(json.dumps(_description(node, container), indent=1))
    (place / "spec.dump").write_bytes((bundle / "config.json").read_bytes())
    deleted = _write_changes(bundle / UPPER, place / "rootfs-diff.tar")
    if deleted:
        (place / "deleted.files").write_text(json.dumps(deleted))
    for name in _OF_CRIU:
        for found in (place / "log" / name, place / "images" / name):
            if found.is_file():
                found.rename(place / name)
                break
    try:
        fd = os.open(location, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"location {location!r} exists; a checkpoint is not written over anything") from None
    except OSError as error:
        raise InvalidArgument("location", location, f"cannot be made: {(error.strerror or '').lower()}") from None
    try:
        with open(fd, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(place.iterdir()):
                if path.name != "log":
                    archive.add(path, _DIRECTORY if path.name == "images" else path.name)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(location)
        raise


def _description(node: Node, container: Container) -> dict[str, Any]:
    """As checkpointctl's library has it (`metadata.ContainerConfig`)."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(container.created_at // 10**9))
    return {
        "id": container.id,
        "name": container.config.metadata.name,
        "rootfsImage": container.config.image.image,
        "rootfsImageRef": container.image_id,
        "rootfsImageName": container.config.image.user_specified_image or container.config.image.image,
        "runtime": container.handler or node.settings.default_runtime,
        "createdTime": made,
        "checkpointedTime": now,
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": False,
    }


def _write_changes(upper: Path, target: Path) -> list[str]:
    """The tree that overlayfs keeps of what changed, as a tar; what was deleted is returned."""
    deleted: list[str] = []
    first: dict[int, str] = {}
    with tarfile.open(target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, name in exporting.below(upper):
            info = path.lstat()
            if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                deleted.append(name)
            elif not stat.S_ISSOCK(info.st_mode):
                exporting.add(archive, path, name, first, sparse=True)
    return deleted
