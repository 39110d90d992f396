"""The tests of pods and containers once more, with OCI runtimes' programs and with a shim: whoever makes a container,
the CRI answers the same.

The built-in executor's own runs are in the modules that are imported here.  Why two tests differ is said in them; what
an operator may notice of that is in docs/runtimes.md.
"""

# ruff: noqa: F401, F403, F811
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .. import machine
from . import external, test_leaks
from .conftest import Client, refused
from .external import fresh, handler, shared
from .test_containers import *
from .test_exec_sync import *
from .test_life_cycle import *
from .test_restart import (
    test_a_config_json_that_is_cut_off,
    test_a_lost_database_leaves_no_containers,
    test_a_monitor_that_was_killed,
    test_after_a_reboot_pods_are_known_as_stopped,
    test_after_a_reboot_pods_are_wiped,
    test_containers_go_on,
    test_the_end_of_the_pause_process_is_noticed_after_a_restart,
)

pytestmark = pytest.mark.root
Code = grpc.StatusCode

del test_output_at_its_bound_does_not_stay_in_the_daemon  # noqa: F821  # it is about the daemon, whoever runs the command
del test_version_and_status, test_command_and_environment  # noqa: F821  # others stand for them below


def test_version_and_status_of_a_handler(cri: Client, handler: str) -> None:
    """The handler is the default, and what it tells of itself is told; a shim cannot tell what its runtime can do."""
    status = cri.call("Status", verbose=True)
    assert {c.type: c.status for c in status.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    features = {each.name: each.features for each in status.runtime_handlers}
    assert set(features) == {"", "builtin", handler}
    assert features[""] == features[handler]
    assert features["builtin"].recursive_read_only_mounts
    told = json.loads(status.info["handlers"])[handler]
    assert told["type"] == ("vm" if handler == "shim" else "oci") and not told["problem"]
    program = Path(external.PROGRAMS[handler]).name
    assert program in told["version"] and Path(told["program"]).name == program
    options = told["features"].get("mountOptions", [])  # older crun have no features to tell
    assert features[handler].recursive_read_only_mounts == ("rro" in options)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"working_dir": "/etc/passwd"}, "config.working_dir"),
        ({"mounts": [pb.Mount(container_path="/etc/passwd", host_path="/tmp")]}, "config.mounts[0].container_path"),
        ({"resources": {"cpuset_cpus": "4000"}}, "config.linux.resources.cpuset_cpus"),
    ],
)
def test_a_value_that_the_kernel_refuses_is_the_callers_mistake(
    cri: Client, handler: str, fields: dict[str, Any], field: str
) -> None:
    with refused(Code.INVALID_ARGUMENT, f"{field}: step", "says: "):
        cri.create(cri.pod(), "true", **fields)
    assert cri.containers() == []


def test_a_limit_that_the_kernel_refuses_is_the_callers_mistake(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "60")
    with refused(Code.INVALID_ARGUMENT, "linux.cpuset_cpus: ", "4000"):
        cri.call(
            "UpdateContainerResources", container_id=container, linux=pb.LinuxContainerResources(cpuset_cpus="4000")
        )


def test_command_and_environment_in_utf8(cri: Client) -> None:
    """But for bytes that are no UTF-8: a config.json cannot hold them."""
    pod = cri.pod()
    greeting = pb.KeyValue(key="GREETING", value='h\xe9 "q"'.encode())
    command = ("sh", "-c", 'echo "$0 $1 $GREETING $PATH"; pwd', "zero", "one")
    code, output = cri.run(*command, pod=pod, working_dir="/var/new", envs=[greeting])
    assert code == 0 and 'zero one h\xe9 "q" /bin' in output and "/var/new" in output
    with refused(Code.INVALID_ARGUMENT, "process.env[", "UTF-8"):
        cri.create(pod, "true", envs=[pb.KeyValue(key="GREETING", value=b"h\xe9")])
    assert len(cri.containers()) == 1


def test_pods_leave_nothing(fresh: Client) -> None:
    """One after another and at once: no mount, namespace, cgroup, process, descriptor or file."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: test_leaks.one_pod(fresh, number), range(8)))  # the daemon's caches exist now
        before = test_leaks.state(fresh)
        test_leaks.one_pod(fresh, 0)
        list(pool.map(lambda number: test_leaks.one_pod(fresh, number), range(15)))
    left: dict[str, Any] = {}

    def settled() -> bool:
        machine.reap_orphans()  # conmon is nobody's child when it ends
        left.clear()
        left.update(test_leaks.difference(before, test_leaks.state(fresh)))
        left.pop("links", None)  # the network is the same for all handlers, and other daemons' links come and go
        return not left

    try:
        fresh.until(settled, 10)
    except AssertionError:
        pytest.fail(f"left behind: {left}")
