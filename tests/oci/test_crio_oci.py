"""The commands of crio-oci in the words that runc's users rely on, on real containers."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crio_native.linux import process
from crio_native.linux.cgroup import hierarchy

from .command_line import PROGRAM, Oci, Receiver, oci
from .conftest import least_profile, spec_of

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


def wait_for(true: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_run_gives_the_containers_own_exit_code_and_leaves_nothing(oci: Oci) -> None:
    done = oci.call("run", "-b", oci.bundle("sh", "-c", "cat; echo err >&2; exit 9"), "c", given="in")
    assert (done.returncode, done.stdout, done.stderr) == (9, "in", "err\n")
    assert not oci.left()


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
        line = [str(PROGRAM), "--root", str(oci.state), "list"]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "no space left on device" in done.stderr
        assert subprocess.run(line, stdin=subprocess.DEVNULL, stdout=full, stderr=full).returncode == 1
        assert subprocess.run([*line, "--nonsense"], stdin=subprocess.DEVNULL, stderr=full).returncode == 1


def test_run_of_a_container_that_is_killed(oci: Oci) -> None:
    line = [str(PROGRAM), "--root", str(oci.state), "run", "-b", str(oci.bundle("sh", "-c", "echo up; cat")), "c"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        oci.ok("kill", "c", "KILL")
        assert running.wait(10) == 128 + 9


def test_run_passes_signals_on(oci: Oci) -> None:
    bundle = oci.bundle("sh", "-c", "trap 'exit 4' USR1; echo up; while :; do sleep 0.01; done")
    line = [str(PROGRAM), "--root", str(oci.state), "run", "-b", str(bundle), "c"]
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


DAMAGE = {"empty": b"", "cut": b'{"id": "c", "pid": 4', "other": b'{"id": "../c"}', "bytes": b"\xff\xfe"}


@pytest.mark.parametrize("damage", [*DAMAGE, "directory", "number"])
def test_a_damaged_state_hides_no_other_container_and_can_be_removed(oci: Oci, damage: str) -> None:
    spec = spec_of(str(oci.root), ("sleep", "1000"))
    for name in ("c", "whole"):
        spec["linux"]["cgroupsPath"] = f"/{oci.name}-{name}"
        oci.ok("run", "--detach", "-b", oci.write(spec), name)
    pid, file = json.loads(oci.ok("state", "c"))["pid"], oci.state / "c/state.json"
    record = json.loads(file.read_text()) | {"pid": "1", "cgroupsPath": f"/{oci.name}-whole"}
    file.unlink()
    if damage == "directory":
        file.mkdir()
    else:
        file.write_bytes(DAMAGE.get(damage) or json.dumps(record).encode())
    listed = oci.call("list", "-q")
    assert (listed.returncode, listed.stdout) == (0, "whole\n")
    assert "the state of container 'c' cannot be read" in listed.stderr
    assert "cannot be read" in oci.refused("delete", "c")
    assert "no hook of it is run" in oci.call("delete", "--force", "c").stderr
    assert not Path(f"/proc/{pid}/root/proc").exists()  # what was in the group that its config.json names
    assert oci.ok("list", "-q") == "whole\n"
    assert oci.status("whole") == "running"
    oci.ok("delete", "-f", "whole")
    assert not oci.left()


def test_without_state_and_config_no_group_is_touched(oci: Oci) -> None:
    oci.running("c")
    pid = json.loads(oci.ok("state", "c"))["pid"]
    for name in ("state.json", "config.json"):
        (oci.state / "c" / name).write_text("")
    (oci.state / "c/elsewhere").symlink_to(oci.root)
    assert "its control group is left" in oci.call("delete", "--force", "c").stderr
    assert not list(oci.state.glob("c")) and (oci.root / "bin").is_dir()
    os.kill(pid, signal.SIGKILL)  # it was let live
    for directory in Path("/sys/fs/cgroup").glob(f"*/{oci.name}/c"):
        wait_for(lambda directory=directory: not (directory / "cgroup.procs").read_text())
        directory.rmdir(), directory.parent.rmdir()


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


@pytest.mark.parametrize("filled", [True, False], ids=["state.json", "config.json"])
def test_a_root_that_is_full_is_named(oci: Oci, filled: bool) -> None:
    oci.state.mkdir()
    line = f"mount -t tmpfs -o size=8k full {oci.state}; echo >{oci.state}/log"
    line += f"; head -c 4096 /dev/zero >{oci.state}/other" * filled
    line += f"; {PROGRAM} --log {oci.state}/log --root {oci.state} create -b {oci.bundle('true')} c; ls {oci.state}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", line], capture_output=True, text=True, timeout=30)
    name = ".state.json" if filled else "config.json"
    why = f"{oci.state}/c/{name}: no space left on device: the container's state cannot be kept"
    assert f"crio-oci: {why}\n" in done.stderr, done.stderr
    assert done.stdout.split() == ["log", "other"][: 1 + filled]


def at_once(oci: Oci, count: int, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """The command, several times at the same moment."""
    line = [str(PROGRAM), "--root", str(oci.state), *words]
    begun = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    return [subprocess.CompletedProcess(line, process.wait(30), "", process.communicate()[1]) for process in begun]


def test_of_several_starts_one_starts_and_of_several_deletes_all_succeed(oci: Oci) -> None:
    spec = json.loads((oci.bundle("sleep", "1000") / "config.json").read_text())
    spec["hooks"] = {
        kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"echo >>{oci.directory}/{kind}"]}]
        for kind in ("poststart", "poststop")
    }
    bundle = oci.write(spec)
    for number in range(6):
        oci.ok("create", "-b", bundle, "c")
        started = at_once(oci, 4, "start", "c")
        assert sorted(done.returncode for done in started) == [0, 1, 1, 1]
        words = {done.stderr for done in started if done.returncode}
        assert words == {"crio-oci: cannot start an already running container: 'c'\n"}
        assert all(done.returncode == 0 for done in at_once(oci, 5, "delete", "--force", "c"))
        for kind in ("poststart", "poststop"):
            assert (oci.directory / kind).read_text() == "\n" * (number + 1)
    assert not oci.left()


def test_a_create_whose_container_is_deleted_meanwhile_says_so(oci: Oci) -> None:
    spec = json.loads((oci.bundle("true", terminal=True) / "config.json").read_text())
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{oci.directory}/console")  # and nobody accepts: the create waits for that
    listener.listen(0)
    connections = [socket.socket(socket.AF_UNIX)]
    connections[0].connect(f"{oci.directory}/console")
    line = [str(PROGRAM), "--root", str(oci.state), "create", "-b", str(oci.write(spec))]
    line += ["--console-socket", f"{oci.directory}/console", "c"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as making, listener:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "created")
        oci.ok("delete", "--force", "c")
        while making.poll() is None:
            listener.settimeout(0.1)
            try:
                connections.append(listener.accept()[0])
            except TimeoutError:
                continue
        assert making.stderr is not None
        assert making.stderr.read() == "crio-oci: container 'c' was deleted, or killed, while it was made\n"
    for connection in connections:
        connection.close()
    assert not oci.left()


def test_a_create_that_is_killed_leaves_what_delete_can_remove(oci: Oci) -> None:
    spec = json.loads((oci.bundle("true") / "config.json").read_text())
    spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]}
    line = [str(PROGRAM), "--root", str(oci.state), "create", "-b", str(oci.write(spec)), "c"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL) as making:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "creating")
        wait_for(lambda: len(children(making.pid)) == 2)  # the init and the hook
        hook = children(making.pid)[-1]
        making.kill()
        os.kill(hook, signal.SIGKILL)  # nobody is left who would
    assert oci.status("c") == "stopped"
    oci.ok("delete", "--force", "c")
    wait_for(lambda: not oci.left())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_an_init_without_its_creator_undoes_nothing(oci: Oci) -> None:
    """A path of the host's is another file in the container: here a volume's."""
    volume = oci.directory / "volume"
    files = [volume / "c" / name for name in ("config.json", "state.json", "start")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("precious")
    spec = json.loads((oci.bundle("true") / "config.json").read_text())
    spec["mounts"].append({"destination": str(oci.state), "type": "bind", "source": str(volume), "options": ["bind"]})
    spec["hooks"] = {"createContainer": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]}
    line = [str(PROGRAM), "--root", str(oci.state), "create", "-b", str(oci.write(spec)), "c"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL) as making:
        wait_for(lambda: len(children(making.pid)) == 1)
        (init,) = children(making.pid)
        wait_for(lambda: len(children(init)) == 1)
        making.kill()
    os.kill(children(init)[0], signal.SIGTERM)  # the hook fails, and there is nobody to tell
    wait_for(lambda: process.start_time(init) is None)
    assert all(file.read_text() == "precious" for file in files)
    assert (oci.state / "c" / "state.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_create_that_is_terminated_undoes_itself(oci: Oci, number: signal.Signals) -> None:
    spec = json.loads((oci.bundle("true") / "config.json").read_text())
    spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"]}]}
    line = [str(PROGRAM), "--root", str(oci.state), "create", "-b", str(oci.write(spec)), "c"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as making:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "creating")
        wait_for(lambda: len(children(making.pid)) == 2)  # the init and the hook
        making.send_signal(number)
        assert making.wait(10) != 0
    wait_for(lambda: not oci.left())


def test_a_hangup_that_the_caller_ignores_is_ignored(oci: Oci) -> None:
    spec = json.loads((oci.bundle("true") / "config.json").read_text())
    spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "0.5"]}]}
    line = ["nohup", str(PROGRAM), "--root", str(oci.state), "create", "-b", str(oci.write(spec)), "c"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as making:
        wait_for(lambda: list(oci.state.glob("c/state.json")) and oci.status("c") == "creating")
        making.send_signal(signal.SIGHUP)
        assert making.wait(10) == 0
    assert oci.status("c") == "created"
    oci.ok("delete", "c")


# -- exec ------------------------------------------------------------------------------------------------------------


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


def end(pid: int) -> None:
    """An exec'ed process is an orphan, so ours; until it is reaped its PID namespace's init cannot end."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


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
    line = [str(PROGRAM), "--root", str(oci.state), "exec", "--ignore-paused", "c", "sh", "-c", "exit 4"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        oci.ok("resume", "c")
        assert waiting.wait(10) == 4
    oci.ok("kill", "c", "9")
    wait_for(lambda: oci.status("c") == "stopped")
    assert "container not running" in oci.refused("exec", "c", "id", code=255)


# -- terminals and descriptors -----------------------------------------------------------------------------------------


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
    words = ["-d", "-t", "--console-socket", receiver.path, "--pid-file", pid_file]
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


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_a_terminal_in_the_foreground(oci: Oci, verb: str) -> None:
    script = "read line; echo got:$line; test -t 0 && exit 5"
    if verb == "run":
        words = ["run", "-b", str(oci.bundle("sh", "-c", script, terminal=True)), "c"]
    else:
        words = ["exec", "-t", oci.running("c"), "sh", "-c", script]
    pid, master = pty.fork()
    if pid == 0:
        os.execv(PROGRAM, [str(PROGRAM), "--root", str(oci.state), *words])
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
    line = [str(PROGRAM), "--root", str(oci.state), "run", "--preserve-fds", "1", "-b", str(bundle), "c"]
    code = (
        f"import os; os.dup2({read}, 3); os.set_inheritable({other}, True) if {other} != 3 else 0; "
        f"os.execv({line[0]!r}, {line!r})"
    )
    os.write(write, b"passed")
    os.close(write)
    done = subprocess.run(
        [sys.executable, "-c", code], pass_fds=[read, other], capture_output=True, text=True, timeout=30
    )
    os.close(read), os.close(other)
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
    line = f'{"LISTEN_PID=$$ " * mine}LISTEN_FDS=1 LISTEN_FDNAMES=web exec {PROGRAM} --root {oci.state} "$@" 3</'
    done = subprocess.run(["sh", "-c", line, "sh", *words], capture_output=True, text=True, timeout=30, check=True)
    names, descriptors = done.stdout.splitlines()
    assert (names, "4" in descriptors) == (("1 1 web", True) if mine and verb == "run" else ("", False))


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_descriptors_to_preserve_have_to_be_there(oci: Oci, verb: str) -> None:
    words = [oci.running("d"), "true"] if verb == "exec" else ["-b", oci.bundle("true"), "c"]
    error = oci.refused(verb, "--preserve-fds", "3", *words, code=255 if verb == "exec" else 1)
    assert "--preserve-fds: descriptor 3 is not open" in error


def test_the_command_line_in_runcs_words(oci: Oci) -> None:
    assert "no such command" in oci.refused("nosuch", code=3)
    assert "no such command" in oci.refused("help", "nosuch", code=3)
    done = oci.call("--criu", "/usr/sbin/criu", "list", "-q")
    assert (done.returncode, done.stdout) == (0, "") and "--criu is ignored" in done.stderr


def test_a_checkpoint_without_criu_leaves_nothing(oci: Oci) -> None:
    oci.running("c")
    images, work = oci.directory / "images", oci.directory / "work"
    words = ["checkpoint", "--image-path", images, "--work-path", work, "c"]
    assert "no program `criu`" in oci.refused(*words, env={**os.environ, "PATH": "/no/such"})
    assert not images.exists() and not work.exists()


def test_a_pidfd_is_sent(oci: Oci) -> None:
    receiver = Receiver(oci.directory / "pidfd")
    oci.ok("create", "-b", oci.bundle("sleep", "1000"), "--pidfd-socket", receiver.path, "c")
    pidfd = receiver.take()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    wait_for(lambda: oci.status("c") == "stopped")
    os.close(pidfd)


# -- resources ---------------------------------------------------------------------------------------------------------


def test_pause_and_resume(oci: Oci) -> None:
    oci.running("c")
    assert "not paused" in oci.refused("resume", "c")
    oci.ok("pause", "c")
    assert oci.status("c") == "paused"
    assert "cannot be paused" in oci.refused("pause", "c")
    oci.ok("resume", "c")
    assert oci.status("c") == "running"
    oci.ok("pause", "c")
    oci.ok("delete", "--force", "c")
    assert not oci.left()


@pytest.mark.skipif(hierarchy().mode != "hybrid", reason="a host with two freezers")
def test_a_container_that_the_other_freezer_stopped_is_paused(oci: Oci) -> None:
    oci.running("c")
    Path(f"{hierarchy().v1_freezer}/{oci.name}/c/freezer.state").write_text("FROZEN")
    assert oci.status("c") == "paused"
    assert "paused container" in oci.refused("exec", "c", "id", code=255)
    oci.ok("resume", "c")
    assert oci.status("c") == "running"
    oci.ok("exec", "c", "id")


def test_update_by_flags_and_by_file(oci: Oci) -> None:
    oci.running("c")
    oci.ok("update", "--pids-limit", "31", "--memory", "64m", "c")
    stats = json.loads(oci.ok("events", "--stats", "c"))["data"]
    assert (stats["pids"]["limit"], stats["memory"]["usage"]["limit"]) == (31, 64 << 20)
    oci.ok("update", "--resources", "-", "c", given='{"pids": {"limit": 32}}')
    assert json.loads(oci.ok("events", "--stats", "c"))["data"]["pids"] == {"current": 1, "limit": 32}
    assert "must be a number of bytes" in oci.refused("update", "--memory", "lots", "c")
    assert "is not JSON" in oci.refused("update", "-r", "-", "c", given="{")


def test_statistics_are_what_the_kernel_counts(oci: Oci) -> None:
    spec = json.loads((oci.bundle("sleep", "1000") / "config.json").read_text())
    spec["linux"]["resources"] = {"memory": {"limit": 50_000_000, "swap": 60_000_000}, "cpu": {"cpus": "0"}}
    oci.ok("run", "--detach", "-b", oci.write(spec), "c")
    stats = json.loads(oci.ok("events", "--stats", "c"))["data"]
    memory = stats["memory"]
    page = os.sysconf("SC_PAGESIZE")
    assert memory["swap"]["limit"] == 60_000_000 // page * page  # memory and swap together, as runc has it
    assert memory["swap"]["usage"] >= memory["usage"]["usage"] > 0
    assert stats["cpuset"]["cpus"] == [0] and stats["cpuset"]["mems"]
    assert all(set(counts) >= {"usage", "failcnt"} for counts in stats["hugetlb"].values())
    if Path("/sys/fs/cgroup/memory").exists():
        assert memory["swap"]["max"] > 0 < memory["kernel"]["max"]
        assert set(memory["kernelTCP"]) == {"limit", "usage", "max", "failcnt"}
        assert stats["cpuset"]["sched_load_balance"] == 1


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
    spec = json.loads((oci.bundle("sleep", "1000") / "config.json").read_text())
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


# -- the interpreter ---------------------------------------------------------------------------------------------------


def test_hooks_run_in_the_bundle_and_flags_are_relative_to_the_caller(oci: Oci) -> None:
    spec = json.loads((oci.bundle("true") / "config.json").read_text())
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


IN_PRIVATE = ("unshare", "--mount", "--propagation", "private", "sh", "-euc")


def without_mount_namespace(oci: Oci, *args: str) -> Path:
    spec = spec_of(str(oci.root), args)
    spec["linux"]["cgroupsPath"] = f"/{oci.name}/c"
    spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "mount"]
    return oci.write(spec)


