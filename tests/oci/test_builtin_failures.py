"""Every failure names its step, its object and its errno, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, NotFound, StartFailed, StepFailed
from crio_native.oci.runtime import ExecSession, ExecSpec, Overlay, UserRequest

from ..machine import Machine
from .conftest import PARENT, Box, Container

pytestmark = pytest.mark.root


def set_path(spec: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for part in parents:
        spec = spec[part]
    spec[last] = value


def test_a_command_that_does_not_exist(box: Box) -> None:
    container = box.create(box.spec("nosuch"))
    with pytest.raises(StartFailed) as failure:
        container.start()
    assert (failure.value.step, failure.value.number, failure.value.path) == ("find_command", 2, "nosuch")
    assert "not found in $PATH" in str(failure.value)
    assert container.wait().code == 128


@pytest.mark.parametrize(("name", "mode", "number"), [("/etc/passwd", 0o644, 13), ("/bin", 0o755, 13)])
def test_a_command_that_cannot_be_executed(box: Box, name: str, mode: int, number: int) -> None:
    container = box.create(box.spec(name))
    with pytest.raises(StartFailed) as failure:
        container.start()
    assert failure.value.number == number


def test_a_command_that_is_no_program(box: Box) -> None:
    (box.root / "bin/text").write_bytes(b"\x00\x01 no program")
    (box.root / "bin/text").chmod(0o755)
    with pytest.raises(StartFailed) as failure:
        box.create(box.spec("text")).start()
    assert failure.value.number == 8


def test_a_mount_source_that_is_missing(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["mounts"].append({"destination": "/data", "type": "bind", "source": "/no/such/dir", "options": ["rbind"]})
    with pytest.raises(StepFailed) as failure:
        box.create(spec)
    assert (failure.value.step, failure.value.number, failure.value.path) == ("bind", 2, "/no/such/dir")
    assert "source" in failure.value.detail


def test_a_user_that_is_not_in_the_image(box: Box) -> None:
    with pytest.raises(StepFailed, match=r"find_user.*no user 'ghost' in the image's /etc/passwd"):
        box.create(box.spec(), user=UserRequest("ghost"))
    with pytest.raises(StepFailed, match=r"no group 'ghosts' in the image's /etc/group"):
        box.create(box.spec(), user=UserRequest("web", "ghosts"))


@pytest.mark.parametrize("number", ["4294967295", "4294967296", "99999999999999999999"])
def test_a_user_number_that_wraps_is_refused(box: Box, number: str) -> None:
    """CVE-2024-40635: such a number became root."""
    with pytest.raises(StepFailed, match="outside 0"):
        box.create(box.spec(), user=UserRequest(number))


def test_a_passwd_file_of_any_size_or_kind(box: Box) -> None:
    """CVE-2025-4437: the image's files are not to fill our memory, nor to block us."""
    passwd = box.root / "etc/passwd"
    with passwd.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StepFailed, match=r"find_user.*EFBIG"):
        box.create(box.spec(), user=UserRequest("web"))
    passwd.unlink()
    os.mkfifo(passwd)
    with pytest.raises(StepFailed, match="not a regular file"):
        box.create(box.spec(), user=UserRequest("web"))


def test_a_file_system_that_does_not_exist(box: Box) -> None:
    spec = box.spec()
    spec["mounts"].append({"destination": "/x", "type": "nosuchfs", "source": "x"})
    with pytest.raises(StepFailed, match=r"step 'mount' failed on /x with ENODEV.*nosuchfs"):
        box.create(spec)


