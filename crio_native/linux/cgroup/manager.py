"""Who owns the cgroup tree, and so what an OCI ``linux.cgroupsPath`` means.

With the `cgroupfs` manager the path is a path below the mounts and this program makes the directories itself.  With the
`systemd` manager it is ``slice:prefix:name`` and systemd makes them; that form is understood nowhere else.
"""

from __future__ import annotations

from crio_native.errors import InvalidArgument, Unimplemented

from .group import Cgroup


def cgroup_of(cgroups_path: str, manager: str = "cgroupfs") -> Cgroup:
    """The group that cgroupsPath names.

    Raises InvalidArgument for a path that manager does not understand, Unimplemented for the systemd manager.
    """
    if manager == "systemd":
        raise Unimplemented("cgroup_manager 'systemd' is not available in this version: use 'cgroupfs'")
    if manager != "cgroupfs":
        raise InvalidArgument("cgroup_manager", manager, "must be 'cgroupfs' or 'systemd'")
    if cgroups_path.count(":") == 2 and not cgroups_path.startswith("/"):
        raise InvalidArgument("linux.cgroupsPath", cgroups_path, "slice:prefix:name is for the systemd cgroup manager")
    return Cgroup(cgroups_path)
