"""`crio-native check`: what this host has of what the daemon needs, found by looking and by trying.

Here belong the questions and their answers in words.  Nothing is changed: the one mount that is tried is made in a
mount namespace of this process's own.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from crio_native import foreign_storage, named_files, places
from crio_native.config import Config, Loaded
from crio_native.cri import exporter, streaming
from crio_native.errors import CrioError
from crio_native.images import roots, snapshots
from crio_native.images.sources import Sources, from_config
from crio_native.linux import capabilities, mounts, syscalls
from crio_native.linux.cgroup.hierarchy import hierarchy
from crio_native.monitor.client import binary_path
from crio_native.oci import seccomp, seccomp_profile
from crio_native.pods import io_classes
from crio_native.pods.host import Host
from crio_native.streaming.server import StreamServer

OK, LACKING, MISSING = "ok", "lacking", "MISSING"

KERNEL_NEEDED = (5, 9)  # openat2, clone3, close_range, the mount calls by descriptor
KERNEL_WANTED = (5, 14)  # mount_setattr, cgroup.kill
NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
CONTROLLERS = ("cpu", "memory", "pids")
CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_SETFCAP"),
    *("CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer.  state: OK; LACKING, the daemon runs without it; MISSING, it does not."""

    subject: str
    state: str
    detail: str


def examine(loaded: Loaded) -> list[Finding]:
    """All findings.  Must run as root, in a process that nobody else's mounts depend on."""
    config = loaded.config
    return [
        _kernel(os.uname().release),
        _namespaces(),
        _user_namespaces(),
        *_cgroups(config),
        _seccomp(),
        _security_module(),
        _capabilities(),
        _overlay(Path(config.crio.root)),
        _monitor(),
        *_handlers(config),
        *_named_files(loaded),
        *_start(loaded),
    ]


def _kernel(release: str) -> Finding:
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if version < KERNEL_NEEDED:
        return Finding("kernel", MISSING, f"{release}; 5.9 or newer is needed")
    if version < KERNEL_WANTED:
        return Finding("kernel", LACKING, f"{release}; before 5.14 there are no recursive read-only mounts")
    return Finding("kernel", OK, release)


def _namespaces() -> Finding:
    absent = [kind for kind in NAMESPACES if not os.path.exists(f"/proc/self/ns/{kind}")]
    if absent:
        return Finding("namespaces", MISSING, f"the kernel is built without {', '.join(absent)}")
    return Finding("namespaces", OK, ", ".join(NAMESPACES))


def _user_namespaces() -> Finding:
    try:
        most = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    except OSError:
        return Finding(
            "user namespaces", LACKING, "the kernel is built without them: pods cannot have hostUsers: false"
        )
    if most == 0:
        return Finding("user namespaces", LACKING, "none allowed; raise the sysctl user.max_user_namespaces")
    return Finding("user namespaces", OK, f"{most} allowed")


def _cgroups(config: Config) -> Iterator[Finding]:
    if config.runtime.cgroup_manager == "systemd" and not os.path.isdir("/run/systemd/system"):
        yield Finding(
            "cgroup manager", MISSING, "systemd does not run here; set crio.runtime.cgroup_manager to cgroupfs"
        )
    try:
        found = hierarchy()
    except (OSError, RuntimeError) as error:
        yield Finding("cgroups", MISSING, str(error))
        return
    absent = [name for name in CONTROLLERS if not found.mount_of(name)]
    if absent:
        yield Finding("cgroups", MISSING, f"{found.mode}, without the controllers {', '.join(absent)}")
    elif found.mode != "v2":
        yield Finding(
            "cgroups", LACKING, f"{found.mode}; only v2 has pressure, memory.high and one write to kill a pod"
        )
    else:
        yield Finding("cgroups", OK, f"v2 with {', '.join(sorted(found.v2))}")


def _seccomp() -> Finding:
    if not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):
        return Finding("seccomp", MISSING, "the kernel is built without CONFIG_SECCOMP_FILTER")
    try:
        compiled = seccomp.compile(seccomp_profile.resolve(seccomp_profile.default_profile(), ()))
    except CrioError as error:
        return Finding("seccomp", MISSING, str(error))
    return Finding("seccomp", OK, f"the default profile compiles to {len(compiled.bpf) // 8} instructions")


