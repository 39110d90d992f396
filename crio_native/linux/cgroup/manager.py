"""Who owns the cgroup tree, and so what an OCI ``linux.cgroupsPath`` means.

With the `cgroupfs` manager the path is a path below the mounts and this program makes the directories itself.  With the
`systemd` manager it is ``slice:prefix:name`` and systemd makes them; that form is understood nowhere else.
"""

from __future__ import annotations

from crio_native.errors import InvalidArgument

from .group import Cgroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def cgroup_of(cgroups_path: str, manager: str = "cgroupfs", annotations: Mapping[str, str] | None = None) -> Cgroup:
    """The group that cgroupsPath names.

    annotations: the container's; with systemd those of ``org.systemd.property.`` become properties of its scope, so
    whoever may write them may change what systemd does.  Raises InvalidArgument for what manager does not understand.
    """
    if manager == "systemd":
        from .systemd import Scope  # and its D-Bus library, only where it is needed

        return Scope(cgroups_path, annotations)
    if manager != "cgroupfs":
        raise InvalidArgument("cgroup_manager", manager, "must be 'cgroupfs' or 'systemd'")
    if cgroups_path.count(":") == 2 and not cgroups_path.startswith("/"):
        raise InvalidArgument("linux.cgroupsPath", cgroups_path, "slice:prefix:name is for the systemd cgroup manager")
    return Cgroup(cgroups_path)
