"""CheckpointContainer: the file that it writes, and that the container in it can be made again."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import wait_for

from ..machine import Machine
from .conftest import Client, log_text, refused
from .test_http import get
from .test_images import crioctl

pytestmark = [pytest.mark.root, pytest.mark.criu]
Code = grpc.StatusCode
LOOP = "i=0; while true; do i=$((i+1)); echo $i > new; mv new count; echo said $i; sleep 0.05; done"
COUNT = f"rm /etc/group; mkdir /made; cd /made; {LOOP}"


@pytest.fixture(autouse=True, scope="module")
def first_pod(shared: Client) -> None:
    """The bridge and the parent of all groups come with it, and stay."""
    shared.remove_pod(shared.pod())


def counting(cri: Client) -> tuple[str, Path]:
    """A container, and the file on the host that it counts in."""
    container = cri.start(cri.pod(), "sh", "-c", COUNT)
    info = json.loads(cri.call("ContainerStatus", container_id=container, verbose=True).info["info"])
    count = Path(info["rootfs"]["upper"]) / "made/count"
    wait_for(lambda: count.exists() and number(count) > 3, 10, "the container counts")
    return container, count


def number(count: Path) -> int:
    return int(count.read_text())


def goes_on(count: Path) -> bool:
    before = number(count)
    time.sleep(0.3)
    return number(count) > before


def test_a_checkpoint_while_the_container_goes_on(cri: Client, tmp_path: Path) -> None:
    container, count = counting(cri)
    target = tmp_path / "saved.tar"
    cri.call("CheckpointContainer", container_id=container, location=str(target), timeout=20)
    assert goes_on(count) and cri.status(container).state == pb.CONTAINER_RUNNING
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        archive.extractall(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert {"config.dump", "spec.dump", "rootfs-diff.tar", "deleted.files", "dump.log"} <= set(os.listdir(saved))
    assert (saved / "checkpoint/inventory.img").stat().st_size
    description = json.loads((saved / "config.dump").read_text())
    assert description["id"] == container and description["rootfsImage"] == cri.image
    assert json.loads((saved / "spec.dump").read_text())["process"]["args"] == ["sh", "-c", COUNT]
    assert json.loads((saved / "deleted.files").read_text()) == ["etc/group"]
    with tarfile.open(saved / "rootfs-diff.tar") as changes:
        said = changes.extractfile("made/count")
        assert said is not None and int(said.read()) > 3


def saved_of(cri: Client, tmp_path: Path, *command: str, **fields: Any) -> Path:
    """A checkpoint's file, of a container in a pod that is gone."""
    pod = cri.pod(privileged="privileged" in str(fields))
    container = cri.start(pod, *command, **fields)
    time.sleep(0.3)
    target = tmp_path / "saved.tar"
    cri.call("CheckpointContainer", container_id=container, location=str(target))
    cri.remove_pod(pod)
    return target


def test_a_container_from_a_checkpoint(cri: Client, tmp_path: Path, leaks: Machine) -> None:
    """It goes on where it was, its memory and its files; in the namespaces of its new pod, with its log."""
    script = f"rm /etc/group; {LOOP}"
    target = saved_of(cri, tmp_path, "sh", "-c", script)
    pod = cri.pod()
    neighbour = cri.start(pod, "sleep", "60")
    container = cri.create(pod, image=str(target))
    status = cri.status(container)
    assert status.state == pb.CONTAINER_CREATED and status.image.image != str(target)
    info = json.loads(cri.call("ContainerStatus", container_id=container, verbose=True).info["info"])
    count = Path(info["rootfs"]["upper"]) / "count"
    before = number(count)
    assert before > 1 and not goes_on(count)
    cri.call("StartContainer", container_id=container)
    assert goes_on(count) and number(count) > before and cri.status(container).state == pb.CONTAINER_RUNNING
    said = log_text(status.log_path).split("\n")
    assert said[0] == f"said {before}" or said[0] == f"said {before + 1}"
    assert b"No such file" in cri.exec(container, "cat", "/etc/group").stderr
    other = json.loads(cri.call("ContainerStatus", container_id=neighbour, verbose=True).info["info"])["pid"]
    for kind in ("net", "ipc", "uts"):
        assert os.path.samestat(os.stat(f"/proc/{info['pid']}/ns/{kind}"), os.stat(f"/proc/{other}/ns/{kind}")), kind
    cri.call("StopContainer", container_id=container, timeout=1)
    assert cri.status(container).exit_code == 137
    cri.remove_pod(pod)


