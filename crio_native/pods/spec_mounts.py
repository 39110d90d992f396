"""The mounts of a container's config.json.

The order: the file systems that every container has, the pod's own files (hosts, resolv.conf, hostname, shm), then what
the caller asks for, shallow paths first.  A caller's mount takes the place of ours on the same path.  Nothing here
touches the file system except to look (`stat`, mountinfo); `check_sources` says what has to be made first.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.oci.spec import normalise
from crio_native.pods import userns
from crio_native.pods.values import Mount, MountPropagation

OciMount = dict[str, Any]

# What a caller may add: it only takes away, and says nothing that has a field of its own.
_OPTIONS = frozenset("noexec nosuid nodev nosymfollow noatime nodiratime relatime rnoexec rnosuid rnodev".split())
_PROPAGATION = {
    MountPropagation.PROPAGATION_PRIVATE: "rprivate",
    MountPropagation.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    MountPropagation.PROPAGATION_BIDIRECTIONAL: "rshared",
}


def system_mounts(*, privileged: bool, groups_writable: bool = False) -> list[OciMount]:
    """The kernel's file systems: proc, dev, devpts, mqueue, sysfs, cgroup.  Only a privileged container may write to
    the last two."""
    access = "rw" if privileged else "ro"
    return [
        _fs("/proc", "proc", "nosuid", "noexec", "nodev"),
        _fs("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _fs("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _fs("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _fs("/sys", "sysfs", "nosuid", "noexec", "nodev", access),
        _fs("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "rw" if groups_writable else access),
    ]


def pod_files(pod_dir: Path, shm: Path | str, *, readonly: bool) -> list[OciMount]:
    """The files that the pod's containers share.  Of /etc only single files, so that the image's others stay."""
    access = "ro" if readonly else "rw"
    files = [
        _bind(f"/etc/{name}", pod_dir / name, "nosuid", "nodev", "noexec", access)
        for name in ("hosts", "resolv.conf", "hostname")
    ]
    return [*files, shared_memory(shm)]


def shared_memory(shm: Path | str) -> OciMount:
    return _bind("/dev/shm", shm, "nosuid", "nodev", "noexec", "rw")


def configured_mounts(file: str, timezone: str) -> list[OciMount]:
    """What crio.conf adds to every container: `default_mounts_file`, and `timezone` as /etc/localtime.

    Raises FailedPrecondition for a file that cannot be used or a time zone that the host does not have.
    """
    result = []
    if timezone:
        source = os.path.realpath("/etc/localtime" if timezone == "Local" else f"/usr/share/zoneinfo/{timezone}")
        if not os.path.isfile(source):
            raise FailedPrecondition(f"crio.runtime.timezone: {timezone!r} is not on this host ({source})")
        result.append(_bind("/etc/localtime", source, "nosuid", "nodev", "noexec", "ro"))
    try:
        lines = Path(file).read_text().splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        why = os.strerror(error.errno or 0).lower() if isinstance(error, OSError) else "not UTF-8"
        raise FailedPrecondition(f"crio.runtime.default_mounts_file: {file} cannot be read: {why}") from None
    for number, line in enumerate(lines, 1):
        source, colon, destination = line.strip().partition(":")
        if not source or source.startswith("#"):
            continue
        if not colon or not source.startswith("/") or not destination.startswith("/"):
            raise FailedPrecondition(
                f"crio.runtime.default_mounts_file: {file}, line {number}: {line!r} is not /SOURCE:/DESTINATION"
            )
        result.append(_bind(normalise(destination), os.path.realpath(source), "nosuid", "nodev", "ro"))
    return result


def scratch_mounts() -> list[OciMount]:
    """Writable places of a container under `read_only = true`."""
    return [
        _fs(path, "tmpfs", "rw", "nosuid", "nodev", "noexec", "tmpcopyup", "size=65536k", mode)
        for path, mode in (("/run", "mode=755"), ("/tmp", "mode=1777"), ("/var/tmp", "mode=1777"))
    ]


def caller_mounts(mounts: Sequence[Mount], volumes: Mapping[int, str], prefix: str = "") -> list[OciMount]:
    """What the caller asks for.  volumes: where the images of mounts are mounted, by the mounts' indices.  prefix:
    where the host's root is (`bind_mount_prefix`).

    Raises InvalidArgument with the mount's index.
    """
    result = []
    for index, mount in enumerate(mounts):
        field = f"config.mounts[{index}]"
        _check_mount(mount, field)
        options = ["rbind", _PROPAGATION[mount.propagation]]
        options.append("rro" if mount.recursive_read_only else "ro" if mount.readonly else "rw")
        options += mount.mount_options
        if mount.image:
            options += ["nosuid", "nodev"]
        oci: OciMount = {
            "destination": normalise(mount.container_path),
            "type": "bind",
            "source": volumes[index] if mount.image else _source(mount, field, prefix),
            "options": options,
        }
        if mount.uidMappings or mount.gidMappings:
            options.append("idmap")
            oci |= {"uidMappings": userns.to_oci(mount.uidMappings), "gidMappings": userns.to_oci(mount.gidMappings)}
        result.append(oci)
    return sorted(result, key=lambda m: m["destination"].count("/"))


def _source(mount: Mount, field: str, prefix: str) -> str:
    """The path behind all links.  Raises InvalidArgument for a link that may not be read."""
    try:
        return os.path.realpath(prefix + mount.host_path)
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise InvalidArgument(f"{field}.host_path", mount.host_path, f"cannot be used: {why}") from None


def _check_mount(mount: Mount, field: str) -> None:
    if mount.image is None and not mount.host_path.startswith("/"):
        raise InvalidArgument(f"{field}.host_path", mount.host_path, "must be an absolute path")
    if not mount.container_path.startswith("/") or normalise(mount.container_path) == "/":
        raise InvalidArgument(f"{field}.container_path", mount.container_path, "must be an absolute path below /")
    for place, option in enumerate(mount.mount_options):
        if option not in _OPTIONS:
            known = ", ".join(sorted(_OPTIONS))
            raise InvalidArgument(f"{field}.mount_options[{place}]", option, f"must be one of {known}")
    for name in ("uidMappings", "gidMappings"):
        userns.check_mappings(getattr(mount, name), f"{field}.{name}")
    if bool(mount.uidMappings) != bool(mount.gidMappings):
        raise InvalidArgument(f"{field}.uidMappings", mount.uidMappings, "come with gidMappings, or not at all")
    private = mount.propagation is MountPropagation.PROPAGATION_PRIVATE
    if mount.recursive_read_only and not (mount.readonly and private):
        raise InvalidArgument(
            f"{field}.recursive_read_only", True, "needs readonly and PROPAGATION_PRIVATE on the same mount"
        )


def merge(ours: Iterable[OciMount], callers: Sequence[OciMount]) -> list[OciMount]:
    """Both lists in one; a path that the caller mounts is the caller's."""
    taken = {mount["destination"] for mount in callers}
    return [mount for mount in ours if mount["destination"] not in taken] + list(callers)


