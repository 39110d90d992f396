"""CRIU's command lines: a container's processes written into a directory of images, and made again from it.

CRIU knows processes, and not where a container's mounts came from.  Mounts that are not the container's own (binds of
the host's, control groups) it is told by name, as `--external mnt[NAME]:...`, and at the restore where each is to be
had then.  NAME is the mount's place in the container; what is behind it is written beside the images (`EXTERNAL`), for
a restore takes its sources from the new configuration.  That, too, may come from another machine, and is checked.

The standard streams are pipes to a monitor: another one's ends are put in their place at a restore.  Their names are in
`DESCRIPTORS`, as runc has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from crio_native.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, StepFailed
from crio_native.linux import inroot, mountinfo
from crio_native.oci import spec as specs

EXTERNAL = "external.json"
DESCRIPTORS = "descriptors.json"
SIZES = "sizes.json"  # of the images: CRIU 4.2 reads on for ever where pages are missing, and writes a log of it
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")  # of the host's that containers have as binds
CGROUP_MODES = ("soft", "full", "strict", "ignore")
_STREAM = re.compile(r"(pipe|socket):\[[0-9]{1,20}\]")
_IMAGE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.img")
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_CHECK_SECONDS = 20.0
_WORDS_MAX = 500
_METADATA_MAX = 1 << 20
_LOG_TAIL = 64 << 10
_STDERR_MAX = 4096
_NETWORK = "extRootNetNS"  # the name that runc's images have for it, too


class Options(NamedTuple):
    """What an engine allows; the words are those of `runc checkpoint`."""

    tcp_established: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    file_locks: bool = False
    manage_cgroups_mode: str = "soft"

    def words(self) -> list[str]:
        """Raises InvalidArgument."""
        if self.manage_cgroups_mode not in CGROUP_MODES:
            allowed = f"must be one of {', '.join(CGROUP_MODES)}"
            raise InvalidArgument("--manage-cgroups-mode", self.manage_cgroups_mode, allowed)
        switches = ("tcp_established", "ext_unix_sk", "shell_job", "file_locks")
        words = [f"--{name.replace('_', '-')}" for name in switches if getattr(self, name)]
        return [*words, f"--manage-cgroups={self.manage_cgroups_mode}"]


class Saved(NamedTuple):
    """What is known of images beside CRIU's own: external mounts by their place, and the three streams' names."""

    mounts: Mapping[str, Mapping[str, str]]
    streams: Sequence[str]


def program() -> str:
    """CRIU's path.  Raises FailedPrecondition."""
    for directory in _PATH.split(":"):
        if os.access(f"{directory}/criu", os.X_OK):
            return f"{directory}/criu"
    raise FailedPrecondition("checkpoint and restore need CRIU, and this host has no program `criu`: install it")


