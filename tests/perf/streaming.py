"""Bytes through the streaming server: port-forward in both directions, exec, and an attachment under endless output."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crio_native.api.runtime.v1 import api_pb2 as cri
from crio_native.cli.ctl.streams import COMMAND, FORWARD, Link
from crio_native.streaming import spdy
from tests.perf.daemon import Client
from tests.perf.peers import SLEEP, resident_set_size
from tests.perf.report import Result

SIZE = 512 << 20  # bytes a round
ROUNDS = 5
FRAME = 32 * 1024  # what clients written in Go put into a frame
GOAL = 300.0  # MB/s
ATTACH_BYTES = 200 << 20
_PORT = 9000
_BLOCK = 64 * 1024  # bytes that the command writes at once

# In the pod's network namespace: takes what comes until its end and answers with the count, or sends SIZE bytes.
_PEER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
buffer, chunk = bytearray(1 << 20), bytes(1 << 20)
print("ready", flush=True)
while True:
    client, _ = listener.accept()
    with client:
        if client.recv(1) == b"T":
            count = 0
            while received := client.recv_into(buffer):
                count += received
            client.sendall(b"%d" % count)
        else:
            for _ in range(int(sys.argv[2]) >> 20):
                client.sendall(chunk)
"""


def measure(client: Client, progress: Callable[[str], None]) -> list[Result]:
    pod, container = client.run("streaming", SLEEP)
    try:
        results = []
        with _peer(client, pod):
            for name, once in (("to the pod", _send), ("from the pod", _receive)):
                progress(f"port-forward {name}")
                results.append(_result(f"port-forward {name}", [once(client, pod) for _ in range(ROUNDS)]))
        progress("exec")
        results.append(_result("exec, output", [_exec(client, container) for _ in range(ROUNDS)]))
    finally:
        client.remove(pod)
    progress("attach")
    return [*results, _attach(client)]


def _result(name: str, seconds: list[float]) -> Result:
    rates = [SIZE / 1e6 / each for each in seconds]
    spread = f"{min(rates):.0f}..{max(rates):.0f}"
    return Result(name, "MB/s", statistics.median(rates), None, None, GOAL, spread=spread, more_is_better=True)


@contextmanager
def _peer(client: Client, pod: str) -> Iterator[None]:
    namespace = Path(client.daemon.directory) / "run/netns" / pod
    command = ["nsenter", f"--net={namespace}", sys.executable, "-c", _PEER, str(_PORT), str(SIZE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def _forward(client: Client, pod: str) -> tuple[Link, int]:
    answer = client.runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod), timeout=10)
    link = Link(answer.url, FORWARD)
    headers = {"port": str(_PORT), "requestid": "1"}
    link.open({**headers, "streamtype": "error"})
    return link, link.open({**headers, "streamtype": "data"})


def _send(client: Client, pod: str) -> float:
    """Seconds until the peer has counted all."""
    link, stream = _forward(client, pod)
    link.send(stream, b"T")
    frame = memoryview(bytes(FRAME))
    began = time.perf_counter()
    for _ in range(SIZE // FRAME):
        link.send(stream, frame)
    link.end(stream)
    counted = b"".join(bytes(event.data) for event in _until_end(link, stream))
    seconds = time.perf_counter() - began
    link.close()
    if int(counted) != SIZE:
        raise RuntimeError(f"{counted!r} of {SIZE} bytes arrived")
    return seconds


def _receive(client: Client, pod: str) -> float:
    link, stream = _forward(client, pod)
    began = time.perf_counter()
    link.send(stream, b"G")
    received = sum(len(event.data) for event in _until_end(link, stream))
    seconds = time.perf_counter() - began
    link.close()
    if received != SIZE:
        raise RuntimeError(f"{received} of {SIZE} bytes arrived")
    return seconds


def _until_end(link: Link, stream: int) -> Iterator[spdy.Data]:
    for event in link.events():
        if isinstance(event, spdy.Data) and event.stream == stream:
            yield event
        elif isinstance(event, spdy.Ended) and event.stream == stream:
            return


def _session(url: str) -> tuple[Link, int]:
    link = Link(url, COMMAND)
    link.open({"streamtype": "error"})
    return link, link.open({"streamtype": "stdout"})


def _exec(client: Client, container: str) -> float:
    command = ["dd", "if=/dev/zero", f"bs={_BLOCK}", f"count={SIZE // _BLOCK}"]
    request = cri.ExecRequest(container_id=container, cmd=command, stdout=True)
    link, stream = _session(client.runtime.Exec(request, timeout=10).url)
    began = time.perf_counter()
    received = sum(len(event.data) for event in _until_end(link, stream))
    seconds = time.perf_counter() - began
    link.close()
    if received != SIZE:
        raise RuntimeError(f"{received} of {SIZE} bytes arrived")
    return seconds


def _attach(client: Client) -> Result:
    """How much larger the daemon is at the end than when a tenth has come."""
    assert client.daemon.process is not None
    pid = client.daemon.process.pid
    pod, container = client.run("attach", ["yes"])
    try:
        request = cri.AttachRequest(container_id=container, stdout=True)
        link, stream = _session(client.runtime.Attach(request, timeout=10).url)
        received, before, began = 0, 0.0, time.perf_counter()
        for event in _until_end(link, stream):
            received += len(event.data)
            before = before or (resident_set_size(pid) if received > ATTACH_BYTES // 10 else 0.0)
            if received >= ATTACH_BYTES:
                break
        rate = received / 1e6 / (time.perf_counter() - began)
        growth = resident_set_size(pid) - before
        link.close()
    finally:
        client.remove(pod)
    name = f"attach to yes, daemon's growth over {ATTACH_BYTES >> 20} MiB"
    return Result(name, "KiB", growth, None, None, 1024, spread=f"at {rate:.0f} MB/s")
