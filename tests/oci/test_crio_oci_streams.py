"""crio-oci's streams, terminals and descriptors, and the container's."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..waiting import wait_for
from .command_line import PROGRAM, Oci, Receiver, end, oci
from .conftest import CAPABILITIES

pytestmark = pytest.mark.root
__all__ = ["oci"]

SCRIPT = [sys.executable, "-c", "from crio_native.cli.oci import main; main()"]  # as the one that pip installs


@pytest.mark.parametrize("program", [[str(PROGRAM)], SCRIPT], ids=["program", "script"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_the_null_device(oci: Oci, closed: str, program: list[str]) -> None:
    """Not a file of ours, in us or in the container."""
    saying = oci.directory / "log"

    def call(*words: str | Path) -> int:
        line = [*program, "--log", str(saying), "--root", str(oci.state), *map(str, words)]
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *line]
        null = subprocess.DEVNULL
        with open(oci.directory / "errors", "w+") as errors:  # a file: an exec'ed process would keep a pipe open
            code = subprocess.run(shell, stdin=null, stdout=null, stderr=errors, timeout=30).returncode
            errors.seek(0)
            assert "Traceback" not in errors.read()
        return code

    script = "for each in 0 1 2; do readlink /proc/self/fd/$each; done > /streams; test -e /proc/self/fd/3 || exit 4"
    assert call("run", "-b", oci.bundle("sh", "-c", script), "c") == 4
    streams = (oci.root / "streams").read_text().split()
    numbers = [number for number, mark in enumerate(("<&-", " >&-", "2>&-")) if mark in " " + closed]
    assert all(streams[number] == "/dev/null" for number in numbers if number != 1)
    oci.running("c")
    assert call("exec", "c", "sh", "-c", "exit 4") == 4
    pid_file = oci.directory / "pid"
    assert call("exec", "-d", "--pid-file", pid_file, "c", "sleep", "1000") == 0
    end(int(pid_file.read_text()))
    for words in (["ps", "c"], ["list"], ["state", "c"], ["pause", "c"], ["resume", "c"]):
        assert call(*words) == 0, words
    assert call("update", "--pids-limit", "50", "c") == call("kill", "c", "KILL") == call("delete", "-f", "c") == 0
    assert call("state", "c") == 1 and "does not exist" in saying.read_text()


def test_an_output_that_cannot_be_written_is_an_error(oci: Oci) -> None:
    with open("/dev/full", "w") as full:
        line = oci.line("list")
        done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "no space left on device" in done.stderr
        assert subprocess.run(line, stdin=subprocess.DEVNULL, stdout=full, stderr=full).returncode == 1
        assert subprocess.run([*line, "--nonsense"], stdin=subprocess.DEVNULL, stderr=full).returncode == 1


def test_a_terminal_goes_to_the_console_socket(oci: Oci) -> None:
    receiver = Receiver(oci.directory / "console")
    size = {"height": 11, "width": 22}
    bundle = oci.bundle("sh", "-c", "test -t 0 && echo yes", terminal=True, consoleSize=size)
    oci.ok("create", "-b", bundle, "--console-socket", receiver.path, "c")
    master = receiver.take()
    assert os.get_terminal_size(master) == (22, 11)
    oci.ok("start", "c")
    assert "yes" in read_all(master)


def test_exec_in_a_terminal_by_console_socket(oci: Oci) -> None:
    oci.running("c")
    receiver = Receiver(oci.directory / "console")
    pid_file = oci.directory / "pid"
    words: list[str | Path] = ["-d", "-t", "--console-socket", receiver.path, "--pid-file", pid_file]
    oci.ok("exec", *words, "c", "sh", "-c", "test -t 1 && echo yes")
    assert "yes" in read_all(receiver.take())
    os.waitpid(int(pid_file.read_text()), 0)


def read_all(master: int) -> str:
    text = b""
    while True:
        try:
            more = os.read(master, 4096)
        except OSError:  # EIO: nobody has the other end any more
            more = b""
        if not more:
            os.close(master)
            return text.decode()
        text += more


@pytest.mark.parametrize(("verb", "capability"), [("run", ""), ("exec", ""), ("exec", "CAP_SYS_PTRACE")])
def test_a_terminal_in_the_foreground(oci: Oci, verb: str, capability: str) -> None:
    """capability: of the container, where an exec comes late to its session."""
    script = "read line; echo got:$line; test -t 0 && exit 5"
    if verb == "run":
        words = ["run", "-b", str(oci.bundle("sh", "-c", script, terminal=True)), "c"]
    else:
        spec = oci.spec("sleep", "1000")
        spec["process"]["capabilities"]["bounding"] = [*CAPABILITIES, *([capability] if capability else [])]
        oci.ok("run", "--detach", "--bundle", oci.write(spec), "c")
        words = ["exec", "-t", "c", "sh", "-c", script]
    pid, master = pty.fork()
    if pid == 0:
        os.execv(PROGRAM, oci.line(*words))
    os.write(master, b"typed\n")
    text = read_all(master)
    assert "got:typed" in text
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_a_terminal_needs_a_socket_when_nobody_stays(oci: Oci) -> None:
    bundle = oci.bundle("true", terminal=True)
    assert "--console-socket" in oci.refused("create", "-b", bundle, "c")
    assert "cannot be sent there" in oci.refused("create", "-b", bundle, "--console-socket", "/no/such", "c")
    assert "of no use" in oci.refused("create", "-b", oci.bundle("true"), "--console-socket", "/no/such", "c")
    assert not oci.left()


def test_descriptors_are_passed_on_and_no_others(oci: Oci) -> None:
    read, write = os.pipe()
    other = os.open("/", os.O_RDONLY)
    bundle = oci.bundle("sh", "-c", "cd /proc/self/fd && echo [0-9]* ; cat <&3")
    line = oci.line("run", "--preserve-fds", "1", "-b", bundle, "c")
    code = (
        f"import os; os.dup2({read}, 3); os.set_inheritable({other}, True) if {other} != 3 else 0; "
        f"os.execv({line[0]!r}, {line!r})"
    )
    os.write(write, b"passed")
    os.close(write)
    done = subprocess.run(
        [sys.executable, "-c", code], pass_fds=[read, other], capture_output=True, text=True, timeout=30
    )
    os.close(read)
    os.close(other)
    numbers, rest = done.stdout.split("\n", 1)
    assert set(numbers.split()) <= {"0", "1", "2", "3", "4"}  # 4: the shell's own, of the directory
    assert rest == "passed"


TOLD = "echo $LISTEN_FDS $LISTEN_PID $LISTEN_FDNAMES; cd /proc/self/fd; echo [0-9]*"  # the last is echo's own


@pytest.mark.parametrize("verb", ["run", "exec"])
@pytest.mark.parametrize("mine", [True, False])
def test_sockets_to_listen_on_are_passed_to_the_containers_own_process(oci: Oci, verb: str, mine: bool) -> None:
    """As by sd_listen_fds(3): who has not the pid for which they are has none."""
    words = ["run", "-b", str(oci.bundle("sh", "-c", TOLD)), "c"]
    if verb == "exec":
        words = ["exec", oci.running("c"), "sh", "-c", TOLD]
    line = f'{"LISTEN_PID=$$ " * mine}LISTEN_FDS=1 LISTEN_FDNAMES=web exec "$@" 3</'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *oci.line(*words)], capture_output=True, text=True, timeout=30, check=True
    )
    names, descriptors = done.stdout.splitlines()
    assert (names, "4" in descriptors) == (("1 1 web", True) if mine and verb == "run" else ("", False))


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_descriptors_to_preserve_have_to_be_there(oci: Oci, verb: str) -> None:
    words = [oci.running("d"), "true"] if verb == "exec" else ["-b", oci.bundle("true"), "c"]
    error = oci.refused(verb, "--preserve-fds", "3", *words, code=255 if verb == "exec" else 1)
    assert "--preserve-fds: descriptor 3 is not open" in error


def test_a_pidfd_is_sent(oci: Oci) -> None:
    receiver = Receiver(oci.directory / "pidfd")
    oci.ok("create", "-b", oci.bundle("sleep", "1000"), "--pidfd-socket", receiver.path, "c")
    pidfd = receiver.take()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    wait_for(lambda: oci.status("c") == "stopped")
    os.close(pidfd)


def test_streams_that_are_pipes_are_the_users(oci: Oci) -> None:
    bundle = oci.bundle("sh", "-c", "stat -L -c %u:%g /proc/self/fd/1", user={"uid": 7, "gid": 8})
    line = oci.line("run", "-b", bundle, "c")
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert (done.stdout, done.stderr) == ("7:8\n", "")
