"""crio-oci exec: one more process in a running container."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from crio_native.linux import process
from crio_native.linux.cgroup import hierarchy

from ..waiting import wait_for
from .command_line import Oci, children, end, oci
from .conftest import least_profile, spec_of

pytestmark = pytest.mark.root
__all__ = ["oci"]


def test_exec(oci: Oci) -> None:
    oci.running("c")
    done = oci.call("exec", "c", "sh", "-c", "cat; exit 3", given="hello")
    assert (done.returncode, done.stdout) == (3, "hello")
    out = oci.ok("exec", "--cwd", "/tmp", "-e", "A=b", "--user", "5:6", "-g", "7", "c", "sh", "-c", "pwd; echo $A; id")
    assert out.splitlines() == ["/tmp", "b", "uid=5 gid=6 groups=6,7"] or "uid=5 gid=6" in out
    assert oci.call("exec", "c", "sh", "-c", "kill -9 $$").returncode == 128 + 9


def test_exec_with_a_process_file_has_nothing_of_the_containers_own(oci: Oci) -> None:
    oci.running("c")
    process = {"args": ["env"], "cwd": "/", "env": ["PATH=/bin", "ONLY=this", "HOME=/h"], "user": {"uid": 0, "gid": 0}}
    (oci.directory / "process.json").write_text(json.dumps(process))
    assert set(oci.ok("exec", "-p", oci.directory / "process.json", "c").split()) == set(process["env"])


def test_exec_detached(oci: Oci) -> None:
    oci.running("c")
    pid_file = oci.directory / "pid"
    oci.ok("exec", "-d", "--pid-file", pid_file, "c", "sh", "-c", "echo $$ >/own; sleep 1000")
    pid = int(pid_file.read_text())
    assert pid in json.loads(oci.ok("ps", "--format", "json", "c"))
    wait_for(lambda: (oci.root / "own").exists() and (oci.root / "own").read_text().strip() != str(pid))
    end(pid)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("c",), "COMMAND"),
        (("c", "nosuch"), "executable file not found in $PATH"),
        (("--cwd", "/no/where", "c", "true"), "chdir"),
        (("--user", "1x", "c", "id"), "--user: must be a number"),
        (("--user", "-1", "c", "id"), "--user: must be a number"),
        (("--user", "4294967296", "c", "id"), "--user: must be a number"),  # CVE-2026-30892: would be 0
        (("--user", "9" * 5000, "c", "id"), "--user: must be a number"),
        (("--cap", "CAP_NONE", "c", "id"), "is not a capability"),
        (("--cgroup", "../up", "c", "id"), "components are not allowed"),
        (("--cgroup", "nosuch", "c", "id"), "has no such group"),
        (("--detach", "--tty", "c", "id"), "--console-socket"),
        (("--console-socket", "/x", "c", "id"), "without a terminal"),
        (("gone", "id"), "does not exist"),
    ],
)
def test_exec_refuses(oci: Oci, words: tuple[str, ...], text: str) -> None:
    oci.running("c")
    assert text in oci.refused("exec", *words, code=255)


def test_exec_in_a_container_that_cannot(oci: Oci) -> None:
    oci.running("c")
    oci.ok("pause", "c")
    assert "paused container: 'c'; resume it first" in oci.refused("exec", "c", "id", code=255)
    line = oci.line("exec", "--ignore-paused", "c", "sh", "-c", "exit 4")
    with subprocess.Popen(line, stdin=subprocess.DEVNULL) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        oci.ok("resume", "c")
        assert waiting.wait(10) == 4
    oci.ok("kill", "c", "9")
    wait_for(lambda: oci.status("c") == "stopped")
    assert "container not running" in oci.refused("exec", "c", "id", code=255)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_an_exec_that_waits_for_a_paused_container_can_be_interrupted(
    oci: Oci, number: signal.Signals, detach: tuple[str, ...]
) -> None:
    oci.running("c")
    oci.ok("pause", "c")
    line = oci.line("exec", "--ignore-paused", *detach, "c", "touch", "/ran")
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as waiting:
        wait_for(lambda: children(waiting.pid))
        (born,) = children(waiting.pid)
        waiting.send_signal(number)
        assert waiting.wait(10) == 255
        assert waiting.stderr is not None and waiting.stderr.read().endswith("crio-oci: interrupted\n")
    oci.ok("resume", "c")
    wait_for(lambda: process.start_time(born) is None)
    assert not (oci.root / "ran").exists()


@pytest.mark.skipif(not hierarchy().v1_freezer, reason="a host with the freezer of cgroup v1")
def test_an_interrupted_exec_that_the_old_freezer_stopped_ends_when_it_is_thawed(oci: Oci) -> None:
    oci.running("c")
    group = Path(f"{hierarchy().v1_freezer}/{oci.name}/c")
    (group / "freezer.state").write_text("FROZEN")
    line = oci.line("exec", "--ignore-paused", "c", "touch", "/ran")
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as waiting:
        wait_for(lambda: children(waiting.pid))
        (born,) = children(waiting.pid)
        wait_for(lambda: str(born) in (group / "cgroup.procs").read_text().split())
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(10) == 255
        assert waiting.stderr is not None
        assert f"process {born} has been killed, and ends when the kernel lets it go on" in waiting.stderr.readline()
    assert os.waitpid(born, os.WNOHANG) == (0, 0)  # it lives, and is left to us
    oci.ok("resume", "c")
    os.waitpid(born, 0)
    assert not (oci.root / "ran").exists()


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_of_an_exec_need_allow_no_more_either(oci: Oci, no_new_privileges: bool) -> None:
    spec = spec_of(str(oci.root), ("sleep", "1000"))
    profile = least_profile(no_new_privileges)
    profile["syscalls"][0]["names"] += ["nanosleep", "clock_nanosleep"]
    spec["linux"]["seccomp"] = profile
    spec["process"]["noNewPrivileges"] = no_new_privileges
    oci.ok("run", "--detach", "-b", oci.write(spec), "c")
    oci.ok("exec", "c", "true")
    assert oci.call("exec", "c", "false").returncode == 1
