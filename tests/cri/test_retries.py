"""A client's deadline tears nothing: the work goes on, and a retry joins it or gets what it made."""

from __future__ import annotations

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode


def test_two_equal_calls_make_one_pod(cri: Client) -> None:
    request = pb.RunPodSandboxRequest(config=cri.pod_config("twice"))
    calls = [cri.runtime.RunPodSandbox.future(request, timeout=20) for _ in range(8)]
    results = [call.exception() or call.result().pod_sandbox_id for call in calls]
    # Those that come while it is made join it; those that come after it was told find the name taken.
    ids = {result for result in results if isinstance(result, str)}
    assert len(ids) == 1 and results[0] in ids
    assert all(r.code() is Code.ALREADY_EXISTS for r in results if not isinstance(r, str))
    assert [pod.id for pod in cri.pods()] == list(ids)


def give_up(cri: Client, call: object, request: object) -> None:
    """Ask with deadlines that grow until one call reached the daemon and was given up."""
    with refused(Code.DEADLINE_EXCEEDED):
        call(request, timeout=0.001)  # type: ignore[operator]
    cri.call("Version")


def test_a_pod_whose_client_gave_up(cri: Client) -> None:
    config = cri.pod_config("patience")
    give_up(cri, cri.runtime.RunPodSandbox, pb.RunPodSandboxRequest(config=config))
    pod = cri.pod(config)
    assert [p.id for p in cri.pods()] == [pod]
    assert cri.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_READY


def test_the_finished_pod_of_a_client_that_gave_up(fresh: Client) -> None:
    """Also after a restart: the record knows that nobody was told the id."""
    config = fresh.pod_config("patience")
    for attempt in range(20):
        config.metadata.attempt = attempt
        try:
            fresh.pod(config, seconds=0.004)
            fresh.remove_pod(fresh.pods()[0].id)
        except grpc.RpcError as error:
            assert error.code() is Code.DEADLINE_EXCEEDED
            import time

            time.sleep(1)
            if fresh.pods():
                break
    [made] = fresh.pods()
    fresh.restart()
    assert fresh.pod(config) == made.id
    with refused(Code.ALREADY_EXISTS, made.id):
        fresh.pod(config)


def test_a_container_whose_client_gave_up(cri: Client) -> None:
    pod = cri.pod()
    config = cri.container_config("sleep", "60", name="patience")
    give_up(cri, cri.runtime.CreateContainer, pb.CreateContainerRequest(pod_sandbox_id=pod, config=config))
    container = cri.create(pod, config=config)
    assert [c.id for c in cri.containers()] == [container]
    cri.call("StartContainer", container_id=container)


def test_another_configuration_under_the_same_name(cri: Client) -> None:
    pod = cri.pod()
    config = cri.container_config("sleep", "60", name="mine")
    first = cri.runtime.CreateContainer.future(pb.CreateContainerRequest(pod_sandbox_id=pod, config=config), timeout=20)
    config.command.append("70")
    with refused(Code.ALREADY_EXISTS, "mine"):
        for _ in range(2):
            cri.create(pod, config=config)
    first.result()


def test_a_deadline_names_the_stage(fresh: Client) -> None:
    """Pods wait for a worker behind sixteen that are held up by a pulled plug: here, a stopped launcher."""
    import os
    import signal
    from pathlib import Path

    fresh.remove_pod(fresh.pod())
    assert fresh.daemon.process is not None
    children = Path(f"/proc/{fresh.daemon.process.pid}/task/{fresh.daemon.process.pid}/children")
    launchers = [int(pid) for pid in children.read_text().split()]
    config = fresh.pod_config("held")
    for pid in launchers:
        os.kill(pid, signal.SIGSTOP)
    try:
        with refused(Code.DEADLINE_EXCEEDED, "still making the namespaces", "retry"):
            fresh.pod(config, seconds=1)
        with refused(Code.DEADLINE_EXCEEDED, "still making the namespaces"):
            fresh.pod(config, seconds=1)
    finally:
        for pid in launchers:
            os.kill(pid, signal.SIGCONT)
    pod = fresh.pod(config)
    assert [p.id for p in fresh.pods()] == [pod]
