"""checkpoint and restore: CRIU saves a container's processes, and makes them again; the rest of it is made here.

A restored container has a cgroup, a state and limits from its bundle, as `create` makes them.  What its processes were
isolated by comes back with them, from the images.
"""

from __future__ import annotations

import os
import signal

from crio_native.errors import FailedPrecondition, InvalidArgument, Unimplemented
from crio_native.linux import inroot, mounts, process, staging, syscalls
from crio_native.linux.cgroup import hierarchy
from crio_native.oci import criu
from crio_native.oci import spec as specs
from crio_native.oci.builtin.standalone import control, create, log, state, terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import SimpleNamespace
    from typing import Any

    from crio_native.linux.cgroup import Cgroup

_MISSING = ("lazy_pages", "page_server", "status_fd", "auto_dedup", "empty_ns", "lsm_profile", "lsm_mount_context")
# Options of `run` that `restore` has not.
_OF_RUN = {
    "config": None, "trace": None, "fail": None, "pidfd_socket": None, "preserve_fds": 0, "keep": False,
    "no_new_keyring": False,
}  # fmt: skip


def checkpoint(options: SimpleNamespace) -> int:
    """`crio-oci checkpoint`: the container ends with it, unless it is to go on.

    Raises FailedPrecondition for a container that does not run, that cannot be saved, and on a host without CRIU.
    """
    terminal.block_signals()  # CRIU cannot be stopped half way: processes would stay as it has them in its hands
    found = state.load(options.root, options.arguments[0])
    if found.status() not in ("running", "paused"):
        raise FailedPrecondition(f"container not running: {found.id!r} is {found.status()}")
    _refuse_missing(options)
    spec = specs.complete(found.config(), os.geteuid(), os.getegid())
    criu.check_spec(spec)
    images, work = _directories(options)
    saved = criu.describe(found.pid, spec)
    parent = options.parent_path or ""
    if parent.startswith("/") or (parent and not os.path.isdir(os.path.join(images, parent))):
        raise InvalidArgument("--parent-path", parent, "must be a directory, relative to the image directory")
    line = criu.dump_line(
        found.pid,
        spec,
        saved,
        _allowed(options),
        images=images,
        work=work,
        root=found.record["rootfs"],
        freezer=_freezer(found.cgroup),
        leave="running" if options.leave_running else "",
        pre_dump=options.pre_dump,
        parent=parent,
    )
    os.makedirs(images, 0o700, exist_ok=True)
    _run(line, work)
    if not options.pre_dump:
        criu.write(saved, images)
    if not (options.leave_running or options.pre_dump):
        control.remove(found)  # as runc does: what is saved is no container here any more
    return 0


def restore(options: SimpleNamespace) -> int:
    """`crio-oci restore`: as `run`, of what `checkpoint` wrote."""
    _refuse_missing(options)
    for name, value in _OF_RUN.items():
        vars(options).setdefault(name, value)
    foreground = not options.detach
    if foreground:
        terminal.block_signals()
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # CRIU ends, and leaves the processes to us
    made = Restored(options)
    try:
        create.poststart(made.state)
        if not foreground:
            return 0
        code = terminal.Foreground(made.pid, made.pidfd, -1).wait()
    except BaseException:
        made.undo()
        raise
    made.forget()
    create.poststop(made.state)
    return code


