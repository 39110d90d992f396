"""Images by the CRI: what a kubelet's PullImage brings, artifacts as volumes, progress, and our own words beside it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..images_support import BASE, HostileRegistry, Picture, picture, reply, sha256
from ..images_support import hostile as hostile
from ..linux.test_images_formats import artifact
from .conftest import Client, refused
from .images import variant

pytestmark = pytest.mark.root


def pull(cri: Client, name: str, **fields: Any) -> str:
    return str(cri.call("PullImage", image=pb.ImageSpec(image=name), **fields).image_ref)


def test_an_artifact_is_mounted_as_a_volume(cri: Client, hostile: HostileRegistry) -> None:
    made, _ = artifact(("weights/model.bin", b"numbers"), ("README", b"words"))
    image = pb.ImageSpec(image=pull(cri, hostile.serve("model", made)))
    mount = pb.Mount(container_path="/model", image=image, readonly=True)
    command = "cat /model/weights/model.bin /model/README; touch /model/x 2>/dev/null || echo :refused"
    assert cri.run("sh", "-c", command, mounts=[mount]) == (0, "numberswords:refused\n")


def test_an_image_is_the_same_by_all_its_names(cri: Client, hostile: HostileRegistry) -> None:
    """A kubelet asks by tag, by digest and by ID, and compares what it hears."""
    made = pull(cri, hostile.serve("app", picture(BASE)))
    by_id = cri.call("ImageStatus", image=pb.ImageSpec(image=made)).image
    assert by_id.repo_tags and by_id.repo_digests
    for name in (*by_id.repo_tags, *by_id.repo_digests):
        assert cri.call("ImageStatus", image=pb.ImageSpec(image=name)).image == by_id, name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"WorkingDir": "relative"}, "the image's WorkingDir must be an absolute path (got 'relative')"),
        ({"WorkingDir": "/etc/passwd"}, "step 'make_working_directory' failed on /etc/passwd"),
        ({"Env": ["A=b", "=bar"]}, "the image's Env[1] must be NAME=VALUE (got '=bar')"),
        ({"Env": ["A=" + "b" * 140000]}, "has 140002 bytes; execve takes at most 131071 a string"),
    ],
)
def test_what_is_wrong_with_an_image_is_told_of_the_image(cri: Client, config: dict[str, Any], words: str) -> None:
    made = variant(cri, "wrong", **config)
    try:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, f"config.image.image: {words}"):
            cri.create(cri.pod(), "true", image=made)
    finally:
        cri.call("RemoveImage", image=pb.ImageSpec(image=made))
        shutil.rmtree(cri.daemon.directory / "layout-wrong")


@pytest.mark.parametrize("digits", [18, 19, 5000])
def test_an_image_of_a_user_without_end_costs_only_itself(cri: Client, digits: int) -> None:
    """The CRI's number has 64 bits; one image that has more must not keep the kubelet from its list."""
    made = variant(cri, f"user-of-{digits}", User="9" * digits)
    try:
        (listed,) = [image for image in cri.call("ListImages").images if image.id == made]
        assert cri.call("ImageStatus", image=pb.ImageSpec(image=made)).image == listed
        assert listed.username or listed.uid.value == 10**18 - 1
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.image.image", "find_user", "outside 0..4294967294"):
            cri.create(cri.pod(), "true", image=made)
    finally:
        cri.call("RemoveImage", image=pb.ImageSpec(image=made))


@pytest.mark.parametrize(
    "auth",
    [
        pb.AuthConfig(username="me", password="pass"),
        pb.AuthConfig(auth="bWU6cGFzcw=="),
        pb.AuthConfig(auth="bWU6cGFzcw==", server_address="{address}"),
    ],
)
def test_a_kubelets_credentials_reach_the_registry(cri: Client, hostile: HostileRegistry, auth: Any) -> None:
    name = hostile.serve("app", picture(BASE))
    manifest = hostile.routes["/v2/app/manifests/latest"]

    def guarded(request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Authorization") == "Basic bWU6cGFzcw==":
            manifest(request)
        else:
            reply(401, headers={"WWW-Authenticate": 'Basic realm="x"'})(request)

    hostile.routes["/v2/app/manifests/latest"] = guarded
    auth.server_address = auth.server_address.format(address=hostile.address)
    assert pull(cri, name, auth=auth)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "no credentials for it were given"):
        pull(cri, name)


def test_credentials_that_are_none_are_refused_and_not_shown(cri: Client) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "auth.auth", "(hidden)"):
        pull(cri, "localhost/app", auth=pb.AuthConfig(auth="c2VjcmV0"))


