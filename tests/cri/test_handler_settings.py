"""[crio.runtime.runtimes.NAME]: what each key does to real pods; handlers that cannot run, or go away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.cli.scratch import mounts_below
from crio_native.errors import Unavailable

from .conftest import Client, log_text, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode

# A program that is runc, and notes what it is called with; it can be told to refuse an exec, and writes no log of that.
NOTING = """#!/bin/sh
echo "$0 $*" >> {directory}/calls
case "$*" in *" exec "*) [ -e {directory}/refuse ] && { echo "plainly: no" >&2; exit 1; };; esac
exec runc "$@"
"""

SETTINGS = """
[crio.runtime]
log_level = "debug"
[crio.runtime.runtimes.plain]
runtime_type = ""
runtime_path = "/usr/sbin/runc"
runtime_root = "{directory}/run/plain"
[crio.runtime.runtimes.runc]
runtime_root = "{directory}/run/runc"
allowed_annotations = ["io.example.", "org.exact/name", "platform-runtime-path.crio.io"]
default_annotations = { "io.example.default" = "given", "io.example.replaced" = "before" }
privileged_without_host_devices = true
container_min_memory = "64 MiB"
monitor_cgroup = "pod"
monitor_exec_cgroup = "container"
no_sync_log = true
seccomp_profile = "{profile}"
platform_runtime_paths = { "linux/other" = "{directory}/noting", "linux/none" = "/no/such/program" }
[crio.runtime.runtimes.grouped]
runtime_type = "builtin"
monitor_cgroup = "pod"
[crio.runtime.runtimes.missing]
runtime_path = "/no/such/runtime"
[crio.runtime.runtimes.nowhere]
[crio.runtime.runtimes.liar]
runtime_path = "/bin/echo"
[crio.runtime.runtimes.noshim]
runtime_type = "vm"
runtime_path = "/bin/false"
monitor_env = ["A=B"]
[crio.runtime.runtimes.heir]
inherit_default_runtime = true
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    file = tmp_path_factory.mktemp("profile") / "seccomp.json"
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["sethostname"], "action": "SCMP_ACT_LOG"}]}
    file.write_text(json.dumps(profile))
    with Client.serving(SETTINGS.replace("{profile}", str(file))) as client:
        directory = client.daemon.directory
        (directory / "noting").write_text(NOTING.replace("{directory}", str(directory)))
        (directory / "noting").chmod(0o755)
        yield client


def config_of(cri: Client, container: str) -> dict[str, Any]:
    path = cri.daemon.directory / "root/containers" / container / "config.json"
    return dict(json.loads(path.read_bytes()))


def told(cri: Client) -> dict[str, Any]:
    return dict(json.loads(cri.call("Status", verbose=True).info["handlers"]))


def test_an_empty_type_is_oci(cri: Client) -> None:
    assert told(cri)["plain"]["type"] == "oci"
    pod = cri.pod(handler="plain")
    assert cri.run("echo", "made by runc", pod=pod) == (0, "made by runc\n")


def test_the_program_is_looked_up_by_the_handlers_name(cri: Client) -> None:
    assert told(cri)["runc"]["program"].endswith("/runc")


def test_the_default_is_inherited(cri: Client) -> None:
    assert told(cri)["heir"]["type"] == "builtin"


def test_handlers_that_cannot_run_are_told(cri: Client) -> None:
    """At the start in the log, in Status, and to who asks for one; the others run."""
    problems = {name: each["problem"] for name, each in told(cri).items() if each["problem"]}
    assert set(problems) == {"missing", "nowhere", "liar", "noshim"}
    assert "step 'shim -v' failed on /bin/false: it is no shim" in problems["noshim"]
    assert "runtime_path names no file" in problems["missing"]
    assert "set runtime_path" in problems["nowhere"] and "is not JSON" in problems["liar"]
    log = cri.daemon.log.read_text()
    assert "crio.runtime.runtimes.noshim.monitor_env: has no effect with runtime_type vm: a shim runs" in log
    for name, problem in problems.items():
        assert f"handler {name} cannot run: {problem}" in log
        with refused(Code.FAILED_PRECONDITION, name, problem):
            cri.pod(handler=name)
    assert not cri.call("Status").runtime_handlers[0].name, "the default comes first"


