"""The guest's first process: makes the kernel's file systems available, runs the job's command, reports its status.

Where the job wants systemd, it makes the mounts and becomes systemd, which starts it again, as a service, for the rest.

Runs as a script in isolated mode, inside the guest only, from the standard library only.  One Python process makes
all the mounts because in there every process costs more than all of them.
"""

import ctypes
import fcntl
import json
import os
import resource
import socket
import struct
import sys
import tty
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_SHARED = 2, 4, 8, 4096, 16384, 1 << 20
SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC
POWER_OFF = 0x4321FEDC
MESSAGES = "/dev/tty1"
SYSTEMD = "/lib/systemd/systemd"
UNITS = {
    "tests.target": "[Unit]\nDefaultDependencies=no\nWants=tests.service\n",
    "tests.service": (
        "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart={again}\nDelegate=yes\nTasksMax=infinity\n"
        "StandardInput=null\nStandardOutput=file:/dev/tty0\nStandardError=file:/dev/tty0\n"
    ),
}


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"{kind} on {target}")


def mount_new(kind: str, target: str, flags: int = 0, data: str = "") -> None:
    os.makedirs(target, exist_ok=True)
    mount(kind, target, kind, flags, data)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def mount_all(job: dict[str, Any]) -> None:
    mount_new("proc", "/proc", SAFE)
    mount_new("sysfs", "/sys", SAFE)
    if not os.path.ismount("/dev"):  # the kernel mounts it itself where it can
        mount_new("devtmpfs", "/dev", MS_NOSUID, "mode=755")
    mount_new("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666")
    mount_new("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777")
    mount_new("mqueue", "/dev/mqueue", SAFE)
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")
    mount_scratch(job["keep"])
    mount("securityfs", "/sys/kernel/security", "securityfs", SAFE)
    mount("bpf", "/sys/fs/bpf", "bpf", SAFE)
    if os.path.isdir("/sys/fs/selinux"):
        mount("selinuxfs", "/sys/fs/selinux", "selinuxfs", MS_NOSUID | MS_NOEXEC)
    mount_cgroups(job["cgroup"])
    mount("none", "/", "none", MS_REC | MS_SHARED)  # as systemd leaves it on a real node


def mount_scratch(keep: list[str]) -> None:
    """Empty /tmp and /run, with the directories that we need and that were below them bound through."""
    kept = [(path, os.open(path, os.O_PATH)) for path in keep if path.startswith(("/tmp/", "/run/"))]
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for path, descriptor in kept:
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", path, "none", MS_BIND)
        os.close(descriptor)


def mount_cgroups(mode: str) -> None:
    if mode == "v2":
        mount("cgroup2", "/sys/fs/cgroup", "cgroup2", SAFE, "nsdelegate")
        with open("/sys/fs/cgroup/cgroup.controllers") as file:
            write("/sys/fs/cgroup/cgroup.subtree_control", " ".join("+" + name for name in file.read().split()))
        return
    mount("tmpfs", "/sys/fs/cgroup", "tmpfs", SAFE, "mode=755")
    with open("/proc/cgroups") as file:
        controllers = [line.split()[0] for line in file if not line.startswith("#")]
    for controller in controllers:
        mount_new("cgroup", f"/sys/fs/cgroup/{controller}", SAFE, controller)
    mount_new("cgroup", "/sys/fs/cgroup/systemd", SAFE, "none,name=systemd")
    if mode == "hybrid":
        mount_new("cgroup2", "/sys/fs/cgroup/unified", SAFE)


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        siocsifflags, iff_up = 0x8914, 1
        fcntl.ioctl(control, siocsifflags, struct.pack("16sH14x", b"lo", iff_up))


def run(job: dict[str, Any]) -> int:
    """The command's wait status; orphans that come to us meanwhile are reaped."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(job["directory"])
        os.execve(job["command"][0], job["command"], job["environment"])
    while True:
        pid, status = os.wait()
        if pid == child:
            return status


def become_systemd(job: dict[str, Any]) -> None:
    """systemd has this one service: no udev, journal or login, as what the tests need is the manager itself."""
    os.makedirs("/run/systemd/system")
    write("/run/job", json.dumps(job))  # where it was there is an empty /tmp now
    again = f"{sys.executable} -I {sys.argv[0]} /run/job"
    for name, unit in UNITS.items():
        write(f"/run/systemd/system/{name}", unit.format(again=again))
    os.execv(SYSTEMD, [SYSTEMD, "--unit=tests.target", "--show-status=no", "--log-target=kmsg"])


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    status = -1
    try:
        if os.getpid() == 1:
            mount_all(job)
            if job["systemd"]:
                become_systemd(job)
        write("/proc/sys/kernel/modprobe", job["modprobe"])
        bring_up_loopback()
        socket.sethostname("vm")
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
        # held open: a terminal's settings last only while someone has it open
        messages = os.open(MESSAGES, os.O_WRONLY | os.O_NOCTTY)
        tty.setraw(messages)
        status = os.waitstatus_to_exitcode(run(job))
        os.write(messages, json.dumps({"end": status}).encode() + b"\n")
    finally:
        sys.stderr.flush()
        libc.reboot(POWER_OFF)


main()
