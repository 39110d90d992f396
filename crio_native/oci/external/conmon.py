"""`ConmonRuntime`: an OCI runtime's program under conmon, for who names conmon as the monitor.

Its conventions instead of our monitor's: an exit file in container_exits_dir, the socket `attach` and the pipe `ctl` in
the bundle.  What is run in a container is run by the runtime alone: conmon would have nothing to do there.
"""

from __future__ import annotations

import json
import os
import select
import signal as signals
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.errors import FailedPrecondition, Internal, NotFound, StepFailed
from crio_native.linux import process
from crio_native.linux.cgroup import Cgroup
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.external.program import ASK_SECONDS
from crio_native.oci.external.runtime import ExternalRuntime
from crio_native.oci.runtime import Abilities, ContainerSpec, ExitStatus, Process

REOPEN_SECONDS = 5.0
END_SECONDS = 10.0
_EXIT_MAX = 16


def is_conmon(path: str) -> bool:
    return os.path.basename(path) == "conmon"


class Ending:
    """What `watch` gives: readable when conmon has ended, which it does when it has written the exit file."""

    def __init__(self, run_dir: Path, pidfd: int) -> None:
        self.run_dir, self._pidfd = run_dir, pidfd

    def fileno(self) -> int:
        return self._pidfd

    def close(self) -> None:
        os.close(self._pidfd)