def test_an_exec_fails_in_the_runtimes_own_words(cri: Client) -> None:
    """Also where they are in no log, but on what was to be the command's standard error."""
    pod = cri.pod(handler="runc", annotations={"platform-runtime-path.crio.io": "linux/other"})
    container = cri.start(pod, "sleep", "60")
    refuse = cri.daemon.directory / "refuse"
    refuse.touch()
    try:
        with refused(Code.INTERNAL, "noting says: nothing, it ended with code 1; plainly: no"):
            cri.exec(container, "true")
    finally:
        refuse.unlink()


def test_the_status_verb(cri: Client) -> None:
    program = Path(sys.executable).with_name("crio-native")
    line = [str(program), "status", "--socket", str(cri.daemon.socket)]
    output = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    lines = {text.split(" ")[1]: text for text in output.splitlines() if text.startswith("handler ")}
    assert set(lines) == set(told(cri))
    assert "(oci, /usr/sbin/runc): runc version" in lines["plain"]
    assert "cannot run: runtime program '/no/such/runtime' not found" in lines["missing"]
    assert lines["builtin"].startswith("handler builtin (builtin): ")


def test_annotations_that_the_runtime_may_see(cri: Client) -> None:
    """Nothing that is not allowed by its beginning, and no other value for what CRI-O's tools read (CVE-2024-3154)."""
    annotations = {
        "io.example.mine": "1",
        "io.example.replaced": "after",
        "org.exact/name": "2",
        "org.exact": "not",
        "run.oci.handler": "evil",
        "io.kubernetes.cri-o.ContainerID": "evil",
    }
    pod = cri.pod(handler="runc", annotations=annotations)
    container = cri.create(pod, "true")
    seen = config_of(cri, container)["annotations"]
    ours = {name: value for name, value in seen.items() if not name.startswith("io.kubernetes.cri-o.")}
    assert ours == {
        "io.example.default": "given",
        "io.example.mine": "1",
        "io.example.replaced": "after",
        "org.exact/name": "2",
    }
    assert seen["io.kubernetes.cri-o.ContainerID"] == container
    bare = cri.create(cri.pod(annotations=annotations), "true")
    assert not [name for name in config_of(cri, bare)["annotations"] if not name.startswith("io.kubernetes.cri-o.")]


def test_limits_devices_and_profile_of_the_handler(cri: Client) -> None:
    pod = cri.pod(handler="runc", privileged=True)
    with refused(Code.INVALID_ARGUMENT, "memory_limit_in_bytes"):
        cri.create(pod, "true", resources={"memory_limit_in_bytes": 63 << 20})
    privileged = cri.create(pod, "true", security={"privileged": True})
    assert "/dev/kmsg" not in {device["path"] for device in config_of(cri, privileged)["linux"]["devices"]}
    default = {"seccomp": pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)}
    plain = cri.create(pod, "true", resources={"memory_limit_in_bytes": 64 << 20}, security=default)
    assert config_of(cri, plain)["linux"]["seccomp"]["syscalls"][0]["names"] == ["sethostname"]


@pytest.mark.parametrize("handler", ["runc", "grouped"])
def test_monitors_and_execs_in_the_pods_cgroups(cri: Client, handler: str) -> None:
    pod = cri.pod(handler=handler)
    container = cri.start(pod, "sleep", "600")
    parent = cri.daemon.cgroup_parent
    [members] = Path("/sys/fs/cgroup").glob(f"pids{parent}/crio-conmon-{container}/cgroup.procs")
    assert len(members.read_text().split()) == 1
    assert cri.exec(container, "echo", "here").stdout == b"here\n"
    cri.remove_pod(pod)
    assert not list(Path("/sys/fs/cgroup").glob(f"*{parent}/crio-*"))


def test_the_program_of_another_platform(cri: Client) -> None:
    calls = cri.daemon.directory / "calls"
    pod = cri.pod(handler="runc", annotations={"platform-runtime-path.crio.io": "linux/other"})
    container = cri.start(pod, "sleep", "600")
    assert f"create --bundle {cri.daemon.directory}/root/containers/{container}" in calls.read_text()
    cri.call("StopContainer", container_id=container, timeout=0)
    assert f"kill {container} 9" in calls.read_text()
    with refused(Code.INVALID_ARGUMENT, "linux/strange", "linux/none, linux/other"):
        cri.pod(handler="runc", annotations={"platform-runtime-path.crio.io": "linux/strange"})
    with refused(Code.FAILED_PRECONDITION, "/no/such/program"):
        cri.pod(handler="runc", annotations={"platform-runtime-path.crio.io": "linux/none"})
    cri.create(cri.pod(handler="plain", annotations={"platform-runtime-path.crio.io": "linux/other"}), "true")
    assert "run/plain" not in calls.read_text(), "it is not allowed to that handler"


