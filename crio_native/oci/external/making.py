"""What every way of having a container created by a program shares: its root and config.json, the program's words and
pid file, the terminal, and the end as its monitor.

A failure is told to whoever asked with the step that it was in (`telling`).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import _socket
import fcntl
import os
import stat

from crio_native.linux import control_files, mounts, process, syscalls
from crio_native.oci.builtin import steps, users, wire
from crio_native.oci.builtin.steps.root import map_layers
from crio_native.oci.external.children import (
    Children,
    Tail,
    Unwanted,
    is_child,
    kill_children,
    spawn,
    wait_for,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


WORDS_MAX = 64 << 10  # bytes kept of what a runtime says, from its end
PID_FILE_MAX = 32
SAID_MAX = 4096  # bytes of a refusal's words that are passed on; JSON may make six of one
DRAIN_CHUNKS = 64


class telling:
    """What goes wrong inside is told to whoever waits for the monitor's first reply, with the name of the step."""

    def __init__(self, request: dict[str, Any], reply: _socket.socket) -> None:
        self.request, self.reply, self.name = request, reply, ""

    def __enter__(self) -> telling:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None or isinstance(error, Unwanted):
            return False
        kill_children()
        if isinstance(error, Refusal):
            fail(self.reply, {"step": self.name, "errno": 0, "path": self.request["line"][0], "detail": error.said})
        elif isinstance(error, users.NoSuchUser):
            fail(self.reply, {"step": self.name, "errno": 0, "path": error.file, "detail": str(error)})
        else:
            fail(self.reply, steps.describe(self.name, error))
        return True


def prepare(request: dict[str, Any], step: telling) -> dict[str, Any] | None:
    """All that comes before the runtime; who the command runs as."""
    step.name = "overlay_root"
    mount_root(request)
    step.name = "find_user"
    user = find_user(request)
    step.name = "write_config"
    write_config(request, user)
    step.name = "monitor_cgroup"
    for path in request["groups"]:
        join(path)
    return user


def fail(reply: _socket.socket, failure: dict[str, Any]) -> None:
    try:
        reply.send(b'{"error":' + wire.encode(failure).encode() + b"}", _socket.MSG_NOSIGNAL)
    except OSError:
        pass


class Refusal(Exception):
    """The runtime ended without having done what it was asked; said: its words."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said[-SAID_MAX:]


def follow_mounts() -> int:
    """Leave the host's mount namespace, of which a descriptor is returned, for a copy that follows it."""
    hosts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, mounts.MS_REC | mounts.MS_SLAVE)
    return hosts


def own_mounts(scratch: str) -> int:
    """As `follow_mounts`, with a null device of our own: there are crun that give their standard streams to the
    container's root, whatever they are."""
    hosts = follow_mounts()
    directory = f"{scratch}/{os.getpid()}.dev"
    os.mkdir(directory)
    syscalls.mount("tmpfs", directory, "tmpfs", mounts.MS_NOSUID | mounts.MS_NOEXEC, "mode=700,nr_inodes=2")
    null = f"{directory}/null"
    os.mknod(null, stat.S_IFCHR, os.makedev(1, 3))
    os.chmod(null, 0o666)
    syscalls.mount(null, "/dev/null", None, mounts.MS_BIND)
    syscalls.umount2(directory, mounts.MNT_DETACH)
    os.rmdir(directory)
    return hosts


def mount_root(request: dict[str, Any]) -> None:
    """The layers' names are relative to `base`, so that 127 of them fit the page that mount data is bounded to."""
    root = request["root"]
    if not root:
        return
    if root["user_namespace"]:
        context = steps.Context(None)
        context.user_namespace = process.open_namespace(root["user_namespace"])
        map_layers(context, root["base"])
        os.close(context.user_namespace)
    os.chdir(root["base"])
    syscalls.mount("overlay", root["path"], "overlay", root["flags"], root["data"])
    os.chdir("/")