@pytest.mark.parametrize("fail", ["", "--fail pivot", "--fail mask_paths"])
def test_without_a_mount_namespace_its_mounts_go_with_the_container(oci: Oci, fail: str) -> None:
    bundle = without_mount_namespace(oci, "sh", "-c", "ls /proc/self/status; ls /rootfs 2>/dev/null || echo confined")
    script = """
        mount --bind /etc /mnt; mount --make-shared /mnt
        grep -E " (/|/mnt|$3.*) " /proc/self/mountinfo >"$3/before"
        "$1" --root "$2" $5 run --bundle "$4" c || echo "status $?"
        grep -E " (/|/mnt|$3.*) " /proc/self/mountinfo >"$3/after"
    """.replace("$5", fail.replace("pivot", "change_root"))
    line = [*IN_PRIVATE, script, "sh", str(PROGRAM), str(oci.state), str(oci.directory), str(bundle)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.stdout == ("status 1\n" if fail else "/proc/self/status\nconfined\n"), done.stderr
    # nothing stays, and no propagation of the host's mounts was changed
    assert (oci.directory / "before").read_text() == (oci.directory / "after").read_text()


def test_a_user_namespace_needs_a_mount_namespace(oci: Oci) -> None:
    bundle = without_mount_namespace(oci, "true")
    spec = json.loads((bundle / "config.json").read_text())
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 70000, "size": 10}]
    (bundle / "config.json").write_text(json.dumps(spec))
    assert "linux.namespaces: a user namespace may change no mounts" in oci.refused("run", "--bundle", bundle, "c")
    assert not oci.left()


