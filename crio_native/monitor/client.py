"""Talking to a container's monitor: its arguments, its first reply, its control socket and its exit file.

Blocking calls on small packets; nothing here keeps a thread or a cache, and any thread may call it.  A monitor that
does not serve is `NotFound`: the container has ended, and `read_exit_file` tells how.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

from crio_native.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    StartFailed,
    StepFailed,
    Unavailable,
)
from crio_native.oci.runtime import ExitStatus

PACKET_MAX = 8192
"""Most bytes of stdin in one packet to `attach`'s socket; the monitor drops a client that sends more."""

OUTPUT_PACKET_MAX = 1 + 8192
"""Most bytes in one packet from `attach`'s socket: 2 (stdout) or 3 (stderr), then output."""

_ANSWER_MAX = 32 * 1024  # the init's object is at most 16 KiB
_EXIT_FILE_MAX = 4096
_TIMEOUT = 10.0  # seconds for an answer that needs only the monitor itself

_REPOSITORY = Path(__file__).resolve().parents[2]
_INSTALLED = Path("/usr/libexec/crio-native/crio-monitor")


def binary_path() -> Path:
    """The monitor program: $CRIO_NATIVE_MONITOR, else the one built in the source tree, else the installed one.  Raises
    NotFound."""
    named = os.environ.get("CRIO_NATIVE_MONITOR")
    candidates = [Path(named)] if named else [_REPOSITORY / "build" / "crio-monitor", _INSTALLED]
    for path in candidates:
        if os.access(path, os.X_OK) and path.is_file():
            return path
    if named:
        raise NotFound("monitor program", named, "CRIO_NATIVE_MONITOR must name an executable file")
    raise NotFound("monitor program", str(candidates[0]), "build it with: make -C helpers")


def arguments(
    *,
    container_id: str,
    tty: bool = False,
    stdin: bool = False,
    stdin_once: bool = False,
    log_path: str = "",
    log_size_max: int = -1,
    oom_file: str = "",
    sync_log: bool = False,
    journal: str = "",
) -> list[str]:
    """The monitor's arguments, but for the --pid of one that is started when its init exists already.

    log_path: absolute, "" for no log.  log_size_max: bytes, no limit when it is not positive.  oom_file: the cgroup's
    memory.events (v2) or memory.oom_control (v1), "" when there is none.  sync_log: flush the log to the disk
    when it is reopened or ends.  journal: the container's name for the systemd journal, "" to send it no output.
    """
    words = ["--id", container_id]
    if tty:
        words.append("--tty")
    if stdin:
        words.append("--stdin")
    if stdin_once:
        words.append("--stdin-once")
    if log_path:
        words += ["--log", log_path]
    if log_path and log_size_max > 0:
        words += ["--log-size-max", str(log_size_max)]
    if log_path and sync_log:
        words.append("--sync-log")
    if journal:
        words += ["--journal", journal]
    if oom_file:
        words += ["--oom-file", oom_file]
    return words


def read_reply(sock: socket.socket, timeout: float | None = None) -> dict[str, Any]:
    """The monitor's answer to its own creation: {"pid", "monitor", "init"}.  timeout: seconds, None for no limit.

    Raises StepFailed with the step that failed in init or monitor: the monitor has then killed and reaped the init and
    left no files.  Raises DeadlineExceeded: closing the socket makes the monitor do the same.  Raises Internal when
    monitor or launcher died silently, or sent nonsense: what is left of the container is then unknown.
    """
    packet = _receive(sock, timeout, "the monitor's reply")
    if not packet:
        raise Internal("the monitor or the launcher died while it created the container, without saying why")
    reply = _parse(packet)
    if "error" in reply:
        raise _step_failed(reply["error"])
    created = reply.get("created")
    if not isinstance(created, dict):
        raise Internal(f"the monitor's reply has neither 'created' nor 'error': {packet[:200]!r}")
    return created


class Connection:
    """A connection to a monitor's control socket; requests go one after the other.  Also a context manager.

    Each request raises NotFound when the container has ended, StepFailed with the errno when it is refused,
    ResourceExhausted when the monitor has too many clients, and DeadlineExceeded when it does not answer within ten
    seconds.
    """

    def __init__(self, sock: socket.socket, run_dir: Path) -> None:
        self._sock = sock
        self._run_dir = run_dir

    @classmethod
    def connect(cls, run_dir: Path) -> Connection:
        """Raises NotFound when no monitor serves run_dir, Unavailable when it has too many clients."""
        return cls(_connect(run_dir), run_dir)

    def start(self, timeout: float | None = None) -> None:
        """Let the container execute its command; returns when it runs.  timeout: seconds, None for no limit.

        Raises StartFailed when the command cannot be executed (the container then ends with code 128), and
        FailedPrecondition when it was started before.
        """
        try:
            self._request("start", timeout)
        except StepFailed as error:
            if error.step == "start" and error.number == errno.EALREADY:
                raise FailedPrecondition(f"the container in {self._run_dir} was started before") from error
            if error.step == "start":
                raise NotFound("container process", str(self._run_dir), error.detail) from error
            raise StartFailed.from_dict(error.to_dict()) from error

    def kill(self, signal: int) -> None:
        """Send a signal to the container's init."""
        try:
            self._request(f"kill {int(signal)}")
        except StepFailed as error:
            if error.number == errno.ESRCH:
                raise NotFound("container process", str(self._run_dir), "it has ended") from error
            raise

    def reopen_log(self) -> None:
        """Begin a new file at the log's path, after someone renamed the old one.  On an error the old one goes on."""
        self._request("reopen")

    def resize(self, height: int, width: int) -> None:
        """Set the terminal's size, in characters, each 0..65535."""
        self._request(f"resize {int(height)} {int(width)}")

    def close_stdin(self) -> None:
        """Close the container's stdin after what it was sent; refused for a terminal, whose input has no end."""
        self._request("close-stdin")

    def ended(self, code: int, finished_at: int, *, oom_killed: bool) -> None:
        """Tell a remote monitor how its container ended; code 0..255, finished_at ns since the epoch, 0 for now."""
        self._request(f"ended {code} {int(oom_killed)} {finished_at}")

    def lost(self) -> None:
        """Tell a remote monitor that nobody will ever know how its container ended: it leaves without an exit file."""
        self._request("lost")

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, text: str, timeout: float | None = _TIMEOUT) -> None:
        _request(self._sock, self._run_dir, text, timeout)


