"""crioctl against a small CRI runtime over a real gRPC socket: its other commands, its exit codes, its errors."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Literal

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as api

from ..waiting import wait_for
from .crioctl_support import COMMAND, Crioctl, Result, ctl, fake, leftovers
from .fake_runtime import BUSYBOX, FakeRuntime

__all__ = ["ctl", "fake"]


# pods and containers


def test_lists_for_people_and_scripts(ctl: Crioctl, fake: FakeRuntime) -> None:
    id_ = ctl("run", "-d", "--name", "web", "busybox", "sleep", "60").out.strip()
    table = ctl("ps").out.splitlines()
    assert re.split(r"\s{2,}", table[0].strip()) == ["CONTAINER", "NAME", "IMAGE", "STATE", "AGE", "POD"]
    assert re.split(r"\s{2,}", table[1].strip())[:4] == [id_[:13], "web", "busybox", "running"]
    assert ctl("ps", "-q").out == f"{id_}\n"
    assert json.loads(ctl("ps", "-o", "json").out)["containers"][0]["state"] == "CONTAINER_RUNNING"
    assert "10.9.8.7, fd00::7" in ctl("pods").out
    (pod,) = json.loads(ctl("pods", "-o", "json").out)["items"]
    assert pod["metadata"]["name"] == "web"
    assert ctl("ps", "--pod", "web", "-q").out == f"{id_}\n"


def test_an_empty_list_is_empty(ctl: Crioctl, fake: FakeRuntime) -> None:
    assert ctl("ps", "-q").out == "" and ctl("pods", "-q").out == ""
    assert json.loads(ctl("pods", "-o", "json").out) == {"items": []}


def test_ended_containers_need_a(ctl: Crioctl, fake: FakeRuntime) -> None:
    ctl("run", "--name", "done", "busybox", "true")
    assert ctl("ps", "-q").out == ""
    assert "exited" in ctl("ps", "-a").out


@pytest.mark.parametrize("reference", ["container", "short", "name", "pod", "pod/name", "namespace/pod"])
def test_what_run_made_goes_as_a_whole_by_any_name(ctl: Crioctl, fake: FakeRuntime, reference: str) -> None:
    id_ = ctl("run", "-d", "--name", "web", "busybox", "sleep", "60").out.strip()
    (pod_id,) = fake.runtime.pods
    names = {"container": id_, "short": id_[:8], "name": "web", "pod": pod_id}
    names |= {"pod/name": "web/web", "namespace/pod": "crioctl/web"}
    refused = ctl("rm", names[reference])
    assert refused.code == 1 and "rm -f" in refused.err
    assert ctl("stop", "-t", "0", names[reference]).code == 0
    assert fake.runtime.pods[pod_id].state == api.SANDBOX_NOTREADY
    assert ctl("rm", names[reference]).code == 0
    assert fake.runtime.pods == {}


def make_pod(fake: FakeRuntime, tmp_path: Path, name: str, *containers: str) -> str:
    """A pod as a kubelet makes it, past crioctl."""
    config = api.PodSandboxConfig(
        metadata=api.PodSandboxMetadata(name=name, namespace="default", uid=name), log_directory=str(tmp_path)
    )
    pod_id = fake.runtime.RunPodSandbox(api.RunPodSandboxRequest(config=config), None).pod_sandbox_id
    for container in containers:
        spec = api.ContainerConfig(
            metadata=api.ContainerMetadata(name=container), args=["sleep", "60"], log_path=f"{container}.log"
        )
        fake.runtime.CreateContainer(
            api.CreateContainerRequest(pod_sandbox_id=pod_id, config=spec, sandbox_config=config), None
        )
    return pod_id


def test_containers_of_a_kubelets_pod_go_one_by_one(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    make_pod(fake, tmp_path, "web", "app", "proxy")
    assert ctl("start", "app").code == 0
    assert ctl("stop", "-t", "1", "web/app").code == 0
    assert ctl("rm", "app").code == 0
    assert [item.config.metadata.name for item in fake.runtime.containers.values()] == ["proxy"]
    assert len(fake.runtime.pods) == 1
    assert ctl("rm", "web").code == 0
    assert fake.runtime.containers == {} and fake.runtime.pods == {}


def test_an_ambiguous_name_lists_the_choices_and_does_nothing(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    make_pod(fake, tmp_path, "one", "app")
    make_pod(fake, tmp_path, "two", "app")
    result = ctl("rm", "-f", "app")
    assert result.code == 1
    assert "one/app" in result.err and "two/app" in result.err
    assert len(fake.runtime.containers) == 2


def test_one_failure_among_several_is_told_and_the_rest_done(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    make_pod(fake, tmp_path, "one", "a")
    make_pod(fake, tmp_path, "two", "b")
    result = ctl("rm", "one", "nothing", "two")
    assert (result.code, result.out) == (1, "one\ntwo\n")
    assert result.err.startswith("crioctl: container or pod 'nothing' not found")
    assert fake.runtime.pods == {}


def test_rm_force_kills(ctl: Crioctl, fake: FakeRuntime) -> None:
    ctl("run", "-d", "--name", "web", "busybox", "sleep", "60")
    assert ctl("rm", "-f", "web").code == 0
    assert fake.runtime.containers == {}


def test_exec_passes_output_and_exit_code_on(ctl: Crioctl, fake: FakeRuntime) -> None:
    ctl("run", "-d", "--name", "web", "busybox", "sleep", "60")
    result = ctl("exec", "--timeout", "5", "web", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.code, result.out, result.err) == (3, "out\n", "err\n")
    assert fake.runtime.asked(api.ExecSyncRequest)[0].timeout == 5


def test_inspect_finds_container_then_pod_then_image(ctl: Crioctl, fake: FakeRuntime) -> None:
    ctl("run", "-d", "--name", "web", "busybox", "sleep", "60")
    container = json.loads(ctl("inspect", "web").out)
    assert container["status"]["state"] == "CONTAINER_RUNNING"
    assert container["info"] == {"info": {"pid": 12}}
    assert json.loads(ctl("inspect", "--type", "pod", "web").out)["status"]["network"]["ip"] == "10.9.8.7"
    assert json.loads(ctl("inspect", "busybox").out)["image"]["id"] == BUSYBOX
    missing = ctl("inspect", "nothing")
    assert missing.code == 1 and "'nothing' not found" in missing.err


# logs


def test_logs_select(ctl: Crioctl, fake: FakeRuntime) -> None:
    ctl("run", "--name", "web", "busybox", "sh", "-c", "echo 1; echo 2; echo 3")
    assert ctl("logs", "--tail", "2", "web").out == "2\n3\n"
    assert ctl("logs", "--tail", "0", "web").out == ""
    assert ctl("logs", "--since", "1h", "web").out == "1\n2\n3\n"
    assert ctl("logs", "--since", "2100-01-01T00:00:00Z", "web").out == ""
    assert re.fullmatch(r"(\d{4}-\d\d-\d\dT[\d:.]+Z \d\n){3}", ctl("logs", "--timestamps", "web").out)


def test_logs_follow_ends_with_the_container(ctl: Crioctl, fake: FakeRuntime) -> None:
    script = "for i in 1 2 3 4; do echo $i; sleep 0.1; done"
    ctl("run", "-d", "--name", "web", "busybox", "sh", "-c", script)
    assert ctl("logs", "-f", "web").out == "1\n2\n3\n4\n"


def test_a_closed_pipe_ends_quietly(fake: FakeRuntime, ctl: Crioctl) -> None:
    ctl("run", "--name", "web", "busybox", "sh", "-c", "seq 4000 | sed s/$/$(printf %0500d)/")
    logs = subprocess.Popen([*COMMAND, "logs", "web"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert logs.stdout and logs.stdout.readline() == b"1" + b"0" * 500 + b"\n"
    logs.stdout.close()
    assert logs.stderr and logs.stderr.read() == b""
    assert logs.wait(10) == 1


def test_a_log_that_cannot_be_read_is_one_line(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    ctl("run", "--name", "web", "busybox", "true")
    (item,) = fake.runtime.containers.values()
    item.log = str(tmp_path)
    result = ctl("logs", "web")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1 and "directory" in result.err


@pytest.mark.parametrize("follow", [(), ("-f",)])
def test_a_log_that_is_gone_is_said(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path, follow: tuple[str, ...]) -> None:
    ctl("run", "--name", "web", "busybox", "true")
    (item,) = fake.runtime.containers.values()
    item.log = str(tmp_path / "gone")
    assert ctl("logs", *follow, "web") == Result(
        1, "", f"crioctl: log file {item.log!r} not found: somebody has removed it\n"
    )


def test_output_that_nobody_can_take_is_one_line(ctl: Crioctl, fake: FakeRuntime) -> None:
    ctl("run", "--name", "web", "busybox", "true")
    with open("/dev/full", "wb") as full:
        for arguments in (["ps", "-a"], ["--help"]):
            done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE)
            assert (done.returncode, done.stderr) == (1, b"crioctl: no space left on device\n")


# images


def test_images_and_rmi(ctl: Crioctl, fake: FakeRuntime) -> None:
    table = ctl("images").out
    assert "docker.io/library/busybox:latest" in table and "4.3 MiB" in table
    assert "\x1b" not in table, "an image's name must not reach the terminal as an escape"
    assert ctl("images", "-q").out == f"{BUSYBOX}\n"
    missing = ctl("images", "-q", "nothing")
    assert (missing.code, missing.out) == (1, "") and "'nothing' not found" in missing.err
    assert ctl("rmi", "busybox").code == 0
    missing = ctl("rmi", "busybox")
    assert missing.code == 1 and "'busybox' not found" in missing.err


def test_pull_passes_credentials(ctl: Crioctl, fake: FakeRuntime) -> None:
    result = ctl("pull", "--creds", "user:pa:ss", "registry/x:1")
    assert result.code == 0 and result.out.startswith("sha256:ccc")
    auth = fake.runtime.asked(api.PullImageRequest)[0].auth
    assert (auth.username, auth.password) == ("user", "pa:ss")


def make_tar(path: Path, *names: str, mode: Literal["w", "w:gz"] = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


def test_load_tells_the_kinds_apart(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    layout.mkdir()
    (layout / "oci-layout").write_text("{}")
    oci = make_tar(tmp_path / "oci.tar", "./index.json", "./oci-layout")
    docker = make_tar(tmp_path / "docker.tar", "manifest.json", "oci-layout")
    packed = make_tar(tmp_path / "docker.tgz", "manifest.json", mode="w:gz")
    for path in (layout, oci, docker, packed):
        assert ctl("load", path).code == 0
    assert ctl("load", "--tag", "v1", layout).code == 0
    asked = [request.image.image for request in fake.runtime.asked(api.PullImageRequest)]
    assert asked == [
        f"oci:{layout}",
        f"oci-archive:{oci}",
        f"docker-archive:{docker}",
        f"docker-archive:{packed}",
        f"oci:{layout}:v1",
    ]


def test_load_refuses_what_is_no_image(ctl: Crioctl, fake: FakeRuntime, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    cut = make_tar(tmp_path / "cut.tgz", "manifest.json", mode="w:gz")
    cut.write_bytes(cut.read_bytes()[:20])
    empty = make_tar(tmp_path / "empty.tar", "README")
    colon = make_tar(tmp_path / "a:b.tar", "manifest.json")
    for path, word in (
        (tmp_path, "oci-layout"),
        (tmp_path / "text", "cannot be read"),
        (cut, "cannot be read"),
        (empty, "neither"),
        (colon, "rename"),
    ):
        result = ctl("load", path)
        assert result.code == 1 and word in result.err and result.err.count("\n") == 1
        assert "method" not in result.err, "what each decompressor thinks of it helps nobody"
    assert ctl("load", tmp_path / "missing").code == 2
    assert fake.runtime.asked(api.PullImageRequest) == []


# the node


def test_version_info_and_stats(ctl: Crioctl, fake: FakeRuntime) -> None:
    assert "9.8.7" in ctl("version").out
    assert json.loads(ctl("version", "-o", "json").out)["runtime"]["runtimeName"] == "fake"
    table = ctl("info").out
    assert "NetworkReady" in table and "cgroupfs" in table and "recursive_read_only_mounts" in table
    assert "\x1b" not in table
    parsed = json.loads(ctl("info", "-o", "json").out)
    assert parsed["info"] == {"config": {"root": "/var/lib"}, "broken": "{"}
    ctl("run", "-d", "--name", "web", "busybox", "sleep", "60")
    row = re.split(r"\s{2,}", ctl("stats", "--interval", "0.2", "web").out.splitlines()[1].strip())
    assert row[1:] == ["web", "50.0", "3.0 MiB", "-", "-", "-"]
    assert len(json.loads(ctl("stats", "-o", "json").out)["stats"]) == 1


def test_info_of_a_runtime_older_than_runtime_config(ctl: Crioctl, fake: FakeRuntime) -> None:
    fake.runtime.fail["RuntimeConfig"] = (grpc.StatusCode.UNIMPLEMENTED, "unknown method RuntimeConfig")
    table = ctl("info")
    assert table.code == 0 and "RuntimeReady" in table.out and "cgroup driver" not in table.out
    assert json.loads(ctl("info", "-o", "json").out)["config"] is None


def test_stats_watch_repeats_until_interrupted(fake: FakeRuntime, ctl: Crioctl) -> None:
    ctl("run", "-d", "--name", "web", "busybox", "sleep", "60")
    fake.runtime.requests.clear()
    watch = subprocess.Popen([*COMMAND, "stats", "--watch", "--interval", "0.1"], stdout=subprocess.PIPE)
    wait_for(lambda: len(fake.runtime.asked(api.ListContainerStatsRequest)) > 3)
    watch.send_signal(signal.SIGINT)
    out, _ = watch.communicate(timeout=10)
    assert watch.returncode == 130 and b"web" in out


# errors


@pytest.mark.parametrize(
    ("arguments", "call"), [(["events"], "GetContainerEvents"), (["stats", "-o", "json"], "ListContainerStats")]
)
def test_a_call_the_runtime_does_not_have_is_named(
    ctl: Crioctl, fake: FakeRuntime, arguments: list[str], call: str
) -> None:
    if call == "ListContainerStats":
        fake.runtime.fail[call] = (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    result = ctl(*arguments)
    assert (result.code, result.err) == (1, f"crioctl: the runtime at {fake.path} does not implement {call}\n")


def test_what_the_runtime_cannot_do_with_a_call_is_in_its_own_words(ctl: Crioctl, fake: FakeRuntime) -> None:
    words = "config.port_mappings[0]: this version does not implement the field"
    fake.runtime.fail["RunPodSandbox"] = (grpc.StatusCode.UNIMPLEMENTED, words)
    result = ctl("run", "-p", "1:2", "busybox")
    assert result.err == f"crioctl: RunPodSandbox: {words}\n"


def test_no_daemon(ctl: Crioctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRIO_NATIVE_SOCKET", raising=False)
    for socket, word in (
        (tmp_path / "none.sock", "no such file"),
        (tmp_path / ("x" * 200), "too long"),
    ):
        result = ctl("-r", socket, "ps")
        assert result.code == 1 and word in result.err and "--socket" in result.err
        assert result.err.count("\n") == 1


def test_a_socket_that_nobody_serves(ctl: Crioctl, fake: FakeRuntime) -> None:
    fake.stop()
    fake.path.touch()
    result = ctl("ps")
    assert result.code == 1 and "refused" in result.err and "start the daemon" in result.err
    fake.path.unlink()
    fake.start()


def test_a_silent_daemon_runs_into_the_timeout(ctl: Crioctl, fake: FakeRuntime) -> None:
    fake.runtime.delays["Version"] = 1
    result = ctl("--timeout", "0.3", "version")
    assert result.code == 1 and "raise it with --timeout" in result.err


def test_control_characters_in_an_error_do_not_reach_the_terminal(ctl: Crioctl, fake: FakeRuntime) -> None:
    fake.runtime.fail["Version"] = (grpc.StatusCode.INTERNAL, "bad \x1b]0;title\x07\nsecond line")
    result = ctl("version")
    assert result.err == "crioctl: Version: bad \\x1b]0;title\\x07 second line\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run"], "IMAGE"),
        (["run", "--memory", "lots", "busybox"], "--memory"),
        (["run", "-v", "relative:/x", "busybox"], "HOST"),
        (["run", "--rm", "-d", "busybox"], "--rm"),
        (["run", "--host-pid", "--share-pid", "busybox"], "--share-pid"),
        (["run", "--name", "../up", "busybox"], "--name"),
        (["exec", "web"], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["--timeout", "nan", "ps"], "--timeout"),
        (["stats", "--interval", "nan"], "--interval"),
        (["-r", "", "ps"], "--socket"),
        (["-r", "relative.sock", "ps"], "absolute"),
        (["-r", "tcp://127.0.0.1:1", "ps"], "unix:///PATH"),
        (["run", "-it", "busybox"], "needs a terminal"),
        (["exec", "-it", "web", "sh"], "needs a terminal"),
        (["attach", "-it", "web"], "needs a terminal"),
        (["stats", "--watch", "-o", "json"], "--watch"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    ctl: Crioctl, fake: FakeRuntime, arguments: list[str], word: str
) -> None:
    result = ctl(*arguments)
    assert (result.code, result.out) == (2, "")
    assert word in result.err and result.err.count("\n") == 1 and "--help" in result.err
    assert fake.runtime.requests == []


def test_a_command_line_that_is_not_utf8_is_refused(fake: FakeRuntime, tmp_path: Path) -> None:
    done = subprocess.run([*map(os.fsencode, COMMAND), b"run", b"busybox", b"echo", b"\xff"], capture_output=True)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and done.stderr.count(b"\n") == 1
    assert fake.runtime.pods == {} and leftovers(tmp_path) == []


def test_help_needs_no_daemon(ctl: Crioctl) -> None:
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        assert ctl(*arguments).code == 0