def test_one_that_was_never_started_can_be_removed(cri: Client, tmp_path: Path, leaks: Machine) -> None:
    target = saved_of(cri, tmp_path, "sleep", "60")
    pod = cri.pod()
    container = cri.create(pod, image=str(target))
    cri.call("RemoveContainer", container_id=container)
    cri.create(pod, image=str(target))
    cri.remove_pod(pod)


def test_a_restored_container_outlives_the_daemon(fresh: Client, tmp_path: Path) -> None:
    target = saved_of(fresh, tmp_path, "sleep", "60")
    pod = fresh.pod()
    started, created = fresh.create(pod, image=str(target)), fresh.create(pod, image=str(target))
    fresh.call("StartContainer", container_id=started)
    fresh.restart()
    assert fresh.status(started).state == pb.CONTAINER_RUNNING
    assert fresh.status(created).state == pb.CONTAINER_CREATED
    fresh.call("StartContainer", container_id=created)
    assert fresh.exec(created, "true").exit_code == 0
    fresh.remove_pod(pod)


def test_a_checkpoint_gives_no_privilege(cri: Client, tmp_path: Path, leaks: Machine) -> None:
    """The images say with which capabilities and without which filter a process goes on; whoever wrote them."""
    target = saved_of(cri, tmp_path, "sleep", "60", security={"privileged": True})
    pod = cri.pod()
    with refused(Code.PERMISSION_DENIED, "less isolated than asked"):
        cri.create(pod, image=str(target))
    assert cri.containers() == []
    cri.remove_pod(pod)


def test_another_filter_than_the_requests(cri: Client, tmp_path: Path, leaks: Machine) -> None:
    """The same one is let go on; one that was made of another profile is not."""
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    profile = tmp_path / "profile.json"
    profile.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_LOG"}]}'
    )
    other = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=str(profile))
    target = saved_of(cri, tmp_path, "sleep", "60", security={"seccomp": other})
    pod = cri.pod()
    container = cri.create(pod, image=str(target), security={"seccomp": other})
    cri.call("StartContainer", container_id=container)
    assert cri.exec(container, "true").exit_code == 0
    with refused(Code.PERMISSION_DENIED, "linux.seccomp is another filter"):
        cri.create(pod, image=str(target), security={"seccomp": default})
    assert [each.id for each in cri.containers()] == [container]
    cri.remove_pod(pod)


def rewritten(target: Path, **files: bytes | None) -> Path:
    """The same archive with other contents for some files (and those that it had not), or without them."""
    other = target.with_name("other.tar")
    with tarfile.open(target) as archive, tarfile.open(other, "w") as changed:
        for entry in archive:
            name = entry.name.rpartition("/")[2].replace(".", "_").replace("-", "_")
            content = files.get(name, b"") if name in files else None
            if name not in files:
                changed.addfile(entry, archive.extractfile(entry) if entry.isfile() else None)
            elif content is not None:
                entry.size = len(content)
                changed.addfile(entry, io.BytesIO(content))
        if files.get("deleted_files"):
            entry = tarfile.TarInfo("deleted.files")
            entry.size = len(files["deleted_files"] or b"")
            changed.addfile(entry, io.BytesIO(files["deleted_files"] or b""))
    return other


