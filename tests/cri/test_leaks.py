"""Many pods, one after another and at once, leave the machine as it was."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.linux.cgroup import Cgroup

from ..machine import assert_machine_unchanged, machine_state
from .conftest import Client, log_text

pytestmark = pytest.mark.root


def state(cri: Client) -> dict[str, Any]:
    """What the daemon could leave: on the machine, in its directory, and in its own process."""
    directory = cri.daemon.directory
    named = machine_state(directory.name)
    assert cri.daemon.process is not None
    process = Path(f"/proc/{cri.daemon.process.pid}")
    files = {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.match("podlogs/*")}
    return {
        **{what: named[what] for what in ("mounts", "namespace pins", "cgroups")},
        "links": {name for name in machine_state()["links"] if name.startswith(("veth", "cn"))},
        "processes": Counter(name.split(" ")[0] for name in named["processes"]),
        "descriptors": len(list((process / "fd").iterdir())),
        "files": {f for f in files if not f.startswith("podlogs")},
    }


def one_pod(cri: Client, number: int) -> None:
    kind = {"pid": pb.POD} if number % 7 == 0 else {}
    pod = cri.pod(namespaces=kind)
    container = cri.start(pod, "sh", "-c", f"echo {number} > /dev/shm/x; cat /dev/shm/x")
    status = cri.ended(container)
    assert (status.exit_code, log_text(status.log_path)) == (0, f"{number}\n")
    if number % 3 == 0:
        cri.call("StopPodSandbox", pod_sandbox_id=pod)
    cri.call("RemovePodSandbox", pod_sandbox_id=pod)


@pytest.mark.slow
def test_many_pods(fresh: Client) -> None:
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda n: one_pod(fresh, n), range(20)))  # the daemon's own threads and caches exist now
        before = state(fresh)
        for number in range(200):
            one_pod(fresh, number)
        list(pool.map(lambda n: one_pod(fresh, n), range(20)))
    assert fresh.pods() == [] and fresh.containers() == []
    after: dict[str, Any] = {}

    def settled() -> bool:
        after.update(state(fresh))
        return difference(before, after) == {}

    try:
        fresh.until(settled, 5)
    except AssertionError:
        pytest.fail(f"left behind: {difference(before, after)}")


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    new = {what: after[what] - before[what] for what in before}
    return {what: names for what, names in new.items() if (names > 2 if isinstance(names, int) else names)}


def test_a_daemon_leaves_nothing() -> None:
    """From its start to its end."""
    unnamed = machine_state("\0")  # only what has no name to tell it from another daemon's: processes, descriptors
    with Client.serving() as client:
        directory = client.daemon.directory.name
        one_pod(client, 7)
        client.start(client.pod(namespaces={"pid": pb.POD}), "sleep", "600")
    assert_machine_unchanged(unnamed, "\0")
    named = machine_state(directory)
    assert not any(named[what] for what in ("mounts", "namespace pins", "cgroups"))
    assert client.daemon.bridge not in machine_state()["links"]


def test_the_parents_that_were_made_for_pods(fresh: Client) -> None:
    """They go with the last pod in them, also after a restart; what was there before, as a kubelet's groups, stays."""
    top = fresh.daemon.cgroup_parent
    theirs = Cgroup(f"{top}/kubelet")
    theirs.create()

    def pod(parent: str) -> str:
        config = fresh.pod_config()
        config.linux.cgroup_parent = f"{top}{parent}"
        return fresh.pod(config)

    first, second, other = pod("/kubelet/a/b"), pod("/kubelet/a/b"), pod("/kubelet/a")
    fresh.start(second, "sleep", "600")
    assert Cgroup(f"{top}/kubelet/a/b").everywhere()
    fresh.remove_pod(first)
    assert Cgroup(f"{top}/kubelet/a/b").everywhere()
    fresh.restart()
    fresh.remove_pod(second)
    assert not Cgroup(f"{top}/kubelet/a/b").exists() and Cgroup(f"{top}/kubelet/a").everywhere()
    fresh.remove_pod(other)
    assert not Cgroup(f"{top}/kubelet/a").exists() and theirs.everywhere()
    again = pod("/kubelet/a")
    Cgroup(f"{top}/kubelet/a").remove()
    Cgroup(f"{top}/kubelet/a").create()  # another's by now
    fresh.remove_pod(again)
    assert Cgroup(f"{top}/kubelet/a").everywhere()
