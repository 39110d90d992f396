"""SIGHUP: what a running daemon takes from its files, what it names as needing a restart, and what it refuses whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client, refused

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def reloading() -> Iterator[Client]:
    with Client.serving() as client:
        yield client


def info(client: Client) -> dict[str, Any]:
    answer = client.call("Status", verbose=True)
    return {"config": json.loads(answer.info["config"])["crio"], "reload": json.loads(answer.info["state"])["reload"]}


def reload(client: Client, settings: str) -> dict[str, Any]:
    """Give the daemon other settings; what it says of taking them."""
    before = info(client)["reload"].get("at", 0)
    (client.daemon.directory / "crio.conf.d/90-more.conf").write_text(settings)
    assert client.daemon.process is not None
    client.daemon.process.send_signal(signal.SIGHUP)
    client.until(lambda: info(client)["reload"].get("at", 0) > before)
    return dict(info(client)["reload"])


def test_what_is_logged(reloading: Client) -> None:
    log = reloading.daemon.log

    def lines_of_a_pod() -> str:
        size = log.stat().st_size
        pod = reloading.pod()
        with refused(grpc.StatusCode.NOT_FOUND):
            reloading.status("0" * 64)
        reloading.remove_pod(pod)
        return log.read_text()[size:]

    assert " DEBUG " not in lines_of_a_pod()
    told = reload(reloading, '[crio.runtime]\nlog_level = "debug"\n')
    assert told["changed"] == ["crio.runtime.log_level"]
    assert info(reloading)["config"]["runtime"].get("log_level") == "debug"
    assert " DEBUG " in lines_of_a_pod()
    reload(reloading, '[crio.runtime]\nlog_level = "debug"\nlog_filter = "no line says this"\n')
    assert lines_of_a_pod() == ""
    reload(reloading, "")


def test_a_seccomp_profile(reloading: Client, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    deny = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [deny]}))
    default = {"seccomp": pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)}
    command = ("sh", "-c", "mkdir /tmp/x 2>/dev/null && echo made || echo refused")
    old = reloading.pod()
    assert reloading.run(*command, pod=old, security=default) == (0, "made\n")
    reload(reloading, f'[crio.runtime]\nseccomp_profile = "{profile}"\n')
    assert reloading.run(*command, pod=old, security=default) == (0, "refused\n")
    reload(reloading, "")
    assert reloading.run(*command, pod=old, security=default) == (0, "made\n")
    reloading.remove_pod(old)


def test_a_handler_that_comes_and_goes(reloading: Client) -> None:
    """It serves at once (not only in what the status says), and its pods outlive its configuration."""
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "other"):
        reloading.pod(handler="other")
    reload(reloading, '[crio.runtime.runtimes.other]\nruntime_type = "builtin"\n')
    pod = reloading.pod(handler="other")
    container = reloading.start(pod, "sleep", "600")
    assert "other" in [each.name for each in reloading.call("Status").runtime_handlers]
    reload(reloading, "")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "other"):
        reloading.pod(handler="other")
    assert reloading.exec(container, "echo", "here").stdout == b"here\n"
    reloading.remove_pod(pod)


def test_the_default_handler(reloading: Client) -> None:
    told = reload(
        reloading, '[crio.runtime]\ndefault_runtime = "broken"\n[crio.runtime.runtimes.broken]\nruntime_type = "oci"\n'
        'runtime_path = "/no/such/runtime"\n'
    )  # fmt: skip
    assert "broken" in told["error"]
    assert info(reloading)["config"]["runtime"].get("default_runtime") is None
    reloading.remove_pod(reloading.pod())
    reload(
        reloading, '[crio.runtime]\ndefault_runtime = "mine"\n[crio.runtime.runtimes.mine]\nruntime_type = "builtin"\n'
    )
    pod = reloading.pod()
    assert reloading.call("PodSandboxStatus", pod_sandbox_id=pod).status.runtime_handler in ("", "mine")
    reloading.remove_pod(pod)
    reload(reloading, "")


def test_pinned_and_pause_images(reloading: Client) -> None:
    def pinned() -> list[bool]:
        return [image.pinned for image in reloading.call("ListImages").images]

    assert pinned() == [False]
    reload(reloading, '[crio.image]\npinned_images = ["*busybox*"]\npause_image = "registry.local/pause:9"\n')
    assert pinned() == [True]
    config = json.loads(reloading.call("Status", verbose=True).info["config"])
    assert config["sandboxImage"] == "registry.local/pause:9"
    reload(reloading, "")
    assert pinned() == [False]


@pytest.mark.parametrize(
    "settings",
    [
        "[crio.runtime\n",
        "[crio.runtime]\nlog_level = 5\n",
        '[crio.runtime]\nlog_level = "loud"\n',
        '[crio.runtime]\nseccomp_profile = "/no/such/profile"\n',
    ],
)
def test_a_wrong_file_changes_nothing(reloading: Client, settings: str) -> None:
    before = info(reloading)["config"]
    told = reload(reloading, settings)
    assert "90-more.conf" in told["error"]
    assert info(reloading)["config"] == before
    assert "was not reloaded" in reloading.daemon.log_tail(5)
    assert "error" not in reload(reloading, "")


@pytest.mark.parametrize("settings", ["[crio.runtime\n", "[crio.runtime]\npids_limit = true\n"])
def test_status_tells_of_a_wrong_file(reloading: Client, settings: str) -> None:
    """It finds the socket in the files that can be read."""
    reload(reloading, settings)
    directory = reloading.daemon.directory
    program = Path(sys.executable).with_name("crio-native")
    command = [f"{program}", f"--config={directory}/crio.conf", f"--config-dir={directory}/crio.conf.d", "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and '"error":' in done.stdout.replace('\\"', '"'), done
    assert done.stderr.startswith("warning: ") and "90-more.conf" in done.stderr
    assert f"asking on {reloading.daemon.socket}" in done.stderr
    assert "error" not in reload(reloading, "")


def test_what_needs_a_restart_is_named(reloading: Client) -> None:
    told = reload(reloading, "[crio.runtime]\npids_limit = 77\n")
    assert told["changed"] == [] and told["needRestart"] == ["crio.runtime.pids_limit"]
    assert "restart is needed: crio.runtime.pids_limit" in reloading.daemon.log_tail(5)
    assert info(reloading)["config"]["runtime"].get("pids_limit") != 77
    reload(reloading, "")