def test_a_user_namespace_without_mappings_has_its_caller_as_root(oci: Oci) -> None:
    spec = spec_of(str(oci.root), ("cat", "/proc/self/uid_map", "/proc/self/gid_map"))
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] != "devpts"]  # its group 5 is not mapped
    bundle = oci.write(spec)
    assert oci.ok("run", "-b", bundle, "c").split() == ["0", "0", "1"] * 2
    assert "enter_user_namespace" in oci.ok("explain", bundle)
    spec["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 0, "size": 1}]
    assert "linux.gidMappings: a new user" in oci.refused("run", "-b", oci.write(spec), "c")
    assert not oci.left()


def without_cgroups_path(oci: Oci, *args: str) -> Path:
    """A bundle as `spec` writes it, with limits; its container has a group that is named by its id."""
    spec = spec_of(str(oci.root), args)
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]})
    resources = {"pids": {"limit": 5}, "memory": {"limit": 100_000_000, "swap": 100_000_000, "reservation": 30_000_000}}
    spec["linux"]["resources"] = resources | {"devices": [{"allow": False, "access": "rwm"}]}
    return oci.write(spec)


def test_what_is_explained_is_what_is_traced(oci: Oci) -> None:
    """Also of a group that the configuration does not name."""
    bundle, trace = without_cgroups_path(oci, "true"), oci.directory / "trace"
    oci.ok("--trace", trace, "run", "-b", bundle, oci.name)
    traced = [json.loads(line) for line in trace.read_text().splitlines()]
    explained = json.loads(oci.ok("explain", "--json", "--id", oci.name, bundle))["steps"]
    others = {"record_state", "find_command"}
    for processes in (("crio-oci", "runtime", "parent"), ("init",)):
        happened, said = (
            [(row["step"], row["source"]) for row in rows if row["process"] in processes and row["step"] not in others]
            for rows in ([row for row in traced if row["result"] == "ok" or row["step"] == "execute"], explained)
        )
        if processes != ("init",):  # the command's own steps come from no field
            happened, said = ([(step, "") for step, _ in rows] for rows in (happened, said))
        assert happened == said
    assert not oci.left()