def trouble(path: str) -> str:
    """Why this CRIU cannot work with this kernel, in its own words; "" when it can."""
    try:
        done = subprocess.run(
            [path, "check"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_CHECK_SECONDS:g} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    return " ".join(lines[0].split())[:_WORDS_MAX] if lines else f"it ended with code {done.returncode}"


def environment() -> dict[str, str]:
    """CRIU runs ip and iptables."""
    return {"PATH": _PATH}


def check_spec(spec: Mapping[str, Any]) -> None:
    """Refuse a container that CRIU could not save, or that nobody could restore.  Raises FailedPrecondition."""
    if spec["process"].get("terminal"):
        raise FailedPrecondition("a container with a terminal has no checkpoint: its terminal's other end is outside")
    if specs.namespace_paths(spec).get("pid", "joined"):
        raise FailedPrecondition("a container without a PID namespace of its own has no checkpoint: its pids are taken")
    if "user" in specs.namespace_paths(spec):
        raise FailedPrecondition(
            "a container in a user namespace has no checkpoint: its root could not read the images at the restore"
        )


# -- dump ------------------------------------------------------------------------------------------------------------


def describe(pid: int, spec: Mapping[str, Any]) -> Saved:
    """What a restore will have to know of a running container.  Raises FailedPrecondition for a mount that CRIU could
    not be told of."""
    mounts: dict[str, dict[str, str]] = {}
    places = _places(pid, spec)
    for mount in mountinfo.read(pid).values():
        place = max((place for place in places if _within(place, mount.point)), key=len, default="")
        if places.get(place):
            what = {"destination": places[place], "below": mount.point[len(place) :]}
        elif mount.fstype in ("cgroup", "cgroup2"):
            what = {"cgroup": os.path.basename(mount.point)}
        elif mount.fstype == "devtmpfs" and mount.root[1:] in DEVICES:
            what = {"device": mount.root[1:]}
        else:
            continue
        if not _nameable(mount.point):
            raise FailedPrecondition(f"a mount at {mount.point!r} has no checkpoint: CRIU could not be told its name")
        mounts[mount.point] = what
    streams = [os.readlink(f"/proc/{pid}/fd/{number}") if _has(pid, number) else "" for number in range(3)]
    return Saved(mounts, streams)


def _within(place: str, path: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


def _nameable(place: str) -> bool:
    """`]` ends a name in CRIU's words."""
    return place.startswith("/") and place.isprintable() and "]" not in place


def _has(pid: int, number: int) -> bool:
    return os.path.lexists(f"/proc/{pid}/fd/{number}")


def _places(pid: int, spec: Mapping[str, Any]) -> dict[str, str]:
    """Where the mounts are, for a destination may lead through the image's symlinks -> a bind's destination; "" for
    what is the container's own, also inside a bind: its other mounts, and what hides its masked paths."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = {}
        for mount in spec.get("mounts") or ():
            found[_place(root, mount["destination"])] = mount["destination"] if is_bind(mount) else ""
        for path in (spec.get("linux") or {}).get("maskedPaths") or ():
            found[_place(root, path)] = ""
        return found
    finally:
        os.close(root)


def is_bind(mount: Mapping[str, Any]) -> bool:
    return bool({"bind", "rbind"} & {mount.get("type"), *(mount.get("options") or ())})


def _place(root: int, destination: str) -> str:
    try:
        fd = inroot.open_in_root(root, destination, os.O_PATH)
    except OSError:
        return specs.normalise(destination)
    try:
        inside = os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return inside


def dump_line(
    pid: int,
    spec: Mapping[str, Any],
    saved: Saved,
    options: Options,
    *,
    images: str,
    work: str,
    root: str,
    freezer: str = "",
    leave: str = "",
    pre_dump: bool = False,
    parent: str = "",
) -> list[str]:
    """root: the root file system as the host has it.  freezer: the directory of the cgroup to freeze meanwhile.
    leave: "running" or "stopped" for processes that are not to end.  parent: an earlier checkpoint, relative to images.
    """
    line = [program(), "pre-dump" if pre_dump else "dump", "--tree", str(pid), "--root", root]
    line += [*_files(images, work, "dump"), *options.words()]
    line += [word for place in saved.mounts for word in ("--external", f"mnt[{place}]:{place}")]
    if specs.namespace_paths(spec).get("network"):
        line += ["--external", f"net[{os.stat(f'/proc/{pid}/ns/net').st_ino}]:{_NETWORK}"]
    if freezer:
        line += ["--freeze-cgroup", freezer]
    if leave and not pre_dump:
        line.append(f"--leave-{leave}")
    if parent:
        line += ["--track-mem", "--prev-images-dir", parent]
    elif pre_dump:
        line.append("--track-mem")
    return line


def _files(images: str, work: str, act: str) -> list[str]:
    return ["--images-dir", images, "--work-dir", work, "--log-file", os.path.basename(log(work, act)), "-v2"]


def log(work: str, act: str) -> str:
    """Of `dump` or `restore`."""
    return os.path.join(work, f"{act}.log")


def clear(work: str, act: str) -> None:
    """Remove what CRIU writes there: an older log would be read as this one's, and a symlink would be followed."""
    for path in (log(work, act), os.path.join(work, f"stats-{act}")):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def write(saved: Saved, images: str) -> None:
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(images) if entry.name.endswith(".img")}
    for name, content in ((EXTERNAL, saved.mounts), (DESCRIPTORS, saved.streams), (SIZES, sizes)):
        with open(os.path.join(images, name), "w", opener=_private) as file:
            json.dump(content, file)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


# -- restore ---------------------------------------------------------------------------------------------------------


def read(images: str) -> Saved:
    """Raises NotFound for a directory without images, InvalidArgument for files that are not what they should be."""
    if not os.path.exists(os.path.join(images, "inventory.img")):
        raise NotFound("checkpoint", images, "the directory has no inventory.img")
    _check_sizes(images, _metadata(images, SIZES))
    mounts = _metadata(images, EXTERNAL)
    streams = _metadata(images, DESCRIPTORS)
    if not isinstance(mounts, dict):
        raise InvalidArgument(EXTERNAL, mounts, "must map mounts to what is behind them")
    for place, what in mounts.items():
        if not _nameable(place):
            raise InvalidArgument(EXTERNAL, place, "is no mount's place")
        if not isinstance(what, dict) or not all(isinstance(word, str) for word in what.values()):
            raise InvalidArgument(EXTERNAL, what, "must say with words what is behind the mount")
    if not isinstance(streams, list) or not all(isinstance(name, str) for name in streams):
        raise InvalidArgument(DESCRIPTORS, streams, "must be a list of names")
    return Saved(mounts, streams[:3])


def _check_sizes(images: str, sizes: Any) -> None:
    if not isinstance(sizes, dict):
        raise InvalidArgument(SIZES, sizes, "must map images to their sizes")
    for name, size in sizes.items():
        if not _IMAGE.fullmatch(name):
            raise InvalidArgument(SIZES, name, "is no image's name")
        try:
            found = os.lstat(os.path.join(images, name)).st_size
        except (OSError, ValueError):
            raise NotFound(
                "checkpoint", images, f"the directory has no {name}, which was there when it was made"
            ) from None
        if found != size:
            raise InvalidArgument(SIZES, size, f"{name} is damaged: it has {found} bytes now")


def _metadata(images: str, name: str) -> Any:
    path = os.path.join(images, name)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(_METADATA_MAX + 1)
        if len(content) > _METADATA_MAX:
            raise InvalidArgument(name, len(content), f"may have at most {_METADATA_MAX} bytes")
        return json.loads(content)
    except FileNotFoundError:
        raise NotFound("checkpoint", images, f"the directory has no {name}: another program made it") from None
    except OSError as error:
        raise InvalidArgument(name, images, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(name, images, f"is not JSON: {error}") from None


def restore_line(
    spec: Mapping[str, Any],
    saved: Saved,
    options: Options,
    *,
    images: str,
    work: str,
    root: str,
    pid_file: str,
    cgroup: str,
    cgroup_directories: Mapping[str, str],
    streams: Sequence[int],
    below: str,
    network: int = -1,
    leave_stopped: bool = False,
) -> list[str]:
    """root: a mount point of its own.  cgroup: the new one's path in each hierarchy; cgroup_directories: see
    `linux.cgroup.Hierarchy.directories`.  streams: descriptors for stdin, stdout and stderr.  below: a directory where
    `sources_below` will have been bound.  network: descriptor of the network namespace to join.

    Raises InvalidArgument for a checkpoint that needs a mount which the new configuration has not.
    """
    line = [program(), "restore", "--restore-detached", "--pidfile", pid_file, "--root", root]
    line += [*_files(images, work, "restore"), *options.words()]
    if leave_stopped:
        line.append("--leave-stopped")
    if cgroup:
        line += ["--cgroup-root", cgroup]
    sources = _sources(spec)
    deeper = iter(range(len(saved.mounts)))
    for place, what in saved.mounts.items():
        source = f"{below}/{next(deeper)}" if what.get("below") else _source(place, what, sources, cgroup_directories)
        line += ["--external", f"mnt[{place}]:{source}"]
    for descriptor, name in zip(streams, saved.streams, strict=False):
        if _STREAM.fullmatch(name):
            line += ["--inherit-fd", f"fd[{descriptor}]:{name}"]
    paths = specs.namespace_paths(spec)
    for kind in ("ipc", "uts"):
        if paths.get(kind):
            line += ["--join-ns", f"{kind}:{paths[kind]}"]
    if network >= 0:
        line += ["--inherit-fd", f"fd[{network}]:{_NETWORK}"]
    return line


def sources_below(spec: Mapping[str, Any], saved: Saved) -> list[tuple[str, str]]:
    """(a bind's source, path below it) of the mounts that CRIU cannot be told by their own path: what is on the way is
    the volume's owner's to swap until CRIU mounts it (see `linux.staging.bind_beneath`).  Raises InvalidArgument."""
    sources = _sources(spec)
    deeper = [(place, what) for place, what in saved.mounts.items() if what.get("below")]
    for _, what in deeper:
        below = what["below"]
        if not below.startswith("/") or {"", ".", ".."}.intersection(below[1:].split("/")):
            raise InvalidArgument(EXTERNAL, below, "does not lead straight down into a bind")
    return [(_source(place, what, sources, {}), what["below"]) for place, what in deeper]


def _sources(spec: Mapping[str, Any]) -> dict[str, str]:
    return {mount["destination"]: mount.get("source", "") for mount in spec.get("mounts") or ()}


def _source(
    place: str, what: Mapping[str, str], sources: Mapping[str, str], cgroup_directories: Mapping[str, str]
) -> str:
    if "cgroup" in what:
        found = cgroup_directories.get(what["cgroup"], cgroup_directories.get("", ""))
        if not found:
            raise InvalidArgument("checkpoint", place, "shows a cgroup hierarchy that this host has not")
        return found
    if "destination" in what:
        if what["destination"] not in sources:
            raise InvalidArgument("mounts", what["destination"], "is missing: the checkpoint needs a mount there")
        return sources[what["destination"]]
    if what.get("device") in DEVICES:
        return f"/dev/{what['device']}"
    raise InvalidArgument(EXTERNAL, dict(what), "says nothing that is known of a mount")


# -- running it ------------------------------------------------------------------------------------------------------


def run(
    line: Sequence[str],
    work: str,
    *,
    keep: Sequence[int] = (),
    seconds: float | None = None,
    before: Callable[[], None] | None = None,
) -> None:
    """To its end.  work: the directory of its log.  keep: descriptors that it inherits.  before: what its process does
    before it is CRIU, for callers without threads: it runs after a fork.

    Raises StepFailed with CRIU's words, DeadlineExceeded.
    """
    act = line[1].removeprefix("pre-")
    clear(work, act)
    with open(os.memfd_create("criu"), "w+", errors="replace") as stderr:  # no pipe, which what CRIU makes could hold
        try:
            done = subprocess.run(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment(),
                pass_fds=keep,
                process_group=0,  # Ctrl-C is for the caller
                preexec_fn=before,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"criu {act} did not end within {seconds:g} s and was killed") from None
        if done.returncode != 0:
            stderr.seek(0)
            raise failure(act, done.returncode, work, stderr.read(_STDERR_MAX))


@contextlib.contextmanager
def locked(work: str) -> Iterator[int]:
    """A lock (flock(2)) on the directory of CRIU's log, whose descriptor `run` may `keep`: then it is held as long as
    CRIU runs, whatever becomes of the caller."""
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def await_end(work: str, seconds: float) -> None:
    """Of a CRIU that keeps the lock (`locked`) of another process.  Raises DeadlineExceeded."""
    end = time.monotonic() + seconds
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DeadlineExceeded(f"criu in {work} did not end within {seconds:g} s") from None
                time.sleep(0.02)
    finally:
        os.close(descriptor)


# -- what went wrong -------------------------------------------------------------------------------------------------


def failure(act: str, code: int, work: str, stderr: str) -> StepFailed:
    """CRIU's last words.  stderr: what it said before it had a log."""
    try:
        with open(log(work, act), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    errors = [line.split("Error ", 1)[1] for line in (text or stderr).splitlines() if "Error " in line]
    said = [words for words in errors if "Can't setup RLIMIT_NOFILE" not in words][:3] or stderr.splitlines()[:3]
    why = "; ".join(said) or f"criu ended with {'signal' if code < 0 else 'code'} {abs(code)} and told no error"
    return StepFailed(f"criu {act}", 0, log(work, act), why[:2000])
