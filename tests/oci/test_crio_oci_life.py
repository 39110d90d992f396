"""crio-oci in the words that runc's users rely on: containers come, run and go."""

from __future__ import annotations

import json
import re
import signal
import subprocess

import pytest

from ..waiting import wait_for
from .command_line import Oci, oci
from .conftest import spec_of

pytestmark = pytest.mark.root
__all__ = ["oci"]


def test_create_start_kill_delete(oci: Oci) -> None:
    bundle = oci.bundle("sh", "-c", "trap 'exit 7' TERM; echo up >/up; while :; do sleep 0.01; done")
    oci.ok("create", "--bundle", bundle, "--pid-file", bundle / "pid", "c")
    state = json.loads(oci.ok("state", "c"))
    pid = state["pid"]
    assert (state["status"], state["bundle"], state["rootfs"]) == ("created", str(bundle), str(oci.root))
    assert (bundle / "pid").read_text() == str(pid)
    assert (oci.directory / "rootfs/up").exists() is False
    oci.ok("start", "c")
    assert oci.status("c") == "running"
    wait_for((oci.root / "up").exists)
    assert "not stopped: running" in oci.refused("delete", "c")
    oci.ok("kill", "c", "SIGTERM")
    wait_for(lambda: oci.status("c") == "stopped")
    assert "container not running" in oci.refused("kill", "c", "TERM")
    oci.ok("delete", "c")
    assert "does not exist" in oci.refused("state", "c")
    assert not oci.left()


def test_run_gives_the_containers_own_exit_code_and_leaves_nothing(oci: Oci) -> None:
    done = oci.call("run", "-b", oci.bundle("sh", "-c", "cat; echo err >&2; exit 9"), "c", given="in")
    assert (done.returncode, done.stdout, done.stderr) == (9, "in", "err\n")
    assert not oci.left()


def test_run_of_a_container_that_is_killed(oci: Oci) -> None:
    line = oci.line("run", "-b", oci.bundle("sh", "-c", "echo up; cat"), "c")
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        oci.ok("kill", "c", "KILL")
        assert running.wait(10) == 128 + 9


def test_run_passes_signals_on(oci: Oci) -> None:
    bundle = oci.bundle("sh", "-c", "trap 'exit 4' USR1; echo up; while :; do sleep 0.01; done")
    line = oci.line("run", "-b", bundle, "c")
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        running.send_signal(signal.SIGUSR1)
        assert running.wait(10) == 4


def test_run_keep_leaves_a_stopped_container(oci: Oci) -> None:
    oci.ok("run", "--keep", "-b", oci.bundle("true"), "c")
    assert oci.status("c") == "stopped"
    assert "has stopped" in oci.refused("start", "c")
    oci.ok("delete", "c")


def test_an_id_is_taken_once(oci: Oci) -> None:
    oci.running("c")
    assert "container with id exists" in oci.refused("create", "-b", oci.bundle("true"), "c")
    assert oci.status("c") == "running"


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a b", "ä", "x" * 256])
def test_ids_that_would_be_bad_names_of_directories(oci: Oci, name: str) -> None:
    assert "container ID: invalid" in oci.refused("create", "-b", oci.bundle("true"), name)
    assert not oci.state.exists()


def test_delete_force(oci: Oci) -> None:
    oci.running("c")
    oci.ok("delete", "--force", "c")
    oci.ok("delete", "--force", "c")  # gone already, which is what was asked for
    oci.ok("create", "-b", oci.bundle("true"), "d")
    oci.ok("delete", "d")  # never started
    (oci.state / "half").mkdir()  # of a create that was killed before it wrote anything
    oci.ok("delete", "-f", "half")
    assert not oci.left()


def test_delete_by_a_regular_expression(oci: Oci) -> None:
    for name in ("job-1", "job-2", "other"):
        spec = spec_of(str(oci.root), ("sleep", "100"))
        spec["linux"]["cgroupsPath"] = f"/{oci.name}-{name}"
        oci.ok("run", "--detach", "-b", oci.write(spec), name)
    assert "'job-1' that is not stopped" in oci.refused("delete", "--regex", "^job-[0-9]$")
    assert "is no regular expression" in oci.refused("delete", "--regex", "job-[")
    oci.ok("delete", "--force", "--regex", "^job-[0-9]$")
    assert oci.ok("list", "-q") == "other\n"
    oci.ok("delete", "-f", "other")
    assert not oci.left()


def test_ps_and_list(oci: Oci) -> None:
    oci.running("c")
    pid = json.loads(oci.ok("state", "c"))["pid"]
    assert json.loads(oci.ok("ps", "-f", "json", "c")) == [pid]
    title, line = oci.ok("ps", "c").splitlines()
    assert "PID" in title and str(pid) in line
    assert "no column PID" in oci.refused("ps", "c", "-o", "comm")
    assert oci.ok("list", "-q") == "c\n"
    (entry,) = json.loads(oci.ok("list", "--format", "json"))
    assert (entry["id"], entry["pid"], entry["status"], entry["owner"]) == ("c", pid, "running", "root")
    assert re.match(r"ID +PID +STATUS +BUNDLE +CREATED +OWNER\n", oci.ok("list"))


def test_kill_all_reaches_every_process(oci: Oci) -> None:
    oci.running("c", "sh", "-c", "sleep 1000 & sleep 1000 & wait")
    wait_for(lambda: len(json.loads(oci.ok("ps", "-f", "json", "c"))) == 3)
    oci.ok("kill", "--all", "c", "KILL")
    wait_for(lambda: oci.status("c") == "stopped")
    assert json.loads(oci.ok("ps", "-f", "json", "c")) == []


def test_hooks_after_the_fact(oci: Oci) -> None:
    note = oci.directory / "note"
    spec = oci.spec("sleep", "1000")
    shell = {"path": "/bin/sh", "args": ["sh", "-c", f"cat >>{note}; echo >>{note}"]}
    spec["hooks"] = {"poststart": [shell], "poststop": [{"path": "/bin/false"}, shell]}
    oci.ok("run", "-d", "-b", oci.write(spec), "c")
    done = oci.call("delete", "-f", "c")
    assert done.returncode == 0
    assert "poststop[0]" in done.stderr or "/bin/false" in done.stderr
    told = [json.loads(line) for line in note.read_text().split("\n") if line]
    assert [state["status"] for state in told] == ["running", "stopped"]
    spec["hooks"] = {"poststart": [{"path": "/bin/false"}]}
    oci.ok("create", "-b", oci.write(spec), "d")
    assert "poststart" in oci.refused("start", "d")
    assert "does not exist" in oci.refused("state", "d")
    assert not oci.left()


def test_hooks_run_in_the_bundle_and_flags_are_relative_to_the_caller(oci: Oci) -> None:
    spec = oci.spec("true")
    kinds = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
    log = oci.directory / "hooks"
    spec["hooks"] = {kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"pwd >> {log}"]}] for kind in kinds}
    bundle = oci.write(spec)
    elsewhere = oci.directory / "elsewhere"
    elsewhere.mkdir()
    oci.ok("create", "--bundle", bundle, "--pid-file", "pid", "c", cwd=elsewhere)
    assert (elsewhere / "pid").exists()
    oci.ok("start", "c", cwd=elsewhere)
    wait_for(lambda: oci.status("c") == "stopped")
    oci.ok("delete", "c", cwd=elsewhere)
    assert log.read_text().split() == [str(path) for path in (bundle, bundle, oci.root, bundle, bundle)]