def test_a_user_namespace_needs_a_handler_that_can(cri: Client) -> None:
    mapping = pb.IDMapping(host_id=100000, container_id=0, length=65536)
    options = pb.UserNamespace(mode=pb.POD, uids=[mapping], gids=[mapping])
    with refused(Code.FAILED_PRECONDITION, "userns_options", "'runc'", "builtin"):
        cri.pod(handler="runc", namespaces={"userns_options": options})


def test_pods_of_all_handlers_side_by_side(cri: Client) -> None:
    """Also a container of runc in the PID namespace that the pod's pause process holds."""
    pods = {name: cri.pod(handler=name, namespaces={"pid": pb.POD}) for name in ("builtin", "runc", "plain")}
    for name, pod in pods.items():
        first = cri.start(pod, "sleep", "600")
        code, output = cri.run("ps", pod=pod)
        assert code == 0 and "sleep 600" in output and "pause" in output, name
        assert cri.status(first).state == pb.CONTAINER_RUNNING
    assert {p.runtime_handler for p in cri.pods()} == set(pods)


def test_a_handler_that_is_removed_or_changed_while_its_pods_live(fresh: Client) -> None:
    """They are managed as they were made; new ones are refused."""
    drop_in = fresh.daemon.directory / "crio.conf.d/20-handlers.conf"
    text = '[crio.runtime.runtimes.{name}]\nruntime_path = "{path}"\nruntime_root = "{directory}/run/state-{name}"\n'

    def configure(**handlers: str) -> None:
        directory = fresh.daemon.directory
        drop_in.write_text("".join(text.format(name=n, path=p, directory=directory) for n, p in handlers.items()))

    configure(gone="/usr/sbin/runc", changed="/usr/sbin/runc")
    fresh.restart()
    pods = {name: fresh.pod(handler=name) for name in ("gone", "changed")}
    containers = {name: fresh.start(pod, "sh", "-c", "echo here; sleep 600") for name, pod in pods.items()}
    configure(changed="/no/such/program")
    fresh.restart(signal.SIGKILL)
    for name, container in containers.items():
        assert fresh.status(container).state == pb.CONTAINER_RUNNING
        assert fresh.exec(container, "echo", name).stdout.decode() == f"{name}\n"
        fresh.call("UpdateContainerResources", container_id=container, linux={"cpu_shares": 512})
        fresh.call("StopContainer", container_id=container, timeout=0)
        assert fresh.status(container).exit_code == 137
        assert log_text(fresh.status(container).log_path) == "here\n"
    with refused(Code.INVALID_ARGUMENT, "no such handler"):
        fresh.pod(handler="gone")
    with refused(Code.INVALID_ARGUMENT, "no such handler"):
        fresh.create(pods["gone"], "true")
    for name, pod in pods.items():
        fresh.remove_pod(pod)
        assert list((fresh.daemon.directory / f"run/state-{name}").iterdir()) == []
    assert mounts_below(fresh.daemon.directory) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('default_runtime = "x"\n[crio.runtime.runtimes.x]\nruntime_path = "/no/such"', "'x' cannot run"),
        ('default_runtime = "x"\n[crio.runtime.runtimes.x]\nruntime_path = "/bin/true"', "is not JSON"),
        ('[crio.runtime.runtimes.x]\nruntime_type = "pod"', 'use "builtin", which needs no conmon-rs'),
    ],
)
def test_a_start_that_is_refused(settings: str, said: str) -> None:
    with pytest.raises(Unavailable) as caught:
        Client.started(f"[crio.runtime]\n{settings}\n")
    assert said in caught.value.__notes__[0]


def test_what_has_no_effect_is_told() -> None:
    with Client.serving(
        "[crio.runtime.runtimes.runc]\nstream_websockets = true\nruntime_pull_image = true\n"
    ) as client:
        text = client.daemon.log.read_text()
        assert "runtimes.runc.stream_websockets: True has no effect: only conmon-rs" in text
        assert "runtimes.runc.runtime_pull_image: True has no effect: the daemon pulls" in text


