"""A shim that misbehaves (`fake_shim.py`), in every way that one can: each is an error in words, and nothing stays."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.linux import process
from tests.cri.conftest import Client, log_text, refused

from .fake_shim import install
from .shim_support import shim_processes

pytestmark = pytest.mark.root
Code = grpc.StatusCode

HANDLERS = """\
[crio.runtime.runtimes.fake]
runtime_type = "vm"
runtime_path = "{fake}"
container_create_timeout = 30
[crio.runtime.runtimes.missing]
runtime_type = "vm"
runtime_path = "/no/such/shim"
[crio.runtime.runtimes.text]
runtime_type = "vm"
runtime_path = "/etc/passwd"
[crio.runtime.runtimes.cc]
runtime_type = "vm"
"""


class Fake(Client):
    def behave(self, **how: str) -> None:
        """How the shim answers from now on: by method, and `start` for its program's verb.

        In one act: the shim reads it for every call, and who reads half a file never answers.
        """
        path = self.daemon.directory / "root" / "behaviour"
        path.with_suffix(".new").write_text(json.dumps(how))
        path.with_suffix(".new").rename(path)

    def left(self) -> list[str]:
        """What of pods and containers is still there."""
        run, root = self.daemon.directory / "run", self.daemon.directory / "root"
        places = (run / "containers", run / "sandboxes", root / "containers", root / "sandboxes")
        return [str(path) for place in places for path in place.iterdir()]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    settings = HANDLERS.replace("{fake}", str(install(tmp_path_factory.mktemp("bin"))))
    with Fake.serving(settings) as client:
        yield client


@pytest.fixture
def fake(daemon: Fake) -> Iterator[Fake]:
    """Well-behaved until told otherwise; every test must leave nothing, in particular no shim."""
    daemon.behave()
    yield daemon
    daemon.behave()
    daemon.remove_pods()
    assert daemon.pods() == [] and daemon.left() == []
    daemon.until(lambda: not [pid for pid in shim_processes(daemon) if process.start_time(pid)])


def test_it_can_behave(fake: Fake) -> None:
    pod = fake.pod(handler="fake")
    container = fake.start(pod, "true")
    fake.until(lambda: log_text(fake.status(container).log_path) == "made\n")
    fake.call("StopContainer", container_id=container, timeout=0)
    assert fake.status(container).exit_code == 137
    assert "hello" in fake.daemon.log.read_text(), "what a shim logs as an error is in our log"


@pytest.mark.parametrize("how", ["message", "version 2", "version 3"])
def test_every_age_of_the_bootstrap(fake: Fake, how: str) -> None:
    fake.behave(start=how)
    fake.start(fake.pod(handler="fake"), "true")


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("fail no machine could be made", Code.INTERNAL, "no machine could be made"),
        ("silent", Code.INTERNAL, "status 1 and said nothing"),
        ("talk", Code.INTERNAL, "no unix socket's address"),
        ("json", Code.INTERNAL, "nonsense"),
        ("grpc", Code.UNIMPLEMENTED, "speaks 'grpc'"),
        ("version 9", Code.UNIMPLEMENTED, "version 9"),
        ("address tcp://127.0.0.1:80", Code.INTERNAL, "no unix socket's address"),
        ("address unix:///no/such/socket", Code.UNAVAILABLE, "no shim listens on unix:///no/such/socket"),
        ("address ", Code.INTERNAL, "no unix socket's address"),
    ],
)
def test_a_bad_start(fake: Fake, how: str, code: grpc.StatusCode, words: str) -> None:
    fake.behave(start=how)
    with refused(code, words):
        fake.pod(handler="fake")


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("die", Code.UNAVAILABLE, "closed the connection"),
        ("close", Code.UNAVAILABLE, "closed the connection"),
        ("half", Code.UNAVAILABLE, "in the middle of a message"),
        ("garbage", Code.UNAVAILABLE, "does not speak ttrpc"),
        ("stranger", Code.UNAVAILABLE, "which nobody opened"),
        ("nonsense", Code.INTERNAL, "no ttrpc response"),
        ("payload", Code.INTERNAL, "no CreateTaskResponse"),
        ("huge", Code.RESOURCE_EXHAUSTED, "answered Create with too much"),
        ("refuse the kernel has no KVM", Code.INTERNAL, "the kernel has no KVM"),
        ("pid 0", Code.INTERNAL, "pid 0"),
        ("pid 4194303", Code.INTERNAL, "no such process"),
        ("pid 4294967295", Code.INTERNAL, "which no process can have"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["pod", "container"])
def test_a_bad_create(fake: Fake, first: bool, how: str, code: grpc.StatusCode, words: str) -> None:
    """Of the pod's first container, or of a later one, which leaves the pod as it is."""
    if first:
        fake.behave(Create=how)
        with refused(code, words):
            fake.pod(handler="fake")
        return
    pod = fake.pod(handler="fake")
    fake.behave(Create=how)
    with refused(code, words):
        fake.create(pod, "true")
    fake.behave()
    if how != "die":
        fake.start(pod, "true")


