"""A container's directory, and what it says.

`<root>/<id>/` (mode 0700) has `state.json` (what is known of the container), `config.json` (a copy of what it was made
from: the bundle's may change), `resources.json` (what `update` has changed of its limits) and, while the container
waits for `start`, the socket `start`.  state.json is written before the kernel is touched and replaced as a whole by
rename, so that a command that was killed leaves a container which `delete --force` can remove.
"""

from __future__ import annotations

import errno
import os
import time

from crio_native.errors import AlreadyExists, CrioError, FailedPrecondition, InvalidArgument, NotFound
from crio_native.linux import process
from crio_native.linux.cgroup import Cgroup, cgroup_of, hierarchy
from crio_native.oci.builtin import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

# What state.json has, by the types that a parser makes; it is checked because disks fill up and people edit.
_RECORD = {
    **dict.fromkeys(("id", "ociVersion", "bundle", "rootfs", "created", "owner", "cgroupsPath", "cgroupManager"), str),
    **dict.fromkeys(("pid", "startTime"), int),
    **dict.fromkeys(("creator", "madeCgroups"), list),
    **dict.fromkeys(("annotations", "hooks"), dict),
}
MAX_CONFIG = 16 << 20  # bytes of a config.json, which an engine wrote; the kernel's limits are far below
START_SOCKET = "start"
UPDATES = "resources.json"
_ID_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")


class State:
    """What is known of one container.

    record: the contents of state.json.  pid is 0 until the init exists; `creator` (pid and start time) is the command
    that makes it.  Times are RFC 3339, UTC.
    """

    def __init__(self, directory: str, record: dict[str, Any]) -> None:
        self.directory, self.record = directory, record
        self.id: str = record["id"]

    @property
    def pid(self) -> int:
        pid: int = self.record["pid"]
        return pid

    @property
    def bundle(self) -> str:
        bundle: str = self.record["bundle"]
        return bundle

    @property
    def cgroup(self) -> Cgroup | None:
        """None when cgroups are disabled for it."""
        manager = self.record["cgroupManager"]
        if manager == "disabled":
            return None
        return cgroup_of(self.record["cgroupsPath"], manager, self.record["annotations"])

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def config(self) -> dict[str, Any]:
        """The config.json that the container was made from."""
        return read_json(self.path("config.json"))

    def save(self) -> None:
        """Replace state.json.  Raises OSError."""
        self.replace("state.json", self.record)

    def replace(self, name: str, content: Mapping[str, Any]) -> None:
        """A file of the directory as a whole, by rename.  Raises OSError."""
        temporary = self.path(f".{name}")
        _write(temporary, wire.encode(content).encode())
        os.rename(temporary, self.path(name))

    def keep_config(self, content: bytes) -> None:
        _write(self.path("config.json"), content)

    def alive(self) -> bool:
        return self.pid > 0 and process.start_time(self.pid) == self.record["startTime"]

    def status(self) -> str:
        """creating, created, running, paused or stopped, as the specification and runc name them."""
        if self.pid == 0:
            creator, began = self.record["creator"]
            return "creating" if process.start_time(creator) == began else "stopped"
        if not self.alive():
            return "stopped"
        cgroup = self.cgroup
        if cgroup is not None and cgroup.frozen():
            return "paused"
        return "created" if os.path.exists(self.path(START_SOCKET)) else "running"

    def open_process(self) -> int:
        """A pidfd of the init.  Raises FailedPrecondition when it has ended."""
        try:
            pidfd = os.pidfd_open(self.pid) if self.pid else -1
        except ProcessLookupError:
            pidfd = -1
        if pidfd < 0 or not self.alive():
            raise FailedPrecondition(f"container not running: {self.id!r} is {self.status()}")
        return pidfd

    def oci(self) -> dict[str, Any]:
        """The state as the runtime specification and runc print it."""
        status, record = self.status(), self.record
        return {
            "ociVersion": record["ociVersion"],
            "id": self.id,
            "pid": 0 if status == "stopped" else self.pid,
            "status": status,
            "bundle": record["bundle"],
            "rootfs": record["rootfs"],
            "created": record["created"],
            "annotations": record["annotations"],
            "owner": record["owner"],
        }

    def remove(self) -> bool:
        """Remove the directory; what is gone already is fine.  Returns whether this, of all that try, removed it."""
        done = False
        for name in (START_SOCKET, f".{UPDATES}", UPDATES, ".state.json", "config.json", "state.json"):
            try:
                os.unlink(self.path(name))
                done = name == "state.json"
            except FileNotFoundError:
                continue
        try:
            os.rmdir(self.directory)
        except FileNotFoundError:
            pass
        return done

    def unmount(self) -> None:
        """What a container without a mount namespace of its own has mounted, on and below its root, is the host's."""
        if "mountsOnRoot" in self.record:
            from crio_native.linux import mounts, syscalls

            while mounts_on(self.record["rootfs"]) > self.record["mountsOnRoot"]:
                syscalls.umount2(self.record["rootfs"], mounts.MNT_DETACH)

    def remove_cgroup(self) -> None:
        """Kill what is in the container's cgroup and remove it, with the ancestors that were made for it if empty."""
        if "intelRdt" in self.record:
            from crio_native.linux import resctrl

            resctrl.remove(self.record["intelRdt"], self.id, resctrl.mount_point())
        cgroup = self.cgroup
        if cgroup is None:
            return
        if cgroup.exists():
            cgroup.kill()
        cgroup.remove()
        for ancestor in reversed(self.record["madeCgroups"]):
            for mount in hierarchy().mounts:
                try:
                    os.rmdir(mount + ancestor)
                except OSError:
                    continue  # another container is in it by now