def test_what_is_no_checkpoint(cri: Client, tmp_path: Path, leaks: Machine) -> None:
    target = saved_of(cri, tmp_path, "sleep", "60")
    pod = cri.pod()
    nothing = tmp_path / "nothing"
    nothing.write_bytes(b"x" * 2000)
    files: list[tuple[Path, Any, str]] = [
        (tmp_path / "none", Code.NOT_FOUND, "no such file"),
        (tmp_path, Code.INVALID_ARGUMENT, "is no checkpoint"),
        (nothing, Code.INVALID_ARGUMENT, "is no checkpoint"),
    ]
    changes: list[tuple[dict[str, bytes | None], Any, str]] = [
        ({"config_dump": None}, Code.INVALID_ARGUMENT, "config.dump"),
        ({"config_dump": b"[]"}, Code.INVALID_ARGUMENT, "config.dump"),
        ({"config_dump": b'{"rootfsImage":"none:1"}'}, Code.FAILED_PRECONDITION, "pull it first"),
        ({"inventory_img": None}, Code.NOT_FOUND, "inventory.img"),
        ({"sizes_json": None}, Code.NOT_FOUND, "sizes.json"),
        ({"core_1_img": b"short"}, Code.INVALID_ARGUMENT, "core-1.img is damaged"),
        ({"core_1_img": b"x" * 99, "sizes_json": b'{"core-1.img": 99}'}, Code.INTERNAL, "criu restore"),
        ({"external_json": b"{"}, Code.INVALID_ARGUMENT, "external.json"),
        ({"external_json": b'{"/x": {"destination": "/none"}}'}, Code.INVALID_ARGUMENT, "/none"),
        ({"rootfs_diff_tar": b"nothing" * 99}, Code.INVALID_ARGUMENT, "rootfs-diff.tar"),
        ({"deleted_files": b'{"a": 1}'}, Code.INVALID_ARGUMENT, "deleted.files"),
        ({"deleted_files": b'["../../../../etc"]'}, Code.INVALID_ARGUMENT, ".."),
    ]

    def refuse(path: Path, code: Any, words: str) -> None:
        with refused(code, words):
            cri.create(pod, image=str(path))
        assert cri.containers() == [], words

    for path, code, words in files:
        refuse(path, code, words)
    for change, code, words in changes:
        refuse(rewritten(target, **change), code, words)
    cri.remove_pod(pod)


def test_a_pod_from_a_checkpoint(cri: Client, tmp_path: Path, leaks: Machine) -> None:
    config = cri.pod_config(hostname="saved")
    pod = cri.pod(config)
    for name in ("one", "two"):
        cri.start(pod, "sh", "-c", LOOP, name=name)
    created = cri.create(pod, "true")
    time.sleep(0.3)
    place = tmp_path / "pod"
    with refused(Code.FAILED_PRECONDITION, created, "created"):
        cri.call("CheckpointPod", pod_sandbox_id=pod, output_path=str(place), container_ids=[created])
    assert not place.exists()
    cri.call("CheckpointPod", pod_sandbox_id=pod, output_path=str(place))
    assert sorted(os.listdir(place)) == ["one.tar", "pod.json", "two.tar"] and place.stat().st_mode & 0o777 == 0o700
    with refused(Code.ALREADY_EXISTS, "output_path"):
        cri.call("CheckpointPod", pod_sandbox_id=pod, output_path=str(place))
    with refused(Code.ALREADY_EXISTS):
        cri.call("RestorePod", checkpoint_path=str(place), config=config)
    cri.remove_pod(pod)
    with refused(Code.PERMISSION_DENIED, "pod.json: config: log_directory is not given by a checkpoint"):
        cri.call("RestorePod", checkpoint_path=str(place))
    answer = cri.call("RestorePod", checkpoint_path=str(place), config=config)
    assert sorted(each.name for each in answer.restored_containers) == ["one", "two"]
    for each in answer.restored_containers:
        assert int(cri.exec(each.container_id, "cat", "/count").stdout) > 3
        assert cri.exec(each.container_id, "hostname").stdout == b"saved\n"
    assert cri.call("PodSandboxStatus", pod_sandbox_id=answer.pod_sandbox_id).status.metadata == config.metadata
    cri.remove_pod(answer.pod_sandbox_id)
    other = cri.call("RestorePod", checkpoint_path=str(place), config=cri.pod_config("other"))
    cri.remove_pod(other.pod_sandbox_id)
    (place / "two.tar").write_bytes(b"damaged")
    with refused(Code.INVALID_ARGUMENT, "two.tar"):
        cri.call("RestorePod", checkpoint_path=str(place), config=config)
    (place / "pod.json").write_text('{"config": {"nonsense": 1}}')
    with refused(Code.INVALID_ARGUMENT, "pod.json", "nonsense"):
        cri.call("RestorePod", checkpoint_path=str(place))
    (place / "pod.json").unlink()
    os.mkfifo(place / "pod.json")
    with refused(Code.INVALID_ARGUMENT, "pod.json", "must be a regular file"):
        cri.call("RestorePod", checkpoint_path=str(place))
    assert cri.pods() == [] and cri.containers() == []


