"""Each bad input gets a status code and a message that names the field or the step, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from crio_native.api.runtime.v1 import api_pb2 as pb

from ..machine import assert_machine_unchanged, machine_state
from .conftest import Client, can_connect, refused

pytestmark = pytest.mark.root
Code = grpc.StatusCode
INVALID = Code.INVALID_ARGUMENT


def tracked(cri: Client) -> Any:
    return machine_state(cri.daemon.directory.name), {str(p) for p in directories(cri)}


def directories(cri: Client) -> list[Path]:
    root, run = cri.daemon.directory / "root", cri.daemon.directory / "run"
    places = [root / "containers", root / "sandboxes", run / "containers", run / "sandboxes"]
    places += [run / "exits", *(run / f"{kind}ns" for kind in ("net", "ipc", "uts"))]
    return [path for place in places if place.exists() for path in place.iterdir()]


def assert_nothing_new(cri: Client, before: Any) -> None:
    state, paths = before
    named = {what: names for what, names in state.items() if what not in ("processes", "descriptors")}
    after = machine_state(cri.daemon.directory.name)
    assert {what: after[what] - names for what, names in named.items() if after[what] - names} == {}
    assert {str(p) for p in directories(cri)} == paths


PODS = [
    ({"metadata": pb.PodSandboxMetadata(uid="u", namespace="n")}, "config.metadata.name"),
    ({"metadata": pb.PodSandboxMetadata(name="a/b", uid="u", namespace="n")}, "config.metadata.name"),
    ({"metadata": pb.PodSandboxMetadata(name="a", uid="u\n", namespace="n")}, "config.metadata.uid"),
    ({"hostname": "a b"}, "config.hostname"),
    ({"hostname": "a\nb"}, "config.hostname"),
    ({"log_directory": "relative"}, "config.log_directory"),
    ({"log_directory": "/var/../etc"}, "config.log_directory"),
    ({"log_directory": "/etc/passwd"}, "config.log_directory: /etc/passwd is no directory"),
    ({"log_directory": "/etc/passwd/logs"}, "config.log_directory: /etc/passwd is no directory"),
    ({"dns_config": pb.DNSConfig(servers=["1.1.1.1\noptions x"])}, "config.dns_config.servers[0]"),
    ({"dns_config": pb.DNSConfig(searches=["a b"])}, "config.dns_config.searches[0]"),
    ({"linux": pb.LinuxPodSandboxConfig(cgroup_parent="/a/../b")}, "config.linux.cgroup_parent"),
    ({"linux": pb.LinuxPodSandboxConfig(cgroup_parent="a.slice")}, "config.linux.cgroup_parent"),
    (
        {"linux": pb.LinuxPodSandboxConfig(resources=pb.LinuxContainerResources(cpu_period=5))},
        "config.linux.resources.cpu_period",
    ),
    (
        {"linux": pb.LinuxPodSandboxConfig(resources=pb.LinuxContainerResources(cpu_quota=-7))},
        "config.linux.resources.cpu_quota",
    ),
    (
        {"linux": pb.LinuxPodSandboxConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=-3))},
        "config.linux.resources.memory_limit_in_bytes",
    ),
    (
        {"linux": pb.LinuxPodSandboxConfig(overhead=pb.LinuxContainerResources(memory_limit_in_bytes=-5))},
        "config.linux.overhead.memory_limit_in_bytes",
    ),
    ({"linux": pb.LinuxPodSandboxConfig(sysctls={"kernel.panic": "1"})}, "config.linux.sysctls['kernel.panic']"),
    ({"linux": pb.LinuxPodSandboxConfig(sysctls={"net.x=1 y": "1"})}, "config.linux.sysctls"),
    ({"linux": pb.LinuxPodSandboxConfig(sysctls={"net.ipv4.nope": "1"})}, "config.linux.sysctls['net.ipv4.nope']"),
    (
        {"linux": pb.LinuxPodSandboxConfig(sysctls={"net.ipv4.ip_forward": "x"})},
        "config.linux.sysctls['net.ipv4.ip_forward']",
    ),
    ({"port_mappings": [pb.PortMapping(container_port=80, host_port=70000)]}, "port"),
]


@pytest.mark.parametrize(("changes", "field"), PODS)
def test_pods(cri: Client, changes: dict[str, Any], field: str) -> None:
    before = tracked(cri)
    config = cri.pod_config()
    for name, value in changes.items():
        config.ClearField(name)
        if isinstance(value, list):
            getattr(config, name).extend(value)
        elif isinstance(value, str):
            setattr(config, name, value)
        else:
            getattr(config, name).CopyFrom(value)
    with refused(INVALID, field):
        cri.pod(config)
    assert cri.pods() == []
    assert_nothing_new(cri, before)


def test_sysctls_of_the_host(cri: Client) -> None:
    namespaces = {"network": pb.NODE, "ipc": pb.NODE, "pid": pb.CONTAINER}
    for key in ("net.ipv4.ip_forward", "kernel.shmmax"):
        with refused(INVALID, key, "host"):
            cri.pod(namespaces=namespaces, linux={"sysctls": {key: "1"}})
    with refused(INVALID, "userns_options"):
        cri.pod(namespaces={"userns_options": pb.UserNamespace(mode=pb.POD)})


def test_an_unknown_handler(cri: Client) -> None:
    with refused(INVALID, "runtime_handler", "kata", "builtin"):
        cri.pod(handler="kata")


def test_a_name_that_is_taken(cri: Client) -> None:
    config = cri.pod_config("taken")
    pod = cri.pod(config)
    with refused(Code.ALREADY_EXISTS, "taken", pod, "attempt"):
        cri.pod(config)
    made = cri.container_config("true", name="mine")
    container = cri.create(pod, config=made)
    with refused(Code.ALREADY_EXISTS, "mine", container):
        cri.create(pod, config=made)
    cri.call("RemoveContainer", container_id=container)
    cri.create(pod, config=made)
    cri.remove_pod(pod)
    cri.pod(config)


SECURITY = "config.linux.security_context"
PROFILE = pb.SecurityProfile
CONTAINERS: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
    ({"image": "no.such/image:1"}, Code.NOT_FOUND, "no.such/image"),
    ({"image": ""}, INVALID, "config.image.image"),
    ({"name": "a/b"}, INVALID, "config.metadata.name"),
    ({"log_path": "../../etc/cron.d/x"}, INVALID, "config.log_path"),
    ({"log_path": "/etc/x"}, INVALID, "config.log_path"),
    ({"log_path": "x" * 300}, INVALID, "config.log_path: step 'monitor'"),
    ({"log_path": "x/" + "y" * 300 + "/z"}, INVALID, "config.log_path"),
    ({"working_dir": "relative"}, INVALID, "config.working_dir"),
    ({"envs": [pb.KeyValue(key="A=B", value=b"x")]}, INVALID, "config.envs[0].key"),
    ({"envs": [pb.KeyValue(key="A", value=b"x\0y")]}, INVALID, "config.envs[0].value"),
    ({"envs": [pb.KeyValue(key="A", value=b"x" * 140000)]}, INVALID, "config.envs[0]: has 140002 bytes"),
    ({"args": ["x", "x" * 140000]}, INVALID, "config.args[1]: has 140000 bytes"),
    ({"working_dir": "/etc/passwd"}, INVALID, "config.working_dir: step 'make_working_directory'"),
    (
        {"mounts": [pb.Mount(container_path="/proc", host_path="/tmp")]},
        INVALID,
        "config.mounts[0].container_path: may be covered by a procfs only (got '/proc')",
    ),
    (
        {"mounts": [pb.Mount(container_path="/etc/", host_path="/etc/passwd")]},
        INVALID,
        "config.mounts[0].container_path: step 'bind' failed on /etc with EISDIR",
    ),
    ({"mounts": [pb.Mount(container_path="/etc/passwd/x", host_path="/tmp")]}, INVALID, "mounts[0].container_path"),
    ({"windows": pb.WindowsContainerConfig()}, Code.UNIMPLEMENTED, "config.windows"),
    ({"mounts": [pb.Mount(container_path="/x", host_path="x")]}, INVALID, "config.mounts[0].host_path"),
    ({"mounts": [pb.Mount(container_path="x", host_path="/tmp")]}, INVALID, "config.mounts[0].container_path"),
    ({"mounts": [pb.Mount(container_path="/", host_path="/tmp")]}, INVALID, "config.mounts[0].container_path"),
    ({"mounts": [pb.Mount(container_path="/x", host_path="/etc/passwd/x")]}, INVALID, "config.mounts[0].host_path"),
    ({"mounts": [pb.Mount(container_path="/x", image=pb.ImageSpec(image="y"))]}, INVALID, "mounts[0].readonly"),
    (
        {"devices": [pb.Device(container_path="/dev/x", host_path="/etc/passwd")]},
        INVALID,
        "config.devices[0].host_path",
    ),
    ({"devices": [pb.Device(container_path="/dev/x", host_path="/dev/null", permissions="q")]}, INVALID, "permissions"),
    ({"CDI_devices": [pb.CDIDevice(name="x")]}, INVALID, "CDI_devices[0].name"),
    ({"security": {"run_as_user": pb.Int64Value(value=-1)}}, INVALID, f"{SECURITY}.run_as_user"),
    ({"security": {"run_as_user": pb.Int64Value(value=2**32 - 1)}}, INVALID, f"{SECURITY}.run_as_user"),
    (
        {"security": {"run_as_username": "nobody-here"}},
        INVALID,
        f"{SECURITY}.run_as_username: step 'find_user' failed on /etc/passwd: no user 'nobody-here'",
    ),
    ({"security": {"capabilities": pb.Capability(add_capabilities=["FLY"])}}, INVALID, "add_capabilities[0]"),
    ({"security": {"masked_paths": ["x"]}}, INVALID, f"{SECURITY}.masked_paths[0]"),
    (
        {"security": {"masked_paths": ["/x" + "y" * 300]}},
        INVALID,
        f"{SECURITY}.masked_paths: step 'mask_paths' failed on",
    ),
    ({"security": {"masked_paths": ["/proc/kcore", "/."]}}, INVALID, f"{SECURITY}.masked_paths[1]"),
    ({"security": {"apparmor_profile": "localhost/x"}}, Code.FAILED_PRECONDITION, "AppArmor"),
    ({"security": {"apparmor_profile": "nonsense"}}, INVALID, f"{SECURITY}.apparmor_profile"),
    (
        {"security": {"seccomp": PROFILE(profile_type=PROFILE.Localhost, localhost_ref="/no/such.json")}},
        INVALID,
        f"{SECURITY}.seccomp.localhost_ref",
    ),
    ({"security": {"seccomp": PROFILE(profile_type=PROFILE.Localhost, localhost_ref="x")}}, INVALID, "absolute"),
    (
        {"security": {"seccomp": PROFILE(profile_type=PROFILE.Localhost, localhost_ref="/etc/passwd")}},
        INVALID,
        f"{SECURITY}.seccomp.localhost_ref: is not JSON",
    ),
    ({"security": {"namespace_options": pb.NamespaceOption(pid=pb.POD)}}, INVALID, "namespace_options.pid"),
    (
        {"security": {"namespace_options": pb.NamespaceOption(pid=pb.TARGET, target_id="f" * 64)}},
        Code.NOT_FOUND,
        "f" * 64,
    ),
    ({"resources": {"memory_limit_in_bytes": 4096}}, INVALID, "config.linux.resources.memory_limit_in_bytes"),
    ({"resources": {"memory_limit_in_bytes": -5}}, INVALID, "config.linux.resources.memory_limit_in_bytes"),
    ({"resources": {"cpu_quota": 10}}, INVALID, "config.linux.resources.cpu_quota"),
    ({"resources": {"cpuset_cpus": "x"}}, INVALID, "config.linux.resources.cpuset_cpus"),
    ({"resources": {"cpuset_cpus": "3-1", "cpu_shares": 1024}}, INVALID, "config.linux.resources.cpuset_cpus"),
    ({"resources": {"cpuset_mems": "9999"}}, INVALID, "config.linux.resources.cpuset_mems"),
    ({"resources": {"cpuset_cpus": "4000"}}, INVALID, "config.linux.resources.cpuset_cpus: step 'cgroup'"),
    ({"resources": {"oom_score_adj": -2000}}, INVALID, "config.linux.resources.oom_score_adj"),
    ({"resources": {"oom_score_adj": 5000}}, INVALID, "config.linux.resources.oom_score_adj"),
    ({"resources": {"unified": {"../x": "1"}}}, INVALID, "config.linux.resources.unified"),
]


@pytest.mark.parametrize(("changes", "code", "words"), CONTAINERS, ids=lambda v: str(v)[:40])
def test_containers(cri: Client, changes: dict[str, Any], code: grpc.StatusCode, words: str) -> None:
    pod = cri.pod()
    before = tracked(cri)
    with refused(code, words):
        cri.create(pod, "true", **changes)
    assert cri.containers() == []
    assert_nothing_new(cri, before)


def test_a_command_that_does_not_exist(cri: Client) -> None:
    pod = cri.pod()
    container = cri.create(pod, "/no/such/command")
    with refused(Code.INTERNAL, "/no/such/command", "ENOENT"):
        cri.call("StartContainer", container_id=container)
    status = cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert "/no/such/command" in status.message and status.finished_at > 0
    cri.call("RemoveContainer", container_id=container)


def test_a_source_that_may_not_be_made(cri: Client, tmp_path: Path) -> None:
    """A directory cannot be made below a file; nothing of the path stays."""
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "further")
    mount = pb.Mount(host_path=str(tmp_path / "link"), container_path="/x")
    pod = cri.pod()
    with refused(INVALID, "nobody-here"):
        cri.create(pod, "true", mounts=[mount], security={"run_as_username": "nobody-here"})
    assert not (tmp_path / "gone").exists(), "a failed create leaves no directory"


def test_a_log_that_cannot_be_where_it_is_asked_for(cri: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pod = cri.pod(log_directory=str(tmp_path))
    with refused(INVALID, "config.log_path", f"{tmp_path}/file"):
        cri.create(pod, "true", log_path="file/x.log")


@pytest.mark.parametrize("kind", ["link", "fifo", "fifo that is read", "socket", "device", "directory"])
def test_a_log_in_whose_place_something_else_is(cri: Client, tmp_path: Path, kind: str) -> None:
    """Whoever may write in the log directory may have put it there."""
    before = cri.daemon.log.stat().st_size
    place = tmp_path / "x.log"
    make: dict[str, Callable[[], object]] = {
        "link": lambda: place.symlink_to(tmp_path / "victim"),
        "fifo": lambda: os.mkfifo(place),
        "fifo that is read": lambda: os.mkfifo(place),
        "socket": lambda: os.mknod(place, stat.S_IFSOCK | 0o600),
        "device": lambda: os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "directory": place.mkdir,
    }
    make[kind]()
    with contextlib.ExitStack() as opened:
        if kind == "fifo that is read":
            opened.callback(os.close, os.open(place, os.O_RDONLY | os.O_NONBLOCK))
        with refused(INVALID, "config.log_path", str(place)):
            cri.create(cri.pod(log_directory=str(tmp_path)), "true", log_path="x.log")
    assert not (tmp_path / "victim").exists()
    assert " ERROR " not in cri.daemon.log.read_text()[before:]


def test_what_a_caller_does_wrong_is_no_error_of_the_daemons(cri: Client) -> None:
    before = cri.daemon.log.stat().st_size
    with refused(INVALID, "working_dir"):
        cri.create(cri.pod(), "true", working_dir="/etc/passwd")
    assert " ERROR " not in cri.daemon.log.read_text()[before:].upper()


def test_windows(cri: Client) -> None:
    """Refused alike, wherever it stands."""
    with refused(Code.UNIMPLEMENTED, "config.windows"):
        cri.pod(cri.pod_config(windows=pb.WindowsPodSandboxConfig()))
    with refused(Code.UNIMPLEMENTED, "windows"):
        cri.call("UpdateContainerResources", container_id="f00", windows=pb.WindowsContainerResources())


def test_a_command_that_no_system_call_can_carry(cri: Client) -> None:
    container = cri.start(cri.pod(), "sleep", "60")
    with refused(INVALID, "cmd[2]", "'c\\x00d'"):
        cri.exec(container, "a", "b", "c\0d")


def test_an_image_that_does_not_exist(cri: Client, tmp_path: Path) -> None:
    with refused(Code.INVALID_ARGUMENT, "image"):
        cri.call("PullImage", image=pb.ImageSpec(image="UPPER CASE"))
    with refused(Code.NOT_FOUND, "nowhere"):
        cri.call("PullImage", image=pb.ImageSpec(image=f"oci:{tmp_path}/nowhere:x"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with refused(Code.UNAVAILABLE, f"127.0.0.1:{port}"):
        cri.call("PullImage", image=pb.ImageSpec(image=f"127.0.0.1:{port}/x:1"))


def test_ids_that_mean_nothing(cri: Client) -> None:
    call: Any = cri.call
    for method, field in (("ContainerStatus", "container_id"), ("PodSandboxStatus", "pod_sandbox_id")):
        with refused(Code.NOT_FOUND, "f00"):
            call(method, **{field: "f00"})
        with refused(INVALID, field):
            call(method, **{field: ""})
    with refused(Code.NOT_FOUND):
        cri.create("f" * 64, "true")
    pod = cri.pod()
    container = cri.create(pod, "sleep", "60")
    for method in ("ExecSync", "ReopenContainerLog"):
        extra = {"cmd": ["true"]} if method == "ExecSync" else {}
        with refused(Code.FAILED_PRECONDITION, "created"):
            call(method, container_id=container, **extra)


def daemon_output(*flags: str, **options: Any) -> tuple[int, str]:
    program = Path(sys.executable).with_name("crio-native")
    done = subprocess.run([program, *flags], capture_output=True, text=True, timeout=60, **options)
    return done.returncode, done.stderr


def test_a_directory_in_use(cri: Client) -> None:
    directory = cri.daemon.directory
    code, error = daemon_output("--config", f"{directory}/crio.conf", "--config-dir", f"{directory}/crio.conf.d")
    assert code == 1 and "another daemon uses" in error and str(directory) in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("runtime.seccomp_profile", "{here}/none", "seccomp profile '{here}/none' not found"),
        ("runtime.seccomp_profile", "{here}/words", "{here}/words: is not JSON"),
        ("runtime.seccomp_profile", "{here}", "seccomp profile {here} cannot be read: Is a directory"),
        ("runtime.privileged_seccomp_profile", "{here}/none", "not found"),
        ("runtime.runtimes.builtin.seccomp_profile", "{here}/none", "not found"),
        ("runtime.timezone", "No/Where", "'No/Where' is not on this host"),
        ("runtime.default_mounts_file", "{here}/none", "{here}/none cannot be read: no such file"),
        ("runtime.default_mounts_file", "{here}/words", "{here}/words, line 1: 'words' is not /SOURCE:/DESTINATION"),
        ("image.signature_policy", "{here}/none", "trust policy {here}/none cannot be read: no such file"),
        ("image.signature_policy", "{here}/words", "{here}/words: not valid JSON"),
    ],
)
def test_a_file_that_the_configuration_names(tmp_path: Path, key: str, value: str, why: str) -> None:
    """Else the daemon would start, and every container fail."""
    (tmp_path / "words").write_text("words\n")
    value, why = (text.replace("{here}", str(tmp_path)) for text in (value, why))
    table, _, name = key.rpartition(".")
    flags = scratch_flags(tmp_path, tmp_path / "s")
    (tmp_path / "empty/10-it.conf").write_text(f'[crio.{table}]\n{name} = "{value}"\n')
    code, error = daemon_output(*flags)
    assert code == 1 and len(error.splitlines()) == 1
    assert f"{tmp_path}/empty/10-it.conf: crio.{key}: " in error and why in error and f"(got '{value}')" in error


@pytest.mark.parametrize("option", ["root", "runroot", "imagestore"])
@pytest.mark.parametrize("verb", [[], ["wipe", "--force"]], ids=["serve", "wipe"])
def test_the_store_of_podman_and_cri_o_is_left_alone(tmp_path: Path, option: str, verb: list[str]) -> None:
    theirs = tmp_path / "storage"
    for name in ("overlay/l", "overlay-images", "libpod"):
        (theirs / name).mkdir(parents=True)
    before = sorted(theirs.rglob("*"))
    for path in (theirs, "/var/lib/containers/storage/"):
        code, error = daemon_output(*scratch_flags(tmp_path, tmp_path / "s"), f"--{option}", str(path), *verb)
        assert code == 1 and len(error.splitlines()) == 1
        assert f"command line: crio.{option}: must not be the directory of containers/storage" in error
    assert sorted(theirs.rglob("*")) == before


def scratch_flags(directory: Path, listen: Path | str) -> list[str]:
    (directory / "empty").mkdir(exist_ok=True)
    flags = {
        "config": "/dev/null",
        "config-dir": directory / "empty",
        "root": directory / "root",
        "runroot": directory / "run",
        "namespaces-dir": directory / "ns",
        "cni-config-dir": directory / "net.d",
        "listen": listen,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def test_a_socket_in_use(cri: Client, tmp_path: Path) -> None:
    before = machine_state(tmp_path.name)
    code, error = daemon_output(*scratch_flags(tmp_path, cri.daemon.socket))
    assert code == 1 and "already listening" in error and str(cri.daemon.socket) in error
    assert "Traceback" not in error
    cri.call("Version")
    plain = tmp_path / "file"
    plain.write_text("precious")
    code, error = daemon_output(*scratch_flags(tmp_path, plain))
    assert code == 1 and "no socket" in error and plain.read_text() == "precious"
    long = tmp_path / ("x" * 120)
    code, error = daemon_output(*scratch_flags(tmp_path, long))
    assert code == 1 and "107 bytes" in error
    assert_machine_unchanged(before, tmp_path.name)


def test_a_stale_socket_is_taken_over(tmp_path: Path) -> None:
    stale = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    program = Path(sys.executable).with_name("crio-native")
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(15)
    env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    daemon = subprocess.Popen([program, *scratch_flags(tmp_path, stale)], stderr=subprocess.PIPE, env=env)
    try:
        assert manager.recv(100) == b"READY=1", "the service manager is told when the socket serves"
        assert can_connect(stale)
        assert os.stat(stale).st_mode & 0o777 == 0o660
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate(timeout=20)
        manager.close()
    assert daemon.returncode == 0 and not stale.exists()


def test_no_monitor(tmp_path: Path) -> None:
    env = {**os.environ, "CRIO_NATIVE_MONITOR": str(tmp_path / "none")}
    code, error = daemon_output(*scratch_flags(tmp_path, tmp_path / "s"), env=env)
    assert code == 1 and "monitor program" in error and "Traceback" not in error


def test_not_root(tmp_path: Path) -> None:
    code, error = daemon_output(*scratch_flags(tmp_path, tmp_path / "s"), user=65534, group=65534, env={})
    assert code == 1 and "root" in error and len(error.strip().splitlines()) == 1


def test_a_cgroup_manager_that_is_not_there_yet(tmp_path: Path) -> None:
    code, error = daemon_output(*scratch_flags(tmp_path, tmp_path / "s"), "--cgroup-manager", "systemd")
    assert code == 1 and "crio.runtime.cgroup_manager" in error and '"cgroupfs"' in error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "root").exists()


@pytest.fixture
def on_a_small_disk() -> Iterator[Client]:
    disk = tempfile.mkdtemp(prefix="cn-", dir="/var/tmp")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "disk", disk], check=True)
    try:
        with Client.serving(parent=Path(disk)) as client:
            yield client
    finally:
        subprocess.run(["umount", disk], check=True)
        os.rmdir(disk)


def test_a_disk_that_a_container_fills(on_a_small_disk: Client) -> None:
    cri = on_a_small_disk
    pod = cri.pod()
    script = "dd if=/dev/zero of=/x bs=1M; dd if=/dev/zero of=/y bs=1k; sleep 1000"
    cri.start(pod, "sh", "-c", script)
    cri.until(lambda: os.statvfs(cri.daemon.directory).f_bavail == 0)
    cri.call("RemovePodSandbox", pod_sandbox_id=pod)
    assert not cri.pods() and not cri.containers()
    assert cri.run("echo", "service returns with the space")[1] == "service returns with the space\n"
