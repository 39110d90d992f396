"""The conversation between a container's init and the commands that make and start it.

Over a socketpair with the command that creates it, the init says `A` when it has let go of that command's own
descriptors, then what it says to any parent (see `parent`) and to a monitor (see docs/architecture.md): `C` with a
terminal's master, `R` when it is ready, `E` with a failure.  The command answers `S` (start at once: `run`) or `W`
(wait: its state is recorded); its end before that means that nobody knows of the container, so it ends too.  After `W`
the init listens on the socket `start` in the container's directory, which it got as a descriptor; whoever connects and
sends `S` gets `E...` or, from the exec itself, the end of the connection.
"""

from __future__ import annotations

import _socket
import errno
import os

from crio_native.errors import StepFailed
from crio_native.oci.builtin import wire
from crio_native.oci.builtin.standalone.state import START_SOCKET, parse_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from crio_native.oci.builtin.standalone.state import State


class InitChannel:
    """The init's side.  To the plan's steps it is the socket to a monitor."""

    def __init__(self, creator: int, listener: int) -> None:
        """Descriptors; listener -1 where the command that creates also starts."""
        self._peer, self._listener = wire.channel(creator), listener

    def fileno(self) -> int:
        return self._peer.fileno()

    def send(self, message: bytes) -> int:
        return self._peer.send(message, _socket.MSG_NOSIGNAL)

    def sendmsg(self, *arguments: object) -> int:
        return self._peer.sendmsg(*arguments)  # type: ignore[arg-type]

    def recv(self, size: int) -> bytes:
        """`S` when somebody starts the container; b"" when nobody ever will."""
        answer = self._peer.recv(size)
        if answer != b"W":
            return answer
        self._peer.close()
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, self._listener)
        while True:
            descriptor, _ = listener._accept()  # type: ignore[attr-defined]
            self._peer = wire.channel(descriptor)
            if self._peer.recv(size) == b"S":
                listener.close()
                return b"S"
            self._peer.close()  # it ended before it spoke


def listen(state: State) -> int:
    """A descriptor that listens as `start` in the container's directory."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    with _directory(state) as directory:
        try:
            listener.bind(f"/proc/self/fd/{directory}/{START_SOCKET}")
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO), state.path(START_SOCKET)) from None
    listener.listen(8)
    return listener.detach()


def start(state: State) -> bool:
    """Let a created container's command run.

    Returns when its execve succeeded, False when nothing waits there any more: another command has started it, or it
    has ended.  Raises StepFailed when the execve did not succeed.
    """
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        with _directory(state) as directory:
            connection.connect(f"/proc/self/fd/{directory}/{START_SOCKET}")
        connection.send(b"S", _socket.MSG_NOSIGNAL)
        await_exec(connection)
        started = True
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
        started = False  # reset: we stood in the queue, and another was taken
    finally:
        connection.close()
    try:
        os.unlink(state.path(START_SOCKET))
    except FileNotFoundError:
        pass
    return started


def await_exec(connection: _socket.socket, born: Callable[[int], None] | None = None) -> int:
    """Until the exec closes the connection; returns the terminal's master if one was sent, else -1.

    born: gets the pid of who takes the process's place, if it says so.  Raises StepFailed with what the init tells
    instead.
    """
    master = -1
    while True:
        message, descriptors = wire.receive(connection, large=False)
        if message[:1] == b"E":
            raise failure(message[1:])
        if message[:1] == b"C" and descriptors:
            master = descriptors[0]
        elif message[:1] == b"B" and born is not None:
            born(int(message[1:]))
        else:
            return master


def failure(content: bytes) -> StepFailed:
    """The init's own words, as it tells them."""
    return StepFailed.from_dict(parse_json(content, "the init's report"))


class _directory:
    """A descriptor of the container's directory: a socket's path may have 108 bytes, and this has less."""

    def __init__(self, state: State) -> None:
        self._path = state.directory

    def __enter__(self) -> int:
        self._fd = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
