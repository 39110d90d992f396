"""Pods with a user namespace of their own by OCI runtimes' programs: `test_user_namespaces` with other handlers.

Debian's runc and crun are too old to tell of id-mapped mounts, so their handlers refuse such pods.  But what they have
to do themselves for a pod without mapped volumes they can: as programs that tell what newer ones tell.
"""

# ruff: noqa: F401  # tests and fixtures are found by their names here
from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from . import test_user_namespaces as users
from .conftest import Client, refused
from .external import PROGRAMS, OfHandler, prepare_host
from .test_user_namespaces import (
    test_a_shared_pid_namespace,
    test_an_ephemeral_container_in_anothers_pid_namespace,
    test_devices,
    test_root_inside_is_nobody_outside,
    test_statistics_and_a_restart_of_the_daemon,
    test_sysctls_of_the_pod,
    test_the_hosts_network,
    test_the_images_files_have_their_owners_and_no_layer_was_changed,
    test_the_namespaces_belong_to_it,
    test_the_pods_files_are_its_own,
    test_what_a_container_writes_belongs_to_its_own_ids,
)

pytestmark = pytest.mark.root
FEATURES = {
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.2.0",
    "linux": {"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": True}}},
}
NEWER = """#!/bin/sh
[ "$1" = features ] && exec echo '{features}'
exec {program} "$@"
"""
SETTINGS = """
[crio.runtime.runtimes.{name}]
runtime_path = "{path}"
runtime_root = "{{directory}}/run/{name}"
monitor_path = "{monitor}"
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: Any) -> Iterator[OfHandler]:
    prepare_host()
    directory = tmp_path_factory.mktemp("newer")
    text = ""
    for name in ("conmon", "crio-oci", "crun", "runc"):
        path = Path(PROGRAMS[name])
        if name != "crio-oci":
            path = directory / name
            path.write_text(NEWER.format(features=json.dumps(FEATURES), program=shutil.which(PROGRAMS[name])))
            path.chmod(0o755)
        text += SETTINGS.format(name=name, path=path, monitor=shutil.which("conmon") if name == "conmon" else "")
    text += '[crio.runtime.runtimes.old]\nruntime_path = "/usr/sbin/runc"\nruntime_root = "{directory}/run/old"\n'
    with OfHandler.serving(text) as client:
        client.daemon.directory.chmod(0o711)
        yield client


@pytest.fixture(scope="module", params=["crio-oci", "crun", "runc"], autouse=True)
def handler(request: Any, shared: OfHandler) -> str:
    shared.handler = request.param
    return shared.handler


@pytest.fixture
def fresh(cri: Client) -> Client:
    """What is restarted may be the shared one."""
    return cri


def test_under_conmon(cri: OfHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cri, "handler", "conmon")
    users.test_root_inside_is_nobody_outside(cri)


@pytest.mark.parametrize("program", ["crun", "conmon"])
def test_the_hosts_null_device_stays_the_hosts(cri: OfHandler, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may give its standard streams, of which one is a null device, to the container's root."""
    monkeypatch.setattr(cri, "handler", program)
    try:
        cri.start(users.user_pod(cri), "sleep", "60")
        found = os.stat("/dev/null")
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o666)
    finally:
        os.chown("/dev/null", 0, 0)


def test_volumes_of_its_own_ids(cri: OfHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our own program: it is the one here that maps them."""
    monkeypatch.setattr(cri, "handler", "crio-oci")
    users.test_a_volume_shows_its_own_ids_or_nobodys(cri, tmp_path)


def test_the_root_is_nowhere_on_the_host(cri: OfHandler) -> None:
    """It is mounted where the namespace's root can search, but for the program and the container alone."""
    pod = users.user_pod(cri)
    container = cri.start(pod, "sleep", "60")
    roots = cri.daemon.directory / "run/roots"
    assert list((roots / container).iterdir()) == []
    assert "/roots/" not in Path("/proc/self/mountinfo").read_text()
    cri.remove_pod(pod)
    assert not list(roots.iterdir())


def test_a_directory_that_hides_the_roots_is_named(cri: OfHandler) -> None:
    directory = cri.daemon.directory
    pod = users.user_pod(cri)
    directory.chmod(0o700)
    try:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "crio.runroot", str(directory), "711"):
            cri.create(pod, "true")
    finally:
        directory.chmod(0o711)
    assert not cri.containers() and not list((directory / "run/roots").iterdir())


def test_a_container_that_cannot_be_made_leaves_nothing(cri: OfHandler) -> None:
    pod = users.user_pod(cri)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "run_as_username", "find_user", "nobody-here"):
        cri.create(pod, "true", security={"run_as_username": "nobody-here"})
    assert not cri.containers() and not list((cri.daemon.directory / "run/roots").iterdir())


def test_who_can_is_told_and_who_cannot_refuses(cri: OfHandler, handler: str) -> None:
    features = {each.name: each.features for each in cri.call("Status").runtime_handlers}
    assert features[handler].user_namespaces and not features["old"].user_namespaces
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "userns_options", "'old'"):
        users.user_pod(cri, handler="old")
    assert not cri.pods()
