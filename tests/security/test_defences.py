"""Defences that no weakened build is made for, and those of `crio-oci`, whose processes are not a launcher's."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import StepFailed, Unavailable
from crio_native.linux.cgroup import Cgroup
from crio_native.monitor.client import binary_path
from crio_native.oci.runtime import ExecSpec, UserRequest

from ..oci.conftest import CAPABILITIES, PARENT
from ..waiting import wait_for
from .attacks import DETOUR
from .conftest import Lab, laboratory

pytestmark = pytest.mark.root

CRIO_OCI = binary_path().with_name("crio-oci")
WRITES_NOTHING = 'for n in 3 4 5 6 7 8 9; do (: >>/proc/self/fd/$n) 2>/dev/null && echo "opened $n"; done; echo done'


@pytest.fixture
def lab(tools: Path) -> Iterator[Lab]:
    with laboratory("", tools) as lab:
        yield lab


def test_a_child_that_keeps_the_pipe_does_not_hold_an_exec(lab: Lab) -> None:
    """CVE-2022-1708 and its kin: the exec has ended when its own process has."""
    container = lab.create(lab.spec()).start()
    read, write = os.pipe()
    process = {**container.spec.spec["process"], "args": ["sh", "-c", "sleep 1000 & echo told"]}
    began = time.monotonic()
    session = lab.runtime.exec(container.spec.id, container.process, "", ExecSpec(process, stdout=write))
    try:
        assert session.result().code == 0
        assert time.monotonic() - began < 5
        assert os.read(read, 100) == b"told\n"
    finally:
        session.close()
        os.close(read)
        os.close(write)


def test_mounts_of_a_privileged_container_stay_inside(lab: Lab) -> None:
    spec = lab.spec("sh", "-c", "mount -t tmpfs evil /data && grep evil /proc/self/mountinfo && sleep 1000")
    volume = lab.directory / "volume"
    volume.mkdir()
    spec["mounts"].append({"destination": "/data", "type": "bind", "source": str(volume), "options": ["rbind"]})
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] = [*CAPABILITIES, "CAP_SYS_ADMIN"]
    container = lab.create(spec).start()
    while "evil" not in container.output():
        assert lab.runtime.is_alive(container.process), container.output("stderr")
    assert "evil" not in Path("/proc/self/mountinfo").read_text()


def test_no_abstract_socket_of_ours_is_there_to_connect_to(lab: Lab) -> None:
    """CVE-2020-15257: a container in the host's network namespace sees its abstract sockets."""
    spec = lab.spec("cat", "/proc/net/unix")
    spec["linux"]["namespaces"].remove({"type": "network"})
    seen = {line.split()[6] for line in lab.output_of(spec=spec).splitlines()[1:] if " @" in line}
    ours = set()
    for pid in lab.launchers.pids():
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                ours.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    assert any(target.startswith("socket:") for target in ours)
    assert not {f"socket:[{inode}]" for inode in seen} & ours


def test_annotations_change_nothing(lab: Lab) -> None:
    """CVE-2024-3154: who writes annotations is not who decides what a container may do."""
    spec = lab.spec("cat", "/proc/self/status")
    plain = lab.output_of(spec=spec)
    spec["annotations"] = {
        "org.systemd.property.ExecStart": "/bin/evil",
        "run.oci.keep_original_groups": "1",
        "run.oci.seccomp_bpf_data": "AAAA",
        "io.kubernetes.cri-o.userns-mode": "auto",
    }
    interesting = ("Cap", "Uid", "Gid", "Groups", "Seccomp", "NoNewPrivs")

    def privileges(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(interesting)]

    assert privileges(lab.output_of(spec=spec)) == privileges(plain)


