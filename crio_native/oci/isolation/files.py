"""What the process sees and holds of files: mounts, masks, devices, descriptors."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from crio_native.linux import inroot, mountinfo, mounts
from crio_native.oci import spec as specs
from crio_native.oci.builtin.plan import DEFAULT_DEVICES
from crio_native.oci.isolation.credentials import own_namespace
from crio_native.oci.isolation.finding import Finding, Verdict, compared
from crio_native.oci.isolation.subject import Probe, Subject

Spec = Mapping[str, Any]
FLAGS = {"ro": mounts.MS_RDONLY, "nosuid": mounts.MS_NOSUID, "nodev": mounts.MS_NODEV, "noexec": mounts.MS_NOEXEC}
FLAGS |= {"nosymfollow": mounts.MS_NOSYMFOLLOW}
ID_MAPPED = "idmapped"  # as mountinfo calls it
NULL = os.makedev(1, 3)
PTY_MAJOR = 136
DEVICES_MAX = 10_000  # entries of /dev that are looked at
DEVICES_DEPTH = 4
DESCRIPTORS_MAX = 4096
# Column of the inode in the tables of /proc/PID/net: whoever's sockets are in none belongs to another namespace.
SOCKET_TABLES = {"unix": 6, "netlink": 9, "packet": 8}
SOCKET_TABLES |= dict.fromkeys(("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6"), 9)


def mounted(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """The mounts that were asked for, each with its flags; then those that nobody asked for."""
    asked = {specs.normalise(mount["destination"]): mount for mount in spec.get("mounts") or ()}
    tops: list[tuple[str, str, Mapping[str, Any]]] = []  # field, where it is mounted, what was asked for
    for index, (target, mount) in enumerate(asked.items()):
        field = f"mounts[{index}] {target}"
        extensions = mounts.parse(mount.get("options") or ()).extensions
        copied = "copy-symlink" in extensions and os.path.islink(mount.get("source", ""))
        probe = None
        for probe in subject.probes(target, follow=not copied and "dest-nofollow" not in extensions):
            tops.append((field, probe.at, mount))
            yield _copied_link(field, mount, probe) if copied else _mount(field, mount, probe)
        if probe is None:
            yield Finding(field, _asked_words(mount), "is not there", Verdict.DIFFERENT)
    stacked = sum(found.point == "/" for found in subject.mounts.values()) - 1
    if stacked > 0:  # whoever enters the mount namespace by setns(2) finds himself up there
        yield Finding("mount /", "the root file system", f"{stacked} more mounted on top of it", Verdict.WEAKER)
    linux = spec.get("linux") or {}
    others = [*(linux.get("maskedPaths") or ()), *(linux.get("readonlyPaths") or ()), "/dev/console"]
    others += [device["path"] for device in linux.get("devices") or ()] + [path for path, _, _ in DEFAULT_DEVICES]
    explained = {"/", *(at for _, at, _ in tops), *(probe.at for path in others for probe in subject.probes(path))}
    capable = "CAP_SYS_ADMIN" in ((spec["process"].get("capabilities") or {}).get("effective") or ())
    for found in subject.mounts.values():
        if found.point in explained:
            continue
        above = [top for top in tops if found.point.startswith(top[1].rstrip("/") + "/")]
        field, _, mount = max(above, key=lambda top: len(top[1]), default=("", "", {}))
        if _brings_others(mount):
            yield from _below(field, mount, found, capable)
            continue
        words = f"{found.fstype} from {found.source}{found.root}, {','.join(sorted(found.options))}"
        yield Finding(f"mount {found.point}", "not asked for", words, _verdict_of_extra(found, capable))


def _below(field: str, mount: Mapping[str, Any], found: mountinfo.Mount, capable: bool) -> Iterator[Finding]:
    """A mount that came with the one above it: what was asked for the whole tree holds for it too."""
    options = mounts.parse(mount.get("options") or ())
    wanted = _names(options.tree_flags) | ({ID_MAPPED} if "ridmap" in options.extensions else set())
    missing = wanted - _flags_of(found)
    if missing:
        # With CAP_SYS_ADMIN it may have made or changed the mount itself.
        verdict = Verdict.DIFFERENT if capable else Verdict.WEAKER
        asked = f"{' '.join(sorted(wanted))} on all below"
        yield Finding(f"{field}: {found.point}", asked, f"{found.fstype}; without {' '.join(sorted(missing))}", verdict)


def _verdict_of_extra(mount: mountinfo.Mount, capable: bool) -> Verdict:
    if mount.read_only and mount.fstype in ("proc", "sysfs", "tmpfs"):
        return Verdict.STRICTER  # a mask, or a protected part of what is there
    # With CAP_SYS_ADMIN it may have made the mount itself.
    return Verdict.DIFFERENT if capable else Verdict.WEAKER


def sources(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """Whether binds show what their sources are now, and what is mounted below them what is mounted there; below
    control groups, the container's own.

    For a container that has just been made: later mounts of the host's may have reached it, or it may have made some.
    """
    asked = {specs.normalise(mount["destination"]): mount for mount in spec.get("mounts") or ()}
    tops = {probe.at: mount for target, mount in asked.items() for probe in subject.probes(target)}
    hidden = (spec.get("linux") or {}).get("maskedPaths") or ()
    explained = {probe.at for path in hidden for probe in subject.probes(path)}
    capable = "CAP_SYS_ADMIN" in ((spec["process"].get("capabilities") or {}).get("effective") or ())
    for found in subject.mounts.values():
        above = max((at for at in tops if _is_within(found.point, at)), key=len, default="")
        mount = tops.get(above, {})
        if found.point in explained:
            continue
        if _is_bind(mount):
            other = _other_than_source(subject, found, mount, found.point[len(above) :])
        elif mount.get("type") == "cgroup" and found.point != above:
            own = found.fstype in ("cgroup", "cgroup2") and found.root in subject.cgroups.values()
            other = "" if own else f"{found.fstype} at {found.root}, no control group of its own"
        else:
            continue
        if other:
            field = f"mount {found.point}"
            yield Finding(field, _asked_words(mount), other, Verdict.DIFFERENT if capable else Verdict.WEAKER)


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _other_than_source(subject: Subject, found: mountinfo.Mount, mount: Mapping[str, Any], below: str) -> str:
    """How a bind, or a mount below one, differs from what the host has there; "" when it does not."""
    for probe in subject.probes(found.point):
        if probe.mount is None or probe.mount.id != found.id:
            return f"{found.fstype} below another mount"
        try:
            source = inroot.open_beneath(mount.get("source", ""), below)
        except OSError as error:
            return f"{found.fstype}, and the source has nothing there: {error.strerror}"
        try:
            if not os.path.samestat(os.fstat(source), probe.status):
                return f"{found.fstype} from {found.source}{found.root}, not what the source has there"
            missing = _flags_of(mountinfo.read()[mountinfo.id_of(source)]) - _flags_of(found) - {ID_MAPPED}
            return f"without the source's {' '.join(_ordered(missing))}" if missing else ""
        finally:
            os.close(source)
    return f"{found.fstype}, which cannot be reached"


def _brings_others(mount: Mapping[str, Any]) -> bool:
    options = mounts.parse(mount.get("options") or ())
    return bool(options.flags & mounts.MS_REC) or mount.get("type") in ("rbind", "cgroup")


def _is_bind(mount: Mapping[str, Any]) -> bool:
    return mount.get("type") in ("bind", "rbind") or bool(
        mounts.parse(mount.get("options") or ()).flags & mounts.MS_BIND
    )


def _asked_words(mount: Mapping[str, Any]) -> str:
    kind = f"the host's {mount.get('source')}" if _is_bind(mount) else mount.get("type")
    return " ".join([str(kind), *_ordered(_wanted(mount))])


def _wanted(mount: Mapping[str, Any]) -> set[str]:
    """What the mount itself is to have of FLAGS and ID_MAPPED."""
    options = mounts.parse(mount.get("options") or ())
    mapped = options.extensions & {"idmap", "ridmap"} or mount.get("uidMappings")
    return _names(options.top_flags) | ({ID_MAPPED} if mapped and _is_bind(mount) else set())


def _flags_of(found: mountinfo.Mount) -> set[str]:
    return ({*FLAGS, ID_MAPPED} & found.options) | ({"ro"} if found.read_only else set())


def _names(flags: int) -> set[str]:
    return {name for name, flag in FLAGS.items() if flags & flag}


def _ordered(names: set[str]) -> list[str]:
    return [name for name in (*FLAGS, ID_MAPPED) if name in names]


def _mount(field: str, mount: Mapping[str, Any], probe: Probe) -> Finding:
    asked = _asked_words(mount)
    found = probe.mount
    if found is None or not probe.mount_point:
        # What a file system would have covered is in view; a part of the host that is missing isolates.
        return Finding(field, asked, "no mount is there", Verdict.DIFFERENT if _is_bind(mount) else Verdict.WEAKER)
    options = mounts.parse(mount.get("options") or ())
    wanted, has = _wanted(mount), _flags_of(found)
    words = " ".join([found.fstype, *_ordered(has)])
    missing = wanted - has
    shared = any(entry.startswith("shared:") for entry in found.fields)
    if shared and not any(kind & mounts.MS_SHARED for kind in options.propagation):
        return Finding(field, asked, f"{words}, shared with other mount namespaces", Verdict.WEAKER)
    if missing:
        return Finding(field, asked, f"{words}; without {' '.join(sorted(missing))}", Verdict.WEAKER)
    if _is_bind(mount):
        if not _same_file(mount.get("source", ""), probe, "src-nofollow" not in options.extensions):
            return Finding(field, asked, f"{words}, not what the source is now", Verdict.DIFFERENT)
    elif found.fstype not in _types(mount.get("type", "")):
        return Finding(field, asked, f"{words}, another file system", Verdict.WEAKER)
    return compared(field, asked, words, weaker=False, same=wanted == has)


def _copied_link(field: str, mount: Mapping[str, Any], probe: Probe) -> Finding:
    asked, found = f"a symlink to {os.readlink(mount['source'])}", "no symlink"
    if stat.S_ISLNK(probe.status.st_mode):
        found = f"a symlink to {os.readlink('', dir_fd=probe.descriptor)}"
    return Finding(field, asked, found, Verdict.SAME if found == asked else Verdict.DIFFERENT)


def _types(kind: str) -> tuple[str, ...]:
    """A cgroup mount is a tmpfs with the v1 hierarchies below it, or cgroup2."""
    return ("cgroup", "cgroup2", "tmpfs") if kind == "cgroup" else (kind,)


def _same_file(source: str, probe: Probe, follow: bool) -> bool:
    try:
        found = os.stat(source, follow_symlinks=follow)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (probe.status.st_dev, probe.status.st_ino)


def root(subject: Subject, spec: Spec) -> Iterator[Finding]:
    found = next((mount for mount in reversed(list(subject.mounts.values())) if mount.point == "/"), None)
    if found is None:
        yield Finding("root", "", "no mount at /", Verdict.UNKNOWN)
        return
    asked = bool(spec["root"].get("readonly"))
    words = ("writable", "read-only")
    yield compared(
        "root.readonly",
        words[asked],
        words[found.read_only],
        weaker=asked and not found.read_only,
        same=asked == found.read_only,
    )
    wanted = (spec.get("linux") or {}).get("rootfsPropagation") or "slave"
    fields = ", ".join(found.fields) or "private"
    shared = any(entry.startswith("shared:") for entry in found.fields)
    allowed = "shared" in wanted
    yield compared("linux.rootfsPropagation", wanted, fields, weaker=shared and not allowed, same=True)
    if subject.namespace("mnt") == own_namespace("mnt"):
        return
    for name in ("cwd", "exe"):
        inside = subject.mount_of(name) in subject.mounts
        where = f"{subject.link(name)}{'' if inside else ', outside its mount namespace'}"
        yield compared(f"process {name}", "inside its mount namespace", where, weaker=not inside, same=inside)


def masked(subject: Subject, spec: Spec) -> Iterator[Finding]:
    for path in (spec.get("linux") or {}).get("maskedPaths") or ():
        found, weaker = "is not there", False
        for probe in subject.probes(path):
            found, weaker = _mask(probe)
        yield compared(f"linux.maskedPaths {path}", "masked", found, weaker=weaker, same=not weaker)


def _mask(probe: Probe) -> tuple[str, bool]:
    mode = probe.status.st_mode
    if stat.S_ISCHR(mode) and probe.status.st_rdev == NULL:
        return "the null device", False
    if stat.S_ISDIR(mode) and probe.mount_point and probe.mount and probe.mount.read_only:
        if not os.listdir(f"/proc/self/fd/{probe.descriptor}"):
            return f"an empty, read-only {probe.mount.fstype}", False
        return "a directory with entries", True
    return "a directory" if stat.S_ISDIR(mode) else "a file", True


def read_only(subject: Subject, spec: Spec) -> Iterator[Finding]:
    for path in (spec.get("linux") or {}).get("readonlyPaths") or ():
        found, weaker = "is not there", False
        for probe in subject.probes(path):
            weaker = not (probe.mount and probe.mount.read_only)
            found = "on a writable mount" if weaker else "read-only"
        yield compared(f"linux.readonlyPaths {path}", "read-only", found, weaker=weaker, same=not weaker)


def devices(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """Device files below /dev that nobody asked for, and asked ones that are missing."""
    entries = (spec.get("linux") or {}).get("devices") or ()
    asked = {specs.normalise(entry["path"]): _number(entry) for entry in entries if entry["type"] != "p"}
    known = {os.makedev(major, minor) for _, major, minor in DEFAULT_DEVICES} | {os.makedev(5, 2), *asked.values()}
    for path, number in asked.items():
        same = False
        for probe in subject.probes(path):
            same = probe.status.st_rdev == number
        words = f"{os.major(number)}:{os.minor(number)}"
        found = words if same else "something else, or nothing"
        yield Finding(f"linux.devices {path}", words, found, Verdict.SAME if same else Verdict.DIFFERENT)
    if any(specs.normalise(mount["destination"]) == "/dev" and _is_bind(mount) for mount in spec.get("mounts") or ()):
        return
    extra = [
        f"{path} ({'b' if stat.S_ISBLK(found.st_mode) else 'c'} {os.major(found.st_rdev)}:{os.minor(found.st_rdev)})"
        for probe in subject.probes("/dev")
        for path, found in _nodes(subject, probe.descriptor, "/dev", 0)
        if found.st_rdev not in known and os.major(found.st_rdev) != PTY_MAJOR
    ]
    yield compared(
        "device files",
        "the default and asked ones",
        ", ".join(extra[:20]) or "no others",
        weaker=bool(extra),
        same=not extra,
    )


def _number(device: Mapping[str, Any]) -> int:
    return os.makedev(device.get("major", 0), device.get("minor", 0))


def _nodes(subject: Subject, directory: int, path: str, depth: int) -> Iterator[tuple[str, os.stat_result]]:
    """Device files that work: none does on a mount with nodev.  Links are not followed."""
    mount = subject.mounts.get(mountinfo.id_of(directory))
    names = os.listdir(f"/proc/self/fd/{directory}")[:DEVICES_MAX]
    for name in names:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode) and depth < DEVICES_DEPTH:
            inner = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                yield from _nodes(subject, inner, f"{path}/{name}", depth + 1)
            finally:
                os.close(inner)
        elif (stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)) and mount and "nodev" not in mount.options:
            yield f"{path}/{name}", found


def descriptors(subject: Subject, spec: Spec) -> Iterator[Finding]:
    """Open descriptors of what is outside: files on no mount of the container's, sockets of another namespace."""
    own_mounts = subject.namespace("mnt") != own_namespace("mnt")
    own_network = "network" in specs.namespace_paths(spec)
    sockets = _sockets(subject) if own_network else frozenset()
    numbers = sorted(int(name) for name in subject.names("fd"))
    given = {0, 1, 2} | _passed(spec)
    leaks = 0
    for number in numbers[:DESCRIPTORS_MAX]:
        try:
            target = subject.link(f"fd/{number}")
            outside = _outside(subject, number, target, own_mounts, own_network, sockets)
            directory = stat.S_ISDIR(subject.stat(f"fd/{number}").st_mode)
        except FileNotFoundError:
            continue  # closed meanwhile
        if not outside:
            continue
        leaks += 1
        passed = number in given and not directory
        asked = "passed on" if passed else "not asked for"
        yield Finding(f"descriptor {number}", asked, outside, Verdict.DIFFERENT if passed else Verdict.WEAKER)
    if not leaks:
        yield Finding("descriptors", "none of the host's", f"none of the host's among {len(numbers)}", Verdict.SAME)