def test_late_answers_are_taken(fake: Fake) -> None:
    fake.behave(Create="late 1", Start="late 1", Kill="late 1")
    container = fake.start(fake.pod(handler="fake"), "true")
    fake.call("StopContainer", container_id=container, timeout=0)
    assert fake.status(container).exit_code == 137


def test_an_answer_that_comes_twice(fake: Fake) -> None:
    fake.behave(Create="twice", Start="twice", Connect="twice")
    fake.start(fake.pod(handler="fake"), "true")


def test_a_shim_that_hangs_is_killed(fake: Fake) -> None:
    """No TERM that it takes ends the grace; a SIGKILL that it does not answer ends it, and what its pod ran."""
    pod = fake.pod(handler="fake")
    container = fake.start(pod, "true")
    hung = dict.fromkeys(("Kill", "State", "Delete", "Shutdown", "Connect"), "hang")
    fake.behave(**hung)
    begin = time.monotonic()
    fake.call("StopContainer", container_id=container, timeout=1, seconds=90)
    assert time.monotonic() - begin < 70
    assert fake.status(container).reason == "ContainerStatusUnknown"
    fake.until(lambda: not [pid for pid in shim_processes(fake, pod) if process.start_time(pid)])


def test_a_shim_that_will_not_end(fake: Fake) -> None:
    pod = fake.pod(handler="fake")
    fake.behave(Shutdown="ignore")
    fake.remove_pod(pod)


def test_a_start_that_hangs_and_a_kill_that_does_nothing(fake: Fake) -> None:
    """At once, as each takes its 30 s.  A container whose end does not come is still there to be stopped."""
    container = fake.start(fake.pod(handler="fake"), "true")
    fake.behave(start="hang", Kill="ignore")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(fake.pod, handler="fake", seconds=60)
        with refused(Code.DEADLINE_EXCEEDED, container):
            fake.call("StopContainer", container_id=container, timeout=0, seconds=90)
        with refused(Code.DEADLINE_EXCEEDED, "fake-shim", "did not end within 30 s"):
            starting.result()
    fake.behave()
    fake.call("StopContainer", container_id=container, timeout=0)


@pytest.mark.parametrize("how", ["close", "half", "garbage"])
def test_a_lost_connection_is_made_again(fake: Fake, how: str) -> None:
    """The shim lives, so its containers do: only the call that was answered so is lost."""
    container = fake.start(fake.pod(handler="fake"), "true")
    fake.behave(Update=how)
    with refused(Code.UNAVAILABLE, "shim"):
        limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        fake.call("UpdateContainerResources", container_id=container, linux=limits)
    fake.behave()
    time.sleep(0.5)
    assert fake.status(container).state == pb.CONTAINER_RUNNING
    fake.call("StopContainer", container_id=container, timeout=0)
    assert fake.status(container).exit_code == 137


def test_a_shim_that_dies(fake: Fake) -> None:
    pod = fake.pod(handler="fake")
    container = fake.start(pod, "true")
    for pid in shim_processes(fake, pod):
        os.kill(pid, signal.SIGKILL)
    ended = fake.ended(container)
    assert (ended.exit_code, ended.reason) == (137, "ContainerStatusUnknown")
    fake.until(lambda: fake.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_NOTREADY)
    bundle = fake.daemon.directory / "root" / "containers" / container
    assert (bundle / "deleted").exists(), "its program was asked to clean up"


def test_an_exit_status_that_cannot_be(fake: Fake) -> None:
    fake.behave(Wait="status 70000")
    container = fake.start(fake.pod(handler="fake"), "true")
    fake.call("StopContainer", container_id=container, timeout=0)
    assert fake.status(container).exit_code == 255


def test_a_shim_that_names_another_process_as_itself(fake: Fake) -> None:
    """Whom a shim calls itself is not believed: else it could have the daemon killed."""
    victim = fake.daemon.process
    assert victim is not None
    fake.behave(Connect=f"pid {victim.pid}", Shutdown="ignore")
    pod = fake.pod(handler="fake")
    fake.remove_pod(pod)
    assert victim.poll() is None


def test_statistics_of_an_unknown_kind(fake: Fake) -> None:
    container = fake.start(fake.pod(handler="fake"), "true")
    fake.call("ContainerStats", container_id=container)  # without them
    assert "ContainerStats failed" not in fake.daemon.log_tail(3)


@pytest.mark.parametrize(
    ("handler", "words"),
    [("missing", "/no/such/shim"), ("text", "not an executable file"), ("cc", "Clear Containers has become Kata")],
)
def test_a_handler_that_cannot_run(fake: Fake, handler: str, words: str) -> None:
    """It was told at the start, and is told to whoever asks for it; the others run."""
    with refused(Code.FAILED_PRECONDITION, handler, words):
        fake.pod(handler=handler)
    assert words in fake.daemon.log.read_text()


def test_the_shim_s_own_process_is_found_after_a_restart(fake: Fake) -> None:
    pod = fake.pod(handler="fake")
    container = fake.start(pod, "true")
    fake.restart(signal.SIGKILL)
    assert fake.status(container).state == pb.CONTAINER_RUNNING
    fake.call("StopContainer", container_id=container, timeout=0)
    assert fake.status(container).exit_code == 137
    assert Path(f"/proc/{shim_processes(fake, pod)[0]}").exists()
