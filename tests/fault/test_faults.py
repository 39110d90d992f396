"""Every act on disk and kernel fails once: nothing half-made stays.  (`test_kill_points` has the daemon die there.)"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..cri.conftest import Client, close
from ..cri.test_bad_input import directories
from ..machine import machine_state
from .faulty_daemon import POINTS

pytestmark = [pytest.mark.root, pytest.mark.slow]


class Faulty(Client):
    """A client whose daemon takes orders to fail."""

    def __init__(self, client: Client) -> None:
        super().__init__(client.daemon)
        self.image = client.image
        self.order = self.daemon.directory / "fault"

    def start_faulty(self) -> None:
        directory = self.daemon.directory
        command: list[Path | str] = [sys.executable, "-m", "tests.fault.faulty_daemon", self.order]
        with self.daemon.log.open("ab") as log:
            self.daemon.process = subprocess.Popen(
                [*command, directory / "crio.conf", directory / "crio.conf.d"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                cwd=Path(__file__).parents[2],
            )
        self.reconnect()

    def life(self) -> None:
        """A pod with a pause process and a container, from the first call to the last."""
        pod = self.pod(self.config())
        container = self.start(pod, "sleep", "600", name="life")
        self.call("StopContainer", container_id=container, timeout=0)
        self.call("RemoveContainer", container_id=container)
        self.call("StopPodSandbox", pod_sandbox_id=pod)
        self.call("RemovePodSandbox", pod_sandbox_id=pod)

    def config(self) -> Any:
        return self.pod_config("life", namespaces={"pid": pb.POD})

    def assert_clean(self) -> None:
        assert self.pods() == [] and self.containers() == []

        def left() -> Any:
            named = machine_state(self.daemon.directory.name)
            found = {what: sorted(named[what]) for what in ("mounts", "namespace pins")}
            found["cgroups"] = [name for name in named["cgroups"] if len(Path(name).name) > 60]
            found["files"] = [str(path) for path in directories(self)]
            return {what: names for what, names in found.items() if names}

        try:
            self.until(lambda: not left(), 5)
        except AssertionError:
            pytest.fail(f"left behind: {left()}\n{self.daemon.log_tail(20)}")


@pytest.fixture(scope="module")
def faulty() -> Iterator[Faulty]:
    client = Client.started()
    client.stop_daemon()
    faulty = Faulty(client)
    faulty.start_faulty()
    yield faulty
    close(faulty)


MAKING = [
    (point, when)
    for point in POINTS
    if not point.endswith(("delete", "teardown", "unpin_namespaces", "remove_tree"))
    for when in ("before", "after")
    if (point, when) != ("store.insert", "after")  # it either raises or has recorded the object
]


@pytest.mark.parametrize(("point", "when"), MAKING)
@pytest.mark.parametrize("number", [1, 2])
def test_an_act_fails(faulty: Faulty, point: str, when: str, number: int) -> None:
    """The call says what failed, nothing of the object stays, and the same call then succeeds.

    The first passage is most often the pod's (or its pause process's), the second the container's.
    """
    faulty.order.write_text(f"{point} {when} {number}")
    try:
        faulty.life()
        fired = not faulty.order.exists()
        assert not fired, "a failure was not told to anybody"
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL), error.details()
        assert f"injected at {point}" in error.details()
    faulty.order.unlink(missing_ok=True)
    faulty.remove_pods()
    faulty.assert_clean()
    faulty.life()
    faulty.assert_clean()


@pytest.mark.parametrize(
    "point", ["store.delete", "network.teardown", "remove_tree", "runtime.delete", "unpin_namespaces"]
)
def test_an_act_of_removal_fails(faulty: Faulty, point: str) -> None:
    """The call says so, and asking again removes the rest."""
    pod = faulty.pod(faulty.config())
    faulty.start(pod, "sleep", "600", name="life")
    faulty.order.write_text(f"{point} before 1")
    try:
        faulty.call("RemovePodSandbox", pod_sandbox_id=pod)
    except grpc.RpcError as error:
        assert f"injected at {point}" in error.details()
    assert not faulty.order.exists()
    faulty.call("RemovePodSandbox", pod_sandbox_id=pod)
    faulty.assert_clean()
