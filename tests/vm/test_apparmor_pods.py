"""Containers under AppArmor profiles, made by the daemon as a kubelet asks for them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.errors import FailedPrecondition
from crio_native.pods import apparmor

from ..cri.conftest import Client, refused
from .conftest import daemon

pytestmark = pytest.mark.vm(lsm="apparmor")

Code = grpc.StatusCode
Profile = pb.SecurityProfile
LOADED = Path("/sys/kernel/security/apparmor/profiles")
MINE = """
profile crio-native-vm-test flags=(attach_disconnected) {
  file,
  capability,
  network,
  signal,
  deny /tmp/secret rw,
}
"""
NAME = "crio-native-vm-test"


def remove(profile: str) -> None:
    if f"{profile} (" in LOADED.read_text():
        Path("/sys/kernel/security/apparmor/.remove").write_text(profile)


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with daemon() as client:
        yield client


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "profile").write_text(MINE)
    subprocess.run(["apparmor_parser", "--skip-cache", "--replace", tmp_path / "profile"], check=True)
    yield NAME
    remove(NAME)


def sleeper(cri: Client, pod: str = "", **security: Any) -> str:
    return cri.start(pod or cri.pod(), "sleep", "1000", security=security)


def profile_of(cri: Client, container: str) -> str:
    """Of a process that is exec'ed, which also proves that an exec is under it."""
    return str(cri.exec(container, "cat", "/proc/self/attr/current").stdout.decode().rstrip("\0\n"))


def first_process(cri: Client, container: str) -> str:
    status = cri.call("ContainerStatus", container_id=container, verbose=True)
    pid = json.loads(status.info["info"])["pid"]
    return Path(f"/proc/{pid}/attr/apparmor/current").read_text().rstrip("\0\n")


def localhost(name: str) -> Any:
    return Profile(profile_type=Profile.Localhost, localhost_ref=name)


def test_the_default_profile_is_loaded_and_confines(cri: Client) -> None:
    remove("crio-default")
    container = sleeper(cri)
    assert f"{apparmor.OWN} (enforce)\n" in LOADED.read_text()
    assert first_process(cri, container) == profile_of(cri, container) == "crio-default (enforce)"
    script = "echo x > /tmp/x && cat /tmp/x; mount -t tmpfs none /tmp || echo refused"
    assert cri.exec(container, "sh", "-c", script).stdout == b"x\nrefused\n"
    asked = sleeper(cri, apparmor=Profile(profile_type=Profile.RuntimeDefault))
    assert profile_of(cri, asked) == "crio-default (enforce)"


def test_the_default_profile_binds_who_may_mount(cri: Client) -> None:
    """Capabilities alone would let it; without the profile they do."""
    mighty = {"capabilities": pb.Capability(add_capabilities=["SYS_ADMIN"])}
    mount = ("mount", "-t", "tmpfs", "none", "/tmp")
    answer = cri.exec(sleeper(cri, **mighty), *mount)
    assert answer.exit_code != 0 and b"Permission denied" in answer.stderr
    free = sleeper(cri, apparmor=Profile(profile_type=Profile.Unconfined), **mighty)
    assert cri.exec(free, *mount).exit_code == 0


@pytest.mark.parametrize("field", ["apparmor", "apparmor with its prefix", "apparmor_profile"])
def test_a_profile_by_name(cri: Client, mine: str, field: str) -> None:
    prefixed = f"localhost/{mine}"
    match field:
        case "apparmor":
            container = sleeper(cri, apparmor=localhost(mine))
        case "apparmor with its prefix":
            container = sleeper(cri, apparmor=localhost(prefixed))
        case _:
            container = sleeper(cri, apparmor_profile=prefixed)
    assert first_process(cri, container) == profile_of(cri, container) == f"{mine} (enforce)"
    answer = cri.exec(container, "sh", "-c", "echo x > /tmp/open && cat /tmp/open; echo y > /tmp/secret")
    assert answer.stdout == b"x\n" and b"Permission denied" in answer.stderr


def test_a_profile_that_is_not_loaded_is_refused_and_leaves_nothing(cri: Client) -> None:
    pod = cri.pod()
    with refused(Code.FAILED_PRECONDITION, "'no-such-profile' is not loaded", "apparmor_parser"):
        sleeper(cri, pod, apparmor=localhost("no-such-profile"))
    assert not cri.containers()
    with refused(Code.INVALID_ARGUMENT, "apparmor.localhost_ref"):
        sleeper(cri, pod, apparmor=localhost(""))
    with refused(Code.INTERNAL, "write_labels", "crio-default//&no-such"):  # the kernel's to judge
        sleeper(cri, pod, apparmor=localhost("crio-default//&no-such"))
    assert not cri.containers()


def test_unconfined_and_privileged(cri: Client) -> None:
    assert profile_of(cri, sleeper(cri, apparmor=Profile(profile_type=Profile.Unconfined))) == "unconfined"
    assert profile_of(cri, sleeper(cri, apparmor_profile="unconfined")) == "unconfined"
    pod = cri.pod(privileged=True)
    assert profile_of(cri, sleeper(cri, pod, privileged=True)) == "unconfined"


def test_a_host_without_the_parser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remove("crio-default")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(apparmor, "_DIRECTORIES", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="install apparmor_parser"):
        apparmor.ensure("crio-default")
    (tmp_path / "apparmor_parser").write_text("#!/bin/sh\necho out of order >&2; exit 3\n")
    (tmp_path / "apparmor_parser").chmod(0o755)
    with pytest.raises(FailedPrecondition, match="'crio-default' is refused: out of order"):
        apparmor.ensure("crio-default")
