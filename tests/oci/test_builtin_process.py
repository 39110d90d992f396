"""What a container's process is given by the kernel: scheduling, memory policy, personality, keyring, terminal."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, StartFailed, StepFailed
from crio_native.linux import syscalls
from crio_native.oci.spec import RLIMITS

from ..machine import Machine
from .conftest import CAPABILITIES, PARENT, Box, Container, least_profile, status_of

pytestmark = pytest.mark.root


def io_priority(pid: int) -> int:
    number = {"x86_64": 252, "aarch64": 31}[os.uname().machine]
    return int(ctypes.CDLL(None).syscall(number, 1, pid))


def attributes(pid: int) -> dict[str, int]:
    """sched_getattr(2)."""
    number = {"x86_64": 315, "aarch64": 275}[os.uname().machine]
    attr = syscalls.sched_attr()
    assert ctypes.CDLL(None).syscall(number, pid, ctypes.byref(attr), ctypes.sizeof(attr), 0) == 0
    return {name: getattr(attr, f"sched_{name}") for name in ("policy", "flags", "nice", "priority", "runtime")}


def with_process(box: Box, *args: str, **process: Any) -> dict[str, Any]:
    spec = box.spec(*args)
    spec["process"] |= process
    return spec


SCHEDULERS = [
    ({"policy": "SCHED_OTHER", "nice": 7}, {"policy": 0, "nice": 7}),
    ({"policy": "SCHED_OTHER", "nice": -7}, {"policy": 0, "nice": -7}),
    ({"policy": "SCHED_BATCH", "nice": 3}, {"policy": 3, "nice": 3}),
    ({"policy": "SCHED_IDLE"}, {"policy": 5}),
    ({"policy": "SCHED_FIFO", "priority": 5}, {"policy": 1, "priority": 5}),
    ({"policy": "SCHED_RR", "priority": 6, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, {"policy": 2, "flags": 1}),
    (
        {"policy": "SCHED_DEADLINE", "runtime": 10**6, "deadline": 10**7, "period": 10**7},
        {"policy": 6, "runtime": 10**6},
    ),
]


@pytest.mark.parametrize(("asked", "found"), SCHEDULERS)
def test_scheduler(box: Box, asked: dict[str, Any], found: dict[str, int]) -> None:
    container = box.create(with_process(box, scheduler=asked)).start()
    shown = attributes(container.process.pid)
    assert {name: shown[name] for name in found} == found


@pytest.mark.parametrize(
    ("scheduler", "field"),
    [
        ({}, "policy"),
        ({"policy": "SCHED_NONE"}, "policy"),
        ({"policy": "SCHED_OTHER", "nice": 20}, "nice"),
        ({"policy": "SCHED_FIFO", "priority": 1, "nice": 1}, "nice"),
        ({"policy": "SCHED_FIFO"}, "priority"),
        ({"policy": "SCHED_RR", "priority": 100}, "priority"),
        ({"policy": "SCHED_OTHER", "priority": 1}, "priority"),
        ({"policy": "SCHED_OTHER", "flags": ["X"]}, r"flags\[0\]"),
        ({"policy": "SCHED_OTHER", "runtime": 1}, "runtime"),
        ({"policy": "SCHED_DEADLINE"}, "runtime"),
        ({"policy": "SCHED_DEADLINE", "runtime": 3, "deadline": 2, "period": 4}, "runtime"),
    ],
)
def test_schedulers_that_cannot_be(box: Box, scheduler: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^process.scheduler.{field}:"):
        box.create(with_process(box, scheduler=scheduler))


def test_a_scheduler_that_no_kernel_has(box: Box, leaks: Machine) -> None:
    with pytest.raises(StepFailed, match=r"step 'scheduling' failed with EINVAL"):
        box.create(with_process(box, scheduler={"policy": "SCHED_ISO"}))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"class": "IOPRIO_CLASS_BE", "priority": 6}, 2 << 13 | 6),
        ({"class": "IOPRIO_CLASS_RT", "priority": 0}, 1 << 13),
        ({"class": "IOPRIO_CLASS_IDLE"}, 3 << 13),
    ],
)
def test_io_priority(box: Box, asked: dict[str, Any], found: int) -> None:
    container = box.create(with_process(box, ioPriority=asked)).start()
    assert io_priority(container.process.pid) == found
    session = container.exec("true", ioPriority=asked)
    assert session[0] == 0


@pytest.mark.parametrize(
    ("asked", "field"),
    [({}, "class"), ({"class": "X"}, "class"), ({"class": "IOPRIO_CLASS_BE", "priority": 8}, "priority")],
)
def test_io_priorities_that_cannot_be(box: Box, asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^process.ioPriority.{field}:"):
        box.create(with_process(box, ioPriority=asked))


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        ({"mode": "MPOL_BIND", "nodes": "0"}, "bind:0"),
        ({"mode": "MPOL_PREFERRED", "nodes": "0"}, "prefer:0"),
        ({"mode": "MPOL_PREFERRED_MANY", "nodes": "0"}, "prefer (many):0"),
        ({"mode": "MPOL_INTERLEAVE", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}, "interleave=static:0"),
        ({"mode": "MPOL_WEIGHTED_INTERLEAVE", "nodes": "0"}, "weighted interleave:0"),
        ({"mode": "MPOL_LOCAL"}, "local"),
        ({"mode": "MPOL_DEFAULT"}, "default"),
    ],
)
def test_memory_policy(box: Box, policy: dict[str, Any], shown: str) -> None:
    spec = box.spec()
    spec["linux"]["memoryPolicy"] = policy
    container = box.create(spec).start()
    maps = Path(f"/proc/{container.process.pid}/numa_maps").read_text().splitlines()
    assert all(line.partition(" ")[2].startswith(shown) for line in maps if "stack" in line or "heap" in line)
    assert any("stack" in line for line in maps)


def test_a_memory_policy_of_a_node_that_is_not_there(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "900-901"}
    with pytest.raises(StepFailed, match=r"step 'memory_policy' failed with EINVAL"):
        box.create(spec)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({}, "mode"),
        ({"mode": "MPOL_X"}, "mode"),
        ({"mode": "MPOL_BIND"}, "nodes"),
        ({"mode": "MPOL_LOCAL", "nodes": "0"}, "nodes"),
        ({"mode": "MPOL_BIND", "nodes": "1-"}, "nodes"),
        ({"mode": "MPOL_BIND", "nodes": "3-1"}, "nodes"),
        ({"mode": "MPOL_BIND", "nodes": "99999999999"}, "nodes"),
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["X"]}, r"flags\[0\]"),
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES", "MPOL_F_RELATIVE_NODES"]}, "flags"),
    ],
)
def test_memory_policies_that_cannot_be(box: Box, policy: dict[str, Any], field: str) -> None:
    spec = box.spec()
    spec["linux"]["memoryPolicy"] = policy
    with pytest.raises(InvalidArgument, match=f"^linux.memoryPolicy.{field}:"):
        box.create(spec)


@pytest.mark.parametrize(("domain", "number"), [("LINUX", "00000000"), ("LINUX32", "00000008")])
def test_personality(box: Box, domain: str, number: str) -> None:
    spec = box.spec("cat", "/proc/self/personality")
    spec["linux"]["personality"] = {"domain": domain}
    assert box.run(spec=spec).output().strip() == number


@pytest.mark.parametrize(
    ("personality", "field"), [({"domain": "BSD"}, "domain"), ({"domain": "LINUX", "flags": ["X"]}, "flags")]
)
def test_personalities_that_cannot_be(box: Box, personality: dict[str, Any], field: str) -> None:
    spec = box.spec()
    spec["linux"]["personality"] = personality
    with pytest.raises(InvalidArgument, match=f"^linux.personality.{field}:"):
        box.create(spec)


def allowed(text: str) -> str:
    return status_of(text)["Cpus_allowed_list"]


def test_cpu_affinity_of_an_exec(box: Box) -> None:
    container = box.create(box.spec()).start()
    everywhere = allowed(Path("/proc/self/status").read_text())
    assert allowed(container.exec("cat", "/proc/self/status")[1]) == everywhere
    for final in ("0", "0,0"):
        _, text = container.exec("cat", "/proc/self/status", execCPUAffinity={"initial": "0", "final": final})
        assert allowed(text) == "0"


def test_cpu_affinity_is_not_the_inits(box: Box) -> None:
    spec = with_process(box, "cat", "/proc/self/status", execCPUAffinity={"final": "0"})
    assert allowed(box.run(spec=spec).output()) == allowed(Path("/proc/self/status").read_text())


@pytest.mark.parametrize(("cpus", "error"), [("0-", InvalidArgument), ("x", InvalidArgument), ("8000", StepFailed)])
def test_cpu_affinities_that_cannot_be(box: Box, cpus: str, error: type[Exception]) -> None:
    container = box.create(box.spec()).start()
    with pytest.raises(error, match=r"execCPUAffinity.final|set_affinity"):
        container.exec("true", execCPUAffinity={"final": cpus})


def test_every_resource_limit(box: Box) -> None:
    """Below the machine's own, so that no privilege is needed."""
    names = {
        "RLIMIT_AS": ("Max address space", 1 << 40),
        "RLIMIT_CORE": ("Max core file size", 0),
        "RLIMIT_CPU": ("Max cpu time", 1000),
        "RLIMIT_DATA": ("Max data size", 1 << 33),
        "RLIMIT_FSIZE": ("Max file size", 1 << 34),
        "RLIMIT_LOCKS": ("Max file locks", 77),
        "RLIMIT_MEMLOCK": ("Max locked memory", 65536),
        "RLIMIT_MSGQUEUE": ("Max msgqueue size", 8192),
        "RLIMIT_NICE": ("Max nice priority", 0),
        "RLIMIT_NOFILE": ("Max open files", 100),
        "RLIMIT_NPROC": ("Max processes", 1000),
        "RLIMIT_RSS": ("Max resident set", 1 << 35),
        "RLIMIT_RTPRIO": ("Max realtime priority", 0),
        "RLIMIT_RTTIME": ("Max realtime timeout", 10**6),
        "RLIMIT_SIGPENDING": ("Max pending signals", 99),
        "RLIMIT_STACK": ("Max stack size", 1 << 23),
    }
    assert set(names) == set(RLIMITS)
    limits = [{"type": name, "soft": value, "hard": value} for name, (_, value) in names.items()]
    container = box.create(with_process(box, rlimits=limits)).start()
    text = Path(f"/proc/{container.process.pid}/limits").read_text()
    for title, value in names.values():
        line = next(line for line in text.splitlines() if line.startswith(title))
        assert line.removeprefix(title).split()[:2] == [str(value)] * 2, title


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_need_allow_no_more_than_the_command_needs(box: Box, no_new_privileges: bool) -> None:
    profile = least_profile(no_new_privileges)
    spec = with_process(box, "true", noNewPrivileges=no_new_privileges)
    spec["linux"]["seccomp"] = profile
    assert box.create(spec).start().wait().code == 0
    container = box.create(with_process(box, "sleep", "1000", noNewPrivileges=no_new_privileges)).start()
    assert container.exec("true", seccomp=profile)[0] == 0
    spec["process"]["args"] = ["no-such-command"]
    with pytest.raises(StartFailed, match="not found in"):
        box.create(spec).start()