def test_an_overlay_of_a_missing_layer(box: Box) -> None:
    for name in ("upper", "work", "merged"):
        (box.directory / name).mkdir()
    overlay = Overlay(str(box.directory), ["no-layer"], str(box.directory / "upper"), str(box.directory / "work"))
    spec = box.spec()
    spec["root"]["path"] = str(box.directory / "merged")
    with pytest.raises(StepFailed, match="overlay_root"):
        box.create(spec, overlay=overlay)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("ociVersion", "2.0.0", "ociVersion"),
        ("process.args", [], "process.args"),
        ("process.cwd", "relative", "process.cwd"),
        ("process.env", ["NOEQUALS"], r"process.env\[0\]"),
        ("process.user", {"uid": -1}, "process.user.uid"),
        ("process.user", {"uid": 2**32 - 1}, "process.user.uid"),
        ("process.capabilities", {"bounding": ["CAP_FLY"]}, r"process.capabilities.bounding\[0\]"),
        ("process.rlimits", [{"type": "RLIMIT_X", "soft": 1, "hard": 1}], r"process.rlimits\[0\].type"),
        ("process.rlimits", [{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}], r"process.rlimits\[0\].soft"),
        ("mounts", [{"destination": "", "type": "proc"}], r"mounts\[0\].destination"),
        ("mounts", [{"destination": "/", "type": "tmpfs"}], r"mounts\[0\].destination"),
        ("mounts", [{"destination": "/proc/self", "type": "tmpfs"}], r"mounts\[0\].destination"),
        ("mounts", [{"destination": "/a/../proc/sys", "type": "tmpfs"}], r"mounts\[0\].destination"),
        ("mounts", [{"destination": "/x", "type": "bind"}], r"mounts\[0\].source"),
        ("mounts", [{"destination": "/proc", "type": "bind", "source": "/tmp"}], r"mounts\[0\].destination"),
        ("mounts", [{"destination": "/proc/.", "type": "tmpfs", "source": "x"}], r"mounts\[0\].destination"),
        ("linux.namespaces", [{"type": "net"}], r"linux.namespaces\[0\].type"),
        ("linux.namespaces", [{"type": "mount"}, {"type": "mount"}], r"linux.namespaces\[1\].type"),
        ("linux.namespaces", [{"type": "mount"}, {"type": "network", "path": "x"}], r"linux.namespaces\[1\].path"),
        ("linux.sysctl", {"kernel.core_pattern": "|/x"}, "linux.sysctl"),
        ("linux.sysctl", {"net.ipv4.ip_forward\n": "1"}, "linux.sysctl"),
        ("linux.sysctl", {"kernel.shmmax=1+kernel.core_pattern": "|/x"}, "linux.sysctl"),
        ("linux.sysctl", {"net/../kernel/core_pattern": "|/x"}, "linux.sysctl"),
        ("linux.cgroupsPath", "/a/../../b", "linux.cgroupsPath"),
        ("linux.maskedPaths", ["x"], r"linux.maskedPaths\[0\]"),
        ("linux.devices", [{"path": "/dev/x", "type": "z"}], r"linux.devices\[0\].type"),
        ("hostname", "x" * 65, "hostname"),
        ("hostname", "a\0b", "hostname"),
    ],
)
def test_a_wrong_config_is_refused_with_its_path(box: Box, path: str, value: object, field: str) -> None:
    spec = box.spec()
    set_path(spec, path, value)
    with pytest.raises(InvalidArgument, match=f"^{field}"):
        box.create(spec)


@pytest.mark.parametrize("kind", ["net", "ipc", "uts"])
def test_a_sysctl_of_the_hosts_namespace_is_refused(box: Box, kind: str) -> None:
    """CVE-2022-0532: with the host's namespace the setting would be the node's."""
    name = {"net": "net.ipv4.ip_forward", "ipc": "kernel.shmmax", "uts": "kernel.domainname"}[kind]
    spec = box.spec()
    spec["linux"]["namespaces"] = [{"type": "mount"}]
    del spec["hostname"]
    spec["linux"]["sysctl"] = {name: "1"}
    with pytest.raises(InvalidArgument, match="needs a"):
        box.create(spec)


def test_a_sysctl_that_the_kernel_refuses_is_named_with_its_value(box: Box) -> None:
    spec = box.spec()
    spec["linux"]["sysctl"] = {"net.ipv4.ip_default_ttl": "many"}
    with pytest.raises(StepFailed, match=r"sysctls?' failed on /proc/sys/net/ipv4/ip_default_ttl with EINVAL.*'many'"):
        box.create(spec)


def hostile_dev(box: Box) -> None:
    (box.root / "dev").rmdir()
    (box.root / "dev").symlink_to("/")


def hostile_proc(box: Box) -> None:
    (box.root / "proc").rmdir()
    (box.root / "proc").symlink_to("/etc")


def climbing_target(box: Box) -> None:
    (box.root / "data").symlink_to("../../../../../../../../" + str(box.directory / "outside").lstrip("/"))


def magic_target(box: Box) -> None:
    (box.root / "data").symlink_to("/proc/self/root/" + str(box.directory).lstrip("/"))


@pytest.mark.parametrize("attack", [hostile_dev, hostile_proc, climbing_target, magic_target])
def test_a_symlink_in_the_image_never_leads_out(box: Box, attack: Callable[[Box], None]) -> None:
    """CVE-2026-41579, CVE-2021-30465, CVE-2019-19921: whatever the links say, the host's tree stays as it is."""
    outside = box.directory / "outside"
    outside.mkdir()
    (box.directory / "shared").mkdir()
    attack(box)
    spec = box.spec("true")
    source = str(box.directory / "shared")
    spec["mounts"].append({"destination": "/data/deep", "type": "bind", "source": source, "options": ["rbind"]})
    try:
        box.create(spec)
    except StepFailed:
        pass
    assert list(outside.iterdir()) == []
    assert "deep" not in os.listdir("/dev") and not os.path.exists("/deep") and not os.path.exists("/etc/deep")
    mounted = Path("/proc/self/mountinfo").read_text()
    assert str(box.directory) not in mounted