def _passed(spec: Spec) -> set[int]:
    """Descriptors of socket activation, which LISTEN_FDS counts from 3."""
    for entry in spec["process"].get("env") or ():
        name, _, value = entry.partition("=")
        if name == "LISTEN_FDS" and value.isascii() and value.isdigit() and len(value) < 5:
            return set(range(3, 3 + int(value)))
    return set()


def _outside(
    subject: Subject, number: int, target: str, own_mounts: bool, own_network: bool, sockets: frozenset[int]
) -> str:
    """What of the host's a descriptor is, in words; "" when it is the container's own."""
    if target.startswith("socket:["):
        if own_network and int(target[8:-1]) not in sockets:
            return f"{target} of another network namespace"
        return ""
    if not target.startswith("/") or target.startswith("/memfd:") or not own_mounts:
        return ""  # pipes, eventfds and the like belong to whoever holds them
    mount = int(mountinfo.field(subject.text(f"fdinfo/{number}"), "mnt_id"))
    return "" if mount in subject.mounts else f"{target} on a mount that is not the container's"


def _sockets(subject: Subject) -> frozenset[int]:
    found = set()
    for name, column in SOCKET_TABLES.items():
        try:
            lines = subject.text(f"net/{name}").splitlines()[1:]
        except OSError:
            continue  # a protocol that this kernel does not have
        rows = (line.split() for line in lines)
        found |= {int(row[column]) for row in rows if len(row) > column and row[column].isdigit()}
    return frozenset(found)