def _write(path: str, content: bytes) -> None:
    """Raises OSError with the path and what it was for: of a full disk write(2) says no more than that it is full."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
    except OSError as error:
        why = f"{os.strerror(error.errno or errno.EIO)}: the container's state cannot be kept"
        raise OSError(error.errno, why, path) from None


def mounts_on(path: str) -> int:
    """How many mounts are stacked on the directory."""
    wanted = os.fsencode(path)
    for letter in (b"\\", b" ", b"\t", b"\n"):  # as mountinfo has them
        wanted = wanted.replace(letter, b"\\%03o" % letter[0])
    with open("/proc/self/mountinfo", "rb") as file:
        return sum(line.split(b" ", 5)[4] == wanted for line in file)


def check_id(container_id: str) -> str:
    """The id, which becomes a directory's name.  Raises InvalidArgument."""
    if not container_id or container_id.startswith(".") or set(container_id) - _ID_LETTERS:
        why = "invalid character: may have letters, digits and _ + - . (not first)"
        raise InvalidArgument("container ID", container_id, why)
    if len(container_id) > 255:
        raise InvalidArgument("container ID", container_id, "invalid length: may have at most 255 characters")
    return container_id


def claim(root: str, container_id: str) -> str:
    """Make the container's directory, which nobody else then can.  Raises AlreadyExists."""
    directory = f"{root}/{check_id(container_id)}"
    os.makedirs(root, 0o711, exist_ok=True)
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        raise AlreadyExists(f"container with id exists: {container_id!r} in {root}") from None
    return directory


def load(root: str, container_id: str) -> State:
    """The container of that id.  Raises DoesNotExist, Damaged."""
    directory = f"{root}/{check_id(container_id)}"
    path = f"{directory}/state.json"
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DoesNotExist(container_id, root, os.path.isdir(directory)) from None
    except OSError as error:
        raise Damaged(container_id, f"{path}: {os.strerror(error.errno or errno.EIO).lower()}") from None
    except InvalidArgument as error:
        raise Damaged(container_id, str(error)) from None
    for field, kind in _RECORD.items():
        if type(record.get(field)) is not kind:
            raise Damaged(container_id, f"{path}: it has no {field!r} as it was written")
    if record["id"] != container_id or len(record["creator"]) != 2:
        raise Damaged(container_id, f"{path}: it is another container's, or was changed")
    return State(directory, record)