def _security_module() -> Finding:
    if os.path.exists("/sys/fs/selinux/enforce"):
        return Finding("security module", OK, "SELinux")
    if _text("/sys/module/apparmor/parameters/enabled").startswith("Y"):
        return Finding("security module", OK, "AppArmor")
    return Finding("security module", LACKING, "neither SELinux nor AppArmor")


def _capabilities() -> Finding:
    mask = re.search(r"^CapEff:\s*(\w+)$", _text("/proc/self/status"), re.M)
    have = set(capabilities.names(int(mask[1], 16) if mask else 0))
    if absent := [name for name in CAPABILITIES if name not in have]:
        return Finding("capabilities", MISSING, f"this root lacks {', '.join(absent)}")
    if absent := [name for name in capabilities.NAMES if name not in have]:
        return Finding("capabilities", LACKING, f"no container can have {', '.join(absent)}")
    return Finding("capabilities", OK, "all")


def _overlay(root: Path) -> Finding:
    """Tried on the file system of the images: one that is an overlay itself, or lacks xattrs, cannot carry another."""
    place = next(directory for directory in (root, *root.parents) if directory.is_dir())
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, mounts.MS_REC | mounts.MS_PRIVATE)
        with _scratch(place) as scratch:
            options = ",".join(f"{name}dir={scratch}/{name}" for name in ("lower", "upper", "work"))
            syscalls.mount("overlay", f"{scratch}/merged", "overlay", 0, options)
            syscalls.umount2(f"{scratch}/merged")
    except OSError as error:
        return Finding("overlay", MISSING, f"cannot be mounted on {place}: {(error.strerror or '').lower()}")
    return Finding("overlay", OK, f"can be mounted on {place}")


@contextmanager
def _scratch(place: Path) -> Iterator[str]:
    scratch = tempfile.mkdtemp(prefix=".crio-native-check-", dir=place)
    try:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{scratch}/{name}")
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _monitor() -> Finding:
    try:
        return Finding("monitor", OK, str(binary_path()))
    except CrioError as error:
        return Finding("monitor", MISSING, str(error))


def _handlers(config: Config) -> Iterator[Finding]:
    for name, handler in sorted(config.runtime.runtimes.items()):
        if handler.runtime_type == "builtin":
            yield Finding(f"handler {name}", OK, "built in")
            continue
        wanted = handler.runtime_path or name
        if program := shutil.which(wanted):
            yield Finding(f"handler {name}", OK, program)
        else:
            state = MISSING if name == config.runtime.default_runtime else LACKING
            yield Finding(f"handler {name}", state, f"there is no program {wanted}; set runtime_path")


def _named_files(loaded: Loaded) -> Iterator[Finding]:
    problems = [Finding("named files", MISSING, str(problem)) for problem in named_files.problems(loaded)]
    yield from problems or [Finding("named files", OK, "those that the configuration names can be used")]


def _start(loaded: Loaded) -> Iterator[Finding]:
    """What the start refuses, asked of the start's own functions."""
    for subject, act in _START.items():
        try:
            act(loaded)
            yield Finding(subject, OK, "as configured")
        except CrioError as error:
            yield Finding(subject, MISSING, str(error))


def _storage(loaded: Loaded) -> None:
    foreign_storage.check(loaded)
    crio = loaded.config.crio
    roots.parse(crio.storage_driver, crio.storage_option)
    if crio.storage_driver == "btrfs":
        snapshots.require_btrfs(Path(crio.imagestore or crio.root))


def _streaming(loaded: Loaded) -> None:
    """On any port: a daemon that runs has the configured one."""
    StreamServer(replace(streaming.settings(loaded.config.api), port=0)).close()


def _metrics(loaded: Loaded) -> None:
    if loaded.config.metrics.enable_metrics:
        for listener in exporter.listen(loaded.config, port=0)[0]:
            listener.close()


def _block_io(loaded: Loaded) -> None:
    if path := loaded.config.runtime.blockio_config_file:
        io_classes.BlockIo().classes(path)


_START: Mapping[str, Callable[[Loaded], object]] = {
    "storage driver": _storage,
    "registries": lambda loaded: Sources(from_config(loaded.config)),
    "SELinux": lambda loaded: Host.read(selinux=loaded.config.runtime.selinux),
    "block I/O classes": _block_io,
    "streaming": _streaming,
    "metrics": _metrics,
    "directories of pods": lambda loaded: places.check(loaded.config),
}


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
