"""The container's log file: records, reopening, the size limit, and disks that are full."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import resource
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crio_native.errors import StepFailed
from crio_native.linux import mounts, syscalls
from tests.linux.monitor_harness import Container, Record, content, parse_log
from tests.waiting import wait_for

Journal = tuple[socket.socket, Callable[[], None]]


def logged(tmp_path: Path, command: str) -> list[Record]:
    with Container(tmp_path / "c", command) as container:
        assert container.run().wait().code == 0
        return container.log()


def written(tmp_path: Path, data: bytes) -> list[tuple[str, bytes]]:
    """Tags and contents of what the container writes to stdout in one piece."""
    (tmp_path / "data").write_bytes(data)
    records = logged(tmp_path, f"dd if={tmp_path}/data bs=64k status=none")
    assert {record.stream for record in records} <= {"stdout"}
    return [(record.tag, record.content) for record in records]


@pytest.mark.parametrize(
    ("data", "records"),
    [
        (b"", []),
        (b"\n", [("F", b"")]),
        (b"one\ntwo\n", [("F", b"one"), ("F", b"two")]),
        (b"one\n\n\ntwo", [("F", b"one"), ("F", b""), ("F", b""), ("P", b"two")]),
        (b"x" * 8191, [("P", b"x" * 8191)]),
        (b"x" * 8192, [("P", b"x" * 8192)]),
        (b"x" * 8193, [("P", b"x" * 8192), ("P", b"x")]),
        (b"x" * 8190 + b"\n", [("F", b"x" * 8190)]),
        (b"x" * 8191 + b"\n", [("F", b"x" * 8191)]),
        (b"x" * 8192 + b"\n", [("P", b"x" * 8192), ("F", b"")]),
        (b"x" * 8193 + b"\n", [("P", b"x" * 8192), ("F", b"x")]),
        (b"a\n" + b"x" * 8192 + b"\nb\n", [("F", b"a"), ("P", b"x" * 8190), ("F", b"xx"), ("F", b"b")]),
        (b"\r\n\0\xff\x80 \n", [("F", b"\r"), ("F", b"\0\xff\x80 ")]),
        (b"\n" * 5000, [("F", b"")] * 5000),
    ],
)
def test_full_and_partial_records(tmp_path: Path, data: bytes, records: list[tuple[str, bytes]]) -> None:
    assert written(tmp_path, data) == records


def test_all_bytes_come_through(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "data").write_bytes(data)
    records = logged(tmp_path, f"cat {tmp_path}/data")
    assert content(records, "stdout") == data


def test_streams_are_told_apart(tmp_path: Path) -> None:
    records = logged(tmp_path, "for i in $(seq 300); do echo out$i; echo err$i >&2; done")
    for stream, word in (("stdout", "out"), ("stderr", "err")):
        assert content(records, stream) == b"".join(b"%s%d\n" % (word.encode(), i) for i in range(1, 301))


def test_time_is_now_and_never_goes_back(tmp_path: Path) -> None:
    before = datetime.datetime.now(datetime.UTC)
    records = logged(tmp_path, "for i in 1 2 3 4 5; do echo $i; sleep 0.01; done")
    after = datetime.datetime.now(datetime.UTC)
    times = [record.time for record in records]
    assert times == sorted(times)
    assert len(set(times)) == 5
    parsed = [datetime.datetime.fromisoformat(t[:26] + "+00:00") for t in (times[0], times[-1])]
    assert before - datetime.timedelta(microseconds=1) <= parsed[0] <= parsed[1] <= after


def test_file_is_as_the_kubelet_wants_it(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100", log=str(tmp_path / "log")) as container:
        container.run()
        info = os.stat(tmp_path / "log")
        assert stat.S_IMODE(info.st_mode) == 0o640
        (fd,) = [
            int(link.name)
            for link in Path(f"/proc/{container.monitor}/fd").iterdir()
            if os.readlink(link) == str(tmp_path / "log")
        ]
        flags = int(Path(f"/proc/{container.monitor}/fdinfo/{fd}").read_text().split("flags:\t")[1].split()[0], 8)
        assert flags & os.O_APPEND
        assert flags & os.O_CLOEXEC


def test_an_older_log_is_continued(tmp_path: Path) -> None:
    old = b"2026-01-02T03:04:05.000000006Z stdout F before\n"
    (tmp_path / "log").write_bytes(old)
    with Container(tmp_path / "c", "echo after", log=str(tmp_path / "log")) as container:
        container.run().wait()
        assert [record.content for record in container.log()] == [b"before", b"after"]


def test_no_log_at_all(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "head -c 300000 /dev/zero; exit 6", log=None) as container:
        container.create()
        with container.connection() as connection:
            connection.reopen_log()
        assert container.start().wait().code == 6
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"exit"}


def test_reopen_after_a_rename_loses_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Container(tmp_path / "c", "for i in $(seq 20000); do echo line$i; done", log=str(log)) as container:
        container.run()
        parts: list[Path] = []
        with contextlib.suppress(Exception), container.connection() as connection:
            while True:
                parts.append(tmp_path / f"log.{len(parts)}")
                log.rename(parts[-1])
                connection.reopen_log()
        container.wait()
        records = [r for part in parts if part.exists() for r in parse_log(part.read_bytes())]
        records += container.log() if log.exists() else []
    assert len(parts) > 2
    assert content(records, "stdout") == b"".join(b"line%d\n" % i for i in range(1, 20001))


def test_reopen_where_it_cannot_be_leaves_the_old_file_in_use(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    command = "while ! [ -e go ]; do sleep 0.01; done; echo more"
    with Container(tmp_path / "c", f"cd {tmp_path}; {command}", log=str(tmp_path / "logs/log")) as container:
        container.run()
        (tmp_path / "logs").rename(tmp_path / "moved")
        with container.connection() as connection, pytest.raises(StepFailed, match="ENOENT") as caught:
            connection.reopen_log()
        assert caught.value.step == "reopen"
        (tmp_path / "go").touch()
        container.wait()
    assert [r.content for r in parse_log((tmp_path / "moved/log").read_bytes())] == [b"more"]


def test_reopen_does_not_follow_a_link(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "exec sleep 100", log=str(tmp_path / "log")) as container:
        container.run()
        (tmp_path / "log").unlink()
        (tmp_path / "log").symlink_to(tmp_path / "victim")
        with container.connection() as connection, pytest.raises(StepFailed, match="ELOOP"):
            connection.reopen_log()
    assert not (tmp_path / "victim").exists()


def test_size_limit_begins_the_file_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Container(tmp_path / "c", "seq 1 20000", log=str(log), log_size_max=10_000) as container:
        container.create()
        with open(log, "rb") as first:  # a reader of the first file gets it whole
            container.start().wait()
            beginning = parse_log(first.read())
        end = container.log()
    assert os.stat(log).st_size <= 10_000
    assert content(beginning, "stdout").startswith(b"1\n2\n3\n")
    assert 8_000 < sum(len(r.content) + 40 for r in beginning) <= 11_000
    assert content(end, "stdout").endswith(b"19999\n20000\n")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("log")] == ["log"]


def test_size_limit_counts_what_was_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"2026-01-02T03:04:05.000000006Z stdout F old\n" * 200)
    with Container(tmp_path / "c", "echo new", log=str(log), log_size_max=8192) as container:
        container.run().wait()
        assert [r.content for r in container.log()] == [b"new"]


def test_record_larger_than_the_limit_is_kept_whole(tmp_path: Path) -> None:
    record = "dd if=/dev/zero bs=5000 count=1 status=none"
    with Container(tmp_path / "c", f"{record}; sleep 0.1; echo end", log_size_max=1000) as container:
        container.run().wait()
        assert [r.content for r in container.log()] == [b"end"]
    with Container(tmp_path / "d", f"echo begin; sleep 0.1; {record}", log_size_max=1000) as container:
        container.run().wait()
        assert [len(r.content) for r in container.log()] == [5000]


def test_file_size_limit_neither_kills_nor_hangs(tmp_path: Path) -> None:
    """RLIMIT_FSIZE acts like a disk that fills in the middle of a record."""
    limits = [(resource.RLIMIT_FSIZE, 10_000)]
    with Container(tmp_path / "c", "seq 1 50000; exit 3", limits=limits) as container:
        assert container.run().wait().code == 3
        records = container.log()  # parses, so no record is torn
        assert content(records, "stdout") == b"".join(b"%d\n" % i for i in range(1, len(records) + 1))
        assert 9_900 < os.stat(str(container.log_path)).st_size <= 10_000
        messages = container.messages().splitlines()
    assert len(messages) == 2  # not one for each of the thousands of records
    assert "test: output is lost, the log cannot be written: " in messages[0]
    lost = int(messages[1].split()[2])
    assert lost + len(content(records, "stdout")) - len(records) == sum(len(str(i)) for i in range(1, 50001))


def test_monitor_whose_messages_nobody_reads_goes_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, b"x" * 4096)
        limits = [(resource.RLIMIT_FSIZE, 1000)]
        with Container(tmp_path / "c", "seq 1 1000; exit 3", limits=limits, stderr=writer) as container:
            assert container.run().wait(5).code == 3
        assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK  # the daemon's own setting is not touched
    finally:
        os.close(reader)
        os.close(writer)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 64 KiB, in another mount namespace, reached through /proc."""
    script = "mount -t tmpfs -o size=64k none /mnt && echo ready && read wait"
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield Path(f"/proc/{holder.pid}/root/mnt")
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.root
def test_full_disk_and_room_again(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 40_000)
    command = f"seq 1 20000; touch {tmp_path}/full; while [ -e {small_disk}/ballast ]; do sleep 0.01; done; echo end"
    with Container(tmp_path / "c", command, log=str(small_disk / "log")) as container:
        container.run()
        wait_for(lambda: (tmp_path / "full").exists(), "the container is not held up")
        time.sleep(0.05)
        (small_disk / "ballast").unlink()
        assert container.wait().code == 0
        records = container.log()
        assert "No space left on device" in container.messages()
    assert records[-1].content == b"end"
    assert content(records[:-1], "stdout") == b"".join(b"%d\n" % i for i in range(1, len(records)))


