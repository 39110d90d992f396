"""The monitor from its birth to the container's end: create, start, kill, exit status, OOM, orphans, failures."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crio_native.errors import FailedPrecondition, Internal, NotFound, StartFailed, StepFailed
from crio_native.monitor import client
from crio_native.oci.runtime import ExitStatus
from tests.apart import MARK
from tests.linux.monitor_harness import Container, alive, children, ending, executing, failing, running
from tests.machine import machine_state
from tests.waiting import wait_for


def left_in(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


def test_exit_code_and_exit_file(tmp_path: Path) -> None:
    before = time.time_ns()
    with Container(tmp_path / "c", "exit 7") as container:
        status = container.run().wait()
    assert (status.code, status.signal, status.oom_killed) == (7, 0, False)
    assert before < status.finished_at < time.time_ns()
    assert left_in(tmp_path / "c") == {"exit", "log"}
    assert container.messages() == ""


def test_exit_by_signal(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "kill -SEGV $$") as container:
        status = container.run().wait()
    assert (status.code, status.signal) == (139, 11)


def test_created_names_the_processes_and_copies_what_the_init_said(tmp_path: Path) -> None:
    with Container(tmp_path / "c", running("exec sleep 100", ready=b'R{"user":{"uid":7}}')) as container:
        created = container.create().created
        assert created["monitor"] == container.monitor
        assert created["init"] == {"user": {"uid": 7}}
        assert children(container.monitor).keys() == {created["pid"]}


def test_command_runs_only_after_start(tmp_path: Path) -> None:
    with Container(tmp_path / "c", f"touch {tmp_path}/ran") as container:
        container.create()
        time.sleep(0.1)
        assert not (tmp_path / "ran").exists()
        container.start().wait()
        assert (tmp_path / "ran").exists()


def test_start_twice(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.run()
        with container.connection() as connection, pytest.raises(FailedPrecondition, match="started before"):
            connection.start()


def test_kill_and_watch(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "trap 'exit 9' TERM; while :; do sleep 0.01; done") as container:
        container.run()
        watches = [client.watch(container.run_dir) for _ in range(3)]
        time.sleep(0.05)  # for the shell's trap
        with container.connection() as connection:
            connection.kill(signal.SIGTERM)
        for sock in watches:
            with sock:
                status = client.read_exit(sock)
                assert status is not None
                assert status.code == 9
        assert container.wait() == status


def test_killed_before_start(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "true") as container:
        with container.create().connection() as connection:
            connection.kill(signal.SIGKILL)
        assert container.wait().code == 137
        with pytest.raises(NotFound, match="the container has ended"):
            container.start()


def test_after_the_end_nobody_serves(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "true") as container:
        container.run().wait()
        for act in (client.watch, client.attach, client.Connection.connect):
            with pytest.raises(NotFound, match="the container has ended"):
                act(container.run_dir)


def test_kill_of_an_ended_init_is_refused(tmp_path: Path) -> None:
    """While the monitor still waits for the output of a process that the init left behind."""
    with Container(tmp_path / "c", "sleep 30 & echo $! && exit 3") as container:
        container.create()
        with container.connection() as connection, container.raw() as raw:
            container.start()
            wait_for(lambda: not alive(container.created["pid"]), "the init's end")
            with pytest.raises(NotFound, match="it has ended"):
                connection.kill(signal.SIGTERM)
            raw.send(b"kill 15")
            assert raw.recv(1000) == b'error {"step":"kill","errno":3,"path":"","detail":""}'
        assert container.wait().code == 3
        os.kill(int(container.log()[0].content), signal.SIGKILL)


def test_child_that_keeps_the_output_open_does_not_hold_the_end(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "sleep 30 & echo $!; exit 3") as container:
        container.run()
        begun = time.monotonic()
        assert container.wait().code == 3
        assert 0.3 < time.monotonic() - begun < 3
        os.kill(int(container.log()[0].content), signal.SIGKILL)


def test_child_that_floods_the_output_does_not_hold_the_end(tmp_path: Path) -> None:
    command = "yes & echo $! >&2; exit 3"
    with Container(tmp_path / "c", command, log_size_max=1 << 20) as container:
        container.run()
        child = children(container.monitor)
        assert container.wait(5).code == 3
        wait_for(lambda: not any(alive(pid) for pid in child), "the end of the flood, by SIGPIPE")


def test_orphans_are_reaped(tmp_path: Path) -> None:
    command = "for i in 1 2 3 4 5; do (sh -c 'sleep 0.01; echo $$' & ); done; exec sleep 100"
    with Container(tmp_path / "c", command) as container:
        container.run()
        wait_for(lambda: len(container.log()) == 5, "the orphans have lived")
        wait_for(lambda: children(container.monitor).keys() == {container.created["pid"]}, "only the init is left")


def test_outlives_signals(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.run()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
            os.kill(container.monitor, number)
        with container.connection() as connection:
            connection.kill(signal.SIGKILL)
        assert container.wait().code == 137


def test_settles_as_a_process_of_its_own(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.run()
        assert os.getsid(container.monitor) == container.monitor

        def kinds() -> list[str]:
            links = {os.readlink(link) for link in Path(f"/proc/{container.monitor}/fd").iterdir()}
            return sorted(link.partition(":")[0] for link in links if not link.startswith("/"))

        # signalfd, stdout and stderr, the control socket
        wait_for(lambda: kinds() == ["anon_inode", "pipe", "pipe", "socket"], "nothing else is open")
        assert os.readlink(f"/proc/{container.monitor}/cwd") == str(container.run_dir)
        assert "NoNewPrivs:\t1" in Path(f"/proc/{container.monitor}/status").read_text()


@pytest.mark.parametrize("start_it", [True, False])
def test_oom_kill_is_told(tmp_path: Path, start_it: bool) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 2\noom_group_kill 7\n")
    with Container(tmp_path / "c", "exec sleep 100", oom_file=str(events)) as container:
        container.create()
        if start_it:
            container.start()
        events.write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 3\noom_group_kill 7\n")
        with container.connection() as connection:
            connection.kill(signal.SIGKILL)
        assert container.wait().oom_killed


@pytest.mark.parametrize(
    "text",
    [
        "low 0\nhigh 0\nmax 9\noom 5\noom_kill 2\n",  # as it was at the start
        "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "oom_kill_disable 9\nunder_oom 9\n",
        "",
        "oom_kill",
        "\0" * 600,
    ],
)
def test_no_oom_kill(tmp_path: Path, text: str) -> None:
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 2\n")
    with Container(tmp_path / "c", "kill -9 $$", oom_file=str(events)) as container:
        container.create()
        events.write_text(text)
        status = container.start().wait()
        assert (status.code, status.oom_killed) == (137, False)


def test_missing_oom_file_is_no_oom(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "kill -9 $$", oom_file=str(tmp_path / "none")) as container:
        assert not container.run().wait().oom_killed


@pytest.mark.root
def test_oom_kill_of_the_kernel(tmp_path: Path) -> None:
    root = Path("/sys/fs/cgroup/memory")
    if not (root / "memory.limit_in_bytes").exists():
        pytest.skip("no cgroup v1 memory controller here")
    cgroup = root / f"{MARK}monitor"
    cgroup.mkdir()
    try:
        (cgroup / "memory.limit_in_bytes").write_text(str(16 << 20))

        def init(sync: socket.socket) -> None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            running("head -c 200m /dev/zero | tail")(sync)

        with Container(tmp_path / "c", init, oom_file=str(cgroup / "memory.oom_control")) as container:
            status = container.run().wait(30)
        assert (status.code, status.oom_killed) == (137, True)
    finally:
        cgroup.rmdir()


def test_error_of_the_init(tmp_path: Path) -> None:
    error = {"step": "mount", "errno": 13, "path": "/proc", "detail": "the third mount"}
    with Container(tmp_path / "c", failing(**error)) as container:
        with pytest.raises(StepFailed) as caught:
            container.create()
        assert caught.value.to_dict() == error
        assert container.reap() == 1
    assert left_in(tmp_path / "c") == set()


@pytest.mark.parametrize(
    ("last_act", "words"),
    [
        (lambda: os._exit(3), "exited with code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGSYS), r"killed by signal 31 \(SIGSYS: its seccomp profile"),
    ],
)
def test_init_ends_before_it_is_ready(tmp_path: Path, last_act: object, words: str) -> None:
    with Container(tmp_path / "c", lambda _sync: last_act()) as container:  # type: ignore[operator]
        with pytest.raises(StepFailed, match=words) as caught:
            container.create()
        assert caught.value.step == "init"
        assert container.reap() == 1
    assert left_in(tmp_path / "c") == set()


def test_init_that_has_ended_before_the_monitor_begins(tmp_path: Path) -> None:
    """Its SIGCHLD came to M, not to the monitor."""

    def init(sync: socket.socket) -> None:
        sync.send(b"R")
        os._exit(5)

    with Container(tmp_path / "c", init, delay=0.1) as container:
        assert container.create().wait().code == 5


def test_init_closes_its_socket_and_goes_on(tmp_path: Path) -> None:
    def init(sync: socket.socket) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        sync.close()
        time.sleep(100)

    with Container(tmp_path / "c", init) as container:
        with pytest.raises(StepFailed, match="went on"):
            container.create()
        assert not alive(int((tmp_path / "pid").read_text()))
        assert container.reap() == 1


@pytest.mark.parametrize("packet", [b"X", b"E", b"C", b"R" + b"x" * 16384, b"E" + b"x" * 40000])
def test_init_that_speaks_nonsense(tmp_path: Path, packet: bytes) -> None:
    def init(sync: socket.socket) -> None:
        sync.send(packet)
        time.sleep(100)

    with Container(tmp_path / "c", init) as container:
        with pytest.raises(StepFailed, match="unknown or too large") as caught:
            container.create()
        assert caught.value.step == "monitor"
        assert container.reap() == 1


def test_init_with_a_large_object(tmp_path: Path) -> None:
    with Container(tmp_path / "c", running("true", ready=b'R{"x":"' + b"y" * 16000 + b'"}')) as container:
        assert container.create().created["init"] == {"x": "y" * 16000}
        assert container.start().wait().code == 0


def test_tty_without_a_terminal(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "true", extra=["--tty"]) as container:
        with pytest.raises(StepFailed, match="sent no terminal"):
            container.create()
        assert container.reap() == 1
    assert left_in(tmp_path / "c") == set()


@pytest.mark.parametrize("path", ["/nonexistent/program", "/etc/passwd", "/"])
def test_command_that_cannot_be_executed(tmp_path: Path, path: str) -> None:
    with Container(tmp_path / "c", executing(path)) as container:
        container.create()
        sock = client.watch(container.run_dir)
        with pytest.raises(StartFailed) as caught:
            container.start()
        assert (caught.value.step, caught.value.path) == ("exec", path)
        assert caught.value.number in (2, 13)
        status = container.wait()
        assert (status.code, status.signal) == (128, 0)
        with sock:
            assert client.read_exit(sock) == status


def test_init_killed_between_start_and_exec(tmp_path: Path) -> None:
    """As by a seccomp filter that the command's interpreter survives and the init does not."""
    with Container(tmp_path / "c", ending(lambda: os.kill(os.getpid(), signal.SIGSYS))) as container:
        with pytest.raises(StartFailed, match="before it executed the command: killed by signal 31"):
            container.run()
        assert container.wait().code == 128


