"""`make run` as a newcomer has it: the whole demonstration, and what is left of it when it ends in other ways."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crio_native.cli.scratch import wait_for

from ..machine import Machine, assert_machine_unchanged, machine_state, reap_orphans

COMMAND = (sys.executable, "-m", "crio_native.cli.demo")
SECONDS = 60
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.root


@contextmanager
def demonstration(*options: str, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*prefix, *COMMAND, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if words in line:
            return text
    raise AssertionError(f"{words!r} never came:\n{text}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    rest, _ = process.communicate(timeout=SECONDS)
    return process.returncode, rest


@pytest.fixture
def before() -> Machine:
    """Our processes and descriptors; of the names, none: what a demonstration will call its own is not known yet."""
    return machine_state("crio-native-demonstration")


def assert_nothing_left(scratch: Path, before: Machine, text: str = "") -> None:
    """Every name that a demonstration makes holds the random part of its directory's."""
    assert list(scratch.iterdir()) == []
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(scratch) in line]
    assert_machine_unchanged(before, suffix_of(text) if text else str(scratch))


def suffix_of(text: str) -> str:
    found = re.search(r"crio-native-(\w{8})/crio\.sock", text)
    assert found, text
    return found[1]


def test_once_shows_everything_and_leaves_nothing(tmp_path: Path, before: Machine) -> None:
    with demonstration("--once", "--scratch", str(tmp_path)) as process:
        status, text = finish(process)
    assert status == 0, text
    assert "hello from demo: I am pid 1, uid 0" in text
    assert "answers: a page from the pod" in text
    subjects = dict(re.findall(r"^ (\S[\w ]*?|  \S[\w ']*?)  +(.*?) *$", text, re.MULTILINE))
    assert set(subjects["namespaces"].split()) == {"pid", "net", "ipc", "uts", "mnt", "cgroup"}
    assert "sys_admin" not in subjects["capabilities"]
    assert subjects["no_new_privs"] == "yes"
    assert subjects["seccomp"].startswith("filter")
    assert "67108864" in subjects["  limits"]
    assert_nothing_left(tmp_path, before, text)


def test_ctrl_c_while_serving(tmp_path: Path, before: Machine) -> None:
    with demonstration("--scratch", str(tmp_path)) as process:
        text = read_until(process, "Serving")
        os.killpg(process.pid, signal.SIGINT)
        status, rest = finish(process)
    assert status == 0, rest
    assert_nothing_left(tmp_path, before, text)


@pytest.mark.parametrize("stage", ["build an image", "start the daemon", "import the image", "create the container"])
def test_ctrl_c_after_a_stage(tmp_path: Path, before: Machine, stage: str) -> None:
    """Twice: the second must not cut the removal short."""
    with demonstration("--scratch", str(tmp_path)) as process:
        read_until(process, stage)
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)
        status, rest = finish(process)
    assert status == 130, rest
    assert_nothing_left(tmp_path, before)


def test_ctrl_c_while_the_daemon_starts(tmp_path: Path, before: Machine) -> None:
    """It lives, but does not serve yet: nothing is asked of it, and nothing is called left behind."""
    with demonstration("--scratch", str(tmp_path)) as process:
        wait_for(lambda: next(tmp_path.glob("*/daemon.log"), None) is not None, SECONDS, "the daemon's process")
        os.killpg(process.pid, signal.SIGINT)
        status, text = finish(process)
    assert status == 130, text
    assert "left behind" not in text and "serve the CRI" not in text
    assert_nothing_left(tmp_path, before)


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.2, 0.3, 0.4, 0.6])
def test_ctrl_c_in_the_first_second(tmp_path: Path, before: Machine, delay: float) -> None:
    """Whatever is being imported or made: no traceback, and nothing left."""
    with demonstration("--scratch", str(tmp_path), prefix=("env", "--block-signal=INT")) as process:
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        status, text = finish(process)
    assert status in (130, -signal.SIGINT), text
    assert "Traceback" not in text and "left behind" not in text
    assert_nothing_left(tmp_path, before)


