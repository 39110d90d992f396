"""The daemon ends, by SIGTERM or SIGKILL, while containers run; the next one knows them all."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from crio_native import __version__
from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli import busybox
from crio_native.errors import NotFound
from crio_native.monitor.client import Connection

from .conftest import Client, log_text, refused

pytestmark = pytest.mark.root
COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_containers_go_on(fresh: Client, number: int) -> None:
    pod = fresh.pod(namespaces={"pid": pb.POD}, labels={"a": "b"})
    counter = fresh.start(pod, "sh", "-c", COUNT)
    ending = fresh.start(pod, "sh", "-c", "while [ ! -e /dev/shm/end ]; do sleep 0.02; done; exit 42")
    created = fresh.create(pod, "sh", "-c", "echo late")
    ended = fresh.start(pod, "sh", "-c", "exit 5")
    fresh.ended(ended)
    before = {c: fresh.status(c) for c in (counter, created, ended)}
    before_pod = fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status
    ending_pid = json.loads(fresh.call("ContainerStatus", container_id=ending, verbose=True).info["info"])["pid"]
    log = Path(before[counter].log_path)
    code = fresh.stop_daemon(number)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    size = log.stat().st_size
    fresh.until(lambda: log.stat().st_size > size + 50)
    shm = fresh.daemon.directory / "run" / "sandboxes" / pod / "shm" / "end"
    shm.touch()
    fresh.until(lambda: not alive(ending_pid))

    fresh.start_daemon()
    assert fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status == before_pod
    for container, status in before.items():
        assert fresh.status(container) == status
    assert fresh.ended(ending).exit_code == 42
    assert fresh.exec(counter, "echo", "alive").stdout == b"alive\n"
    fresh.call("StartContainer", container_id=created)
    assert log_text(fresh.ended(created).log_path) == "late\n"
    numbers = [int(line) for line in log_text(str(log)).split()]
    assert numbers == list(range(len(numbers))), "a line was lost"
    fresh.call("StopContainer", container_id=counter, timeout=0)
    assert fresh.status(counter).exit_code == 137


def test_the_end_of_the_pause_process_is_noticed_after_a_restart(fresh: Client) -> None:
    pod = fresh.pod(namespaces={"pid": pb.POD})
    fresh.restart()
    info = fresh.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True).info["info"]
    os.kill(json.loads(info)["pid"], signal.SIGKILL)

    def state() -> bool:
        return bool(fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status.state == pb.SANDBOX_NOTREADY)

    fresh.until(state)


def test_a_monitor_that_was_killed(fresh: Client) -> None:
    """While the daemon runs, and while it does not: the container is not left running unwatched."""
    pod = fresh.pod()
    one, two = fresh.start(pod, "sleep", "600"), fresh.start(pod, "sleep", "600")

    def info(container: str) -> dict[str, int]:
        answer = fresh.call("ContainerStatus", container_id=container, verbose=True)
        return dict(json.loads(answer.info["info"])["state"])

    first, second = info(one), info(two)
    os.kill(first["monitorPid"], signal.SIGKILL)
    status = fresh.ended(one)
    assert (status.exit_code, status.reason) == (137, "ContainerStatusUnknown")
    fresh.stop_daemon(signal.SIGKILL)
    os.kill(second["monitorPid"], signal.SIGKILL)
    fresh.start_daemon()
    status = fresh.ended(two)
    assert status.exit_code == 137 and "monitor" in status.message
    for pid in (first["pid"], second["pid"]):
        assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def reboot(client: Client) -> None:
    """What a reboot leaves: the root directory without the run directory, and no process, mount or namespace."""
    import shutil

    from crio_native.cli.scratch import mounts_below
    from crio_native.linux import mounts, syscalls
    from crio_native.linux.cgroup import Cgroup
    from crio_native.network import PodNetwork

    run, state = client.daemon.directory / "run", client.daemon.network_state
    client.stop_daemon()
    Cgroup(client.daemon.cgroup_parent).kill()
    kill_helpers(client.daemon.directory)
    client.until(lambda: not any(has_monitor(run_dir) for run_dir in run.glob("containers/*")))
    PodNetwork.from_directory(network_dir=client.daemon.directory / "net.d", state_dir=state).collect([])
    for target in reversed(mounts_below(client.daemon.directory)):
        syscalls.umount2(target, mounts.MNT_DETACH)
    shutil.rmtree(run)


def kill_helpers(directory: Path) -> None:
    """Shims, and the monitors of their containers, which wait for a daemon: what works in, or names, the directory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            where, line = os.readlink(process / "cwd"), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if where.startswith(f"{directory}/") or (b"\0remote\0" in line and os.fsencode(directory) in line):
            os.kill(int(process.name), signal.SIGKILL)