def test_init_that_reports_an_error_after_start_and_stays_is_killed(tmp_path: Path) -> None:
    def init(sync: socket.socket) -> None:
        sync.send(b"R")
        sync.recv(16)
        sync.send(b'E{"step":"exec","errno":7}')
        time.sleep(100)

    with Container(tmp_path / "c", init) as container:
        with pytest.raises(StartFailed, match="E2BIG"):
            container.run()
        status = container.wait()
        assert (status.code, status.signal) == (128, 0)


def test_others_are_served_while_an_exec_takes_long(tmp_path: Path) -> None:
    def init(sync: socket.socket) -> None:
        sync.send(b"R")
        sync.recv(16)
        time.sleep(100)

    with Container(tmp_path / "c", init) as container:
        container.create()
        with container.raw(b"start") as starter, container.connection() as connection:
            connection.reopen_log()
            connection.kill(signal.SIGKILL)
            answer = starter.recv(1000)
        assert b"killed by signal 9" in answer
        assert container.wait().code == 128


def test_daemon_that_leaves_after_start_is_not_missed(tmp_path: Path) -> None:
    with Container(tmp_path / "c", f"sleep 0.1; touch {tmp_path}/ran; exit 5") as container:
        container.create().raw(b"start").close()
        assert container.wait().code == 5
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("ready_after", [0.2, 100])
def test_daemon_that_leaves_during_create_takes_the_container_along(tmp_path: Path, ready_after: float) -> None:
    def init(sync: socket.socket) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(ready_after)
        running("exec sleep 100")(sync)

    with Container(tmp_path / "c", init) as container:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the init's birth")
        container.reply.close()
        assert container.reap() == 1
        assert not alive(int((tmp_path / "pid").read_text()))
        assert "not there to be told" in container.messages()
    assert left_in(tmp_path / "c") == set()