class DoesNotExist(NotFound):
    """No such container below --root.  half_made: its directory is there, but was never filled."""

    def __init__(self, container_id: str, root: str, half_made: bool) -> None:
        CrioError.__init__(self, f"container {container_id!r} does not exist in {root}")
        self.kind, self.name, self.half_made = "container", container_id, half_made


class Damaged(CrioError):
    """There is a container of that id, but its state.json cannot be read, or does not say what it has to."""

    def __init__(self, container_id: str, why: str) -> None:
        super().__init__(f"the state of container {container_id!r} cannot be read: {why}")


def ids(root: str) -> list[str]:
    """Of all containers below root; those that come or go meanwhile may be missing."""
    try:
        return sorted(name for name in os.listdir(root) if os.path.lexists(f"{root}/{name}/state.json"))
    except FileNotFoundError:
        return []


def clear(directory: str) -> None:
    """Remove a container's directory, whatever files are in it; no link is followed, and what is gone is fine."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for entry in os.scandir(fd):
            try:
                (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.name, dir_fd=fd)
            except FileNotFoundError:
                continue
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO), directory) from None
    finally:
        os.close(fd)


def now() -> str:
    """The time as RFC 3339 with nanoseconds, UTC."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09}Z"


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file.  Raises OSError, InvalidArgument with the file's name."""
    return parse_json(_content(path), path)


def _content(path: str) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        return file.read(MAX_CONFIG + 1)


def read_config(path: str) -> bytes:
    """A bundle's config.json, not yet parsed.  Whoever made a FIFO of it keeps nobody waiting.  Raises
    InvalidArgument."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            return file.read(MAX_CONFIG + 1) or b""  # None: a FIFO that somebody may write to yet
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise InvalidArgument("--bundle", path, f"the bundle's config.json cannot be read: {why}") from None


def parse_json(content: bytes, path: str) -> dict[str, Any]:
    """The interpreter's own scanner, without the package around it: that imports re, which takes longer than all else
    here.  The package is asked only to say what is wrong.  Raises InvalidArgument."""
    if len(content) > MAX_CONFIG:
        raise InvalidArgument(path, len(content), f"may have at most {MAX_CONFIG} bytes")
    try:
        value = _parsed(content.decode())
    except RecursionError:
        raise InvalidArgument(path, content[:20].decode(errors="replace"), "is nested too deeply") from None
    except ValueError as error:
        raise InvalidArgument(path, content[:40].decode(errors="replace"), f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(path, value, "must be a JSON object")
    return value


def foreign_json(content: bytes, path: str, within: str) -> dict[str, Any]:
    """`parse_json`, of what others wrote: every string in it has to be one that there are bytes for.

    within: the object's own JSON path, which errors begin with.
    """
    value = parse_json(content, path)
    # UTF-8 has no halves, so only escapes can; looking for one byte takes no time.
    if b"\\" in content and (b"\\ud" in content or b"\\uD" in content):
        from crio_native.oci import checks

        checks.encodable(value, within)
    return value


def read_foreign_json(path: str, within: str) -> dict[str, Any]:
    """The same, from a file.  Raises OSError, InvalidArgument."""
    return foreign_json(_content(path), path, within)


_BLANK = " \t\n\r"


def _parsed(text: str) -> Any:
    try:
        value, end = _scanner()(text, len(text) - len(text.lstrip(_BLANK)))
        if not text[end:].strip(_BLANK):
            return value
    except (StopIteration, SystemError):
        pass  # the second without its package, where the scanner looks for the class of its errors
    import json

    return json.loads(text)


def _scanner() -> Any:
    from _json import make_scanner

    class Settings:
        """As json.loads has them; NaN is not JSON."""

        strict, object_hook, object_pairs_hook = True, None, None
        memo: dict[str, str] = {}
        parse_float, parse_int = float, int

        @staticmethod
        def parse_constant(name: str) -> None:
            raise ValueError(f"{name} is not a number in JSON")

    return make_scanner(Settings)  # type: ignore[arg-type]


def write_pid_file(path: str, pid: int) -> None:
    """As a whole, by rename: engines wait for the file to appear."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "w") as file:
            file.write(str(pid))
        os.rename(temporary, path)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO), path) from None