def has_monitor(run_dir: Path) -> bool:
    try:
        Connection.connect(run_dir).close()
    except NotFound:
        return False
    return True


def set_option(client: Client, text: str) -> None:
    (client.daemon.directory / "crio.conf.d/50-test.conf").write_text(text)


def test_after_a_reboot_pods_are_known_as_stopped(fresh: Client) -> None:
    set_option(fresh, "[crio]\ninternal_wipe = false\n")
    pod = fresh.pod(namespaces={"pid": pb.POD})
    container = fresh.start(pod, "sleep", "600")
    created = fresh.create(pod, "true")
    reboot(fresh)
    fresh.start_daemon()
    answer = fresh.call("PodSandboxStatus", pod_sandbox_id=pod).status
    assert answer.state == pb.SANDBOX_NOTREADY
    for each in (container, created):
        status = fresh.status(each)
        assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 137, "ContainerStatusUnknown")
        assert status.finished_at > 0 and "rebooted" in status.message
    assert list(fresh.daemon.network_state.glob("pods/*")) == []
    other = fresh.pod()
    fresh.remove_pod(other)
    fresh.remove_pod(pod)
    assert fresh.pods() == []


def test_after_a_reboot_pods_are_wiped(fresh: Client) -> None:
    """As CRI-O's internal_wipe has it, by the version file; images stay."""
    config = fresh.pod_config("wiped")
    pod = fresh.pod(config)
    fresh.start(pod, "sleep", "600")
    reboot(fresh)
    fresh.start_daemon()
    log = fresh.daemon.log.read_text()
    assert f"pod {pod} is not ready any more: the node was rebooted" in log
    assert "removed 1 pods with their containers: the node was rebooted" in log
    assert fresh.pods() == [] and fresh.containers() == []
    assert (fresh.daemon.directory / "run/version").read_text().strip('"')[0].isdigit()
    assert len(fresh.call("ListImages").images) == 1
    assert list((fresh.daemon.directory / "root/containers").iterdir()) == []
    fresh.remove_pod(fresh.pod(config))


def test_a_lost_version_file_costs_no_pod_that_lives(fresh: Client) -> None:
    pod = fresh.pod()
    container = fresh.start(pod, "sleep", "600")
    fresh.stop_daemon()
    (fresh.daemon.directory / "run/version").unlink()
    fresh.start_daemon()
    assert fresh.exec(container, "echo", "here").stdout == b"here\n"


@pytest.mark.parametrize(("version", "left"), [("0.0.9", 1), ("999.0.0", 2), ("no version", 2)])
def test_an_upgrade_removes_the_images_that_nobody_uses(fresh: Client, version: str, left: int) -> None:
    persist = fresh.daemon.directory / "root/version"
    set_option(fresh, f'[crio]\nversion_file_persist = "{persist}"\n')
    other = busybox.build_layout(fresh.daemon.directory / "other", "other", command=("true",))
    fresh.call("PullImage", image=pb.ImageSpec(image=other))
    fresh.start(fresh.pod(), "sleep", "600")
    fresh.stop_daemon()
    persist.write_text(version)
    fresh.start_daemon()
    assert len(fresh.call("ListImages").images) == left
    told = "removed 1 images that no container stands on: the last run was of an older version"
    assert (told in fresh.daemon.log.read_text()) == (left == 1)
    assert json.loads(persist.read_text()) == __version__


def test_the_clean_shutdown_file_is_there_only_after_an_orderly_stop(fresh: Client) -> None:
    marker = fresh.daemon.directory / "root/clean.shutdown"
    assert not marker.exists()
    fresh.stop_daemon()
    assert marker.exists()
    fresh.start_daemon()
    assert not marker.exists()
    fresh.stop_daemon(signal.SIGKILL)
    assert not marker.exists()
    fresh.start_daemon()


