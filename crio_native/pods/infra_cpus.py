"""The CPUs of what a node runs for its pods beside their containers: `crio.runtime.infra_ctr_cpuset`."""

from __future__ import annotations

import logging
import os
from typing import Any

from crio_native.linux import scheduling
from crio_native.oci.runtime import Process

_MOST = 65535

log = logging.getLogger(__name__)


def resources(cpus: str) -> dict[str, Any]:
    """A pause process's part of `linux.resources`; cpus: "" for all."""
    return {"cpu": {"cpus": cpus}} if cpus else {}


def keep_monitor_on(cpus: str, process: Process) -> None:
    """Bind the monitor of a process to CPUs, "" for all; its container, which is born already, inherits nothing.

    A node whose CPUs are others than configured runs its pods all the same: it is logged.
    """
    if not cpus or not process.monitor_pid:
        return
    try:
        os.sched_setaffinity(process.monitor_pid, scheduling.parse_list(cpus, _MOST))
    except ProcessLookupError:
        pass  # it has ended with its container
    except OSError as error:
        log.error("crio.runtime.infra_ctr_cpuset: %s cannot be had for a monitor: %s", cpus, error.strerror)