def test_a_daemon_that_is_killed_meanwhile(fresh: Client, tmp_path: Path) -> None:
    """CRIU outlives it, and leaves the processes stopped; the next daemon lets them go on."""
    container, count = counting(fresh)
    for turn, delay in enumerate((0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)):
        fresh.begin("CheckpointContainer", container_id=container, location=str(tmp_path / f"{turn}.tar"))
        time.sleep(delay)
        fresh.restart(signal.SIGKILL)
        assert goes_on(count), delay
        assert not (count.parents[2] / "checkpoint").exists()
        assert fresh.exec(container, "true").exit_code == 0


def test_crioctl_checkpoint(cri: Client, tmp_path: Path) -> None:
    container, count = counting(cri)
    line = crioctl(cri, "checkpoint", container[:12], tmp_path / "saved.tar")
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/saved.tar\n"), done.stderr
    assert tarfile.is_tarfile(tmp_path / "saved.tar") and goes_on(count)
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and "exists" in done.stderr and len(done.stderr.splitlines()) == 1


def test_nothing_stays_of_one_that_fails(cri: Client, tmp_path: Path) -> None:
    container, count = counting(cri)
    there = tmp_path / "there"
    there.write_text("mine")
    with refused(Code.ALREADY_EXISTS, str(there)):
        cri.call("CheckpointContainer", container_id=container, location=str(there))
    with refused(Code.INVALID_ARGUMENT, "location", "no such file"):
        cri.call("CheckpointContainer", container_id=container, location=str(tmp_path / "no/where"))
    assert there.read_text() == "mine" and os.listdir(tmp_path) == ["there"]
    assert not (count.parents[2] / "checkpoint").exists() and goes_on(count)


def test_who_cannot_be_saved(cri: Client, tmp_path: Path) -> None:
    target = str(tmp_path / "x")
    terminal = cri.start(cri.pod(), "sleep", "60", tty=True)
    with refused(Code.FAILED_PRECONDITION, "terminal"):
        cri.call("CheckpointContainer", container_id=terminal, location=target)
    shared = cri.start(cri.pod(namespaces={"pid": pb.POD}), "sleep", "60", security={"namespace_options": POD_PIDS})
    with refused(Code.FAILED_PRECONDITION, "PID namespace"):
        cri.call("CheckpointContainer", container_id=shared, location=target)
    paused, count = counting(cri)
    assert get(cri, f"/pause/{paused}")[0] == 200
    with refused(Code.FAILED_PRECONDITION, "is paused"):
        cri.call("CheckpointContainer", container_id=paused, location=target)
    assert get(cri, f"/unpause/{paused}")[0] == 200 and goes_on(count)
    assert os.listdir(tmp_path) == []


POD_PIDS = pb.NamespaceOption(pid=pb.POD)
