"""Booting one guest and reading what it says; no pytest in here.

The guest is a user-mode-linux kernel: an ordinary program of this machine.  Its first console is a log file, its second
one a pipe of JSON lines to us: ``{"report": ...}`` from the tests, ``{"end": status}`` from its first process.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .packages import Rig, RigUnavailable

DISK_SIZE = 64 << 20
SYSTEMD = "/lib/systemd/systemd"
CGROUP_MODES = ("v2", "v1", "hybrid")
LSM_ARGUMENTS = {
    "none": "security=none lsm=capability selinux=0 apparmor=0",
    "selinux": "security=selinux lsm=selinux selinux=1 apparmor=0",
    "apparmor": "security=apparmor lsm=apparmor selinux=0 apparmor=1",
}


@dataclass(frozen=True, order=True)
class Configuration:
    """What distinguishes one boot from another."""

    cgroup: str = "v2"
    lsm: str = "none"
    memory: str = "1024M"
    systemd: bool = False  # whether systemd is the first process

    def __post_init__(self) -> None:
        if self.cgroup not in CGROUP_MODES or self.lsm not in LSM_ARGUMENTS:
            raise ValueError(
                f"vm marker: cgroup is one of {CGROUP_MODES}, lsm one of {tuple(LSM_ARGUMENTS)}, not {self}"
            )


class GuestEnded(Exception):
    """The guest is gone, or was silent for too long; the message says which."""


class Guest:
    """A running guest.  `read` gives its next message, `kill` ends it; both cope with one that has ended."""

    def __init__(self, rig: Rig, configuration: Configuration, command: list[str], environment: dict[str, str]) -> None:
        """Boot it and have its first process run command, in this directory, with environment.

        Raises RigUnavailable.
        """
        memory_directory = _memory_directory(configuration.memory)
        if configuration.systemd and not os.path.exists(SYSTEMD):
            raise RigUnavailable(f"{SYSTEMD} is not installed: the guest boots with the host's files")
        self._directory = Path(tempfile.mkdtemp(prefix="crio-native-vm-"))
        self._console = self._directory / "console"
        self._pending = b""
        job = {
            "directory": str(Path.cwd()),
            "command": command,
            "environment": environment,
            "cgroup": configuration.cgroup,
            "systemd": configuration.systemd,
            "modprobe": str(rig.modprobe),
            "keep": [str(Path.cwd()), sys.prefix, str(rig.tree)],
        }
        (self._directory / "job").write_text(json.dumps(job))
        disk = self._directory / "disk"  # /dev/ubda in there: a block device whose input and output can be limited
        with disk.open("wb") as file:
            file.truncate(DISK_SIZE)
        self._messages, write_end = os.pipe()
        with self._console.open("wb") as console:
            self._kernel = subprocess.Popen(
                [
                    *(rig.kernel, "rootfstype=hostfs", "rootflags=/", "ro", f"mem={configuration.memory}"),
                    *(f"uml_dir={self._directory}/", "umid=uml", "console=tty0", "quiet", "loglevel=3", "panic=-1"),
                    f"ubda={disk}",
                    *("con=null", "con0=null,fd:1", f"con1=null,fd:{write_end}"),
                    *LSM_ARGUMENTS[configuration.lsm].split(),
                    *(
                        f"init={sys.executable}",
                        "--",
                        "-I",
                        Path(__file__).with_name("init.py"),
                        self._directory / "job",
                    ),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=[write_end],
                env={"TMPDIR": memory_directory},
                start_new_session=True,
            )
        os.close(write_end)

    def read(self, deadline: float) -> dict[str, Any]:
        """The next message.  Raises GuestEnded when there is none before deadline (time.monotonic) or at all."""
        while b"\n" not in self._pending:
            if not select.select([self._messages], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise GuestEnded("the guest did not answer in time")
            data = os.read(self._messages, 1 << 16)
            if not data:
                raise GuestEnded("the guest's kernel ended")
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def console(self, lines: int = 60) -> str:
        """The end of what kernel and tests wrote to the console."""
        return "\n".join(self._console.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """End it.  Its root is read-only, so there is nothing to shut down in order.

        Each address space in there is a process out here, and a kernel that panicked leaves them behind.  The leader
        was not waited for yet, so the group's number is still its own.
        """
        os.killpg(self._kernel.pid, signal.SIGKILL)
        self._kernel.wait()
        try:
            while True:
                os.waitpid(-self._kernel.pid, 0)  # ours only if this process is a subreaper
        except ChildProcessError:
            pass
        os.close(self._messages)
        shutil.rmtree(self._directory)


def _memory_directory(size: str) -> str:
    """Where the guest's memory can be: a file that the kernel program maps, executable.  Raises RigUnavailable.

    A tmpfs where there is a good one; in a container /dev/shm is often small, or forbids execution.
    """
    needed = int(size[:-1]) * {"M": 1 << 20, "G": 1 << 30}[size[-1]]
    for directory in ("/dev/shm", "/tmp", "/var/tmp"):
        about = os.statvfs(directory)
        if about.f_bavail * about.f_frsize > needed and not about.f_flag & os.ST_NOEXEC:
            return directory
    raise RigUnavailable(f"neither /dev/shm nor /tmp nor /var/tmp can hold the guest's {size} of executable memory")