@pytest.mark.parametrize("flags", [(), ("--no-pivot",), ("--no-new-keyring",)])
@pytest.mark.parametrize(
    "surroundings", ["", "NOTIFY_SOCKET=/dev/null", "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web"]
)
def test_flags_and_environment_are_explained_as_they_act(oci: Oci, flags: tuple[str, ...], surroundings: str) -> None:
    bundle, trace = oci.bundle("env"), oci.directory / "trace"

    def call(*words: str | Path) -> str:
        line = f'{surroundings} exec {PROGRAM} --root {oci.state} "$@" 3</'
        done = subprocess.run(
            ["sh", "-c", line, "sh", *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    there = {line.partition("=")[0] for line in call("--trace", trace, "run", *flags, "-b", bundle, oci.name).split()}
    traced = [json.loads(line) for line in trace.read_text().splitlines()]
    happened = [row["step"] for row in traced if row["process"] == "init" and row["step"] != "find_command"]
    rows = json.loads(call("explain", "--json", "--id", oci.name, *flags, bundle))["steps"]
    explained = [row for row in rows if row["process"] == "init" and row["step"] != "find_command"]
    assert [row["step"] for row in explained] == happened
    told = " ".join(line for row in explained if row["step"] == "environment" for line in row["calls"])
    assert {name for name in there if name in told} >= there - {"HOME", "PWD", "SHLVL"}
    assert {entry.partition("=")[0] for entry in surroundings.split()} <= there


def test_the_groups_of_intels_technology_are_explained(oci: Oci) -> None:
    spec = json.loads((oci.bundle("true") / "config.json").read_text())
    spec["linux"]["intelRdt"] = {"enableMonitoring": True, "schemata": ["L3:0=f"]}
    bundle, trace = oci.write(spec), oci.directory / "trace"
    told = json.loads(oci.ok("explain", "--json", "--id", "c", bundle))
    first, *rest = told["steps"]
    assert (
        first["step"] == "make_resctrl" and "/c/schemata" in first["calls"][1] and "mon_groups/c" in first["calls"][2]
    )
    joined = next(row for row in rest if row["step"] == "join_cgroup")
    assert any("resctrl/c/tasks" in line for line in joined["calls"])
    assert any("resctrl/c/mon_groups/c/tasks" in line for line in joined["calls"])
    done = oci.call("--trace", trace, "run", "-b", bundle, "c")
    assert (done.returncode != 0) == any("resctrl" in sentence for sentence in told["assumptions"])
    assert json.loads(trace.read_text().splitlines()[0])["step"] == "make_resctrl"


def test_isolation_knows_the_given_group_and_what_was_updated(oci: Oci) -> None:
    name = oci.name
    oci.ok("create", "-b", without_cgroups_path(oci, "sleep", "1000"), name)
    assert "is created only" in oci.refused("isolation", name)
    oci.ok("start", name)
    assert "pids.max 5\tpids.max 5" in oci.ok("isolation", name)
    limit = Path(f"{hierarchy().mount_of('pids')}/{name}/pids.max")
    limit.write_text("max")
    weaker = oci.call("isolation", name)
    assert weaker.returncode == 1 and "! weaker    linux.resources.pids.limit" in weaker.stdout
    oci.ok("update", "--pids-limit", "-1", "--memory", "-1", name)
    oci.ok("update", "--pids-limit", "0", "--memory", "0", name)  # no memory is no word about it
    assert "1 of" not in oci.ok("isolation", name)
    assert "~ stricter" not in oci.ok("isolation", name)
    oci.ok("update", "--pids-limit", "7", name)
    limit.write_text("8")
    assert "pids.max 7\tpids.max 8" in oci.call("isolation", name).stdout
    process = json.loads(oci.ok("state", name))["pid"]
    for mount in hierarchy().mounts:
        Path(mount, "cgroup.procs").write_text(str(process))
    shown = oci.call("isolation", name).stdout
    assert "! weaker    linux.cgroupsPath unified" in shown or "! weaker    linux.cgroupsPath pids" in shown
    oci.ok("delete", "--force", name)
    assert not oci.left()


@pytest.mark.parametrize("own_user", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_the_callers_groups_are_kept_when_an_annotation_says_so(oci: Oci, own_user: bool, kept: bool) -> None:
    """As podman asks for it; also groups that the user namespace does not know."""
    spec = spec_of(str(oci.root), ("grep", "Groups", "/proc/self/status"))
    if own_user:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 10}]
    spec["annotations"] = {"run.oci.keep_original_groups": "1" if kept else "0"}
    bundle = oci.write(spec)
    groups = oci.ok("run", "-b", bundle, "c", extra_groups=[7, 4711]).split()[1:]
    assert groups == (["7", "65534" if own_user else "4711"] if kept else [])
    assert ("setgroups(" in oci.ok("explain", bundle)) != kept


@pytest.mark.parametrize("name", ["hostname", "domainname"])
def test_a_name_by_sysctl_is_refused_where_it_has_a_field(oci: Oci, name: str) -> None:
    spec = spec_of(str(oci.root), ("true",)) | {name: "by-field"}
    spec["linux"]["sysctl"] = {f"kernel.{name}": "by-sysctl"}
    assert f"sysctl `kernel.{name}` conflicts with OCI field `{name}`" in oci.refused("run", "-b", oci.write(spec), "c")


def test_streams_that_are_pipes_are_the_users(oci: Oci) -> None:
    bundle = oci.bundle("sh", "-c", "stat -L -c %u:%g /proc/self/fd/1", user={"uid": 7, "gid": 8})
    line = [str(PROGRAM), "--root", str(oci.state), "run", "-b", str(bundle), "c"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert (done.stdout, done.stderr) == ("7:8\n", "")


def test_an_ambient_capability_that_cannot_be_is_a_warning(oci: Oci) -> None:
    held = ["CAP_KILL", "CAP_CHOWN"]
    sets = {"bounding": held, "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"], "inheritable": held}
    bundle = oci.bundle("grep", "CapAmb", "/proc/self/status", capabilities=sets | {"ambient": [*held, "CAP_SETUID"]})
    done = oci.call("run", "-b", bundle, "c")
    assert "process.capabilities.ambient: CAP_CHOWN, CAP_SETUID cannot be given" in done.stderr
    assert done.stdout.split() == ["CapAmb:", f"{1 << 5:016x}"]


def test_a_new_network_namespace_has_its_loopback_up(oci: Oci) -> None:
    assert "LOOPBACK,UP" in oci.ok("run", "-b", oci.bundle("sh", "-c", "ip link show lo 2>/dev/null || ip addr"), "c")


@pytest.mark.parametrize(("kind", "other"), [("ipc", "net"), ("uts", "ipc"), ("network", "uts")])
def test_a_namespace_of_another_kind_is_not_entered(oci: Oci, kind: str, other: str) -> None:
    spec = spec_of(str(oci.root), ("true",))
    spaces = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != kind]
    spec["linux"]["namespaces"] = [*spaces, {"type": kind, "path": f"/proc/{os.getpid()}/ns/{other}"}]
    assert f"of kind {kind}" in oci.refused("run", "-b", oci.write(spec), "c")
    assert not oci.left()


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_need_allow_no_more_than_the_command_needs(oci: Oci, no_new_privileges: bool) -> None:
    """Whatever we call ourselves on the way, and however often we are waited for: it comes before the filter."""
    spec = spec_of(str(oci.root), ("true",))
    spec["linux"]["seccomp"] = least_profile(no_new_privileges)
    spec["process"]["noNewPrivileges"] = no_new_privileges
    bundle = oci.write(spec)
    oci.ok("run", "-b", bundle, "c")
    oci.ok("create", "-b", bundle, "c")
    oci.ok("start", "c")
    wait_for(lambda: oci.status("c") == "stopped")
    oci.ok("delete", "c")
    spec["process"]["args"] = ["no-such-command"]
    assert "not found in $PATH" in oci.refused("create", "-b", oci.write(spec), "c")


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