def test_a_pull_tells_how_far_it_is(cri: Client, hostile: HostileRegistry) -> None:
    image = picture(BASE * 200, compress=False)
    name = hostile.serve("slow", image)
    blob = max(image.blobs.values(), key=len)
    enough = threading.Event()

    def slow(request: BaseHTTPRequestHandler) -> None:
        reply(200, blob[: len(blob) // 2], {"Content-Length": str(len(blob))})(request)
        request.wfile.flush()
        enough.wait(20)
        request.wfile.write(blob[len(blob) // 2 :])

    hostile.routes[f"/v2/slow/blobs/{sha256(blob)}"] = slow
    puller = threading.Thread(target=pull, args=(cri, name))
    puller.start()
    try:
        (layer,) = cri.until(lambda: progress(cri, name))
        assert layer["digest"] == sha256(blob) and layer["total"] == len(blob)
        assert 0 < layer["current"] < len(blob) and layer["stage"] == "fetch"
    finally:
        enough.set()
        puller.join()
    assert progress(cri, name) is None


def test_crioctl_draws_each_layer(cri: Client, hostile: HostileRegistry) -> None:
    """On a terminal."""
    image = picture(BASE * 150, compress=False)
    name = hostile.serve("drawn", image)
    blob = max(image.blobs.values(), key=len)

    def slow(request: BaseHTTPRequestHandler) -> None:
        reply(200, blob[:1000], {"Content-Length": str(len(blob))})(request)
        request.wfile.flush()
        time.sleep(1.5)
        request.wfile.write(blob[1000:])

    hostile.routes[f"/v2/drawn/blobs/{sha256(blob)}"] = slow
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        child = subprocess.Popen(crioctl(cri, "pull", name), stderr=theirs, stdout=subprocess.PIPE, text=True)
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # a terminal that nobody has any more
            while piece := screen.read(4096):
                drawn += piece
        out, _ = child.communicate(timeout=20)
    assert child.returncode == 0 and out.startswith("sha256:")
    assert sha256(blob)[7:19] in drawn.decode()


def test_crioctl_says_that_an_image_is_for_another_machine(cri: Client, hostile: HostileRegistry) -> None:
    """It is pulled all the same."""
    name = hostile.serve("other", picture(BASE, config={"architecture": "s390x"}))
    done = subprocess.run(crioctl(cri, "pull", name), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("sha256:")
    assert f"{name}: it is for linux/s390x, and this host is linux/" in done.stderr
    done = subprocess.run(crioctl(cri, "pull", hostile.serve("own", picture(BASE))), capture_output=True, text=True)
    assert done.returncode == 0 and "this host" not in done.stderr
    for image in cri.call("ListImages").images:
        if image.id != cri.image:
            cri.call("RemoveImage", image=pb.ImageSpec(image=image.id))


def crioctl(cri: Client, *arguments: object) -> list[str]:
    program = (sys.executable, "-m", "crio_native.cli.crioctl", "--socket", f"unix://{cri.daemon.socket}")
    return [*program, *map(str, arguments)]


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_crioctl_saves_and_loads(cri: Client, tmp_path: Path, transport: str) -> None:
    save = crioctl(cri, "save", "--format", transport, cri.image, tmp_path / "saved")
    done = subprocess.run(save, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/saved\n"), done.stderr
    done = subprocess.run(crioctl(cri, "load", tmp_path / "saved"), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.startswith("sha256:"), done.stderr
    done = subprocess.run(save, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "exists" in done.stderr
    save[-1] = f"{tmp_path}/none/x"
    done = subprocess.run(save, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and f"directory '{tmp_path}/none' not found: make it first" in done.stderr


def progress(cri: Client, name: str) -> Any:
    answer = cri.call("ImageStatus", image=pb.ImageSpec(image=name), verbose=True)
    return json.loads(answer.info["pull"]) if "pull" in answer.info else None


def test_an_image_is_saved_and_loaded_again(cri: Client, tmp_path: Path) -> None:
    assert pull(cri, f"save:oci:{tmp_path}/saved:{cri.image}") == cri.image
    loaded = pull(cri, f"oci:{tmp_path}/saved")
    status = cri.call("ImageStatus", image=pb.ImageSpec(image=loaded)).image
    assert status.id == loaded
    with refused(grpc.StatusCode.ALREADY_EXISTS, f"{tmp_path}/saved exists"):
        pull(cri, f"save:oci:{tmp_path}/saved:{cri.image}")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        pull(cri, "save:")


def test_other_calls_are_answered_during_a_pull(cri: Client, hostile: HostileRegistry) -> None:
    name = hostile.serve("large", large_picture())
    done = threading.Event()
    took: list[float] = []

    def call() -> None:
        while not done.wait(0.02):
            began = time.monotonic()
            cri.call("ListContainers")
            took.append(time.monotonic() - began)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        pull(cri, name)
    finally:
        done.set()
        caller.join()
    assert max(took) < 2  # a blocked event loop would be as long as the pull; `make bench` has the milliseconds


def large_picture() -> Picture:
    return picture(*(BASE + bytes([number]) * (8 << 20) for number in range(3)), compress=False)
