"""What a Runtime does by the container's monitor and cgroup alone, whoever made the container.

Here belong the calls that are the same for the built-in executor and for an OCI runtime's program: both leave a
container with our monitor as its parent.  Making, starting and removing containers, and running commands in them, is
their own.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path

from crio_native.errors import Internal, NotFound, StepFailed
from crio_native.linux import process
from crio_native.linux.cgroup import Cgroup, cgroup_of
from crio_native.monitor import client as monitor
from crio_native.oci.runtime import ContainerSpec, ExitStatus, Freezer, Process, Stats

MONITOR_GROUP = "crio-conmon"  # and the container's id: the name of its monitor's control group, where that has one


def monitor_arguments(container: ContainerSpec, cgroup: Cgroup | None, *, sync_log: bool) -> list[str]:
    """See `monitor.client.arguments`."""
    return monitor.arguments(
        container_id=container.id,
        tty=bool(container.spec["process"].get("terminal")),
        stdin=container.stdin,
        stdin_once=container.stdin_once,
        log_path=container.log_path,
        log_size_max=container.log_size_max,
        oom_file=cgroup.oom_file() if cgroup is not None else "",
        sync_log=sync_log,
        journal=container.journal,
    )


class Monitored:
    """The part of `oci.runtime.Runtime` that needs no more than run_dir and cgroup.

    monitor_cgroup: the handler's, see `config.tables.RuntimeHandler`.
    """

    def __init__(self, cgroup_manager: str, monitor_cgroup: str = "") -> None:
        self._cgroup_manager, self._monitor_cgroup = cgroup_manager, monitor_cgroup

    def watch(self, container_id: str, run_dir: Path) -> socket.socket:
        return monitor.watch(run_dir)

    def read_exit(self, watch: socket.socket) -> ExitStatus | None:
        return monitor.read_exit(watch)

    def exit_status(self, run_dir: Path) -> ExitStatus | None:
        return monitor.read_exit_file(run_dir)

    def is_alive(self, process_: Process) -> bool:
        return process.start_time(process_.pid) == process_.start_time

    def kill(self, container_id: str, run_dir: Path, signal: int) -> None:
        with monitor.Connection.connect(run_dir) as connection:
            connection.kill(signal)

    def attach(self, container_id: str, run_dir: Path, *, stdin: bool) -> socket.socket:
        return monitor.attach(run_dir, stdin=stdin)

    def resize(self, container_id: str, run_dir: Path, height: int, width: int) -> None:
        with monitor.Connection.connect(run_dir) as connection:
            connection.resize(height, width)

    def freezer(self, container_id: str, cgroups_path: str) -> Freezer:
        return cgroup_of(cgroups_path, self._cgroup_manager)

    def reopen_log(self, container_id: str, run_dir: Path) -> None:
        with monitor.Connection.connect(run_dir) as connection:
            connection.reopen_log()

    def stats(self, container_id: str, cgroups_path: str) -> Stats:
        return Stats(**cgroup_of(cgroups_path, self._cgroup_manager).stats())

    def _cgroup(self, cgroups_path: str, annotations: Mapping[str, str] | None = None) -> Cgroup | None:
        return cgroup_of(cgroups_path, self._cgroup_manager, annotations) if cgroups_path else None

    def _monitor_group(self, container_id: str, cgroups_path: str) -> Cgroup | None:
        """Beside the container's, or in the slice that is named; None where the monitor stays in the daemon's."""
        if not self._monitor_cgroup or not cgroups_path:
            return None
        if self._cgroup_manager == "systemd":
            slice_ = cgroups_path.partition(":")[0] if self._monitor_cgroup == "pod" else self._monitor_cgroup
            return cgroup_of(f"{slice_}:{MONITOR_GROUP}:{container_id}", "systemd")
        parent = cgroups_path.rpartition("/")[0]
        return cgroup_of(f"{parent}/{MONITOR_GROUP}-{container_id}")

    def _end(self, container_id: str, run_dir: Path, cgroup: Cgroup | None) -> None:
        """Kill every process of the container and wait for its monitor, which records the end; idempotent."""
        try:
            watch = self.watch(container_id, run_dir)
        except NotFound:
            watch = None
        try:
            if watch is not None:
                with contextlib.suppress(NotFound, StepFailed), monitor.Connection.connect(run_dir) as connection:
                    connection.kill(9)
            if cgroup is not None and cgroup.exists():
                cgroup.kill()
            if watch is not None:
                _await_monitor(watch, container_id)
        finally:
            if watch is not None:
                watch.close()


def _await_monitor(watch: socket.socket, container_id: str) -> None:
    watch.settimeout(10)
    try:
        while watch.recv(4096):
            pass
    except TimeoutError:
        raise Internal(f"the monitor of container {container_id} did not end within 10 s of its kill") from None
    except OSError:
        pass  # reset: it ended with our request unread
