"""crio-oci exec: one more process in a running container."""

from __future__ import annotations

import json
import subprocess

import pytest

from ..waiting import wait_for
from .command_line import Oci, end, oci
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
