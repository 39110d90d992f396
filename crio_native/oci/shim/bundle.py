"""A container's files as a shim expects them: a mounted root file system, a config.json that is complete, and pipes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crio_native.errors import InvalidArgument, StepFailed
from crio_native.linux import mounts, syscalls
from crio_native.monitor import client as monitor
from crio_native.oci.builtin import users
from crio_native.oci.runtime import ContainerSpec, Overlay, ResolvedUser
from crio_native.oci.shim.task import Streams

PAUSE = "crio-monitor"  # the pause program's name in the root of a pod's first container
PAUSE_MOUNTS = (  # what an OCI runtime needs to make a container at all
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
)
_OPTIONS_MAX = 4000  # bytes; the kernel takes one page of mount data


def mount_root(overlay: Overlay, target: Path, label: str) -> None:
    """Mount the layers on the host, where a shim looks for them.  Raises StepFailed."""
    base = os.open(overlay.base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        data = overlay.data(label, overlay.base)
        if len(data) > _OPTIONS_MAX:
            data = overlay.data(label, f"/proc/self/fd/{base}")
        syscalls.mount("overlay", str(target), "overlay", overlay.flags, data)
    except OSError as error:
        raise StepFailed("overlay_root", error.errno or 0, str(target), "") from None
    finally:
        os.close(base)


def unmount_root(target: Path) -> None:
    """Nothing happens when nothing is mounted there.  Raises StepFailed."""
    while target.is_mount():
        try:
            syscalls.umount2(str(target), mounts.MNT_DETACH)
        except OSError as error:
            raise StepFailed("unmount_root", error.errno or 0, str(target), "") from None


def find_user(container: ContainerSpec, root: Path) -> ResolvedUser | None:
    """Who the command runs as, by the image's own files; None when the spec says it in numbers.  Raises StepFailed."""
    wanted = container.user
    if wanted is None:
        return None
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = users.find(fd, wanted.user, wanted.group, wanted.supplementary, wanted.merge)
    except users.NoSuchUser as error:
        raise StepFailed("find_user", 0, error.file, str(error)) from None
    finally:
        os.close(fd)
    return ResolvedUser(found.uid, found.gid, found.groups, found.home)


def complete(container: ContainerSpec, user: ResolvedUser | None, sandbox_id: str) -> dict[str, Any]:
    """The container's spec with its user, and with the annotations by which shims know which pod is whose."""
    process = dict(container.spec["process"])
    _refuse_bytes(process)
    if user is not None:
        process["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)}
        if not any(text.startswith("HOME=") for text in process["env"]):
            process["env"] = [*process["env"], f"HOME={user.home}"]
    mounts = list(container.spec.get("mounts") or ())
    if container.pause:
        process["args"] = [f"/{PAUSE}", "pause"]
        mounts = list(PAUSE_MOUNTS)
    kind = "sandbox" if container.id == sandbox_id else "container"
    annotations = {
        **(container.spec.get("annotations") or {}),
        "io.kubernetes.cri-o.ContainerType": kind,
        "io.kubernetes.cri-o.SandboxID": sandbox_id,
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": sandbox_id,
    }
    return {**container.spec, "process": process, "mounts": mounts, "annotations": annotations}


def _refuse_bytes(process: Mapping[str, Any]) -> None:
    """A config.json is UTF-8, and what is not would reach the command as another text."""
    for name in ("args", "env"):
        for index, text in enumerate(process.get(name) or ()):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InvalidArgument(f"process.{name}[{index}]", text, "is not UTF-8, which a shim needs")


def write_config(path: Path, spec: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(spec))
    temporary.chmod(0o600)
    temporary.rename(path)


def place_pause(root: Path) -> None:
    """The pause program in a root that is otherwise empty: a virtual machine has no view of the host's files."""
    target = root / PAUSE
    shutil.copyfile(monitor.binary_path(), target)
    target.chmod(0o755)


def make_pipes(run_dir: Path, *, stdin: bool, terminal: bool) -> Streams:
    """The named pipes between the shim and our monitor, which must be made before either opens them."""
    names = (["stdin"] if stdin else []) + ["stdout"] + ([] if terminal else ["stderr"])
    for name in names:
        os.mkfifo(run_dir / name, 0o600)
    return Streams(**{name: str(run_dir / name) for name in names}, terminal=terminal)


def remove_pipes(run_dir: Path) -> None:
    for name in ("stdin", "stdout", "stderr"):
        with contextlib.suppress(FileNotFoundError):
            (run_dir / name).unlink()