def test_digits_are_a_number_whatever_the_image_calls_so(lab: Lab) -> None:
    """The image's root is called 1000, and its group 2000."""
    with (lab.root / "etc/passwd").open("a") as passwd, (lab.root / "etc/group").open("a") as group:
        passwd.write("1000:x:0:0:evil:/evil:/bin/sh\n")
        group.write("2000:x:0:\n")
    shown = lab.output_of("sh", "-c", "id -u; id -G; echo $HOME", user=UserRequest("1000:2000", "", [3000]))
    assert shown == "1000\n2000 3000\n/\n"
    spec = lab.spec("sh", "-c", "id -u; echo $HOME")
    spec["process"]["user"] = {"uid": 1000, "gid": 1000}
    spec["process"]["env"] = ["PATH=/bin"]
    assert lab.output_of(spec=spec) == "1000\n/\n"


@pytest.mark.parametrize("name", ["-1", "+5", " 5", "\u0663", "0x10", "1_000"])
def test_what_only_python_takes_for_a_number_is_a_name(lab: Lab, name: str) -> None:
    with pytest.raises(StepFailed, match="no user"):
        lab.create(lab.spec(), user=UserRequest(name))
    with pytest.raises(StepFailed, match="no group"):
        lab.create(lab.spec(), user=UserRequest("7", name))


def test_a_newcomer_that_is_stopped_keeps_no_other_container_waiting(lab: Lab) -> None:
    """There is one launcher, and root in a container may stop what is root and has just been born there."""
    hostile, other = lab.create(lab.spec("hostile", "stop")).start(), lab.create(lab.spec()).start()
    wait_for(lambda: "stopping" in hostile.output(), "the attacker")
    request = ExecSpec({**hostile.spec.spec["process"], "args": ["true"]}, waits=False)
    stopped = [lab.runtime.exec(hostile.spec.id, hostile.process, "", request) for _ in range(12)]
    try:
        assert select.select(stopped, [], [], 1)[0] != stopped, "nobody was stopped"
        assert other.exec("echo", "here") == (0, "here\n")
    finally:
        for session in stopped:
            session.kill()
        codes = []
        for session in stopped:
            with contextlib.suppress(Unavailable):  # killed before it could say that it runs
                codes.append(session.result().code)
            session.close()
    assert set(codes) <= {0, 137}