def verb(client: Client, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a verb of crio-native with the daemon's configuration."""
    directory = client.daemon.directory
    program = Path(sys.executable).with_name("crio-native")
    command = [str(program), "--config", f"{directory}/crio.conf", "--config-dir", f"{directory}/crio.conf.d", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_verb_wipe(fresh: Client) -> None:
    set_option(fresh, "[crio]\ninternal_wipe = false\n")
    fresh.start(fresh.pod(), "sleep", "600")
    done = verb(fresh, "wipe")
    assert done.returncode == 1 and "another daemon uses" in done.stderr
    fresh.stop_daemon()
    assert verb(fresh, "wipe").stdout == "removed 0 pods and 0 images\n"
    fresh.start_daemon()
    reboot(fresh)
    assert verb(fresh, "wipe").stdout == "removed 1 pods and 0 images\n"
    fresh.start_daemon()
    assert fresh.pods() == []
    fresh.start(fresh.pod(), "sleep", "600")
    fresh.stop_daemon()
    assert verb(fresh, "wipe", "--force").stdout == "removed 1 pods and 1 images\n"
    fresh.start_daemon()
    assert fresh.pods() == [] and list(fresh.call("ListImages").images) == []


def test_a_start_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    """Whatever it fails at: the handler, the socket that another daemon has, a directory that cannot be made."""
    root, run = tmp_path / "a/root", tmp_path / "b/c/run"
    program = Path(sys.executable).with_name("crio-native")
    (tmp_path / "file").touch()
    base = {"root": root, "runroot": run, "listen": tmp_path / "x.sock", "version-file": run / "version"}
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "taken.sock"))
        taken.listen()
        for change, words in (
            ({"listen": tmp_path / "taken.sock"}, "taken.sock"),
            ({"runroot": tmp_path / "file/run"}, "file/run"),
            ({"default-runtime": "none"}, "none"),
            ({"imagestore": tmp_path / "file/images"}, "file"),
        ):
            flags = [f"--{name}={value}" for name, value in {**base, **change}.items()]
            done = subprocess.run([program, *flags], capture_output=True, text=True, timeout=60)
            assert done.returncode == 1 and words in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
            assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists(), change


def test_another_daemon_on_the_same_runroot(fresh: Client, tmp_path: Path) -> None:
    container = fresh.start(fresh.pod(), "sleep", "600")
    done = verb(fresh, f"--root={tmp_path}/root", f"--listen={tmp_path}/x.sock", "serve")
    assert done.returncode == 1 and f"uses the state directory {fresh.daemon.directory}/run" in done.stderr
    assert "set --root, --runroot and --listen" in done.stderr
    assert fresh.exec(container, "echo", "here").stdout == b"here\n"


@pytest.mark.parametrize("name", ["root", "runroot", "namespaces_dir"])
def test_pods_that_run_keep_their_directories(fresh: Client, tmp_path: Path, name: str) -> None:
    pod = fresh.pod()
    container = fresh.start(pod, "sleep", "600")
    fresh.stop_daemon()
    flag = f"--{name.replace('_', '-')}"
    old = fresh.daemon.directory / ("root" if name == "root" else "run")
    for act in (["serve"], ["wipe", "--force"]):
        done = verb(fresh, f"{flag}={tmp_path}/new", *act)
        assert done.returncode == 1, done
        assert f"{name} is {tmp_path}/new, but pods that run here use {old}" in done.stderr
        assert f"crio-native {flag}={old} wipe --force" in done.stderr
    fresh.start_daemon()
    assert fresh.exec(container, "echo", "here").stdout == b"here\n"

    fresh.call("StopPodSandbox", pod_sandbox_id=pod)
    fresh.stop_daemon()
    table = "crio.runtime" if name == "namespaces_dir" else "crio"
    set_option(fresh, f'[{table}]\n{name} = "{tmp_path}/new"\n')
    fresh.start_daemon()
    assert list((fresh.daemon.directory / "run/containers").iterdir()) == [] or name == "namespaces_dir"
    fresh.remove_pod(fresh.pod())
    fresh.call("RemovePodSandbox", pod_sandbox_id=pod)


def test_a_daemon_that_cannot_serve_removes_nothing(fresh: Client) -> None:
    container = fresh.start(fresh.pod(), "sleep", "600")
    info = fresh.call("ContainerStatus", container_id=container, verbose=True).info["info"]
    fresh.stop_daemon()
    (fresh.daemon.directory / "root/state.db").unlink()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(fresh.daemon.socket))
        taken.listen()
        done = verb(fresh, "serve")
    assert done.returncode == 1 and "already listening" in done.stderr
    assert alive(json.loads(info)["pid"])
    fresh.start_daemon()
    assert not alive(json.loads(info)["pid"])


def test_a_damaged_database_is_set_aside(fresh: Client) -> None:
    """Nothing of it can be read: what it knew is removed, and the daemon serves."""
    pod = fresh.pod(namespaces={"pid": pb.POD})
    container = fresh.start(pod, "sleep", "600")
    assert cgroups(fresh, pod) and cgroups(fresh, container)
    fresh.stop_daemon()
    root = fresh.daemon.directory / "root"
    text = b"not a database, but a text of some length" * 100
    (root / "state.db").write_bytes(text)
    for suffix in ("-wal", "-shm"):
        (root / f"state.db{suffix}").unlink(missing_ok=True)
    fresh.start_daemon()
    (kept,) = (root / "damaged").iterdir()
    assert kept.read_bytes() == text and str(kept) in fresh.daemon.log.read_text()
    assert fresh.pods() == [] and not (fresh.daemon.directory / "run/netns" / pod).exists()
    assert cgroups(fresh) == []
    fresh.remove_pod(fresh.pod())