def test_a_session_keyring_of_its_own(box: Box) -> None:
    container = box.create(box.spec()).start()
    _, text = container.exec("cat", "/proc/keys")
    assert f"_ses.{container.spec.id}" in text or text == ""  # /proc/keys is masked


def test_a_terminal_has_the_size_that_was_asked_for(box: Box) -> None:
    spec = with_process(box, "sh", "-c", "busybox stty size", terminal=True, consoleSize={"height": 11, "width": 22})
    assert box.run(spec=spec).output().strip() == "11 22"


@pytest.mark.parametrize(
    ("size", "field"), [({"height": 1}, "width"), ({"height": 65536, "width": 1}, "height"), ({"height": -1}, "height")]
)
def test_sizes_that_cannot_be(box: Box, size: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^process.consoleSize.{field}:"):
        box.create(with_process(box, terminal=True, consoleSize=size))


def test_a_terminal_without_a_devpts(box: Box, leaks: Machine) -> None:
    spec = with_process(box, terminal=True)
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != "/dev/pts"]
    with pytest.raises(StepFailed, match=r"step 'console' failed on dev/pts/ptmx with ENOENT"):
        box.create(spec)


@pytest.mark.parametrize(
    ("label", "module"), [({"apparmorProfile": "some"}, "apparmor"), ({"selinuxLabel": "a:b:c:d"}, "selinux")]
)
def test_a_label_for_a_module_that_the_kernel_does_not_run(
    box: Box, leaks: Machine, label: dict[str, str], module: str
) -> None:
    if module in Path("/sys/kernel/security/lsm").read_text() if Path("/sys/kernel/security/lsm").exists() else False:
        pytest.skip(f"this kernel runs {module}")
    with pytest.raises(StepFailed, match=rf"step 'write_labels'.*{module}"):
        box.create(with_process(box, **label))


