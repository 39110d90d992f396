"""SELinux labels: which a pod's processes and files have, the categories that keep pods apart, relabelling volumes.

Each pod gets a level of its own, two of the 1024 categories (MCS): a process of one pod may not touch another's files,
although their types are the same.  What a label does is the kernel's and the policy's; writing a process's label is
the executor's.  The arithmetic of labels, and the reading and writing of a file's, is libselinux's.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

from crio_native.config.tables import RuntimeTable
from crio_native.errors import InvalidArgument, ResourceExhausted, StepFailed
from crio_native.linux import syscalls
from crio_native.pods.host import Host
from crio_native.pods.libselinux import bindings
from crio_native.pods.records import Pod, Record
from crio_native.pods.store import Store
from crio_native.pods.values import ContainerSecurity, NamespaceMode, PodConfig, SELinuxOption

CATEGORIES = 1024
UNSEPARATED = "s0:c1022,c1023"  # the level of files of pods that are not separated, as in other runtimes
_PART = {
    "user": re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII),
    "role": re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII),
    "type": re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII),
    "level": re.compile(r"s\d{1,2}(-s\d{1,2})?(:[c0-9.,]{1,512}(-s\d{1,2}:[c0-9.,]{1,512})?)?", re.ASCII),
}
_NEVER_RELABELLED = frozenset(
    "/ /bin /boot /dev /etc /home /lib /lib64 /opt /proc /root /run /sbin /srv /sys /tmp /usr /var /var/lib /var/run "
    "/var/tmp".split()
)
_MAX_ENTRIES = 50_000_000


@dataclass(frozen=True, slots=True)
class Labels:
    """process: of the container's processes.  files: of its root file system and volumes.  "" for none."""

    process: str = ""
    files: str = ""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the host's policy says of containers, in `contexts/lxc_contexts`."""

    process: str = "system_u:system_r:container_t:s0"
    files: str = "system_u:object_r:container_file_t:s0"

    @classmethod
    def read(cls, path: str = "") -> Defaults:
        """A policy without the file, as Debian's, leaves the names that other runtimes' policies use.

        path: the file, "" for the one of the host's policy.
        """
        try:
            text = Path(path or bindings().selinux_lxc_contexts_path()).read_text()
        except OSError:
            return cls()
        found = dict(re.findall(r'^(process|file)\s*=\s*"([^"\n]+)"', text, re.MULTILINE))
        return cls(found.get("process", cls().process), found.get("file", cls().files))


class Levels:
    """The levels that pods hold.  They are in the pods' records, so a restart knows them; one is free again when its
    pod's record is gone."""

    def __init__(self, store: Store) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, str] = {}
        store.listen(self._changed)

    def allot(self, pod_id: str) -> str:
        """A level that no other pod has.  Raises ResourceExhausted when there is none."""
        with self._lock:
            taken = {UNSEPARATED, *self._held.values()}
            for _ in range(1000):  # half a million pairs: chance finds a free one long before it gives up
                first, second = sorted((secrets.randbelow(CATEGORIES), secrets.randbelow(CATEGORIES)))
                level = f"s0:c{first},c{second}"
                if first != second and level not in taken:
                    self._held[pod_id] = level
                    return level
        raise ResourceExhausted("no pair of SELinux categories is free for another pod")

    def release(self, pod_id: str) -> None:
        with self._lock:
            self._held.pop(pod_id, None)

    def _changed(self, kind: type, object_id: str, record: Record | None) -> None:
        if kind is not Pod:
            return
        with self._lock:
            if record is None:
                self._held.pop(object_id, None)
            elif isinstance(record, Pod) and record.selinux_level:
                self._held[object_id] = record.selinux_level


def is_separated(config: PodConfig, settings: RuntimeTable) -> bool:
    """Whether a pod's containers are confined at all: not where they share what separation would take away."""
    modes = config.namespaces
    if config.linux.security_context.privileged or NamespaceMode.NODE in (modes.pid, modes.ipc):
        return False
    return not (modes.network is NamespaceMode.NODE and settings.hostnetwork_disable_selinux)


def level_of_pod(config: PodConfig, settings: RuntimeTable, host: Host, levels: Levels, pod_id: str) -> str:
    """The level that a new pod gets: the one asked for, or one of its own; "" where it is not confined."""
    options = config.linux.security_context.selinux_options
    _check(options, "config.linux.security_context.selinux_options")
    if not host.selinux or not is_separated(config, settings):
        return ""
    return options.level if options and options.level else levels.allot(pod_id)