def check_sources(mounts: Sequence[Mount], rejected: Collection[str], prefix: str = "") -> list[str]:
    """Look at every mount's source; returns those that are absent and have to be made as directories.

    Raises InvalidArgument for an absent source that may not be made (`absent_mount_sources_to_reject`), for one that
    cannot be made or reached, and for a propagation that the source's own mount cannot give.
    """
    absent = []
    for index, mount in enumerate(mounts):
        if mount.image:
            continue
        field = f"config.mounts[{index}].host_path"
        path = _source(mount, f"config.mounts[{index}]", prefix)
        try:
            os.stat(path)
        except FileNotFoundError:
            if mount.host_path in rejected:
                raise InvalidArgument(
                    field, mount.host_path, "does not exist, and crio.runtime.absent_mount_sources_to_reject names it"
                ) from None
            absent.append(path)
        except OSError as error:
            raise InvalidArgument(
                field, mount.host_path, f"cannot be used: {os.strerror(error.errno or 0).lower()}"
            ) from None
        if mount.propagation is not MountPropagation.PROPAGATION_PRIVATE:
            _check_propagation(field, path, mount.propagation)
    return absent


def _check_propagation(field: str, path: str, wanted: MountPropagation) -> None:
    tags = _propagation_tags(path)
    if wanted is MountPropagation.PROPAGATION_BIDIRECTIONAL and not any(t.startswith("shared:") for t in tags):
        raise InvalidArgument(field, path, "is not on a shared mount, which PROPAGATION_BIDIRECTIONAL needs")
    if not any(t.startswith(("shared:", "master:")) for t in tags):
        raise InvalidArgument(
            field, path, "is on a private mount, but PROPAGATION_HOST_TO_CONTAINER needs a shared or slave one"
        )


def _propagation_tags(path: str) -> list[str]:
    """The optional fields (``shared:1``, ``master:2``) of the mount that `path` is on (proc(5), mountinfo)."""
    best, tags = "", []
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            point = fields[4].encode("latin-1", "surrogateescape").decode("unicode_escape")
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):  # a later mount on the same point is the upper one
                best, tags = point, fields[6 : fields.index("-")]
    return tags


def root_propagation(mounts: Sequence[Mount]) -> str:
    """What the root mount must be so that each mount's propagation can reach it; "" for the default."""
    wanted = {mount.propagation for mount in mounts}
    if MountPropagation.PROPAGATION_BIDIRECTIONAL in wanted:
        return "rshared"
    return "rslave" if MountPropagation.PROPAGATION_HOST_TO_CONTAINER in wanted else ""


def _fs(destination: str, kind: str, *options: str) -> OciMount:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _bind(destination: str, source: Path | str, *options: str) -> OciMount:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["bind", *options]}
