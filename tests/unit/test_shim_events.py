"""The events service: what a shim may send, and what it must not be able to do by it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.api.shim.v1 import events_pb2, ttrpc_pb2
from crio_native.oci.shim import frames
from crio_native.oci.shim.client import Client
from crio_native.oci.shim.events import Events, mark_oom
from crio_native.oci.shim.loop import Loop

SERVICE = "containerd.services.events.ttrpc.v1.Events"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Events, Loop, list[str]]]:
    loop, heard = Loop(), list[str]()
    events = Events(tmp_path / "e.sock", loop, heard.append)
    yield events, loop, heard
    events.close()
    loop.stop()


def connect(events: Events) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(events.path)
    return sock


def forwarded(kind: str, value: bytes) -> bytes:
    request = events_pb2.ForwardRequest()
    request.envelope.topic = "/tasks/oom"
    request.envelope.event.type_url = kind
    request.envelope.event.value = value
    message: bytes = request.SerializeToString()
    return message


def test_oom_is_heard_and_all_is_answered(served: tuple[Events, Loop, list[str]]) -> None:
    events, loop, heard = served
    client = Client(connect(events), "the service", loop)
    oom = events_pb2.TaskOOM(container_id="abc").SerializeToString()
    for kind, value in (("containerd.events.TaskExit", b"x"), ("containerd.events.TaskOOM", oom)):
        assert client.call(SERVICE, "Forward", forwarded(kind, value), 5) == b""
    assert heard == ["abc"]
    client.close()


def test_what_is_none_of_it_is_refused(served: tuple[Events, Loop, list[str]]) -> None:
    events, _, heard = served
    for method, payload, code in (("Subscribe", b"", 12), ("Forward", b"\xff\xff", 3)):
        with connect(events) as sock:
            message = ttrpc_pb2.Request(service=SERVICE, method=method, payload=payload).SerializeToString()
            sock.sendall(frames.pack(frames.Frame(1, frames.REQUEST, 0, message)))
            length, stream, kind, _ = frames.HEADER.unpack(sock.recv(frames.HEADER.size))
            assert (stream, kind) == (1, frames.RESPONSE)
            assert ttrpc_pb2.Response.FromString(sock.recv(length)).status.code == code
    assert heard == []


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", struct.pack(">IIBB", 0, 1, 77, 0)])
def test_a_peer_that_speaks_something_else_is_dropped(served: tuple[Events, Loop, list[str]], sent: bytes) -> None:
    with connect(served[0]) as sock:
        sock.sendall(sent)
        assert sock.recv(1) == b""


def test_a_path_that_is_too_long_is_not_served(tmp_path: Path) -> None:
    loop = Loop()
    assert Events(tmp_path / ("x" * 120), loop, print).path == ""
    loop.stop()


def test_only_a_container_of_ours_is_marked(tmp_path: Path) -> None:
    (tmp_path / "runs" / "known").mkdir(parents=True)
    for name in ("known", "unknown", "../outside", "..", ""):
        mark_oom(tmp_path / "runs", name)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("oom")] == ["runs/known/oom"]