@pytest.mark.root
def test_full_disk_at_the_size_limit(tmp_path: Path, small_disk: Path) -> None:
    """There is no room for the new file beside the old one: tmpfs refuses the inode, or its first page."""
    with Container(tmp_path / "c", "seq 1 20000", log=str(small_disk / "log"), log_size_max=60_000) as container:
        assert container.run().wait().code == 0
        container.log()
    assert {path.name for path in small_disk.iterdir()} == {"log"}


def test_kill_in_the_middle_of_output_leaves_whole_records(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "yes", log_size_max=1 << 20) as container:
        container.run()
        time.sleep(0.1)
        with container.connection() as connection:
            connection.kill(signal.SIGKILL)
        assert container.wait().code == 137
        assert {r.content for r in container.log() if r.tag == "F"} == {b"y"}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """A journal, and how a process comes to see it where the monitor looks for one."""
    run = tmp_path / "run"
    (run / "systemd/journal").mkdir(parents=True)

    def enter() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, mounts.MS_REC | mounts.MS_PRIVATE)
        syscalls.mount(str(run), "/run", None, mounts.MS_BIND)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.chdir(run):
        sock.bind("systemd/journal/socket")
        sock.settimeout(10)
        yield sock, enter


def parsed(message: bytes) -> dict[str, bytes]:
    """A message of the journal's native protocol: NAME=VALUE lines, or NAME, the value's length, and the value."""
    fields = {}
    while message:
        line, _, message = message.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(message[:8], "little")
            value, message = message[8 : 8 + size], message[8 + size + 1 :]
        fields[name.decode()] = value
    return fields