def test_monitor_that_is_killed_is_noticed(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100") as container:
        container.run()
        init = container.created["pid"]
        with client.watch(container.run_dir) as sock:
            os.kill(container.monitor, signal.SIGKILL)
            assert client.read_exit(sock) is None
        assert container.reap() == -9
        assert client.read_exit_file(container.run_dir) is None
        with pytest.raises(NotFound):
            client.watch(container.run_dir)
        os.kill(init, signal.SIGKILL)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--frobnicate"], "on --frobnicate with EINVAL .*unknown argument"),
        (["--log"], "with EINVAL .*unknown argument"),  # it takes --pid for its value
        (["--log-size-max", "12k"], "on --log-size-max with EINVAL .*not a number"),
        (["--pid", "0"], "on --pid with EINVAL .*out of range"),
        (["--pid", "-1"], "on --pid with EINVAL .*out of range"),
        (["--pid", "99999999999999999999"], "on --pid with EINVAL .*out of range"),
        (["--log", "relative"], "on relative with EINVAL .*absolute path"),
    ],
)
def test_wrong_arguments(tmp_path: Path, extra: list[str], words: str) -> None:
    with Container(tmp_path / "c", "true", extra=extra) as container:
        with pytest.raises(StepFailed, match=words):
            container.create()
        assert container.reap() == 1


