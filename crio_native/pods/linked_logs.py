"""A pod's logs inside the pod: its log directory, read-only, in place of an empty volume of its own.

The annotation `link-logs.crio.io` names the emptyDir; a container that mounts that volume then reads the logs of all,
each also as ID.log.  Only a volume of the very pod can be meant, whatever the annotation says (CVE-2025-0750).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.linux import mounts, syscalls, trees
from crio_native.pods.pod_annotations import NAMES, Allowed
from crio_native.pods.records import Container, Pod

VOLUMES = (
    "/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir"  # the kubelet's, wherever its state is linked to
)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)  # RFC 1123, as the names of volumes are
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}", re.ASCII)
_ATTRIBUTES = mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC
_NOFOLLOW = 8  # UMOUNT_NOFOLLOW


def mount(pod: Pod, allowed: Allowed, label: str) -> None:
    """Put the logs where the pod's annotation, if it is allowed, says.  label: SELinux's, of the pod's files.

    Raises InvalidArgument, StepFailed when the kernel refuses.
    """
    field, volume = allowed.get("link_logs")
    if not volume:
        return
    logs = pod.config.log_directory
    if not logs:
        raise InvalidArgument("config.log_directory", logs, f"must be named for {field}")
    target = _open(pod, field, volume)
    try:
        os.makedirs(logs, 0o755, exist_ok=True)
        if label:
            os.setxattr(logs, "security.selinux", label.encode() + b"\0")
        tree = trees.clone(syscalls.AT_FDCWD, logs)
        try:
            tree.change(_ATTRIBUTES)
            tree.attach(target)
        finally:
            tree.close()
    except OSError as error:
        raise StepFailed("link_logs", error.errno or 0, logs, f"for the volume {volume!r}") from None
    finally:
        os.close(target)


def unmount(pod: Pod) -> None:
    """Undo `mount`; idempotent.  What is mounted there of somebody else's, as a volume in memory is, stays."""
    for name in NAMES["link_logs"]:
        volume = pod.config.annotations.get(name, "")
        if volume and _LABEL.fullmatch(volume) and _UID.fullmatch(pod.config.metadata.uid):
            place = os.path.join(VOLUMES.format(uid=pod.config.metadata.uid), volume)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(place, pod.config.log_directory):
                    _detach(place)


def link(pod: Pod, container: Container, allowed: Allowed) -> None:
    """The container's log by its id, for who knows only that; relative, so that it leads there inside and outside."""
    if allowed.get("link_logs")[1] and container.config.log_path:
        with contextlib.suppress(FileExistsError):
            os.symlink(container.config.log_path, Path(pod.config.log_directory, f"{container.id}.log"))


def keep_read_only(asked: Sequence[dict[str, Any]], allowed: Allowed) -> list[dict[str, Any]]:
    """A container's mounts; those from a read-only mount, as the logs' or what a sub-path of it is, stay read-only.

    Who can write in a log directory can have the kubelet read any file of the node, by a link in a log's place.
    """
    if not allowed.get("link_logs")[1]:
        return list(asked)
    return [_guarded(each) if each["type"] == "bind" else each for each in asked]


def _guarded(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        writable = not os.statvfs(asked["source"]).f_flag & os.ST_RDONLY
    except FileNotFoundError:
        return asked  # it is made for the container
    return asked if writable else {**asked, "options": ["ro" if word == "rw" else word for word in asked["options"]]}


def unlink(pod: Pod, container_id: str) -> None:
    """Undo `link`; idempotent."""
    if any(name in pod.config.annotations for name in NAMES["link_logs"]):
        Path(pod.config.log_directory, f"{container_id}.log").unlink(missing_ok=True)


def _open(pod: Pod, field: str, volume: str) -> int:
    if not _LABEL.fullmatch(volume):
        raise InvalidArgument(field, volume, "is no name of a volume")
    if not _UID.fullmatch(pod.config.metadata.uid):
        raise InvalidArgument("config.metadata.uid", pod.config.metadata.uid, f"is no id of a pod, as {field} needs")
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        volumes = os.open(VOLUMES.format(uid=pod.config.metadata.uid), flags)
        try:
            return os.open(volume, flags, dir_fd=volumes)
        finally:
            os.close(volumes)
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise InvalidArgument(field, volume, f"is no emptyDir of the pod: {why}") from None


def _detach(place: str) -> None:
    try:
        syscalls.umount2(place, mounts.MNT_DETACH | _NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise StepFailed("unlink_logs", error.errno or 0, place) from None