def test_logs_are_flushed_unless_told_otherwise(cri: Client) -> None:
    for handler, flushed in (("plain", True), ("runc", False)):
        container = cri.start(cri.pod(handler=handler), "sleep", "600")
        answer = cri.call("ContainerStatus", container_id=container, verbose=True)
        pid = json.loads(answer.info["info"])["pid"]
        parent = next(
            line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid")
        )
        assert (b"--sync-log" in Path(f"/proc/{parent}/cmdline").read_bytes()) == flushed
        assert os.readlink(f"/proc/{parent}/exe").endswith("crio-monitor")


def test_a_daemon_that_is_killed_while_a_runtime_hangs(fresh: Client) -> None:
    """Nobody wants the container any more: the runtime goes at once, the rest with the next start."""
    directory = fresh.daemon.directory
    program = directory / "hanging"
    hangs = f'[ "$w" = create ] && {{ touch {directory}/here; sleep 600; }}'
    program.write_text(f'#!/bin/sh\nfor w in "$@"; do {hangs}; done\nexec runc "$@"\n')
    program.chmod(0o755)
    (directory / "crio.conf.d/20-handlers.conf").write_text(
        f'[crio.runtime.runtimes.hanging]\nruntime_path = "{program}"\nruntime_root = "{directory}/run/hanging"\n'
    )
    fresh.restart()
    pod = fresh.pod(handler="hanging")
    request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=fresh.container_config("true"))
    call = fresh.runtime.CreateContainer.future(request, timeout=30)
    fresh.until((directory / "here").exists)
    fresh.stop_daemon(signal.SIGKILL)
    assert call.code() is Code.UNAVAILABLE
    fresh.until(lambda: not _running(str(program)))
    fresh.start_daemon()
    assert fresh.containers() == []
    assert [path for path in mounts_below(directory) if path.endswith("/rootfs")] == []
    fresh.remove_pod(pod)


def _running(program: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(path)] if program.encode() in path.read_bytes() else []
        except OSError:
            pass  # it has just ended
    return found


UNDER_CONMON = """
[crio.runtime]
default_runtime = "runc"
conmon = "/usr/bin/conmon"
conmon_cgroup = "pod"
conmon_env = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
container_exits_dir = "{directory}/run/exits"
container_attach_socket_dir = "{directory}/run/attach"
[crio.runtime.runtimes.runc]
runtime_path = "/usr/sbin/runc"
runtime_type = "oci"
runtime_root = "{directory}/run/runc"
"""


def test_an_example_for_crio_means_what_it_says() -> None:
    """The deprecated key too: conmon is the monitor of every handler of runtime_type oci."""
    with Client.serving(UNDER_CONMON) as client:
        container = client.start(client.pod(), "sh", "-c", "echo out; sleep 600")
        conmon = (client.daemon.directory / "run/containers" / container / "conmon-pidfile").read_text().strip()
        assert os.readlink(f"/proc/{conmon}/exe") == "/usr/bin/conmon"
        assert f"/crio-conmon-{container}" in Path(f"/proc/{conmon}/cgroup").read_text()
        client.restart(signal.SIGKILL)
        client.call("StopContainer", container_id=container, timeout=0)
        status = client.status(container)
        assert (status.exit_code, log_text(status.log_path)) == (137, "out\n")


def test_the_group_of_a_monitor_goes_with_a_container_whose_record_is_damaged() -> None:
    """Also when the handler's settings do not tell of it any more."""
    with Client.serving(UNDER_CONMON) as client:
        container = client.start(client.pod(), "sleep", "600")
        client.stop_daemon(signal.SIGKILL)
        with contextlib.closing(sqlite3.connect(client.daemon.directory / "root/state.db")) as database, database:
            database.execute("UPDATE containers SET record = '?' WHERE id = ?", (container,))
        settings = client.daemon.directory / "crio.conf.d/10-settings.conf"
        settings.write_text(settings.read_text().replace('conmon_cgroup = "pod"', ""))
        groups = f"*{client.daemon.cgroup_parent}/crio-conmon-{container}"
        assert list(Path("/sys/fs/cgroup").glob(groups))
        client.start_daemon()
        assert not list(Path("/sys/fs/cgroup").glob(groups))
        assert not client.containers()