@pytest.mark.parametrize("pid", [1, 2, pytest.param(os.getpid(), id="our own")])
def test_a_process_that_is_not_its_child_is_left_alone(tmp_path: Path, pid: int) -> None:
    with Container(tmp_path / "c", "true", pid_argument=pid) as container:
        with pytest.raises(StepFailed, match="must name a child"):
            container.create()
        assert container.reap() == 1


def test_started_by_hand(tmp_path: Path) -> None:
    done = subprocess.run([client.binary_path(), "--help"], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2
    assert "is started by crio-native" in done.stderr


def test_unusable_log_fails_the_create(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dir").mkdir()
    for name in ("fifo", "link", "dir", "missing/log", '"\n\\'):
        path = str(tmp_path / name) if '"' not in name else f"/{name}/log"
        with Container(tmp_path / "c", "true", log=path) as container:
            with pytest.raises(StepFailed, match="log as a regular file") as caught:
                container.create()
            assert caught.value.path == path
            assert container.reap() == 1
    assert not (tmp_path / "target").exists()
    assert left_in(tmp_path / "c") == set()


def test_exit_file_of_an_earlier_life_is_replaced(tmp_path: Path) -> None:
    run_dir = tmp_path / "c"
    run_dir.mkdir()
    (run_dir / "exit.tmp").symlink_to(tmp_path / "target")
    (run_dir / "exit").write_text("{}")
    with Container(run_dir, "exit 4") as container:
        container.run()
        assert container.reap() == 0
        assert "cannot write the exit file" in container.messages()  # a link is not followed
        assert not (tmp_path / "target").exists()
    (run_dir / "exit.tmp").unlink()
    with Container(run_dir, "exit 4") as container:
        assert container.run().wait().code == 4


def test_socket_that_is_there_already_fails_the_create(tmp_path: Path) -> None:
    run_dir = tmp_path / "c"
    with Container(run_dir, "exec sleep 100") as first:
        first.run()
        with Container(run_dir, "exec sleep 100") as second:
            with pytest.raises(StepFailed, match="on control with EADDRINUSE"):
                second.create()
            assert second.reap() == 1
        with first.connection() as connection:  # the first one's socket is still there
            connection.kill(signal.SIGKILL)
        assert first.wait().code == 137


def test_launcher_that_dies_before_the_monitor_is_there() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours, pytest.raises(Internal, match="without saying why"):
        client.read_reply(ours, 1)


def test_200_in_a_row_and_20_at_once_leave_nothing(tmp_path: Path) -> None:
    before = machine_state()

    def one(number: int) -> ExitStatus:
        with Container(tmp_path / f"c{number}", f"echo {number}; exit {number % 100}") as container:
            return container.run().wait()

    for number in range(200):
        assert one(number).code == number % 100
    with ThreadPoolExecutor(20) as pool:
        assert [status.code for status in pool.map(one, range(200, 240))] == [n % 100 for n in range(200, 240)]
    after = machine_state()
    assert after["processes"] - before["processes"] == set()
    assert after["descriptors"] - before["descriptors"] == set()
    assert all(left_in(tmp_path / f"c{number}") == {"exit", "log"} for number in range(240))


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_pause_reaps_and_ends(number: int) -> None:
    script = "sleep 0.05 & sleep 0.1 & exec $0 pause"
    pause = subprocess.Popen(["unshare", "--pid", "--fork", "sh", "-c", script, str(client.binary_path())])
    try:
        wait_for(lambda: children(pause.pid), "the pause process")
        (pid,) = children(pause.pid)
        wait_for(lambda: Path(f"/proc/{pid}/comm").read_text() == "crio-pause\n", "its name")
        wait_for(lambda: not children(pid), "its children are reaped")
        os.kill(pid, signal.SIGHUP)
        time.sleep(0.05)
        assert alive(pid)
        os.kill(pid, number)
        assert pause.wait(5) == 0
    finally:
        pause.kill()
        pause.wait()