class Restored(create.Made):
    """A container whose processes CRIU has made."""

    def __init__(self, options: SimpleNamespace) -> None:
        self._images, self._work = _directories(options)
        self._saved = criu.read(self._images)
        super().__init__(options, starts=True)

    def _make(self) -> None:
        criu.check_spec(self.spec)
        linux = self.spec.get("linux") or {}
        cgroup = self.state.cgroup
        if cgroup is not None:
            self._make_cgroup(cgroup, linux.get("resources") or {})
            cgroup.release()
        _make_places(self.state.record["rootfs"], self.spec)
        self.pid = self._run_criu(cgroup)
        self.pidfd = os.pidfd_open(self.pid)
        self._record_init()
        if self.options.pid_file:
            state.write_pid_file(self.options.pid_file, self.pid)

    def _run_criu(self, cgroup: Cgroup | None) -> int:
        pid_file = self.state.path("restored")
        network = specs.namespace_paths(self.spec).get("network", "")
        joined = process.open_namespace(network) if network else -1
        deeper = criu.sources_below(self.spec, self._saved)
        for top, path in deeper:
            os.close(inroot.open_beneath(top, path))  # an error is told from here; what is opened later is what counts
        streams = [os.dup(number) for number in range(3)]  # criu's own are others
        root, below = self.state.record["rootfs"], self.state.path("below")
        line = criu.restore_line(
            self.spec,
            self._saved,
            _allowed(self.options),
            images=self._images,
            work=self._work,
            root=root,
            pid_file=pid_file,
            cgroup=cgroup.path if cgroup is not None else "",
            cgroup_directories=hierarchy().directories(cgroup.path) if cgroup is not None else {},
            streams=streams,
            below=below,
            network=joined,
        )
        os.mkdir(below, 0o700)
        try:
            _run(line, self._work, [*streams, joined], before=lambda: _prepare_mounts(root, below, deeper))
            with open(pid_file) as file:
                return int(file.read())
        except BaseException:
            _end_children()
            raise
        finally:
            for fd in (*streams, joined):
                if fd >= 0:
                    os.close(fd)
            os.rmdir(below)
            if os.path.exists(pid_file):
                os.unlink(pid_file)


def _allowed(options: SimpleNamespace) -> criu.Options:
    given = {name: getattr(options, name) for name in criu.Options._fields if getattr(options, name)}
    return criu.Options(**given)


def _refuse_missing(options: SimpleNamespace) -> None:
    for name in _MISSING:
        if getattr(options, name, None):
            raise Unimplemented(f"--{name.replace('_', '-')} is not available in this version of crio-oci")


def _directories(options: SimpleNamespace) -> tuple[str, str]:
    """Of the images and of the log, as absolute paths."""
    images = os.path.abspath(options.image_path or "checkpoint")
    work = os.path.abspath(options.work_path) if options.work_path else images
    return images, work


def _make_places(root: str, spec: Mapping[str, Any]) -> None:
    """What the mounts will cover: a root file system that is new has not what was made in the old one for them.  Inside
    another mount it is there."""
    wanted = {specs.normalise(mount["destination"]): mount for mount in spec.get("mounts") or ()}
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for place, mount in wanted.items():
            if any(place.startswith(f"{other}/") for other in wanted):
                continue
            directory = not criu.is_bind(mount) or os.path.isdir(mount["source"])
            make = inroot.make_directories if directory else inroot.make_file
            os.close(make(descriptor, place, links=inroot.MAX_LINKS))
    finally:
        os.close(descriptor)


def _freezer(cgroup: Cgroup | None) -> str:
    directories = hierarchy().directories(cgroup.path) if cgroup is not None else {}
    return directories.get("unified") or directories.get("") or directories.get("freezer", "")


def _prepare_mounts(root: str, below: str, deeper: Sequence[tuple[str, str]]) -> None:
    """In a mount namespace that nobody else sees: the root as a mount point, and what was below binds."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, mounts.MS_SLAVE | mounts.MS_REC)
    syscalls.mount(root, root, None, mounts.MS_BIND | mounts.MS_REC)
    staging.bind_beneath(below, deeper)


def _run(line: list[str], work: str, keep: Sequence[int] = (), *, before: Callable[[], None] = lambda: None) -> None:
    """See `criu.run`."""

    def isolate() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        before()

    os.makedirs(work, 0o700, exist_ok=True)
    log.debug(" ".join(line))
    criu.run(line, work, keep=[fd for fd in keep if fd >= 0], before=isolate)


def _end_children() -> None:
    """CRIU takes down what it has made when it fails, but not when it is killed: its orphans are our children."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