def cgroups(cri: Client, name: str = "") -> list[Path]:
    """The groups of an object of the daemon's, or of all, in every hierarchy."""
    parent = cri.daemon.cgroup_parent.lstrip("/")
    top = Path("/sys/fs/cgroup")
    return [*top.glob(f"{parent}/crio-{name}*"), *top.glob(f"*/{parent}/crio-{name}*")]


def test_a_damaged_record_costs_its_own_object_only(fresh: Client) -> None:
    """With it go its control groups, the pause process's too, and the exit code of what had ended."""
    pods = [fresh.pod(namespaces={"pid": pb.POD}) for _ in range(3)]
    containers = [fresh.start(pod, "sleep", "600") for pod in pods]
    ended = fresh.start(pods[1], "false")
    exits = fresh.daemon.directory / "run/exits"
    fresh.until((exits / ended).exists)
    lonely = fresh.start(pods[2], "sleep", "600")
    pids = [json.loads(fresh.call("ContainerStatus", container_id=c, verbose=True).info["info"])["pid"] for c in
            (containers[1], lonely)]  # fmt: skip
    fresh.stop_daemon(signal.SIGKILL)
    root = fresh.daemon.directory / "root"
    with sqlite3.connect(root / "state.db") as database:
        database.execute("UPDATE pods SET record = substr(record, 1, 100) WHERE id = ?", (pods[1],))
        database.execute("UPDATE containers SET record = '?' WHERE id = ?", (lonely,))
    database.close()
    fresh.start_daemon()
    assert {pod.id for pod in fresh.pods()} == {pods[0], pods[2]}
    assert {c.id for c in fresh.containers()} == {containers[0], containers[2]}
    assert fresh.exec(containers[2], "echo", "here").stdout == b"here\n"
    log = fresh.daemon.log.read_text()
    assert list(exits.iterdir()) == []
    for gone in (pods[1], containers[1], lonely, ended):
        assert not cgroups(fresh, gone)
        assert f"{gone}.json" in log
        assert not (fresh.daemon.directory / "run/containers" / gone).exists()
    assert cgroups(fresh, pods[0]) and cgroups(fresh, containers[2])
    assert len(list((root / "damaged").iterdir())) == 4
    fresh.until(lambda: not any(map(alive, pids)))


def test_a_config_json_that_is_cut_off(fresh: Client) -> None:
    """The container goes on, is stopped and removed; only what needs the file says so, and names it."""
    pod = fresh.pod()
    container, other = fresh.start(pod, "sleep", "600"), fresh.start(pod, "sleep", "600")
    config = fresh.daemon.directory / "root/containers" / container / "config.json"
    config.write_text(config.read_text()[:200])
    fresh.restart(signal.SIGKILL)
    with refused(grpc.StatusCode.INTERNAL, str(config), "damaged"):
        fresh.exec(container, "true")
    assert fresh.exec(other, "echo", "here").stdout == b"here\n"
    assert fresh.call("ContainerStatus", container_id=container, verbose=True).status.state == pb.CONTAINER_RUNNING
    fresh.call("StopContainer", container_id=container, timeout=0)
    fresh.call("RemoveContainer", container_id=container)
    assert [c.id for c in fresh.containers()] == [other]


def test_a_lost_database_leaves_no_containers(fresh: Client) -> None:
    """Whatever else of them is damaged: the control groups are known by their names."""
    pod = fresh.pod(namespaces={"pid": pb.POD})
    container = fresh.start(pod, "sleep", "600")
    fresh.stop_daemon()
    for path in (fresh.daemon.directory / "root").glob("state.db*"):
        path.unlink()
    config = fresh.daemon.directory / "root/containers" / container / "config.json"
    config.write_text('{"linux": {"cgroupsPath": "/"}}')
    fresh.start_daemon()
    assert fresh.pods() == [] and cgroups(fresh) == []
    run, root = fresh.daemon.directory / "run", fresh.daemon.directory / "root"
    assert not (run / "containers" / container).exists() and not (root / "containers" / container).exists()
    assert not (run / "netns" / pod).exists()
    with refused(grpc.StatusCode.NOT_FOUND):
        fresh.status(container)