@pytest.mark.parametrize("shared", [False, True])
def test_no_process_of_the_host_has_the_memory_of_one_that_others_may_trace(
    lab: Lab, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a PID namespace of its own nobody is there to trace an init while it becomes one."""
    first = lab.create(lab.spec()).start()
    spec = lab.spec()
    spec["linux"]["cgroupsPath"] = f"{PARENT}/memory{os.getpid()}"
    if shared:
        spec["linux"]["namespaces"][0]["path"] = f"/proc/{first.process.pid}/ns/pid"
    found: set[int] = set()

    def look(group: Cgroup) -> None:
        complete(group)  # an init waits for it, in the midst of its plan
        wait_for(lambda: _named("crio-init") - before, "an init")
        for init in _named("crio-init") - before:
            found.update(pid for pid in _named("crio-spare") if _share_memory(init, pid))

    complete, before = Cgroup.complete, _named("crio-init")
    monkeypatch.setattr(Cgroup, "complete", look)
    lab.create(spec)
    assert bool(found) is not shared


def _named(name: str) -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text() == f"{name}\n":
                found.add(int(entry.name))
    return found


def _share_memory(one: int, other: int) -> bool:
    """kcmp(2)"""
    return bool(ctypes.CDLL(None).syscall(312, one, other, 1, 0, 0) == 0)


# -- crio-oci ----------------------------------------------------------------------------------------------------


class Bundle:
    """A container of crio-oci."""

    def __init__(self, lab: Lab, spec: dict[str, Any]) -> None:
        self.directory, self.state = lab.directory / "bundle", lab.directory / "state"
        self.directory.mkdir()
        (self.directory / "config.json").write_text(json.dumps(spec))
        self.name = f"attack{os.getpid()}"

    def call(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [str(CRIO_OCI), "--root", str(self.state), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, **more)

    def start(self) -> None:
        """Detached; it keeps the streams that it is given, so it is given none."""
        words = ["--root", str(self.state), "run", "--detach", "--bundle", str(self.directory), self.name]
        null = subprocess.DEVNULL
        subprocess.run([CRIO_OCI, *words], check=True, timeout=30, stdin=null, stdout=null, stderr=null)

    def run(self, **more: Any) -> str:
        done = self.call("run", "--bundle", str(self.directory), self.name, **more)
        return done.stdout + done.stderr


@contextlib.contextmanager
def bundle_of(lab: Lab, spec: dict[str, Any]) -> Iterator[Bundle]:
    spec["linux"]["cgroupsPath"] = f"/crio-native-attack-oci-{os.getpid()}"
    bundle = Bundle(lab, spec)
    try:
        yield bundle
    finally:
        bundle.call("delete", "--force", bundle.name)


def test_crio_oci_gives_no_writable_interpreter_away(lab: Lab) -> None:
    """CVE-2019-5736: no process of crio-oci remains that would keep the file busy."""
    interpreter = lab.interpreter.read_bytes()
    start = interpreter.index(b"/lib64/ld-") if b"/lib64/ld-" in interpreter else interpreter.index(b"/lib/ld-")
    linker = lab.root / interpreter[start : interpreter.index(b"\0", start)].decode().lstrip("/")
    linker.parent.mkdir(parents=True, exist_ok=True)
    linker.write_bytes((lab.tools / "loader").read_bytes())
    linker.chmod(0o755)
    (lab.root / "hold").write_text(f"sleep 0.5; {WRITES_NOTHING}\n")
    with bundle_of(lab, lab.spec("/proc/self/exe")) as bundle:
        assert bundle.run() == "done\n"


def test_crio_oci_passes_no_descriptor_of_its_caller_on(lab: Lab) -> None:
    """CVE-2024-21626: an engine that forgot O_CLOEXEC does not open the host."""
    leak = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with bundle_of(lab, lab.spec("sh", "-c", "ls /proc/self/fd; cat /proc/self/fd/*/etc/hostname")) as bundle:
            text = bundle.run(pass_fds=[leak])
        assert set(text.splitlines()[:4]) == {"0", "1", "2", "3"}  # 3 is the directory that ls reads
        assert "No such file" in text.splitlines()[4]
    finally:
        os.close(leak)


WRONG_USERS = ["1000abc", "-1", "+0", " 0", "0x0", "4294967295", "4294967296", "1000:", "1000:-1", ":0", "٣", "1e3"]


def test_crio_oci_exec_refuses_what_is_no_user(lab: Lab) -> None:
    """CVE-2026-30892: half a number became another user."""
    with bundle_of(lab, lab.spec("sleep", "1000")) as bundle:
        bundle.start()
        assert bundle.call("exec", "--user", "1000:7", bundle.name, "id", "-u").stdout == "1000\n"
        for user in WRONG_USERS:
            done = bundle.call("exec", "--user", user, bundle.name, "id", "-u")
            assert done.returncode != 0 and done.stdout == "" and done.stderr, user


def test_who_traces_an_exec_of_crio_oci_finds_no_more_than_itself(lab: Lab) -> None:
    spec = lab.spec("sh", "-c", "hostile trace >/tmp/seen")
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] = [*CAPABILITIES, "CAP_SYS_PTRACE"]
    seen = lab.root / "tmp/seen"
    with bundle_of(lab, spec) as bundle:
        bundle.start()
        wait_for(lambda: seen.exists() and "tracing" in seen.read_text(), "the attacker")
        for _ in range(10):
            assert bundle.call("exec", "--env", DETOUR, bundle.name, "echo", "here").stdout == "here\n"
    assert "stronger" not in seen.read_text()


def test_crio_oci_tells_a_terminal_nothing(lab: Lab) -> None:
    """Engines print what it says, and whoever reads that has a terminal."""
    with bundle_of(lab, lab.spec("/none\x1b[31m\nforged")) as bundle:
        said = bundle.run().rstrip("\n")
        assert "forged" in said and said.isprintable()
        said = bundle.call("run", "--bundle", "/none\x1b[31m\nforged", "other").stderr.rstrip("\n")
        assert "forged" in said and said.isprintable()
