"""The benchmark's own CRI client: it gets what gRPC's client gets."""

from __future__ import annotations

import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..perf import stub
from .conftest import Client

pytestmark = pytest.mark.root


def test_it_gets_what_grpc_gets(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "60")
    runtime = stub.runtime(cri.daemon.socket)
    for _ in range(3):  # on one connection
        assert runtime.Version(pb.VersionRequest(), timeout=5) == cri.call("Version")
    assert runtime.ListContainers(pb.ListContainersRequest(), timeout=5) == cri.call("ListContainers")
    request = pb.ExecSyncRequest(container_id=container, cmd=["seq", "300000"], timeout=5)
    for _ in range(2):  # more than HTTP/2 lets a server send unasked, in many frames
        assert runtime.ExecSync(request, timeout=10).stdout == cri.exec(container, "seq", "300000").stdout


def test_a_connection_that_rested_is_left(cri: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = stub.runtime(cri.daemon.socket)
    runtime.Version(pb.VersionRequest(), timeout=5)
    first = runtime._local.connection
    monkeypatch.setattr(stub, "_REST_SECONDS", -1.0)
    assert runtime.Version(pb.VersionRequest(), timeout=5) == cri.call("Version")
    assert runtime._local.connection is not first


def test_a_call_that_fails_is_no_answer(cri: Client) -> None:
    runtime = stub.runtime(cri.daemon.socket)
    request = pb.ExecSyncRequest(container_id="nosuch", cmd=["true"], timeout=5)
    with pytest.raises(RuntimeError, match=r"ExecSync: status 5: .*nosuch"):
        runtime.ExecSync(request, timeout=10)
    assert runtime.Version(pb.VersionRequest(), timeout=5) == cri.call("Version")