def find_user(request: dict[str, Any]) -> dict[str, Any] | None:
    """Who the command runs as, in numbers, by the image's own files."""
    wanted = request["user"]
    if wanted is None:
        return None
    root = os.open(request["rootfs"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        user = users.find(root, wanted["user"], wanted["group"], wanted["supplementary"], wanted["merge"])
        users.check_group_names(root, user.groups)
    finally:
        os.close(root)
    return {"uid": user.uid, "gid": user.gid, "groups": list(user.groups), "home": user.home}


def write_config(request: dict[str, Any], user: dict[str, Any] | None) -> None:
    process = request["process"]
    if user is not None:
        process["user"] = {"uid": user["uid"], "gid": user["gid"], "additionalGids": user["groups"]}
        if not any(text.startswith("HOME=") for text in process["env"]):
            process["env"] = [*process["env"], f"HOME={user['home']}"]
    rest = request["spec"]  # the JSON object without its process
    config = rest[:-1] + (b"," if len(rest) > 2 else b"") + b'"process":' + wire.encode(process).encode() + b"}"
    write_file(request["config"], config)


def write_file(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def join(procs: str) -> None:
    """Put this process, and all that it will start, into the group whose file of processes this is."""
    control_files.write(procs, "0")


class Made:
    """A container in the making: its streams and, for a terminal, the socket that its master arrives on."""

    def __init__(self, request: dict[str, Any], reply: _socket.socket) -> None:
        self.request, self.reply = request, reply
        self.run_dir = os.open(request["run_dir"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.out, self.err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        self.stdin = os.pipe2(os.O_CLOEXEC) if request["stdin"] and not request["terminal"] else (null, -1)
        self.console = Console(f"{request['scratch']}/{os.getpid()}.tty") if request["terminal"] else None

    def create(self, line: list[str]) -> bytes:
        """Run the program that makes the container; what it said although it succeeded.  Raises Refusal."""
        children = Children()
        tails = [Tail(self.out[0], WORDS_MAX, end=True), Tail(self.err[0], WORDS_MAX, end=True)]
        extra = {self.console.fileno(): self.console.accept} if self.console else {}
        try:
            pid = spawn(line, self.request["env"], [self.stdin[0], self.out[1], self.err[1]])
            for fd in (self.stdin[0], self.out[1], self.err[1]):
                os.close(fd)
            status = wait_for(pid, children, self.reply, tails, extra)
            if self.console and status == 0:
                self.console.accept()
        finally:
            if self.console:
                self.console.close()
        for tail in tails:
            for _ in range(DRAIN_CHUNKS):  # what a hook left behind may write for ever
                if not tail.read():
                    break
        said = tails[1].data or tails[0].data
        if status != 0:
            raise Refusal(end_of(status, said))
        self.pid = child_of_file(self.request["pid_file"])
        return said

    def line(self) -> list[str]:
        *line, container_id = self.request["line"]
        return [*line, *(["--console-socket", self.console.path] if self.console else []), container_id]

    def become_monitor(self, reply: _socket.socket, told: dict[str, Any]) -> NoReturn:
        """Say for the container's process what an init of ours would say itself, then exec the monitor."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        if self.console:
            wire.send(theirs, b"C", [self.console.master])
        theirs.send(b"R" + wire.encode(told).encode())
        wanted = {3: ours.fileno(), 4: reply.fileno(), 5: self.run_dir}
        if not self.console:
            wanted |= {6: self.stdin[1]} if self.stdin[1] >= 0 else {}
            wanted |= {7: self.out[0], 8: self.err[0]}
        moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for number, fd in wanted.items()}
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for number in (0, 1):
            os.dup2(null, number)
        syscalls.close_range(3, 63)
        for number, fd in moved.items():
            os.dup2(fd, number)
        syscalls.close_range(64)
        _signal.set_wakeup_fd(-1)
        steps.restore_signals()
        monitor = self.request["monitor"]
        os.execve(monitor["path"], ["crio-monitor", *monitor["arguments"], "--pid", str(self.pid)], {})


class Console:
    """The socket that a runtime sends a terminal's master to.  Its path must be short: sun_path has 108 bytes."""

    def __init__(self, path: str) -> None:
        self.path, self.master = path, -1
        self.listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        forget(path)
        try:
            self.listener.bind(path)
        except OSError as error:
            raise OSError(error.errno or 22, "crio.runroot may be too long for a socket's path", path) from None
        self.listener.listen(1)

    def fileno(self) -> int:
        return self.listener.fileno()

    def accept(self) -> None:
        """Take the master from whoever connected; nothing happens when it is here already."""
        if self.master >= 0:
            return
        self.listener.settimeout(1)
        try:
            fd, _ = self.listener._accept()  # type: ignore[attr-defined]  # what socket.accept is made of
        except (TimeoutError, BlockingIOError):
            raise Refusal("the runtime did not send the terminal to its console socket") from None
        with_socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
        try:
            with_socket.settimeout(5)
            _, descriptors = wire.receive(with_socket)
        finally:
            with_socket.close()
        if not descriptors or not os.isatty(descriptors[0]):
            raise Refusal("what the runtime sent to its console socket is no terminal")
        self.master = descriptors[0]

    def close(self) -> None:
        self.listener.close()
        forget(self.path)


def end_of(status: int, said: bytes) -> str:
    """A runtime's words, with how it ended where it has none."""
    code = os.waitstatus_to_exitcode(status)
    end = f"nothing, it was killed by signal {-code}" if code < 0 else f"nothing, it ended with code {code}"
    return said.decode(errors="replace").strip() or end


def child_of_file(path: str, children: Children | None = None) -> int:
    """The pid in a pid file, when it is a child of ours; a runtime may write anything.  Raises Refusal."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read(PID_FILE_MAX)
    except OSError as error:
        raise Refusal(f"the runtime left no pid file: {(error.strerror or '').lower()}") from None
    text = data.strip()
    if not (text.isdigit() and len(text) <= 10):
        raise Refusal(f"the runtime left a pid file without a pid: {data!r}")
    pid = int(text)
    if children is not None and pid in children.statuses:
        return pid
    if not is_child(pid):
        raise Refusal(f"the runtime left a pid file with {pid}, which is no process that it made")
    return pid


def forget(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