def test_the_journal_gets_the_output_too(tmp_path: Path, journal: Journal) -> None:
    command = "printf 'one\\n\\ntwo=2'; sleep 0.05; echo bad >&2"
    with Container(tmp_path / "c", command, journal="the_name", enter=journal[1]) as container:
        assert container.run().wait().code == 0
        assert [record.content for record in container.log()] == [b"one", b"", b"two=2", b"bad"]
        messages = [parsed(journal[0].recv(1 << 16)) for _ in range(4)]
        assert [m["MESSAGE"] for m in messages] == [b"one", b"", b"two=2", b"bad"]
        assert [m["PRIORITY"] for m in messages] == [b"6", b"6", b"6", b"3"]
        assert ["CONTAINER_PARTIAL_MESSAGE" in m for m in messages] == [False, False, True, False]
        assert {m["CONTAINER_NAME"] for m in messages} == {m["SYSLOG_IDENTIFIER"] for m in messages} == {b"the_name"}
        [whole] = {m["CONTAINER_ID_FULL"].decode() for m in messages}
        assert messages[0]["CONTAINER_ID"].decode() == whole[:12]


def test_a_journal_that_takes_nothing_holds_nobody_up(tmp_path: Path, journal: Journal) -> None:
    """Its queue holds some ten messages."""
    with Container(tmp_path / "c", "seq 5000", journal="x", enter=journal[1]) as container:
        assert container.run().wait().code == 0
        assert content(container.log(), "stdout").split()[-1] == b"5000"
        assert "output is missing in the journal" in container.messages()


def test_a_name_that_would_be_two_fields_is_refused(tmp_path: Path) -> None:
    with Container(tmp_path / "c", "true", journal="a\nPRIORITY=0") as container:
        with pytest.raises(StepFailed, match="journal"):
            container.run()
