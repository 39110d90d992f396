"""Volumes that are the files of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import mounts_below

from .conftest import Client, refused
from .images import variant

pytestmark = pytest.mark.root


def volume(cri: Client, **changes: Any) -> Any:
    fields = {"container_path": "/volume", "image": pb.ImageSpec(image=cri.image), "readonly": True, **changes}
    return pb.Mount(**fields)


def test_its_files_are_there_and_cannot_be_changed(cri: Client) -> None:
    script = "ls /volume/bin/busybox; touch /volume/x || echo refused; /volume/bin/busybox echo runs"
    code, output = cri.run("sh", "-c", f"exec 2>/dev/null; {script}", mounts=[volume(cri)])
    assert (code, output) == (0, "/volume/bin/busybox\nrefused\nruns\n")


def test_a_part_of_it(cri: Client) -> None:
    mounts = [
        volume(cri, image_sub_path="etc", container_path="/one"),
        volume(cri, image_sub_path="etc/passwd", container_path="/two"),
    ]
    code, output = cri.run(
        "sh", "-c", "cmp /one/passwd /etc/passwd && cmp /two /etc/passwd && echo same", mounts=mounts
    )
    assert (code, output) == (0, "same\n")


def test_its_status_tells_the_image(cri: Client) -> None:
    container = cri.create(cri.pod(), "true", mounts=[volume(cri)])
    [mount] = cri.status(container).mounts
    assert mount.image.image == cri.image and mount.image.image_ref == cri.status(container).image_id and mount.readonly


def test_in_a_user_namespace_its_owners_are_the_images(cri: Client) -> None:
    maps = [pb.IDMapping(host_id=200000, container_id=0, length=65536)]
    pod = cri.pod(namespaces={"userns_options": pb.UserNamespace(mode=pb.POD, uids=maps, gids=maps)})
    assert cri.run("stat", "-c", "%u:%g", "/volume/etc/passwd", pod=pod, mounts=[volume(cri)]) == (0, "0:0\n")


def test_nothing_of_it_stays(fresh: Client) -> None:
    pod = fresh.pod()
    container = fresh.start(pod, "sleep", "60", mounts=[volume(fresh), volume(fresh, container_path="/other")])
    where = fresh.daemon.directory / "root/containers"
    assert len(mounts_below(where)) == 2
    fresh.restart(9)
    fresh.call("RemoveContainer", container_id=container)
    assert mounts_below(where) == [] and not list(where.iterdir())
    with refused(grpc.StatusCode.NOT_FOUND, "no-such"):
        fresh.create(pod, "true", mounts=[volume(fresh), volume(fresh, image=pb.ImageSpec(image="localhost/no-such"))])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[1].image_sub_path", "not in the image"):
        fresh.create(pod, "true", mounts=[volume(fresh), volume(fresh, image_sub_path="no/such")])
    assert mounts_below(where) == [] and not list(where.iterdir())


def test_its_image_is_in_use(fresh: Client) -> None:
    other = variant(fresh, "other", Env=["OTHER=1"])
    assert other != fresh.image
    pod = fresh.pod()
    container = fresh.create(pod, "true", mounts=[volume(fresh, image=pb.ImageSpec(image=other))])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container):
        fresh.call("RemoveImage", image=pb.ImageSpec(image=other))
    fresh.call("RemoveContainer", container_id=container)
    fresh.call("RemoveImage", image=pb.ImageSpec(image=other))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"readonly": False}, ["mounts[0].readonly", "cannot be written"]),
        ({"host_path": "/tmp"}, ["mounts[0].host_path"]),
        ({"image": pb.ImageSpec()}, ["mounts[0].image.image"]),
        ({"image_sub_path": "../etc"}, ["mounts[0].image_sub_path"]),
        ({"image_sub_path": "/etc"}, ["mounts[0].image_sub_path"]),
        ({"propagation": pb.PROPAGATION_BIDIRECTIONAL}, ["mounts[0].propagation"]),
    ],
)
def test_bad_ones_are_refused(cri: Client, changes: dict[str, Any], words: list[str]) -> None:
    pod = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
        cri.create(pod, "true", mounts=[volume(cri, **changes)])


def test_a_sub_path_without_an_image(cri: Client, tmp_path: Path) -> None:
    pod = cri.pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "image_sub_path"):
        cri.create(pod, "true", mounts=[pb.Mount(container_path="/x", host_path=str(tmp_path), image_sub_path="y")])