def test_a_mount_label_without_selinux(box: Box, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0"
    with pytest.raises(StepFailed, match=r"step 'mount' failed on /dev with EINVAL.*context="):
        box.create(spec)


def nodes(container: Container, *paths: str) -> list[str]:
    return [
        container.exec("sh", "-c", f"head -c 1 {path} >/dev/null 2>&1 && echo yes || echo no")[1].strip()
        for path in paths
    ]


def test_device_rules(box: Box) -> None:
    """Nodes can be made of any device; which can be opened the control group decides."""
    spec = box.spec()
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{box.directory.name}"
    wanted = {"/dev/own-kmsg": (1, 11), "/dev/own-zero": (1, 5), "/dev/own-port": (1, 4)}
    spec["linux"]["devices"] = [
        {"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666}
        for path, (major, minor) in wanted.items()
    ]
    spec["linux"]["devices"].append({"path": "/dev/own-loop", "type": "b", "major": 7, "minor": 0, "fileMode": 0o666})
    spec["linux"]["resources"] = {
        "devices": [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "w"},
        ]
    }
    container = box.create(spec).start()
    assert nodes(container, *wanted, "/dev/null", "/dev/urandom") == ["no", "yes", "no", "yes", "yes"]
    _, text = container.exec("sh", "-c", "true > /dev/own-kmsg && echo written; true > /dev/own-loop")
    assert text.startswith("written") and "not permitted" in text


def test_the_structures_are_the_kernels() -> None:
    assert ctypes.sizeof(syscalls.sched_attr) == 56
    assert struct.calcsize("=IHHII") == 16


@pytest.mark.parametrize("action", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])
def test_a_filter_under_which_no_exec_can_appear(box: Box, action: str) -> None:
    """One that may be traced has its filter already when it is born in the container's PID namespace."""
    spec = box.spec()
    spec["process"]["capabilities"]["bounding"] = [*CAPABILITIES, "CAP_SYS_PTRACE"]
    container = box.create(spec).start()
    filter_ = {**least_profile(True), "defaultAction": action}
    with pytest.raises(StepFailed, match=r"'appear' failed: .*a filter that forbids clone"):
        container.exec("true", seccomp=filter_)
    assert container.exec("echo", "here") == (0, "here\n")