def of_container(pod: Pod, security: ContainerSecurity | None, settings: RuntimeTable, host: Host) -> Labels:
    """The labels of a container, or of the pod's own process and files (security None).

    Each part is the container's, else the pod's, else the policy's; none on a host without SELinux, as many
    workloads name labels that only some of their hosts have.  Raises InvalidArgument.
    """
    asked = security.selinux_options if security else None
    _check(asked, "config.linux.security_context.selinux_options")
    if not host.selinux or (security is not None and security.privileged):
        return Labels()
    if not pod.selinux_level and not (asked and any((asked.user, asked.role, asked.type, asked.level))):
        return Labels()
    options = (asked or SELinuxOption(), pod.config.linux.security_context.selinux_options or SELinuxOption())
    defaults = Defaults.read()
    level = _first("level", options) or pod.selinux_level or "s0"
    parts = {part: _first(part, options) for part in ("user", "role", "type")}
    return Labels(_with_parts(defaults.process, range=level, **parts), _with_parts(defaults.files, range=level))


def of_shared_memory(labels: Labels, host: Host) -> str:
    """The file label of a pod's /dev/shm, "" on a host without SELinux.

    labels: of the pod's own files.  A pod that is not separated, whose processes the policy lets do anything, has one
    too, at a level that no separated pod has.
    """
    if labels.files or not host.selinux:
        return labels.files
    return _with_parts(Defaults.read().files, range=UNSEPARATED)


def _with_parts(label: str, **parts: str) -> str:
    """The label with those of its parts replaced that are not ""."""
    library = bindings()
    context = library.context_new(label)
    if context is None:
        raise InvalidArgument("contexts/lxc_contexts", label, "is no SELinux label")
    try:
        for part, value in parts.items():
            if value:
                getattr(library, f"context_{part}_set")(context, value)
        return str(library.context_str(context))
    finally:
        library.context_free(context)


def check_policy(labels: Labels) -> None:
    """Refuse labels that the host's policy does not know.  Raises InvalidArgument."""
    for label in filter(None, (labels.process, labels.files)):
        try:
            bindings().security_check_context(label)
        except OSError:
            field = "config.linux.security_context.selinux_options"
            raise InvalidArgument(field, label, "is not known to this host's SELinux policy") from None


def _first(part: str, options: tuple[SELinuxOption, ...]) -> str:
    return next((value for each in options if (value := str(getattr(each, part)))), "")


def _check(options: SELinuxOption | None, field: str) -> None:
    if options is None:
        return
    for part, pattern in _PART.items():
        value = getattr(options, part)
        if value and not pattern.fullmatch(value):
            raise InvalidArgument(f"{field}.{part}", value, f"is no SELinux {part}")


def check_relabel(path: str, field: str) -> None:
    """Refuse to relabel what the host itself lives on."""
    if path in _NEVER_RELABELLED or path.startswith(("/usr/", "/etc/", "/proc/", "/sys/", "/boot/")):
        raise InvalidArgument(f"{field}.selinux_relabel", path, "would relabel a directory of the host's system")


def relabel(path: str, label: str, *, trust_top: bool = False) -> None:
    """Give a tree of files the label, never through a link.  trust_top: leave all as it is when the top has it already.

    Whoever writes to the tree meanwhile may keep a file from its label, but cannot lead us out of it.  A file system
    without labels is left alone.  Raises StepFailed.
    """
    top = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if trust_top and _label_of(top) == label:
            return
        _set(top, label)
        if stat.S_ISDIR(os.fstat(top).st_mode):
            _relabel_below(top, label)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise StepFailed("relabel", error.errno or 0, path, f"label {label}") from None
    finally:
        os.close(top)


def _relabel_below(top: int, label: str) -> None:
    pending, left = ["."], _MAX_ENTRIES
    while pending:
        directory = pending.pop()
        try:
            fd = syscalls.openat2(
                top,
                directory,
                os.O_RDONLY | os.O_DIRECTORY,
                resolve=syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS,
            )
        except FileNotFoundError:
            continue
        with os.scandir(fd) as entries:
            for entry in entries:
                left -= 1
                if not left:
                    raise OSError(errno.E2BIG, "more files than are relabelled")
                _set_entry(fd, entry.name, label)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{directory}/{entry.name}")
        os.close(fd)


def _set_entry(directory: int, name: str, label: str) -> None:
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        _set(fd, label)
    finally:
        os.close(fd)


def _set(fd: int, label: str) -> None:
    """Through /proc, which leads to what the descriptor is open on, be it a link itself."""
    bindings().setfilecon_raw(f"/proc/self/fd/{fd}", label)


def _label_of(fd: int) -> str:
    try:
        return str(bindings().getfilecon_raw(f"/proc/self/fd/{fd}")[1])
    except OSError:
        return ""