def watch(run_dir: Path) -> socket.socket:
    """A socket that becomes readable when the container ends; for `read_exit`.

    Raises NotFound when no monitor serves run_dir; then `read_exit_file` tells whether the container ended.
    """
    sock = _connect(run_dir)
    try:
        sock.send(b"watch")
    except OSError as error:
        sock.close()
        raise _gone(run_dir) from error
    sock.settimeout(None)
    return sock


def read_exit(sock: socket.socket) -> ExitStatus | None:
    """What `watch` brought, waiting for it; None when the monitor ended without telling.

    None also comes when the watch arrived in the instant in which the monitor left: look at `read_exit_file` then.
    """
    packet = _receive(sock, None, "the container's end")
    if not packet.startswith(b"exit "):
        return None
    return _exit_status(packet[5:])


def read_exit_file(run_dir: Path) -> ExitStatus | None:
    """How the container ended, from the file its monitor left; None while there is none."""
    try:
        with open(run_dir / "exit", "rb") as file:
            return _exit_status(file.read(_EXIT_FILE_MAX))
    except FileNotFoundError:
        return None


def attach(run_dir: Path, *, stdin: bool = True) -> socket.socket:
    """A SEQPACKET socket on the container's streams, from now on.

    Packets out: one byte, 2 stdout or 3 stderr, then output (`OUTPUT_PACKET_MAX`).  Packets in, with stdin: at most
    `PACKET_MAX` bytes of input; shutdown(SHUT_WR) ends it.  While a client does not take its packets the container's
    output is held back, and after five seconds the client is dropped (EOF).
    """
    sock = _connect(run_dir)
    try:
        _request(sock, run_dir, "attach" if stdin else "attach output", _TIMEOUT)
    except BaseException:
        sock.close()
        raise
    sock.settimeout(None)
    return sock


def _connect(run_dir: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY)
        try:
            sock.setblocking(False)
            sock.connect(f"/proc/self/fd/{directory}/control")  # a whole path may be longer than sun_path's 108 bytes
        finally:
            os.close(directory)
    except BlockingIOError as error:
        sock.close()
        raise Unavailable(f"the monitor of {run_dir} has too many clients waiting") from error
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise _gone(run_dir) from error
        raise Internal(f"cannot connect to the monitor of {run_dir}: {error.strerror}") from error
    return sock


def _gone(run_dir: Path) -> NotFound:
    return NotFound("monitor", str(run_dir), "the container has ended")


def _request(sock: socket.socket, run_dir: Path, text: str, timeout: float | None) -> None:
    sock.settimeout(timeout)
    try:
        sock.send(text.encode())
    except (BrokenPipeError, ConnectionResetError):
        pass  # a monitor that does not want us has said why before it closed the connection
    answer = _receive(sock, timeout, f"the monitor's answer to {text!r}")
    if not answer:
        raise _gone(run_dir)
    verb, _, body = answer.partition(b" ")
    if verb == b"ok":
        return
    if verb != b"error":
        raise Internal(f"the monitor of {run_dir} answered {text!r} with {answer[:200]!r}")
    refusal = _step_failed(_parse(body))
    if refusal.number == errno.EBUSY:
        raise ResourceExhausted(f"the monitor of {run_dir} refuses {text!r}: {refusal.detail}")
    raise refusal


def _receive(sock: socket.socket, timeout: float | None, what: str) -> bytes:
    sock.settimeout(timeout)
    try:
        packet, _, flags, _ = sock.recvmsg(_ANSWER_MAX)
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what} did not come within {timeout:g} s") from error
    except ConnectionResetError:
        return b""
    if flags & socket.MSG_TRUNC:
        raise Internal(f"{what} is larger than {_ANSWER_MAX} bytes")
    return packet


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(errors="replace"))
    except ValueError as error:
        raise Internal(f"the monitor sent what is not JSON: {data[:200]!r}") from error
    if not isinstance(value, dict):
        raise Internal(f"the monitor sent JSON that is not an object: {data[:200]!r}")
    return value


def _step_failed(data: Any) -> StepFailed:
    try:
        return StepFailed.from_dict(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Internal(f"the init's or the monitor's error object is incomplete: {data!r:.200}") from error


def _exit_status(data: bytes) -> ExitStatus:
    value = _parse(data)
    try:
        return ExitStatus(
            code=int(value["code"]),
            signal=int(value["signal"]),
            oom_killed=bool(value["oom_killed"]),
            finished_at=int(value["finished_at"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Internal(f"the exit object is incomplete: {data[:200]!r}") from error
