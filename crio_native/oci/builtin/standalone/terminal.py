"""Terminals and descriptors that are handed to others, and a process in the foreground."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import errno
import fcntl
import os
import select
import struct

from crio_native.errors import InvalidArgument
from crio_native.oci.builtin import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CHUNK = 8192
# Not passed on: what cannot be caught, what is about us, and what a write to a closed pipe brings.
_OURS = ("SIGKILL", "SIGSTOP", "SIGCHLD", "SIGPIPE", "SIGURG")
FORWARDED = frozenset(_signal.valid_signals()) - {getattr(_signal, name) for name in _OURS}
INTERRUPTS = frozenset((_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP))


def send_descriptor(field: str, path: str, name: str, descriptor: int) -> None:
    """Connect to a unix socket and send a descriptor there, with its name as the text beside it.

    Raises InvalidArgument when nobody listens there.
    """
    directory, _, base = path.rpartition("/")
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        parent = os.open(directory or ("/" if path.startswith("/") else "."), os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{parent}/{base}")  # by its directory: an address has 108 bytes
        finally:
            os.close(parent)
        wire.send(connection, name.encode(), [descriptor])
    except OSError as error:
        why = os.strerror(error.errno or errno.EIO).lower()
        raise InvalidArgument(field, path, f"the descriptor cannot be sent there: {why}") from None
    finally:
        connection.close()


def block_signals(but: frozenset[int] = frozenset()) -> None:
    """Hold back what is to be passed on, but those, until `Foreground` can."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, FORWARDED - but)


class Foreground:
    """Waits for a process, passes signals on to it and, with a terminal, joins its master to our own stdin and stdout.

    The caller has blocked the signals before the process was cloned.
    """

    def __init__(self, pid: int, pidfd: int, master: int = -1) -> None:
        self.pid, self.pidfd, self.master = pid, pidfd, master
        self.pending = b""  # typed, not yet taken by the terminal
        self.settings: list[Any] | None = None
        self.wakeup, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in FORWARDED:
            try:
                _signal.signal(number, lambda *_: None)
            except (OSError, ValueError):
                continue  # libc keeps a few real-time signals to itself

    def wait(self) -> int:
        """The exit code: the process's own, or 128 + the signal that ended it."""
        poll = select.poll()
        for fd in (self.pidfd, self.wakeup):
            poll.register(fd, select.POLLIN)
        if self.master >= 0:
            self._take_terminal(poll)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, FORWARDED)
        try:
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if self.wakeup in ready:
                    self._pass_on(os.read(self.wakeup, 512))
                if self.master in ready and not self._show():
                    poll.unregister(self.master)
                    self.master = -1
                if 0 in ready and self.master >= 0 and not self._type():
                    poll.unregister(0)
                if self.pidfd in ready:
                    while self.master >= 0 and self._show():
                        continue
                    return self._reaped()
        finally:
            self._restore_terminal()

    def _reaped(self) -> int:
        """Ours, and those of the container's that it left to us."""
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _pass_on(self, signals: bytes) -> None:
        for number in signals:
            if number == _signal.SIGWINCH and self.master >= 0:
                self._resize()
            elif number in FORWARDED:
                try:
                    _signal.pidfd_send_signal(self.pidfd, number)
                except ProcessLookupError:
                    return

    def _take_terminal(self, poll: select.poll) -> None:
        os.set_blocking(self.master, False)
        poll.register(self.master, select.POLLIN)
        poll.register(0, select.POLLIN)
        if os.isatty(0):
            import termios  # here: a library to be loaded, which only a terminal needs

            self.settings = termios.tcgetattr(0)
            raw = termios.tcgetattr(0)
            raw[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
            raw[1] &= ~termios.OPOST
            raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
            raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
            termios.tcsetattr(0, termios.TCSANOW, raw)
            self._resize()

    def _restore_terminal(self) -> None:
        if self.settings is not None:
            import termios

            termios.tcsetattr(0, termios.TCSANOW, self.settings)

    def _resize(self) -> None:
        import termios

        size = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8) if os.isatty(0) else struct.pack("4H", 0, 0, 0, 0)
        if any(size):
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def _show(self) -> bool:
        """Copy output; False at its end."""
        try:
            data = os.read(self.master, CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: nobody has the other end open any more
                raise
            return False
        _write_all(1, data)
        return bool(data)

    def _type(self) -> bool:
        """Copy input; False at its end."""
        data = os.read(0, CHUNK)
        os.set_blocking(self.master, True)
        try:
            _write_all(self.master, data or b"\x04")  # a terminal's input has no end, but a key that says so
        except OSError:
            return False
        finally:
            os.set_blocking(self.master, False)
        return bool(data)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
