"""A container whose processes CRIU makes: what a launcher's spare is asked, and what is looked at before they go on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crio_native.errors import PermissionRefused, StepFailed
from crio_native.linux import process, tracing
from crio_native.linux.cgroup import Cgroup, hierarchy
from crio_native.monitor import client as monitor
from crio_native.oci import criu, isolation
from crio_native.oci import seccomp as filters
from crio_native.oci import spec as specs
from crio_native.oci.external.runner import NETWORK_FD
from crio_native.oci.monitored import monitor_arguments
from crio_native.oci.runtime import ContainerSpec

SECONDS = 60.0  # for CRIU, which some damaged images have wait for ever
_STREAMS = (0, 1, 2)  # CRIU's own are the container's


def request(
    container: ContainerSpec, saved: criu.Saved, images: Path, cgroup: Cgroup, *, sync_log: bool
) -> dict[str, Any]:
    """See `external.runner.restore`."""
    spec, run_dir = container.spec, str(container.run_dir)
    network = specs.namespace_paths(spec).get("network", "")
    root, label = spec["root"]["path"], spec["linux"].get("mountLabel", "")
    pid_file = f"{run_dir}/pid"
    below = container.run_dir / "below"
    below.mkdir(mode=0o700)
    line = criu.restore_line(
        spec,
        saved,
        criu.Options(tcp_established=True, file_locks=True, ext_unix_sk=True),
        images=str(images),
        work=run_dir,
        root=root,
        pid_file=pid_file,
        cgroup=cgroup.path,
        cgroup_directories=hierarchy().directories(cgroup.path),
        streams=_STREAMS,
        below=str(below),
        network=NETWORK_FD if network else -1,
        leave_stopped=True,
    )
    overlay = container.overlay
    return {
        "op": "external",
        "act": "restore",
        "line": line,
        "env": criu.environment(),
        "root": overlay
        and {
            "base": overlay.base,
            "path": root,
            "data": overlay.data(label),
            "flags": overlay.flags,
            "user_namespace": "",
        },
        "network": network,
        "below": {"directory": str(below), "sources": criu.sources_below(spec, saved)},
        "run_dir": run_dir,
        "pid_file": pid_file,
        "terminal": False,
        "stdin": container.stdin,
        "monitor": {
            "path": str(monitor.binary_path()),
            "arguments": monitor_arguments(container, cgroup, sync_log=sync_log),
        },
    }


def in_crius_words(error: StepFailed, run_dir: Path) -> StepFailed:
    return criu.failure("restore", 1, str(run_dir), error.detail) if error.step == "criu restore" else error


def take_over(cgroup: Cgroup, pid: int, spec: Mapping[str, Any]) -> None:
    """Of stopped processes make frozen ones, and see whether they are isolated as was asked: images are files, and say
    with which privileges a process goes on.  Raises PermissionRefused."""
    try:
        _check_filters(_tree(pid), spec)  # a frozen process could not be asked
        cgroup.freeze()
        found = cgroup.processes()
        for each in _tree(pid).difference(found):
            raise PermissionRefused(f"the checkpoint's process {each} is not in the control group {cgroup.path}")
        for each in found:
            _check(each, spec)
    except BaseException:
        for each in _tree(pid):  # who undoes the container looks into its control group only
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        raise
    for each in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGCONT)


def _tree(pid: int) -> set[int]:
    """All that CRIU made, in whatever control groups: who is in a PID namespace is below its first process."""
    return {pid, *process.descendants(pid)}


def _check_filters(pids: Iterable[int], spec: Mapping[str, Any]) -> None:
    """Whether each thread has the very filter that was asked for: its number says nothing.  Others, which it may have
    loaded besides, can only refuse more."""
    asked = (spec.get("linux") or {}).get("seccomp")
    if not asked:
        return
    program = filters.compile(asked).bpf
    for pid in pids:
        for thread in process.threads(pid):
            try:
                found = tracing.seccomp_filters(thread)
            except OSError as error:
                why = f"its filters cannot be read: {error.strerror}"
                raise PermissionRefused(f"the checkpoint's process {pid} is not let go on: {why}") from None
            if program not in found:
                raise PermissionRefused(
                    f"the checkpoint's process {pid} is less isolated than asked: linux.seccomp is another filter"
                )


def _check(pid: int, spec: Mapping[str, Any]) -> None:
    for finding in isolation.report(pid, spec, restored=True):
        if finding.weaker:
            raise PermissionRefused(
                f"the checkpoint's process {pid} is less isolated than asked: {finding.field} is {finding.found}, "
                f"and not {finding.asked or 'as asked'}"
            )