class ConmonRuntime(ExternalRuntime):
    def __init__(
        self,
        name: str,
        settings: RuntimeHandler,
        table: RuntimeTable,
        launchers: Launchers,
        *,
        scratch: Path,
        bundle: Callable[[str], Path],
    ) -> None:
        super().__init__(name, settings, table, launchers, scratch=scratch, bundle=bundle)
        self._exits = Path(table.container_exits_dir)
        self._sockets = Path(table.container_attach_socket_dir)

    def create(self, container: ContainerSpec) -> Process:
        for directory in (self._exits, self._sockets):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        made = super().create(container)
        record = {
            "id": container.id,
            "pid": made.pid,
            "start": made.start_time,
            "conmon": made.monitor_pid,
            "conmon_start": process.start_time(made.monitor_pid) or 0,
        }
        (container.run_dir / "conmon").write_text(json.dumps(record))
        return made

    def _create_request(self, container: ContainerSpec, cgroup: Cgroup | None, groups: list[str]) -> dict[str, Any]:
        request = super()._create_request(container, cgroup, groups)
        pid_file = f"{container.run_dir}/conmon-pidfile"
        return {
            **request,
            "act": "conmon",
            "conmon": self._line(container, pid_file, request),
            "conmon_pid_file": pid_file,
        }

    def _line(self, container: ContainerSpec, pid_file: str, request: dict[str, Any]) -> list[str]:
        line = [self._settings.monitor_path, "-b", str(container.bundle), "-c", container.id, "-u", container.id]
        line += ["-n", container.id, "--exit-dir", str(self._exits), "--socket-dir-path", str(self._sockets)]
        line += ["--persist-dir", str(container.run_dir), "-P", pid_file, "-p", request["pid_file"]]
        line += ["-l", container.log_path or "none", "--log-level", "info"]
        line += ["-r", self.program, "--runtime-arg", f"--root={self._program.root}"]
        line += ["-l", "journald:"] if container.journal else []
        line += ["--log-size-max", str(container.log_size_max)] if container.log_size_max > 0 else []
        line += ["--no-sync-log"] if self._settings.no_sync_log else []
        line += ["--no-pivot"] if self._no_pivot else []
        line += ["-s"] if self._cgroup_manager == "systemd" else []
        if request["terminal"]:
            line.append("-t")
        if container.stdin:
            line += ["-i"] if container.stdin_once else ["-i", "--leave-stdin-open"]
        return line

    def watch(self, container_id: str, run_dir: Path) -> socket.socket:
        record = self._record(run_dir)
        pidfd = _open(record["conmon"], record["conmon_start"])
        if pidfd < 0:
            raise NotFound("conmon", str(run_dir), "the container has ended")
        return cast(socket.socket, Ending(run_dir, pidfd))  # it is polled, given back to read_exit, and closed

    def read_exit(self, watch: socket.socket) -> ExitStatus | None:
        return self.exit_status(cast(Ending, watch).run_dir)

    def exit_status(self, run_dir: Path) -> ExitStatus | None:
        try:
            with open(run_dir / "exit", "rb") as file:  # the same as in container_exits_dir, which others may clean up
                code = int(file.read(_EXIT_MAX))
                finished = os.fstat(file.fileno()).st_mtime_ns
        except (FileNotFoundError, ValueError):
            return None
        oom = (run_dir / "oom").exists()
        return ExitStatus(code & 255, code - 128 if 128 < code <= 192 else 0, oom, finished)

    def attach(self, container_id: str, run_dir: Path, *, stdin: bool) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = -1
        try:
            directory = os.open(self._bundle(container_id), os.O_PATH | os.O_DIRECTORY)
            sock.connect(f"/proc/self/fd/{directory}/attach")  # a whole path may be longer than sun_path
        except OSError as error:
            sock.close()
            raise NotFound("conmon's attach socket", container_id, (error.strerror or "").lower()) from None
        finally:
            if directory >= 0:
                os.close(directory)
        return sock

    def resize(self, container_id: str, run_dir: Path, height: int, width: int) -> None:
        self._tell(container_id, f"1 {int(height)} {int(width)}\n")

    def reopen_log(self, container_id: str, run_dir: Path) -> None:
        """Returns when the new file is there: conmon gives no answer."""
        path = self._log_path(run_dir)
        before = _inode(path)
        self._tell(container_id, "2 0 0\n")
        deadline = time.monotonic() + REOPEN_SECONDS
        while path and _inode(path) in (before, 0) and time.monotonic() < deadline:
            time.sleep(0.005)

    def _log_path(self, run_dir: Path) -> str:
        """From conmon's own command line."""
        words = Path(f"/proc/{self._record(run_dir)['conmon']}/cmdline").read_bytes().split(b"\0")
        return os.fsdecode(words[words.index(b"-l") + 1])

    def _tell(self, container_id: str, message: str) -> None:
        try:
            pipe = os.open(self._bundle(container_id) / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise NotFound("conmon", container_id, "the container has ended") from None
        try:
            os.write(pipe, message.encode())
        finally:
            os.close(pipe)

    def _record(self, run_dir: Path) -> dict[str, Any]:
        try:
            return dict(json.loads((run_dir / "conmon").read_bytes()))
        except FileNotFoundError:
            raise NotFound("conmon", str(run_dir), "the container has ended") from None

    def _require_monitor(self, run_dir: Path) -> None:
        cast(Ending, self.watch("", run_dir)).close()

    def _signal(self, container_id: str, run_dir: Path, signal: int) -> None:
        record = self._record(run_dir)
        pidfd = _open(record["pid"], record["start"])
        if pidfd < 0:
            raise NotFound("container process", container_id, "it has ended")
        try:
            signals.pidfd_send_signal(pidfd, signal)
        finally:
            os.close(pidfd)

    def _end(self, container_id: str, run_dir: Path, cgroup: Cgroup | None) -> None:
        """conmon ends when the container has; one that does not is killed."""
        if cgroup is not None and cgroup.exists():
            cgroup.kill()
        try:
            self._signal(container_id, run_dir, signals.SIGKILL)
        except NotFound:
            pass
        try:
            ending = cast(Ending, self.watch(container_id, run_dir))
        except NotFound:
            return
        try:
            _await(ending)
        finally:
            ending.close()

    def delete(self, container_id: str, run_dir: Path, cgroups_path: str) -> None:
        super().delete(container_id, run_dir, cgroups_path)
        for path in (self._sockets / container_id, self._exits / container_id):
            path.unlink(missing_ok=True)

    def _monitor(self) -> str:
        path = self._settings.monitor_path
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise FailedPrecondition(
                f"monitor_path {path!r} is not an executable file; leave it out for our own monitor"
            )
        return path

    def abilities(self) -> Abilities:
        """Also raises StepFailed for a conmon that cannot tell its version."""
        asked = self._program.run([self._monitor(), "--version"], seconds=ASK_SECONDS)
        if asked.code != 0:
            raise StepFailed("conmon --version", 0, self._settings.monitor_path, asked.words)
        return super().abilities()


def _open(pid: int, start: int) -> int:
    """A pidfd of exactly this process; -1 when it has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    if process.start_time(pid) != start:
        os.close(pidfd)
        return -1
    return pidfd


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _await(ending: Ending) -> None:
    poll = select.poll()
    poll.register(ending, select.POLLIN)
    if poll.poll(END_SECONDS * 1000):
        return
    signals.pidfd_send_signal(ending.fileno(), signals.SIGKILL)
    if not poll.poll(END_SECONDS * 1000):
        raise Internal(f"conmon of {ending.run_dir} does not end, though killed")
