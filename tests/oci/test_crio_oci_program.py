"""crio-oci as a program: how it is called, and what a container can see of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .command_line import PROGRAM, Oci, oci

pytestmark = pytest.mark.root
__all__ = ["oci"]


def test_the_command_line_in_runcs_words(oci: Oci) -> None:
    assert "no such command" in oci.refused("nosuch", code=3)
    assert "no such command" in oci.refused("help", "nosuch", code=3)
    done = oci.call("--criu", "/usr/sbin/criu", "list", "-q")
    assert (done.returncode, done.stdout) == (0, "") and "--criu is ignored" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(oci: Oci) -> None:
    line = oci.line("explain", oci.bundle("true"))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("words", "help_of", "code"), [(["nosuch"], "", 3), (["create"], " create", 1)])
def test_a_wrong_command_line_is_one_line(oci: Oci, words: list[str], help_of: str, code: int) -> None:
    log = oci.directory / "log"
    line = [str(PROGRAM), "--log", str(log), "--log-format", "json", *words]
    done = subprocess.run(line[:1] + words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.count("\n") == 1
    assert done.stderr.startswith("crio-oci: ") and done.stderr.endswith(f"; see crio-oci help{help_of}\n")
    subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True)
    assert log.exists() or not help_of, "the record for the engine"


def test_a_checkpoint_without_criu_leaves_nothing(oci: Oci) -> None:
    oci.running("c")
    images, work = oci.directory / "images", oci.directory / "work"
    words: list[str | Path] = ["checkpoint", "--image-path", images, "--work-path", work, "c"]
    assert "no program `criu`" in oci.refused(*words, env={**os.environ, "PATH": "/no/such"})
    assert not images.exists() and not work.exists()


def test_who_enters_a_container_runs_from_a_file_that_nobody_can_write_to(oci: Oci) -> None:
    """CVE-2019-5736: from the init, which waits in the container, to a write through /proc/PID/exe."""
    oci.ok("create", "-b", oci.bundle("true"), "c")
    pid = json.loads(oci.ok("state", "c"))["pid"]
    assert os.statvfs(f"/proc/{pid}/exe").f_flag & os.ST_RDONLY
    with pytest.raises(OSError, match=r"Read-only|busy"):
        os.open(f"/proc/{pid}/exe", os.O_WRONLY)
    opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert not [path for path in opened if not path.startswith(("socket:", "/dev/null", "/tmp/"))], opened


def test_who_waits_in_a_container_shows_no_path_of_the_host(oci: Oci) -> None:
    oci.ok("create", "-b", oci.bundle("true"), "c")
    pid = json.loads(oci.ok("state", "c"))["pid"]
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"crio-init\0"
    assert oci.ok("exec", "c", "cat", "/proc/1/cmdline") == "crio-init\0"
    oci.ok("start", "c")


def test_a_script_that_starts_it_otherwise_is_started_again(oci: Oci) -> None:
    code = "import sys; sys.argv[0] = 'crio-oci'; from crio_native.cli.oci import main; main()"
    line = [sys.executable, "-c", code, "--root", str(oci.state), "create", "-b", str(oci.bundle("true")), "c"]
    subprocess.run(line, check=True, timeout=30, stdin=subprocess.DEVNULL)
    pid = json.loads(oci.ok("state", "c"))["pid"]
    assert os.statvfs(f"/proc/{pid}/exe").f_flag & os.ST_RDONLY


def test_without_systemd_its_manager_is_refused_at_the_door(oci: Oci) -> None:
    if os.path.exists("/run/systemd/private"):
        pytest.skip("systemd runs here")
    refusal = oci.refused("--systemd-cgroup", "run", "-b", oci.bundle("true"), "c")
    assert refusal.startswith("crio-oci: systemd is not there to make cgroups: there is neither /run/systemd/private")
    assert len(refusal.splitlines()) == 1 and not oci.left()
