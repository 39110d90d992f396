"""A monitor that is killed: what it watched ends, and everybody who asks, or listens, is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client

pytestmark = pytest.mark.root


def state(client: Client, method: str, **fields: Any) -> dict[str, Any]:
    info = json.loads(client.call(method, verbose=True, **fields).info["info"])
    return dict(info.get("state", info))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_end_is_an_event_and_a_status(fresh: Client) -> None:
    fresh.stop_daemon()
    (fresh.daemon.directory / "crio.conf.d/50-events.conf").write_text("[crio.runtime]\nenable_pod_events = true\n")
    fresh.start_daemon()
    pod = fresh.pod()
    container, other = fresh.start(pod, "sleep", "600"), fresh.start(pod, "sleep", "600")
    seen: list[tuple[str, int]] = []
    stream = fresh.runtime.GetContainerEvents(pb.GetEventsRequest())

    def listen() -> None:
        try:
            for event in stream:
                seen.append((event.container_id, event.container_event_type))
        except grpc.RpcError:
            pass  # cancelled at the end

    thread = threading.Thread(target=listen)
    thread.start()
    time.sleep(0.3)
    process = state(fresh, "ContainerStatus", container_id=container)
    os.kill(process["monitorPid"], signal.SIGKILL)
    status = fresh.ended(container)
    assert (status.exit_code, status.reason) == (137, "ContainerStatusUnknown") and "monitor" in status.message
    fresh.until(lambda: (container, pb.CONTAINER_STOPPED_EVENT) in seen)
    fresh.until(lambda: gone(process["pid"]))
    assert fresh.exec(other, "echo", "here").stdout == b"here\n"
    assert (fresh.daemon.directory / "run/exits" / container).read_text() == "137"
    fresh.call("RemoveContainer", container_id=container)
    fresh.until(lambda: (container, pb.CONTAINER_DELETED_EVENT) in seen)
    assert seen.count((container, pb.CONTAINER_STOPPED_EVENT)) == 1
    stream.cancel()
    thread.join(5)
