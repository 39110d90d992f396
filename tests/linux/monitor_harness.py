"""A stand-in for the launcher: starts real monitors, with real inits that scripts drive.

`Container(...)` does what a launcher does: it makes sockets and pipes, forks M, which forks the init and executes
crio-monitor.  The init sends R, waits for S, and executes a shell command.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crio_native.monitor import client
from crio_native.oci.runtime import ExitStatus

from ..waiting import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
LINE = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([PF]) ([^\n]*)\n")


if "CRIO_NATIVE_MONITOR" not in os.environ:  # the program under test is the one in the source tree, as it is now
    subprocess.run(["make", "-s", "-C", str(REPOSITORY / "helpers")], check=True)


@dataclass(frozen=True)
class Record:
    time: str
    stream: str
    tag: str
    content: bytes


def parse_log(data: bytes) -> list[Record]:
    """The records of a log; fails on anything that is not a record."""
    records, at = [], 0
    while at < len(data):
        match = LINE.match(data, at)
        assert match, f"not a record at byte {at}: {data[at : at + 120]!r}"
        records.append(Record(match[1].decode(), match[2].decode(), match[3].decode(), match[4]))
        at = match.end()
    return records


def content(records: Sequence[Record], stream: str) -> bytes:
    """A stream's bytes as the container wrote them."""
    return b"".join(r.content + (b"\n" if r.tag == "F" else b"") for r in records if r.stream == stream)


def failing(**error: Any) -> Callable[[socket.socket], None]:
    """An init that reports an error and ends."""

    def init(sync: socket.socket) -> None:
        sync.send(b"E" + json.dumps({"errno": 0, "path": "", "detail": "", **error}).encode())
        os._exit(1)

    return init


def running(command: str, *, ready: bytes = b"R") -> Callable[[socket.socket], None]:
    """An init that waits for the start and executes a shell command; ENOENT and the like are sent as the real one's."""

    def init(sync: socket.socket) -> None:
        sync.send(ready)
        if sync.recv(16) != b"S":
            os._exit(99)
        os.execv("/bin/sh", ["sh", "-c", command])

    return init


def executing(path: str) -> Callable[[socket.socket], None]:
    """An init that executes a program, and reports why it cannot."""

    def init(sync: socket.socket) -> None:
        sync.send(b"R")
        sync.recv(16)
        try:
            os.execv(path, [path])
        except OSError as error:
            failing(step="exec", errno=error.errno, path=path)(sync)

    return init


