"""A pod's own user namespace: the mappings that a caller or the configuration asks for, checked and translated.

As Kubernetes has it (KEP-127): the kubelet chooses a range of the host's ids for each pod and says so in
`userns_options`; all containers of the pod are in the one namespace.  What the mappings do to files is said in `spec`
(volumes, root file system) and `pod_files`; making the namespace is the launchers' work.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from crio_native.config.tables import RuntimeTable
from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.oci.builtin.plan_mounts import id_map
from crio_native.oci.runtime import Overlay
from crio_native.pods.host import Host
from crio_native.pods.values import IDMapping, NamespaceMode, PodConfig, UserNamespace

FIELD = "config.linux.security_context.namespace_options.userns_options"
MAX_ID = 2**32 - 2  # the last number is the kernel's "no id"
MAX_MAPPINGS = 340  # UID_GID_MAP_MAX_EXTENTS
_PAUSE_USER = 65535


def of_pod(config: PodConfig, settings: RuntimeTable, host: Host) -> UserNamespace | None:
    """The user namespace that a pod gets, None for the host's.

    A caller that says nothing gets the configuration's (`uid_mappings`).  Raises InvalidArgument, and
    FailedPrecondition where this kernel cannot give one.
    """
    asked = config.namespaces.userns_options
    if asked is None:
        wanted = _configured(settings)
        if wanted is None:
            return None
    elif asked.mode is NamespaceMode.NODE:
        if asked.uids or asked.gids:
            raise InvalidArgument(f"{FIELD}.mode", "NODE", "the host's user namespace takes no mappings")
        return None
    elif asked.mode is NamespaceMode.POD:
        wanted = asked
    else:
        raise InvalidArgument(f"{FIELD}.mode", asked.mode.name, "must be POD or NODE")
    for name, mappings in (("uids", wanted.uids), ("gids", wanted.gids)):
        check_mappings(mappings, f"{FIELD}.{name}")
        if host_id(mappings, 0) is None:
            raise InvalidArgument(f"{FIELD}.{name}", mappings, "must map container_id 0: a pod's files belong to it")
    _check_least("uids", wanted.uids, settings.minimum_mappable_uid)
    _check_least("gids", wanted.gids, settings.minimum_mappable_gid)
    _check_modes(config)
    if not host.user_namespaces:
        raise FailedPrecondition(
            f"{FIELD}: a user namespace is asked for, but this kernel has none, or no id-mapped mounts (Linux 5.12)"
        )
    return wanted


def check_mappings(mappings: Sequence[IDMapping], field: str) -> None:
    """Raises InvalidArgument for ranges that the kernel would refuse."""
    if len(mappings) > MAX_MAPPINGS:
        raise InvalidArgument(field, len(mappings), f"the kernel takes at most {MAX_MAPPINGS} ranges")
    for index, entry in enumerate(mappings):
        if entry.length < 1 or max(entry.host_id, entry.container_id) + entry.length - 1 > MAX_ID:
            raise InvalidArgument(f"{field}[{index}]", entry, f"must have a length, and end at {MAX_ID} at most")
    for name in ("container_id", "host_id"):
        spans = sorted((getattr(entry, name), getattr(entry, name) + entry.length) for entry in mappings)
        if any(second[0] < first[1] for first, second in itertools.pairwise(spans)):
            raise InvalidArgument(field, mappings, f"the {name} ranges overlap")


def host_id(mappings: Sequence[IDMapping], inside: int) -> int | None:
    """The host's number of an id in the namespace; None for one that is not mapped."""
    for entry in mappings:
        if entry.container_id <= inside < entry.container_id + entry.length:
            return entry.host_id + inside - entry.container_id
    return None


def root_of(namespace: UserNamespace | None) -> tuple[int, int]:
    """The host's uid and gid of a pod's root."""
    if namespace is None:
        return 0, 0
    return host_id(namespace.uids, 0) or 0, host_id(namespace.gids, 0) or 0


def pause_user(namespace: UserNamespace | None) -> int:
    """The pause process is nobody in particular, but somebody that the namespace knows."""
    if namespace is None or None not in (host_id(namespace.uids, _PAUSE_USER), host_id(namespace.gids, _PAUSE_USER)):
        return _PAUSE_USER
    return 0


def map_root(overlay: Overlay, namespace: UserNamespace) -> Overlay:
    """The root file system for a container in the namespace; its upper directory, still empty, changes its owner.
    Raises InvalidArgument."""
    info = os.stat(overlay.upper)
    uid, gid = host_id(namespace.uids, info.st_uid), host_id(namespace.gids, info.st_gid)
    if uid is None or gid is None:
        raise InvalidArgument(
            f"{FIELD}.uids", namespace.uids, f"do not map {info.st_uid}:{info.st_gid}, who owns the image's root"
        )
    os.chown(overlay.upper, uid, gid)
    return replace(overlay, mapped=True)


def to_oci(mappings: Sequence[IDMapping]) -> list[dict[str, int]]:
    """As config.json has them."""
    return [{"containerID": m.container_id, "hostID": m.host_id, "size": m.length} for m in mappings]


def map_lines(namespace: UserNamespace) -> tuple[str, str]:
    """As /proc/PID/uid_map and gid_map take them."""
    return id_map(to_oci(namespace.uids)), id_map(to_oci(namespace.gids))


def _configured(settings: RuntimeTable) -> UserNamespace | None:
    def of(mappings: Any) -> tuple[IDMapping, ...]:
        return tuple(IDMapping(m.host, m.container, m.size) for m in mappings)

    if not settings.uid_mappings and not settings.gid_mappings:
        return None
    return UserNamespace(NamespaceMode.POD, of(settings.uid_mappings), of(settings.gid_mappings))


def _check_least(name: str, mappings: Sequence[IDMapping], least: int) -> None:
    for index, entry in enumerate(mappings):
        if entry.host_id < least:
            option = f"crio.runtime.minimum_mappable_{name[:-1]}"
            raise InvalidArgument(
                f"{FIELD}.{name}[{index}].host_id", entry.host_id, f"is below {least}, which {option} says"
            )


def _check_modes(config: PodConfig) -> None:
    """The host's processes and queues are not the namespace's: its root could do nothing with them, or too much."""
    for name in ("pid", "ipc"):
        if getattr(config.namespaces, name) is NamespaceMode.NODE:
            raise InvalidArgument(
                FIELD, "POD", f"a user namespace of the pod's own excludes the host's {name} namespace"
            )
