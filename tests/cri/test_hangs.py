"""Registries and plugins that never answer: only the calls that need them wait, and lists never do."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli import busybox

from ..images_support import BASE, HostileRegistry, blob_path, deaf, picture
from ..images_support import hostile as hostile
from .conftest import Client, refused

pytestmark = pytest.mark.root
HUNG = 10
LISTS = 300
# What a list takes on a machine with other work to do; a list that waits for what hangs takes seconds.
P99_MAX = 0.5


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a registry that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_registry_that_hangs(fresh: Client, silent: str) -> None:
    pod = fresh.pod()
    container = fresh.start(pod, "sleep", "600")

    def pull(number: int) -> grpc.Future:
        return fresh.begin("PullImage", image=pb.ImageSpec(image=f"{silent}/image:{number}"), seconds=100)

    with hanging(pull):
        time.sleep(0.5)
        p99 = lists(fresh)
        began = time.monotonic()
        other = busybox.build_layout(fresh.daemon.directory / "other", "other", command=("true",))
        fresh.call("PullImage", image=pb.ImageSpec(image=other))
        assert fresh.exec(container, "echo", "here").stdout == b"here\n"
        fresh.remove_pod(fresh.pod())
        took = time.monotonic() - began
    assert p99 < P99_MAX and took < 15, (p99, took)
    print(f"lists beside {HUNG} pulls that hang: p99 {p99 * 1000:.1f} ms")


def stopped_during(fresh: Client, pull: grpc.Future, name: str) -> float:
    """How long the daemon's stop takes, in seconds; whoever pulls is told."""
    began = time.monotonic()
    fresh.stop_daemon()
    took = time.monotonic() - began
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, f"pull of {name} was cancelled"):
        pull.result()
    return took


@pytest.mark.parametrize("after", ["nothing", "a part of a blob"])
def test_a_registry_that_hangs_does_not_hold_a_daemon_that_stops(
    fresh: Client, hostile: HostileRegistry, after: str
) -> None:
    """Whoever pulls is told at once, nothing half-made is left, and a successor can start."""
    image = picture(BASE)
    name = hostile.serve("app", image)
    path = blob_path(BASE)
    held = threading.Event()

    def hang(request: BaseHTTPRequestHandler) -> None:
        if after != "nothing":
            request.send_response(200)
            request.send_header("Content-Length", str(len(image.blobs[path[-71:]])))
            request.end_headers()
            request.wfile.write(image.blobs[path[-71:]][:100])
        held.wait()

    hostile.routes[path] = hang
    try:
        pull = fresh.begin("PullImage", image=pb.ImageSpec(image=name), seconds=100)
        fresh.until(lambda: hostile.count(path))
        time.sleep(0.3)
        took = stopped_during(fresh, pull, name)
        fresh.start_daemon()
    finally:
        held.set()
    assert took < 4, took
    assert list((fresh.daemon.directory / "root/images/tmp").iterdir()) == []
    assert [each.id for each in fresh.call("ListImages").images] == [fresh.image]


def test_a_registry_that_does_not_even_connect_does_not_hold_a_daemon_that_stops(fresh: Client) -> None:
    with deaf() as address:
        pull = fresh.begin("PullImage", image=pb.ImageSpec(image=f"{address}/app"), seconds=100)
        time.sleep(1)
        took = stopped_during(fresh, pull, f"{address}/app")
    assert took < 2, took


def test_a_network_plugin_that_hangs(fresh: Client) -> None:
    directory = fresh.daemon.directory
    good = fresh.pod()
    container = fresh.start(good, "sleep", "600")
    programs = directory / "plugins"
    programs.mkdir()
    write_plugin(programs / "slow")
    (directory / "crio.conf.d/70-plugins.conf").write_text(f'[crio.network]\nplugin_dirs = ["{programs}"]\n')
    conflist = {"cniVersion": "1.0.0", "name": "slow", "plugins": [{"type": "slow"}]}
    (directory / "net.d/05-slow.conflist").write_text(json.dumps(conflist))
    fresh.restart()

    def run(number: int) -> grpc.Future:
        return fresh.begin("RunPodSandbox", config=fresh.pod_config(f"hung{number}"), seconds=100)

    with hanging(run):
        time.sleep(0.5)
        p99 = lists(fresh)
        assert fresh.exec(container, "echo", "here").stdout == b"here\n"
        fresh.remove_pod(good)
    assert p99 < P99_MAX, p99
    print(f"lists beside {HUNG} plugins that hang: p99 {p99 * 1000:.1f} ms")
    (programs / "stop").touch()
    fresh.until(lambda: fresh.pods() == [] or all(p.state == pb.SANDBOX_READY for p in fresh.pods()))


def write_plugin(path: Path) -> None:
    """Says no to what it can do; its ADD waits for a file."""
    path.write_text(
        '#!/bin/sh\nhere=${0%/*}\ncase "$CNI_COMMAND" in\n'
        'VERSION) echo \'{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}\';;\n'
        'ADD) while [ ! -e "$here/stop" ]; do sleep 0.1; done; echo \'{"cniVersion":"1.0.0","ips":[]}\';;\n'
        "*) exit 0;;\nesac\n"
    )
    path.chmod(0o755)


@contextlib.contextmanager
def hanging(begin: Callable[[int], grpc.Future]) -> Iterator[None]:
    """HUNG calls that nobody answers all the while; then they are given up."""
    calls = [begin(number) for number in range(HUNG)]
    yield
    assert not any(call.done() for call in calls), "what should hang has answered"
    assert all(call.cancel() for call in calls)


def lists(client: Client) -> float:
    """The 99th percentile of ListContainers and ListPodSandbox, in seconds."""
    taken = []
    for _ in range(LISTS):
        began = time.monotonic()
        client.containers()
        client.pods()
        taken.append((time.monotonic() - began) / 2)
    return sorted(taken)[LISTS * 99 // 100]