def test_a_proc_that_is_a_link_is_refused_for_mounts_below_it(box: Box) -> None:
    (box.root / "data").symlink_to("/proc")
    spec = box.spec()
    spec["mounts"].append({"destination": "/data/sys", "type": "tmpfs", "source": "x"})
    with pytest.raises(StepFailed, match=r"resolves to /proc/sys"):
        box.create(spec)


def test_procfs_is_mounted_at_proc_and_nowhere_else(box: Box) -> None:
    """CVE-2019-19921: with /proc a link, the masks would cover files of the image."""
    hostile_proc(box)
    with pytest.raises(StepFailed, match=r"resolves to /etc"):
        box.create(box.spec())


def test_kill_after_the_end_says_so(box: Box) -> None:
    container = box.run("true")
    with pytest.raises((NotFound, StepFailed)):
        box.runtime.kill(container.spec.id, container.spec.run_dir, 15)


def test_exec_in_a_container_that_has_ended(box: Box) -> None:
    container = box.run("true")
    with pytest.raises(StepFailed):
        container.exec("true")


def test_exec_of_a_command_that_does_not_exist(box: Box) -> None:
    container = box.create(box.spec()).start()
    with pytest.raises(StartFailed, match="nosuch"):
        container.exec("nosuch")
    assert container.exec("true") == (0, "")


def exec_that_nobody_awaits(container: Container, *args: str) -> ExecSession:
    request = ExecSpec({**container.spec.spec["process"], "args": list(args)}, waits=False)
    return container.runtime.exec(container.spec.id, container.process, container.cgroup, request)


@pytest.mark.parametrize(
    ("code", "args"), [(0, ["true"]), (7, ["sh", "-c", "exit 7"]), (137, ["sh", "-c", "kill -9 $$"])]
)
def test_an_exec_whose_start_nobody_awaits(box: Box, code: int, args: list[str]) -> None:
    container = box.create(box.spec()).start()
    with contextlib.closing(exec_that_nobody_awaits(container, *args)) as session:
        assert session.result().code == session.result().code == code


def test_an_exec_whose_start_nobody_awaits_tells_why_it_failed(box: Box) -> None:
    container = box.create(box.spec()).start()
    with (
        contextlib.closing(exec_that_nobody_awaits(container, "nosuch")) as session,
        pytest.raises(StartFailed, match="nosuch"),
    ):
        session.result()


def test_an_exec_that_comes_with_the_containers_end(box: Box) -> None:
    """What is known of a container from earlier execs is its own: the pid may be anybody's by now."""
    container = box.create(box.spec()).start()
    container.exec("true")
    os.kill(container.process.pid, 9)
    container.wait()
    with (
        contextlib.closing(exec_that_nobody_awaits(container, "true")) as session,
        pytest.raises(StepFailed, match="the container has ended"),
    ):
        session.result()
    with pytest.raises(StepFailed, match="the container has ended"):
        container.exec("true")


def test_a_container_that_goes_takes_what_execs_have_kept_of_it(box: Box) -> None:
    before = os.listdir("/proc/self/fd")
    container = box.create(box.spec()).start()
    container.exec("true")
    box.runtime.delete(container.spec.id, container.spec.run_dir, container.cgroup)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_killed_launcher_is_replaced(box: Box, runtime: Any) -> None:
    killed = runtime._launchers.pids()
    for pid in killed:
        os.kill(pid, 9)
    for pid in killed:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert box.run("echo", "still here").output() == "still here\n"
    while any(Path(f"/proc/{pid}/comm").read_text() != "crio-launcher\n" for pid in runtime._launchers.pids()):
        pass  # one that comes up still has its first name, and would look new to the next test


def test_delete_is_idempotent_and_leaves_nothing(runtime: Any, tmp_path: Path, leaks: Machine) -> None:
    box = Box(runtime, tmp_path / "box")
    spec = box.spec()
    spec["linux"]["cgroupsPath"] = f"{PARENT}/left"
    spec["linux"]["resources"] = {"pids": {"limit": 50}}
    container: Container = box.create(spec).start()
    assert runtime.is_alive(container.process)
    for _ in range(2):
        runtime.delete(container.spec.id, container.spec.run_dir, container.cgroup)
    assert not runtime.is_alive(container.process)
    assert not (container.spec.run_dir / "control").exists()
    box.remove_all()