def test_between_filter_and_exec_there_are_the_last_capabilities_alone(oci: Oci) -> None:
    denied = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["capset"], "action": "SCMP_ACT_ERRNO"}]}
    spec = spec_of(str(oci.root), ("true",))
    spec["linux"]["seccomp"] = denied
    spec["process"]["noNewPrivileges"] = False
    assert "step 'set_capabilities'" in oci.refused("run", "-b", oci.write(spec), "c")
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] = ["CAP_SYS_ADMIN"]
    oci.ok("run", "-b", oci.write(spec), "c")


@pytest.mark.parametrize("command", ["/bin", "bin"])
def test_a_directory_is_no_command(oci: Oci, command: str) -> None:
    assert "'find_command' failed on" in oci.refused("create", "-b", oci.bundle(command, cwd="/"), "c")
    assert not oci.left()


def test_an_unknown_system_call_in_a_profile_is_refused_when_an_annotation_says_so(oci: Oci) -> None:
    spec = spec_of(str(oci.root), ("true",))
    rule = {"names": ["chdir", "no_such_call"], "action": "SCMP_ACT_ERRNO"}
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    oci.ok("run", "-b", oci.write(spec), "c")
    spec["annotations"] = {"run.oci.seccomp_fail_unknown_syscall": "1"}
    assert "linux.seccomp.syscalls[0].names" in oci.refused("run", "-b", oci.write(spec), "c")
    assert not oci.left()


def test_a_create_that_fails_early_leaves_alone_the_group_of_another(oci: Oci) -> None:
    """It has not made the group of that name yet, and must not undo it."""
    oci.ok("run", "--detach", "-b", oci.bundle("sleep", "1000"), "c")
    spec = json.loads((oci.bundle("true") / "config.json").read_text())
    rule = {"names": ["no_such_call"], "action": "SCMP_ACT_ERRNO"}
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    spec["annotations"] = {"run.oci.seccomp_fail_unknown_syscall": "1"}
    assert "no system call" in oci.refused("create", "-b", oci.write(spec), "d")
    assert oci.status("c") == "running"


def test_without_systemd_its_manager_is_refused_at_the_door(oci: Oci) -> None:
    if os.path.exists("/run/systemd/private"):
        pytest.skip("systemd runs here")
    refusal = oci.refused("--systemd-cgroup", "run", "-b", oci.bundle("true"), "c")
    assert refusal.startswith("crio-oci: systemd is not there to make cgroups: there is neither /run/systemd/private")
    assert len(refusal.splitlines()) == 1 and not oci.left()
