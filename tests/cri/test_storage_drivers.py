"""Containers of hosts whose kernel mounts no overlay for us: copies of the layers, and overlays of a program."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import ScratchDaemon, mounts_below

from .conftest import Client

pytestmark = pytest.mark.root

FUSE = shutil.which("fuse-overlayfs") or ""
SETTINGS = {
    "vfs": '[crio]\nstorage_driver = "vfs"\n',
    "fuse-overlayfs": f'[crio]\nstorage_option = ["overlay.mount_program={FUSE}"]\n',
}


@pytest.fixture(params=SETTINGS)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    if request.param == "fuse-overlayfs" and not FUSE:
        pytest.skip("fuse-overlayfs is not installed")
    daemon = ScratchDaemon(settings=SETTINGS[request.param])
    try:
        daemon.start()
        made = Client(daemon)
        made.load_image()
        yield made
        made.channel.close()
    finally:
        assert daemon.close() == []


def test_containers_have_roots_of_their_own_that_go_with_them(client: Client) -> None:
    pod = client.pod()
    before = mounts_below(client.daemon.directory)
    writer = client.start(pod, "sh", "-c", "rm /bin/ls; echo mine >/etc/mine; sleep 100")
    client.until(lambda: client.exec(writer, "cat", "/etc/mine").stdout == b"mine\n")
    assert client.run("cat", "/etc/mine", pod=pod)[0] == 1
    assert client.run("test", "-e", "/bin/ls", pod=pod)[0] == 0
    assert client.exec(writer, "test", "-e", "/bin/ls").exit_code == 1
    client.call("RemoveContainer", container_id=writer)
    for container in client.call("ListContainers").containers:
        client.call("RemoveContainer", container_id=container.id)
    assert mounts_below(client.daemon.directory) == before
    assert list((client.daemon.directory / "root/containers").glob("*")) == []


def test_a_user_namespace_is_refused(client: Client) -> None:
    ids = [pb.IDMapping(host_id=200000, container_id=0, length=65536)]
    options = pb.UserNamespace(mode=pb.POD, uids=ids, gids=ids)
    pod = client.pod(namespaces={"userns_options": options})
    with pytest.raises(grpc.RpcError) as caught:
        client.create(pod, "true")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "needs overlays of the kernel" in caught.value.details()
    assert client.call("ListContainers").containers == []
