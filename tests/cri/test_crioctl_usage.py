"""crioctl's stats, update and events against the real daemon."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Client

pytestmark = pytest.mark.root


def ctl(cri: Client, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("crioctl"))
    return subprocess.run(
        [program, "-r", str(cri.daemon.socket), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_stats_of_pods(cri: Client) -> None:
    pod = cri.pod(name="busy")
    cri.start(pod, "sh", "-c", "while :; do :; done")
    cri.pod(name="other")
    done = ctl(cri, "stats", "--pods", "busy")
    title, row = done.stdout.splitlines()
    assert title.split()[:3] == ["POD", "NAME", "CPU"] and "SENT" in title
    assert row.split()[1] == "busy" and float(row.split()[2]) > 5
    listed = json.loads(ctl(cri, "stats", "--pods", "-o", "json").stdout)["stats"]
    assert {item["attributes"]["metadata"]["name"] for item in listed} == {"busy", "other"}


def test_update(cri: Client) -> None:
    pod = cri.pod()
    container = cri.start(pod, "sleep", "60", name="web")
    done = ctl(cri, "update", "--memory", "64m", "--cpus", "0.5", "web")
    assert (done.returncode, done.stdout) == (0, "web\n"), done.stderr
    linux = cri.status(container).resources.linux
    assert (linux.memory_limit_in_bytes, linux.cpu_quota) == (64 << 20, 50_000)
    assert ctl(cri, "update", "--no-memory-limit", "web").returncode == 0
    assert cri.status(container).resources.linux.memory_limit_in_bytes == 0
    refused = ctl(cri, "update", "--memory", "1k", "web")
    assert refused.returncode == 1 and "linux.memory_limit_in_bytes" in refused.stderr
    for wrong in (["update", "web"], ["update", "--memory", "1m", "--no-memory-limit", "web"]):
        assert ctl(cri, *wrong).returncode == 2


def test_events_as_lines(cri: Client, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("crioctl"))
    out = tmp_path / "events"
    with out.open("wb") as file:
        watch = subprocess.Popen([program, "-r", str(cri.daemon.socket), "events", "-o", "json"], stdout=file)
    try:
        for _ in range(40):
            if out.stat().st_size:
                break
            cri.remove_pod(cri.pod())
            time.sleep(0.2)
        pod = cri.pod(name="seen")
        cri.remove_pod(pod)
        cri.until(lambda: out.read_text().count(f'"containerId": "{pod}"') == 4)
    finally:
        watch.send_signal(signal.SIGINT)
        assert watch.wait(10) == 130
    words = [json.loads(line) for line in out.read_text().splitlines()]
    mine = [w.get("containerEventType", "CONTAINER_CREATED_EVENT") for w in words if w["containerId"] == pod]
    assert [word.split("_")[1] for word in mine] == ["CREATED", "STARTED", "STOPPED", "DELETED"]