def ending(act: Callable[[], None]) -> Callable[[socket.socket], None]:
    """An init that is told to start and does something else than execute a program."""

    def init(sync: socket.socket) -> None:
        sync.send(b"R")
        sync.recv(16)
        act()

    return init


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> dict[int, str]:
    """pid -> state of a process's children."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found[int(stat.parent.name)] = fields[0]
    return found


class Container:
    """A monitor with its init, from birth to the exit file.  `close` kills and reaps whatever is left."""

    def __init__(
        self,
        run_dir: Path,
        init: str | Callable[[socket.socket], None],
        *,
        log: str | None = "",
        tty: bool = False,
        stdin: bool = False,
        stdin_once: bool = False,
        extra: Sequence[str] = (),
        pid_argument: int | None = None,
        limits: Sequence[tuple[int, int]] = (),
        stderr: int | None = None,
        delay: float = 0,
        enter: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        """log: None for no log, "" for one in run_dir.  limits: (resource, value) for the monitor alone.
        stderr: the monitor's own, instead of a file.  delay: seconds between the init's birth and the monitor's.
        enter: what M does first, such as entering a mount namespace of its own."""
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.log_path = None if log is None else log or str(run_dir / "log")
        self.init = running(init) if isinstance(init, str) else init
        self.tty, self.stdin = tty, stdin
        self.stderr_path = run_dir.with_name(run_dir.name + "-stderr")
        self.words = [
            "crio-monitor",
            *client.arguments(
                container_id="test",
                tty=tty,
                stdin=stdin,
                stdin_once=stdin_once,
                log_path=self.log_path or "",
                **options,
            ),
            *extra,
        ]
        self.pid_argument, self.limits, self.stderr, self.delay = pid_argument, limits, stderr, delay
        self.enter = enter
        self.reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.monitor = os.fork()
        if not self.monitor:
            _never_return(lambda: self._become_monitor(theirs))
        theirs.close()
        self.created: dict[str, Any] = {}

    def _become_monitor(self, reply: socket.socket) -> None:
        self.enter()
        sync, init_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open("/dev/null", os.O_RDWR)
        stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
        init = os.fork()
        if not init:
            sync.close()
            if self.tty:
                self._open_terminal(init_sync)
            else:
                for source, target in ((stdin[0] if self.stdin else null, 0), (stdout[1], 1), (stderr[1], 2)):
                    os.dup2(source, target)
            os.dup2(init_sync.fileno(), 3, inheritable=False)
            os.closerange(4, 256)
            self.init(socket.socket(fileno=3))
            os._exit(98)
        messages = self.stderr
        if messages is None:
            messages = os.open(self.stderr_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        run_dir = os.open(self.run_dir, os.O_PATH | os.O_DIRECTORY)
        wanted = [null, null, messages, sync.fileno(), reply.fileno(), run_dir, stdin[1], stdout[0], stderr[0]]
        copies = [os.dup2(fd, 100 + number) for number, fd in enumerate(wanted)]
        for number, fd in enumerate(copies):
            os.dup2(fd, number)
        if not self.stdin or self.tty:
            os.close(6)
        if self.tty:
            os.close(7)
            os.close(8)
        os.closerange(9, 256)
        for kind, value in self.limits:
            resource.setrlimit(kind, (value, value))
        time.sleep(self.delay)
        program = os.fspath(client.binary_path())
        pid = init if self.pid_argument is None else self.pid_argument
        sanitizer = {name: value for name, value in os.environ.items() if name.endswith("SAN_OPTIONS")}
        os.execve(program, [*self.words, "--pid", str(pid)], sanitizer)

    def _open_terminal(self, sync: socket.socket) -> None:
        master, slave = pty.openpty()
        socket.send_fds(sync, [b"C"], [master])
        os.close(master)
        os.login_tty(slave)

    def create(self, timeout: float = 10) -> Container:
        self.created = client.read_reply(self.reply, timeout)
        self.reply.close()
        return self

    def start(self) -> Container:
        with client.Connection.connect(self.run_dir) as connection:
            connection.start(timeout=10)
        return self

    def run(self) -> Container:
        return self.create().start()

    def connection(self) -> client.Connection:
        return client.Connection.connect(self.run_dir)

    def raw(self, request: bytes = b"") -> socket.socket:
        """A control connection without the client's manners."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(10)
        directory = os.open(self.run_dir, os.O_PATH)
        try:
            sock.connect(f"/proc/self/fd/{directory}/control")
        finally:
            os.close(directory)
        if request:
            sock.send(request)
        return sock

    def wait(self, seconds: float = 10) -> ExitStatus:
        """Waits for the monitor itself; then the exit file must be there, and the socket must not."""
        assert self.reap(seconds) == 0, f"the monitor failed: {self.messages()}"
        status = client.read_exit_file(self.run_dir)
        assert status is not None
        assert not (self.run_dir / "control").exists()
        return status

    def reap(self, seconds: float = 10) -> int:
        """The monitor's wait status as an exit code."""
        found = 0

        def ended() -> bool:
            nonlocal found
            pid, status = os.waitpid(self.monitor, os.WNOHANG)
            if pid:
                self.monitor = 0
                found = os.waitstatus_to_exitcode(status)
            return bool(pid)

        wait_for(ended, "the monitor's end", seconds)
        return found

    def log(self) -> list[Record]:
        assert self.log_path
        return parse_log(Path(self.log_path).read_bytes())

    def messages(self) -> str:
        return self.stderr_path.read_text() if self.stderr_path.exists() else ""

    def close(self) -> None:
        self.reply.close()
        if self.created and self.monitor:  # the pid is the init's for as long as its monitor has not ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.created["pid"], signal.SIGKILL)
        if self.monitor:
            try:
                self.reap(3)
            except AssertionError:
                os.kill(self.monitor, signal.SIGKILL)
                self.reap(3)
                raise

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _never_return(act: Callable[[], None]) -> None:
    """Runs `act` in a forked child, which must not come back into the test."""
    try:
        act()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(97)
