"""A disk that is full, for real: a small file system is the daemon's root.  What fails says so, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import ScratchDaemon
from crio_native.linux import syscalls

from ..images_support import member, picture, tar, write_layout
from .conftest import Client, refused

pytestmark = pytest.mark.root
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def small() -> Iterator[Client]:
    """A daemon whose root is a tmpfs of 24 MiB of its own, as the disk of a node is not its /run."""
    daemon = ScratchDaemon()
    try:
        root = daemon.directory / "root"
        root.mkdir()
        syscalls.mount("tmpfs", str(root), "tmpfs", 0, "size=24m,mode=0700")
        daemon.start()
        client = Client(daemon)
        client.load_image()
        yield client
        unfill(client)
        client.channel.close()
    finally:
        print(daemon.log_tail(30))
        problems = daemon.close()
    assert not problems


def fill(client: Client) -> None:
    """To the last page: also what the files of others leave of theirs is taken by more files."""
    for number in range(3):
        with (client.daemon.directory / f"root/filler{number}").open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            with contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass


def unfill(client: Client) -> None:
    for file in client.daemon.directory.glob("root/filler*"):
        file.unlink()


def test_what_lives_goes_on_and_what_is_new_is_refused(small: Client) -> None:
    pod = small.pod(namespaces={"pid": pb.POD})
    living = small.start(pod, "sh", "-c", "while [ ! -e /end ]; do sleep 0.05; done; exit 7")
    ending = small.start(pod, "sleep", "600")
    image = write_layout(small.daemon.directory / "big", picture(tar(member("big", data=os.urandom(4 << 20)))))
    fill(small)
    for _ in range(3):
        with refused(FULL, "ENOSPC"):
            small.pod()
        with refused(FULL, "ENOSPC"):
            small.create(pod, "true")
    with refused(FULL, "layer sha256:", "no space left"):
        small.call("PullImage", image=pb.ImageSpec(image=f"oci:{image}:latest"))
    assert [p.id for p in small.pods()] == [pod]
    assert {c.id for c in small.containers()} == {living, ending}
    assert small.exec(living, "echo", "here").stdout == b"here\n"
    small.call("StopContainer", container_id=ending, timeout=0)
    assert small.status(ending).exit_code == 137

    unfill(small)
    assert small.run("echo", "again", pod=pod) == (0, "again\n")
    small.exec(living, "touch", "/end")
    assert small.ended(living).exit_code == 7
    small.restart(signal.SIGKILL)
    assert (small.status(living).exit_code, small.status(ending).exit_code) == (7, 137)


def test_removing_works_on_a_full_disk(small: Client) -> None:
    """It is what frees space; and names are free for what comes then."""
    config = small.pod_config("same")
    pod = small.pod(config)
    container = small.start(pod, "sh", "-c", "dd if=/dev/zero of=/data bs=1M count=3; sleep 600")
    small.until(lambda: small.exec(container, "stat", "-c", "%s", "/data").stdout.strip() == str(3 << 20).encode())
    fill(small)
    small.call("RemoveContainer", container_id=container)
    fill(small)
    small.remove_pod(pod)
    assert small.pods() == [] and small.containers() == []
    unfill(small)
    small.remove_pod(small.pod(config))
    small.restart(signal.SIGKILL)
    assert small.pods() == []


def test_a_daemon_that_dies_on_a_full_disk(small: Client) -> None:
    """It starts there, knows what lives, and what ended meanwhile."""
    pod = small.pod()
    living, ending = small.start(pod, "sleep", "600"), small.start(pod, "sleep", "600")
    fill(small)
    small.call("StopContainer", container_id=ending, timeout=0)
    small.restart(signal.SIGKILL)
    assert small.exec(living, "echo", "here").stdout == b"here\n"
    assert small.status(ending).state == pb.CONTAINER_EXITED
    small.remove_pod(pod)
    assert small.pods() == []
    unfill(small)
    small.remove_pod(small.pod())
