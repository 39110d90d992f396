"""One control group: made, limited, joined, frozen, killed and removed in every hierarchy at once."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's C half
import errno
import os
import time

from crio_native.errors import AlreadyExists, InvalidArgument, StepFailed

from . import files
from .hierarchy import Hierarchy, hierarchy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from .. import bpf
    from . import resources

STEP = "cgroup"
_PATH_MAX = 1024
_REMOVE_SECONDS = 5.0  # a killed process leaves its group when the kernel has taken its memory apart
_KILL_SECONDS = 10.0
_FREEZE_SECONDS = 2.0
_GONE = (errno.ENOENT, errno.ENODEV)  # the second where the group was removed after its file was opened
# Controllers that a v2 group is given: those that `resources` and `stats` know.
_WANTED = frozenset("cpu cpuset io memory pids hugetlb rdma".split())


class Cgroup:
    """The group at path, below every mount of the host's hierarchies; it need not exist.

    Holds no kernel object and no lock: two values for one path are interchangeable.
    """

    def __init__(self, path: str, host: Hierarchy | None = None) -> None:
        """path: absolute, in no hierarchy's root.  host: for tests.  Raises InvalidArgument."""
        parts = path.split("/")
        if parts[0] or len(parts) < 2 or any(part in ("", ".", "..") or len(part) > 255 for part in parts[1:]):
            raise InvalidArgument("linux.cgroupsPath", path, "must be absolute, without '.', '..' or empty components")
        if len(path) > _PATH_MAX or not path.isprintable():
            raise InvalidArgument("linux.cgroupsPath", path, f"must be printable and at most {_PATH_MAX} long")
        self.path = path
        self._made: list[str] = []  # directories
        self._host = host or hierarchy()
        self._directories = [mount + path for mount in self._host.mounts]

    # Making and removing

    def create(self) -> None:
        """Make the group, and the ancestors it needs, in every hierarchy; all of it or nothing.

        An empty group that is there already is taken.  Raises AlreadyExists when it has processes, StepFailed when the
        kernel refuses.
        """
        self.begin()
        self.complete()

    def begin(self) -> None:
        """`create`, as far as a process needs it that is to be born in the group (CLONE_INTO_CGROUP)."""
        self._made = []
        self._make_in([self._host.unified] if self._host.unified else [])

    def complete(self) -> None:
        """The rest of `create`."""
        self._make_in([mount for mount in self._host.mounts if mount != self._host.unified])

    def _make_in(self, mounts: Iterable[str]) -> None:
        try:
            for mount in mounts:
                self._make(mount, self._made)
        except OSError as error:
            self._unmake()
            raise StepFailed(STEP, error.errno or 0, error.filename or self.path, "making the group") from error
        except BaseException:
            self._unmake()
            raise

    def _unmake(self) -> None:
        _remove_all(self._made)
        self._made.clear()

    def _make(self, mount: str, made: list[str]) -> None:
        directory = mount + self.path
        try:
            os.mkdir(directory, 0o755)
            made.append(directory)
        except FileExistsError:
            if pids := _listed(directory):
                raise AlreadyExists(f"cgroup {self.path} is in use by processes {_few(pids)}") from None
        except FileNotFoundError:
            for ancestor in self._ancestors(mount):
                if not os.path.isdir(ancestor):
                    _make_if_missing(ancestor, made)
                    if mount == self._host.v1.get("cpuset"):
                        _fill_cpuset(ancestor)
                        files.write(ancestor + "/cgroup.clone_children", "1")  # groups below need no filling then
            _make_if_missing(directory, made)
        if mount == self._host.v1.get("cpuset"):
            _fill_cpuset(directory)
        elif mount == self._host.unified:
            self._delegate_controllers(directory)

    def _delegate_controllers(self, directory: str) -> None:
        """v2: a group has only the controllers that every ancestor hands down."""
        wanted = self._host.v2 & _WANTED
        if not wanted or wanted <= set(files.read(directory + "/cgroup.controllers").split()):
            return
        mount = self._host.unified
        for ancestor in (mount, *self._ancestors(mount)):
            available = wanted & set(files.read(ancestor + "/cgroup.controllers").split())
            missing = available - set(files.read(ancestor + "/cgroup.subtree_control").split())
            # memory and io first: cpu and pids alone would turn an ancestor that has processes into a threaded group,
            # which no process can be in below, rather than be refused
            for controller in sorted(missing, key=lambda name: name not in ("memory", "io")):
                self._hand_down(ancestor, controller)

    def _hand_down(self, ancestor: str, controller: str) -> None:
        """Controllers go one by one: one that this host cannot hand down must not take the others with it.

        What is missing in the end is a warning or an error of `apply`, if a limit needs it.
        """
        try:
            files.write(ancestor + "/cgroup.subtree_control", "+" + controller)
        except OSError as error:
            if error.errno == errno.EBUSY:
                why = (
                    f"processes {_few(_listed(ancestor))} are in {ancestor} itself, and such a group cannot hand the "
                    f"{controller} controller to groups below it: move them to one of their own, or use another parent"
                )
                raise StepFailed(STEP, errno.EBUSY, ancestor + "/cgroup.subtree_control", why) from error
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP):
                raise

    @property
    def made(self) -> list[str]:
        """The ancestors that `create` had to make, the outermost first; removing them is the caller's affair."""
        return sorted({self._below_mount(directory) for directory in self._made} - {self.path}, key=len)

    @property
    def made_above(self) -> list[tuple[str, str]]:
        """The same, as (path, directory) in each hierarchy."""
        pairs = [(self._below_mount(directory), directory) for directory in self._made]
        return [(path, directory) for path, directory in pairs if path != self.path]

    def release(self) -> None:
        """To be called when the container's init is in the group, which need not be held open for it any more."""

    def exists(self) -> bool:
        return any(os.path.isdir(directory) for directory in self._directories)

    def everywhere(self) -> bool:
        """Whether it exists in every hierarchy."""
        return all(os.path.isdir(directory) for directory in self._directories)

    def remove(self) -> None:
        """Remove the group and all below it, from every hierarchy.  Nothing happens when it is not there.

        Waits a little for processes that are ending.  Raises StepFailed (EBUSY) when some live; then it is whole.
        """
        deadline = time.monotonic() + _REMOVE_SECONDS
        for directory in self._directories:
            _remove_tree(directory, deadline)

    def _ancestors(self, mount: str) -> Iterator[str]:
        """Directories between the mount point and the group, the outermost first; neither of the two."""
        parts = self.path.split("/")[1:-1]
        for length in range(1, len(parts) + 1):
            yield mount + "/" + "/".join(parts[:length])

    def _below_mount(self, directory: str) -> str:
        mount = next(mount for mount in self._host.mounts if directory.startswith(mount + "/"))
        return directory[len(mount) :]

    # Limits

    def apply(self, wanted: Mapping[str, Any]) -> list[str]:
        """Write an OCI ``linux.resources`` object; fields that are absent stay as they are, devices apart.

        Returns a warning for each field that this host cannot do.  Raises InvalidArgument for values that no host could
        do, StepFailed with the file and the field for those that the kernel refuses.
        """
        from . import resources  # only who limits pays for it: crio-oci has a process for each command

        writes, warnings = resources.plan(wanted, _Answers(self._host, self.path))
        self._announce(writes)
        # The kernel compares some files with each other (memory with memory and swap, quota with burst), in an order
        # that depends on the old values: a refused write gets its second try when the others are done.
        refused = [write for write in writes if not self._accepted(write)]
        for write in refused:
            try:
                files.write(self._file(write.controller, write.file), write.value)
            except OSError as error:
                raise self._refusal(write, error) from error
        return warnings

    def _announce(self, writes: Sequence[resources.Write]) -> None:
        """Tell who else keeps this group's limits, if anybody does, what they are to be."""

    def _announce_devices(self, rules: Sequence[bpf.Rule]) -> None:
        """The same for device rules."""

    def _accepted(self, write: resources.Write) -> bool:
        try:
            files.write(self._file(write.controller, write.file), write.value)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBUSY):
                return False
            raise self._refusal(write, error) from error
        return True

    def _refusal(self, write: resources.Write, error: OSError) -> StepFailed:
        detail = f"linux.resources.{write.field}: the kernel refused {write.value!r}"
        if error.errno == errno.ENOENT:
            detail += f"; the {write.controller} controller is not enabled for this group" if self.exists() else ""
        elif error.errno == errno.EBUSY and write.controller == "memory":
            detail += "; more than that is in use"
        return StepFailed(STEP, error.errno or 0, error.filename or write.file, detail)

    def apply_devices(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """Make OCI device rules the group's: in order, the last match decides, and what none allows is denied.

        On v2 they replace the old ones at once; on v1 there is a moment with none allowed.  An empty list changes
        nothing.  Raises InvalidArgument, StepFailed.
        """
        from . import devices

        parsed = devices.parse(rules)
        if not parsed:
            return
        self._announce_devices(parsed)
        version = self._host.version_of("devices")
        if not version:
            raise StepFailed(STEP, 0, self.path, "linux.resources.devices: this host cannot restrict devices")
        try:
            if version == 2:
                devices.attach_v2(self._host.unified + self.path, parsed)
            else:
                self._write_v1_devices(devices.v1_lines(parsed))
        except OSError as error:
            raise StepFailed(STEP, error.errno or 0, error.filename or self.path, "linux.resources.devices") from error

    def _write_v1_devices(self, lines: Sequence[tuple[str, str]]) -> None:
        directory = self._host.v1["devices"] + self.path
        names = {file for file, _ in lines}
        opened = {file: os.open(f"{directory}/{file}", os.O_WRONLY | os.O_CLOEXEC) for file in names}
        try:
            for file, line in lines:
                os.write(opened[file], line.encode())
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    def _file(self, controller: str, file: str) -> str:
        return f"{self._host.mount_of(controller)}{self.path}/{file}"

    # Members

    def descriptor(self) -> int | None:
        """The group's directory in the unified hierarchy, for CLONE_INTO_CGROUP; the caller closes it.

        None on a v1 host.  `join_files` has what the process must join besides.
        """
        if not self._host.unified:
            return None
        return os.open(self._host.unified + self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def join_files(self) -> list[str]:
        """The v1 files to which a process of one thread writes "0" to join; [] on a v2 host.

        `tasks`, not `cgroup.procs`: for a thread that moves itself the kernel takes no lock, for a process it waits
        for an RCU grace period (5 ms and more, after some idle time).
        """
        return [directory + "/tasks" for directory in self._directories if not self._below_unified(directory)]

    def procs_files(self) -> list[str]:
        """Where a process of one thread, also another's pid, is written to be moved here in every hierarchy."""
        return self.join_files() + ([f"{self._host.unified}{self.path}/cgroup.procs"] if self._host.unified else [])

    def take(self, pid: int) -> None:
        """Move a process of one thread here.  Raises StepFailed."""
        try:
            for file in self.procs_files():
                files.write(file, str(pid))
        except OSError as error:
            raise StepFailed(STEP, error.errno or 0, error.filename or self.path, f"moving process {pid}") from error

    def _below_unified(self, directory: str) -> bool:
        return bool(self._host.unified) and directory == self._host.unified + self.path

    def processes(self) -> list[int]:
        """The pids in the group and below it, in our PID namespace; [] when it does not exist."""
        return [pid for directory in _tree(self._directories[0]) for pid in _listed(directory)]

    def kill(self) -> None:
        """SIGKILL to every process in the group and below it, also to those that fork meanwhile.

        With cgroup.kill they may still be ending on return (`remove` waits); without, they have.  Nothing happens when
        the group does not exist.  Raises StepFailed when some do not end in 10 seconds.
        """
        if self._host.unified:
            try:
                files.write(f"{self._host.unified}{self.path}/cgroup.kill", "1")
                return
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                if not self.exists():
                    return
        self._kill_frozen()

    def _kill_frozen(self) -> None:
        """Frozen processes cannot fork, nor end and leave their pid to another, between being listed and signalled."""
        deadline = time.monotonic() + _KILL_SECONDS
        while pids := self.processes():
            if time.monotonic() > deadline:
                raise StepFailed(STEP, errno.EBUSY, self.path, f"processes {_few(pids)} do not end after SIGKILL")
            try:
                self.freeze()
            except StepFailed:
                pass  # no freezer here, or one process will not stop: signal what can be had, and look again
            for pid in self.processes():
                try:
                    os.kill(pid, _signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.thaw()
            time.sleep(0.001)

    def freeze(self) -> None:
        """Stop every process, now and to come.  Raises StepFailed when one does not stop in 2 seconds; then all run."""
        deadline = time.monotonic() + _FREEZE_SECONDS
        self._set_frozen(True)
        while not self.frozen():
            if time.monotonic() > deadline:
                self._set_frozen(False)
                raise StepFailed(STEP, errno.EBUSY, self._freezer()[0], "a process does not stop")
            time.sleep(0.001)
            if not self._host.unified:
                self._set_frozen(True)  # v1 gives up on a process that forked meanwhile; asking again goes on

    def thaw(self) -> None:
        """Let them run again, whichever freezer stopped them.  Nothing happens when they do."""
        self._set_frozen(False)
        if self._host.unified and self._host.v1_freezer:
            files.write_if_there(f"{self._host.v1_freezer}{self.path}/freezer.state", "THAWED")

    def frozen(self) -> bool:
        """Whether every process is stopped, by this group's freezer or by one above it.

        On a hybrid host a process is in the v1 freezer too: we leave that alone, others may not.
        """
        if self._host.unified:
            events = files.table(files.read_or_empty(f"{self._host.unified}{self.path}/cgroup.events"))
            if events.get("frozen") == 1:
                return True
        v1 = self._host.v1_freezer
        return bool(v1) and files.read_or_empty(f"{v1}{self.path}/freezer.state").strip() == "FROZEN"

    def frozen_ancestors(self) -> list[str]:
        """The directories of groups above that are frozen themselves: processes here go on when those do, too."""
        freezers = ((self._host.unified, "cgroup.freeze"), (self._host.v1_freezer, "freezer.self_freezing"))
        return [
            directory
            for mount, file in freezers
            if mount
            for directory in self._ancestors(mount)
            if files.read_or_empty(f"{directory}/{file}").strip() == "1"
        ]

    def _freezer(self) -> tuple[str, str, str]:
        """The file, and the words for stop and go."""
        if self._host.unified:
            return f"{self._host.unified}{self.path}/cgroup.freeze", "1", "0"
        return f"{self._host.v1_freezer}{self.path}/freezer.state", "FROZEN", "THAWED"

    def _set_frozen(self, frozen: bool) -> None:
        file, stop, go = self._freezer()
        try:
            files.write(file, stop if frozen else go)
        except OSError as error:
            if error.errno not in _GONE:
                raise StepFailed(STEP, error.errno or 0, file, "freezing" if frozen else "thawing") from error
            if frozen:
                raise StepFailed(STEP, errno.ENOENT, file, "no such group, or no freezer on this host") from error

    # Accounts

    def oom_file(self) -> str:
        """The file with the line ``oom_kill N``; "" without a memory controller."""
        version = self._host.version_of("memory")
        return self._file("memory", "memory.events" if version == 2 else "memory.oom_control") if version else ""

    def events(self) -> dict[str, int]:
        """The memory controller's counts (``oom_kill``, on v2 also ``oom``, ``max``, ``high``); {} without them."""
        return files.table(files.read_or_empty(self.oom_file()))

    def stats(self) -> dict[str, Any]:
        """One reading of the accounts, by the field names of `oci.runtime.Stats`; see `stats.read`."""
        from . import stats  # only who asks pays for it

        return stats.read(self._host, self.path)


class _Answers:
    """What `resources.plan` may know about one group of this host."""

    def __init__(self, host: Hierarchy, path: str) -> None:
        self._host, self._path = host, path

    def version(self, controller: str) -> int:
        return self._host.version_of(controller)

    def read(self, controller: str, file: str) -> str | None:
        try:
            return files.read(f"{self._host.mount_of(controller)}{self._path}/{file}")
        except FileNotFoundError:
            return None
        except OSError:
            return ""  # it is there, but cannot be read


def _make_if_missing(directory: str, made: list[str]) -> None:
    try:
        os.mkdir(directory, 0o755)
        made.append(directory)
    except FileExistsError:
        pass  # another container of the pod made it meanwhile


def _fill_cpuset(directory: str) -> None:
    """v1: a new cpuset is empty, and no process can join it, unless its parent has clone_children set."""
    parent = os.path.dirname(directory)
    for file in ("cpuset.cpus", "cpuset.mems"):
        if files.read(f"{directory}/{file}").strip():
            continue
        if not files.read(f"{parent}/{file}").strip():
            _fill_cpuset(parent)  # somebody else's; the hierarchy's root always has both
        files.write(f"{directory}/{file}", files.read(f"{parent}/{file}"))


def _listed(directory: str) -> list[int]:
    """The directory's own processes; [] when it has gone, or is a threaded group (its domain lists them)."""
    try:
        return [int(pid) for pid in files.read_all(directory + "/cgroup.procs").split()]
    except OSError:
        return []


def _few(pids: Sequence[int]) -> str:
    return ", ".join(map(str, pids[:5])) + (" ..." if len(pids) > 5 else "")


def _tree(directory: str) -> list[str]:
    """The directory and all below it, parents first; [] when it does not exist."""
    found: list[str] = []
    pending = [directory]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            continue
        found.append(current)
    return found


def _remove_tree(directory: str, deadline: float) -> None:
    pause = 0.00005
    while True:
        try:
            os.rmdir(directory)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise StepFailed(STEP, error.errno or 0, directory, "removing the group") from error
        tree = _tree(directory)
        if time.monotonic() > deadline:
            pids = [pid for group in tree for pid in _listed(group)]
            why = f"processes {_few(pids)} live in it: kill them first" if pids else "it does not become empty"
            raise StepFailed(STEP, errno.EBUSY, directory, why)
        _remove_all(tree[1:])
        time.sleep(pause)
        pause = min(pause * 2, 0.01)


def _remove_all(directories: Sequence[str]) -> None:
    """Remove what can be, the last first."""
    for directory in reversed(directories):
        try:
            os.rmdir(directory)
        except OSError:
            continue
