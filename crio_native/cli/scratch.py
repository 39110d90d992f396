"""A daemon of its own in a scratch directory, and its removal to the last mount.

The demonstration and the benchmark use it.  Every name that the daemon could share with another runtime is its own:
root, runroot, socket, namespaces, logs, cgroup, bridge, subnet.  Here belongs no display.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import grpc

from crio_native.api.runtime.v1 import api_pb2, api_pb2_grpc
from crio_native.errors import InvalidArgument, Unavailable
from crio_native.linux import mounts, syscalls
from crio_native.linux.cgroup import Cgroup

MESSAGE_SIZE = 80 << 20
PREFIX = "crio-native-"  # of the directory's name, and so of the cgroup's
PARENT_BYTES = 107 - len("/crio-native-12345678/crio.sock")  # a socket's address has 107 bytes for its path
START_SECONDS = 20.0
STOP_SECONDS = 20.0
_LOCK = "lock"  # held by the directory's owner, however that ends

CONFIG = """\
[crio]
root = "{directory}/root"
runroot = "{directory}/run"
log_dir = "{directory}/logs"
version_file = "{directory}/run/version"
clean_shutdown_file = "{directory}/root/clean.shutdown"
[crio.api]
listen = "{directory}/crio.sock"
[crio.runtime]
namespaces_dir = "{directory}/run"
container_exits_dir = "{directory}/run/exits"
container_attach_socket_dir = "{directory}/run"
cgroup_manager = "cgroupfs"
[crio.network]
network_dir = "{directory}/net.d"
"""


class ScratchDaemon:
    """The daemon process, its directory and its CRI stubs (`runtime`, `images`).

    settings: TOML of a configuration file of its own; {directory} stands for the directory.  left: the directory of an
    owner that has died (see `abandoned`), to be closed.

    Raises InvalidArgument when the parent's path is too long, BlockingIOError when the owner of `left` lives.  `start`
    raises Unavailable, with the end of the daemon's log, when the daemon does not come up.  `close` removes everything
    and may be called at any point, also after a `start` that failed or a daemon that was killed.
    """

    def __init__(self, parent: Path = Path("/var/tmp"), settings: str = "", *, left: Path | None = None) -> None:
        if len(os.fsencode(parent)) > PARENT_BYTES:
            raise InvalidArgument("scratch", str(parent), f"longer than the {PARENT_BYTES} bytes that sockets leave")
        self.directory = left or Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = _lock(self.directory, new=left is None)
        suffix = self.directory.name.removeprefix(PREFIX)
        self.bridge = f"crio{suffix}"
        self.cgroup_parent = f"/{self.directory.name}"
        self.socket = self.directory / "crio.sock"
        self.log = self.directory / "daemon.log"
        self.network_state = self.directory / "run/network"
        self._settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self._served = False
        self.channel = grpc.insecure_channel(
            f"unix://{self.socket}",
            options=[("grpc.max_receive_message_length", MESSAGE_SIZE), ("grpc.max_send_message_length", MESSAGE_SIZE)],
        )
        self.runtime = api_pb2_grpc.RuntimeServiceStub(self.channel)
        self.images = api_pb2_grpc.ImageServiceStub(self.channel)

    def start(self) -> str:
        """Start the daemon and wait until it serves; returns its version."""
        self._write_config()
        self.launch()
        return self._wait_until_serving()

    def launch(self) -> None:
        """Start the daemon's process on what there is: for who has killed the one before and wants to wait himself."""
        command = [str(Path(sys.executable).with_name("crio-native")), *self._arguments()]
        with self.log.open("ab") as log:
            # A session of its own: the terminal's Ctrl-C is for us, who then stop it in order.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)

    def _arguments(self) -> list[str]:
        return ["--config", f"{self.directory}/crio.conf", "--config-dir", f"{self.directory}/crio.conf.d"]

    def wait(self) -> None:
        """Until the daemon ends."""
        if self.process is not None:
            self.process.wait()

    def close(self) -> list[str]:
        """Remove pods, daemon, processes, cgroups, bridge, mounts and the directory; returns what could not be."""
        problems: list[str] = []
        for act in (
            self._remove_pods,
            self._stop_daemon,
            self._remove_cgroup,
            self._remove_network,
            self._unmount,
            self._remove_directory,
        ):
            try:
                act()
            except Exception as error:
                reason = error.details() if isinstance(error, grpc.RpcError) else error
                problems.append(f"{act.__name__.strip('_').replace('_', ' ')}: {reason}")
        self._lock.close()
        return problems

    def complaint(self, state: str) -> Unavailable:
        """What to raise of a daemon in a state; the end of its log is the error's note."""
        error = Unavailable(f"the daemon {state}; the end of its log:")
        error.add_note(self.log_tail())
        return error

    def log_tail(self, lines: int = 20) -> str:
        """The end of the daemon's log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _write_config(self) -> None:
        (self.directory / "crio.conf").write_text(CONFIG.format(directory=self.directory))
        (self.directory / "crio.conf.d").mkdir()
        (self.directory / "crio.conf.d/10-settings.conf").write_text(
            self._settings.replace("{directory}", str(self.directory))
        )
        network_dir = self.directory / "net.d"
        network_dir.mkdir()
        (network_dir / "10-scratch.conflist").write_text(json.dumps(self._conflist(), indent=2))

    def _conflist(self) -> dict[str, object]:
        """A subnet by chance, so that two daemons at once hardly ever meet; the bridge's name never does."""
        high, low = 128 + secrets.randbelow(64), secrets.randbelow(256)
        ranges = [[{"subnet": f"10.{high}.{low}.0/24"}], [{"subnet": f"fd00:10:{high:x}:{low:x}::/64"}]]
        bridge = {
            "type": "bridge",
            "bridge": self.bridge,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]},
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "1.0.0", "name": "scratch", "plugins": [bridge, portmap]}

    def _wait_until_serving(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._lives():
            try:
                answer = self.runtime.Version(api_pb2.VersionRequest(), timeout=0.25, wait_for_ready=True)
                self._served = True
                return f"{answer.runtime_name} {answer.runtime_version}"
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
        state = "does not answer" if self._lives() else "ended"
        raise self.complaint(state)

    def _lives(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _remove_pods(self) -> None:
        if not (self._served and self._lives()):
            return
        for pod in self.runtime.ListPodSandbox(api_pb2.ListPodSandboxRequest(), timeout=STOP_SECONDS).items:
            self.runtime.StopPodSandbox(api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=STOP_SECONDS)
            self.runtime.RemovePodSandbox(api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=STOP_SECONDS)

    def _stop_daemon(self) -> None:
        self.channel.close()
        if self.process is None:
            _kill(self._daemons())
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _daemons(self) -> list[int]:
        """Who was started with our arguments: a daemon that has outlived its owner."""
        ending = "\0".join(["", *self._arguments(), ""]).encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if (entry / "cmdline").read_bytes().endswith(ending):
                    found.append(int(entry.name))
        return found

    def _remove_cgroup(self) -> None:
        """Containers outlive a daemon that was killed; the cgroup names all their processes."""
        cgroup = Cgroup(self.cgroup_parent)
        cgroup.kill()
        cgroup.remove()

    def _remove_network(self) -> None:
        """What the daemon's own records name: also what a daemon that was killed left attached.

        Then the bridge and its table by name: a daemon that lost its records (as in a test of a reboot) met a bridge
        that was there already, and does not count it as its own.
        """
        from crio_native.network import PodNetwork, bridges

        if self.network_state.exists():
            network = PodNetwork.from_directory(network_dir=self.directory / "net.d", state_dir=self.network_state)
            network.collect([])
            if not network.shutdown(remove=True):
                raise OSError(f"pods are still attached to {self.bridge}")
        bridges.remove(self.bridge)

    def _unmount(self) -> None:
        for target in reversed(mounts_below(self.directory)):
            syscalls.umount2(target, mounts.MNT_DETACH)

    def _remove_directory(self) -> None:
        """Never through a mount that is left: what is behind it is not ours."""
        left = mounts_below(self.directory)
        if left:
            raise OSError(f"still mounted: {', '.join(left)}")
        shutil.rmtree(self.directory, ignore_errors=False)


def abandoned(parent: Path) -> list[ScratchDaemon]:
    """What owners that were killed have left in a parent directory: daemon, pods and all, to be closed."""
    found = []
    for directory in sorted(parent.glob(f"{PREFIX}*")):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, BlockingIOError):
            if _is_ours(directory):
                found.append(ScratchDaemon(parent, left=directory))
    return found


def _is_ours(directory: Path) -> bool:
    """The parent may be anybody's to write, and what is removed is removed as the files in the directory say."""
    info = directory.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022


def _lock(directory: Path, *, new: bool) -> BinaryIO:
    """Raises FileNotFoundError when there is none yet, BlockingIOError when somebody has it."""
    path = directory / (f"{_LOCK}.new" if new else _LOCK)
    file = path.open("wb" if new else "rb+")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.rename(directory / _LOCK)  # who sees it sees it locked
    return file


def _kill(pids: Sequence[int]) -> None:
    """Until they have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], STOP_SECONDS)
            finally:
                os.close(pidfd)


def mounts_below(directory: Path) -> list[str]:
    """Mount points below a directory, in the order that they were made; the kernel writes odd bytes in octal."""
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    targets = (re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4]) for line in lines if line)
    return [os.fsdecode(target) for target in targets if os.fsdecode(target).startswith(f"{directory}/")]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll every 10 ms.  Raises Unavailable when `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable(f"{what}: not within {seconds:g} s")
        time.sleep(0.01)
