"""A runtime to test, and containers made with it from Debian's static busybox."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.builtin.runtime import BuiltinRuntime
from crio_native.oci.runtime import ContainerSpec, ExecSpec, ExitStatus, Process

from ..apart import MARK

PARENT = f"/{MARK}boxes"  # of the cgroups of containers that have one
APPLETS = "sh true false cat ls id echo sleep mount stat grep wc hostname umask dd head touch ln mkdir sysctl env kill"
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"]
MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
    },
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    },
    {
        "destination": "/dev/shm",
        "type": "tmpfs",
        "source": "shm",
        "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
    },
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
]


def least_profile(no_new_privileges: bool) -> dict[str, Any]:
    """A filter that allows what the exec of a static program takes, and without no_new_privs the dropping of the
    CAP_SYS_ADMIN that loaded it."""
    names = ["execve", "exit_group", "brk", "mmap", "mprotect", "arch_prctl"]  # the last four: the C library's memory
    if not no_new_privileges:
        names.append("capset")
    allowed = {"names": names, "action": "SCMP_ACT_ALLOW"}
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [allowed]}


def spec_of(root: str, args: Sequence[str]) -> dict[str, Any]:
    return {
        "ociVersion": "1.2.0",
        "root": {"path": root},
        "hostname": "box",
        "process": {
            "args": list(args),
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": True,
            "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
        },
        "mounts": copy.deepcopy(MOUNTS),
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware", "/no/such/path"],
            "readonlyPaths": ["/proc/bus", "/proc/sys", "/proc/irq", "/no/such/path"],
        },
    }


@dataclass
class Container:
    """A container that was created, and what it left."""

    runtime: BuiltinRuntime
    spec: ContainerSpec
    process: Process
    exec_output: list[bytes] = field(default_factory=list)

    @property
    def cgroup(self) -> str:
        path: str = self.spec.spec["linux"].get("cgroupsPath", "")
        return path

    def start(self) -> Container:
        self.runtime.start(self.spec.id, self.spec.run_dir)
        return self

    def wait(self, seconds: float = 30) -> ExitStatus:
        deadline = time.monotonic() + seconds
        while (status := self.runtime.exit_status(self.spec.run_dir)) is None:
            assert time.monotonic() < deadline, f"still running; output: {self.output()!r}"
            time.sleep(0.005)
        return status

    def output(self, stream: str = "stdout") -> str:
        """The container's output so far, from its CRI log."""
        found = ""
        for line in Path(self.spec.log_path).read_text().splitlines():
            _, source, tag, text = line.split(" ", 3)
            if source == stream:
                found += text + ("\n" if tag == "F" else "")
        return found

    def exec(self, *args: str, seccomp: Mapping[str, Any] | None = None, **process: Any) -> tuple[int, str]:
        """Run a command in the container; (exit code, its output and errors together)."""
        request = {**self.spec.spec["process"], "args": list(args), **process}
        request.pop("terminal", None)
        read, write = os.pipe()
        with open(read, "rb") as pipe:
            with open(write, "wb"):
                spec = ExecSpec(request, seccomp, stdout=write, stderr=write)
                session = self.runtime.exec(self.spec.id, self.process, self.cgroup, spec)
            text = pipe.read().decode()
        code = session.result().code
        session.close()
        return code, text


def make_root(root: Path) -> None:
    for name in ("bin", "proc", "sys", "dev", "etc", "tmp", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in APPLETS.split():
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:web:/var/www:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nweb:x:44:\nextra:x:99:web,other\n")


class Box:
    """Makes containers of one scratch root file system and removes them all at the end."""

    def __init__(self, runtime: BuiltinRuntime, directory: Path) -> None:
        self.runtime, self.directory = runtime, directory
        self.root = directory / "rootfs"
        self.containers: list[ContainerSpec] = []
        self._numbers = itertools.count()
        make_root(self.root)

    def spec(self, *args: str) -> dict[str, Any]:
        return spec_of(str(self.root), args or ("sleep", "1000"))

    def create(self, spec: Mapping[str, Any], **more: Any) -> Container:
        number = next(self._numbers)
        name = f"box{os.getpid()}-{number}"
        run_dir = self.directory / f"run{number}"
        run_dir.mkdir(mode=0o700)
        container = ContainerSpec(
            id=name, spec=spec, bundle=self.directory, run_dir=run_dir, log_path=str(run_dir / "log"), **more
        )
        process = self.runtime.create(container)
        self.containers.append(container)
        return Container(self.runtime, container, process)

    def run(self, *args: str, spec: Mapping[str, Any] | None = None, **more: Any) -> Container:
        """Create, start and wait."""
        container = self.create(spec or self.spec(*args), **more).start()
        container.wait()
        return container

    def remove_containers(self) -> None:
        while self.containers:
            container = self.containers.pop()
            path = container.spec.get("linux", {}).get("cgroupsPath", "")
            self.runtime.delete(container.id, container.run_dir, path)

    def remove_all(self) -> None:
        self.remove_containers()
        for parent in (*Path("/sys/fs/cgroup").glob(f"*{PARENT}"), Path(f"/sys/fs/cgroup{PARENT}")):
            with contextlib.suppress(OSError):  # not there, or another test's containers are in it
                parent.rmdir()
        subprocess.run(["rm", "-rf", "--one-file-system", str(self.directory)], check=True)


@pytest.fixture(scope="session")
def launchers() -> Iterator[Launchers]:
    launchers = Launchers(2)
    launchers.start()
    yield launchers
    launchers.stop()


@pytest.fixture(scope="session")
def runtime(launchers: Launchers) -> BuiltinRuntime:
    return BuiltinRuntime(launchers)


@pytest.fixture
def box(runtime: BuiltinRuntime) -> Iterator[Box]:
    box = Box(runtime, Path(tempfile.mkdtemp(prefix="crio-native-box-")))
    yield box
    box.remove_all()


def status_of(text: str) -> dict[str, str]:
    """/proc/PID/status as a dict."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def write_config(path: Path, spec: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(spec))