def test_ctrl_c_during_setup_keeps_the_environment(tmp_path: Path) -> None:
    """The look whether .venv works was interrupted with it, which read as: it is broken, make it anew."""
    checkout = tmp_path / "checkout"
    (checkout / "helpers").mkdir(parents=True)
    shutil.copy(ROOT / "helpers/setup", checkout / "helpers/setup")
    slow = checkout / ".venv/bin/python"
    slow.parent.mkdir(parents=True)
    slow.write_text("#!/bin/sh\ntouch looking\ntrap 'exit 1' INT\nsleep 5 & wait\n")
    slow.chmod(0o755)
    process = subprocess.Popen(
        [checkout / "helpers/setup"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    wait_for((checkout / "looking").exists, SECONDS, "the look at .venv")
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, text
    assert text == "" and slow.exists()


def test_a_daemon_that_is_killed(tmp_path: Path, before: Machine) -> None:
    """Its container lives on; the demonstration ends it."""
    with demonstration("--scratch", str(tmp_path)) as process:
        text = read_until(process, "Serving")
        socket = re.search(r"unix://(\S+)", text)
        assert socket
        os.kill(daemon_pid(str(Path(socket[1]).parent)), signal.SIGKILL)
        status, rest = finish(process)
    assert status == 1
    assert "the daemon ended by itself" in rest
    assert_nothing_left(tmp_path, before, text)


@pytest.mark.parametrize("ends", ["the demonstration", "its daemon too"])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, before: Machine, ends: str) -> None:
    """Daemon, pod, bridge, table, groups, mounts; not what belongs to a run that lives, and nobody else's directory."""
    others = tmp_path / "crio-native-strange1"
    others.mkdir()
    (others / "lock").touch()
    os.chown(others, 1, 1)
    with demonstration("--scratch", str(tmp_path)) as alive, demonstration("--scratch", str(tmp_path)) as killed:
        serving, text = read_until(alive, "Serving"), read_until(killed, "Serving")
        directory = tmp_path / f"crio-native-{suffix_of(text)}"
        pid = daemon_pid(str(directory))
        killed.kill()
        finish(killed)
        if ends == "its daemon too":
            os.kill(pid, signal.SIGKILL)
        with demonstration("--once", "--scratch", str(tmp_path)) as process:
            status, told = finish(process)
        assert status == 0, told
        assert f"remove what a killed run left, {directory}" in told.replace("\n", "") and "left behind" not in told
        reap_orphans()
        assert not Path(f"/proc/{pid}").exists()
        assert not nft_tables(suffix_of(text)) and nft_tables(suffix_of(serving))
        assert sorted(tmp_path.iterdir()) == sorted([others, tmp_path / f"crio-native-{suffix_of(serving)}"])
        os.killpg(alive.pid, signal.SIGINT)
        assert finish(alive)[0] == 0
    shutil.rmtree(others)
    assert_nothing_left(tmp_path, before, text)
    assert_nothing_left(tmp_path, before, serving)


def nft_tables(suffix: str) -> list[str]:
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    return [line for line in tables.splitlines() if suffix in line]


def test_a_daemon_that_does_not_start(tmp_path: Path, before: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_LOG_LEVEL", "loud")
    with demonstration("--once", "--scratch", str(tmp_path)) as process:
        status, text = finish(process)
    assert status == 1
    assert "the daemon ended; the end of its log" in text
    assert "loud" in text
    assert_nothing_left(tmp_path, before)


def test_a_directory_too_deep_for_a_socket(tmp_path: Path, before: Machine) -> None:
    deep = tmp_path / ("deep" * 25)
    deep.mkdir()
    with demonstration("--once", "--scratch", str(deep)) as process:
        status, text = finish(process)
    assert status == 1
    assert re.match(r"scratch: longer than the \d+ bytes", text)
    assert_nothing_left(deep, before)


def test_not_root() -> None:
    words = ("setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all")
    with demonstration("--once", prefix=words) as process:
        status, text = finish(process)
    assert status == 1
    assert text.strip().endswith("run it as root")


def daemon_pid(directory: str) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if f"{directory}/crio.conf" in words:
                return int(entry.name)
    raise AssertionError("the daemon's process is not there")
