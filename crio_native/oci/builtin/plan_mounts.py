"""The part of a plan that makes the container's file tree: root, mounts, devices, and what protects them.

Most trees are opened where they are used.  They are opened `early`, while the host's mounts and privileges are there,
when these will not be later: in a user namespace the init may not even search the directories above a volume.
"""

from __future__ import annotations

from crio_native.linux import mounts
from crio_native.oci import spec as specs
from crio_native.oci.builtin.plan_types import RULE, Steps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from crio_native.oci.runtime import ContainerSpec

DEFAULT_DEVICES = (
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
)
# After the spec's own device rules: the init makes nodes inside its cgroup, and every container uses the default
# devices and its terminals (pts 136, ptmx 5:2) whatever the spec denies.
DEFAULT_DEVICE_RULES = (
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
    *(
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
        for _, major, minor in (*DEFAULT_DEVICES, ("/dev/ptmx", 5, 2))
    ),
    {"allow": True, "type": "c", "major": 136, "access": "rwm"},
)
DEVICE_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
)
NOTIFY_SOCKET = "/run/notify/notify.sock"  # where a container finds the host's, and what its environment says
_WITHOUT_CONTEXT = ("proc", "sysfs", "cgroup", "cgroup2", "mqueue")  # file systems that take no SELinux context
# What a user namespace may not mount unless the namespace that it shows is new too.
_SHOWS = {"proc": ("pid", "/proc"), "sysfs": ("network", "/sys")}


class FileTree:
    """The file tree's steps.

    early: see above.  outside: the root is made outside the namespaces that it will be in, and placed there as a whole.
    rootless: outside of the container's user namespace we could do no more than inside.  hosts: without a mount
    namespace of its own the container's mounts are the host's too, and those of the host stay as they are.
    """

    def __init__(
        self,
        container: ContainerSpec,
        namespaces: Mapping[str, str],
        cgroup_directories: Mapping[str, str],
        notify_socket: str,
        rootless: bool,
    ) -> None:
        self.container, self.namespaces = container, namespaces
        self.linux = container.spec.get("linux") or {}
        self.own_user = "user" in namespaces
        self.outside = (self.own_user and not rootless) or bool(namespaces.get("mount"))
        self.hosts = "mount" not in namespaces
        self.shared = (self.linux.get("rootfsPropagation") or "").endswith("shared")
        self.early = self.outside or self.shared
        path = container.spec["root"]["path"]
        self.root = path if path.startswith("/") else f"{container.bundle}/{path}"
        self._mounts = list(self._translate(cgroup_directories, notify_socket))
        self._devices = [] if self._hosts_dev() else list(self._device_groups())

    def open_steps(self, out: Steps) -> None:
        """The trees that are opened early."""
        if self.outside:
            if self.container.overlay is not None:
                self._overlay_step(out)
            out.add("open_root", "root.path", path=self.root)
        for source, step, args in self._mounts if self.early else ():
            if step == "bind":
                opened = {name: value for name, value in args.items() if name not in ("destination", "follow")}
                out.add("open_bind", source, name=source, **opened)
        for source, nodes in self._devices if self.own_user else ():
            bound = [node for node in nodes if node["type"] != "p"]
            if bound and self.outside and source == "linux.devices":
                nodes = [self._owned_outside(node) for node in bound]
                out.add("prepare_devices", source, nodes=nodes, label=self.linux.get("mountLabel") or "")
            elif bound:
                out.add("open_devices", source, nodes=bound)

    def propagation_step(self, out: Steps) -> None:
        if self.hosts:
            return
        propagation = self.linux.get("rootfsPropagation") or "rslave"
        flags = mounts.PROPAGATION[propagation] | mounts.MS_REC
        if flags & mounts.MS_UNBINDABLE:  # nothing could be bound from there: for now it is private
            flags ^= mounts.MS_UNBINDABLE | mounts.MS_PRIVATE
        out.add("root_propagation", "linux.rootfsPropagation", flags=flags)

    def root_steps(self, out: Steps) -> None:
        if self.outside:
            out.add("place_root", "root.path")
        elif self.container.overlay is not None:
            self._overlay_step(out)
        else:
            out.add("bind_root", "root.path", path=self.root, **({"pivots": False} if self.hosts else {}))

    def mount_steps(self, out: Steps) -> None:
        for source, step, args in self._mounts:
            if step == "bind" and self.early:
                where = {name: args[name] for name in ("destination", "follow") if name in args}
                out.add("attach_bind", source, name=source, **where)
            else:
                out.add(step, source, **args)

    def device_steps(self, out: Steps) -> None:
        for source, nodes in self._devices:
            bound = [node["path"] for node in nodes if node["type"] != "p"] if self.own_user else []
            made = [node for node in nodes if node["path"] not in bound]
            if bound:
                out.add("bind_devices", source, paths=bound)
            if made:
                out.add("make_devices", source, nodes=made)
        if self._devices:
            out.add("link_devices", RULE + "default links in /dev", links=[list(link) for link in DEVICE_LINKS])

    def protect_steps(self, out: Steps) -> None:
        if self.linux.get("readonlyPaths"):
            out.add("read_only_paths", "linux.readonlyPaths", paths=list(self.linux["readonlyPaths"]))
        if self.linux.get("maskedPaths"):
            out.add("mask_paths", "linux.maskedPaths", paths=list(self.linux["maskedPaths"]))

    def enter_steps(self, out: Steps, pivot: bool) -> None:
        if self.container.spec["root"].get("readonly"):
            out.add("read_only_root", "root.readonly")
        if self.hosts or self.namespaces["mount"]:
            out.add("change_root", RULE + "in a mount namespace of others / stays theirs")
        elif pivot:
            out.add("pivot_root", RULE + "the root file system becomes /")
        else:
            out.add("move_root", RULE + "the root file system becomes /, on a ramfs")
        if self.linux.get("rootfsPropagation"):
            flags = mounts.PROPAGATION[self.linux["rootfsPropagation"]]
            out.add("propagate_root", "linux.rootfsPropagation", flags=flags)

    def _overlay_step(self, out: Steps) -> None:
        overlay = self.container.overlay
        assert overlay is not None
        if overlay.mapped:
            out.add("map_layers", "linux.uidMappings, linux.gidMappings", base=overlay.base)
        data = overlay.data(self.linux.get("mountLabel", ""))
        out.add("overlay_root", "root.path", path=self.root, base=overlay.base, data=data, flags=overlay.flags)

    def _translate(
        self, cgroup_directories: Mapping[str, str], notify_socket: str
    ) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(source, step, arguments) of each mount."""
        for index, mount in enumerate(self.container.spec.get("mounts") or ()):
            yield f"mounts[{index}]", *self._mount(mount, cgroup_directories)
        if notify_socket:
            wanted = {"destination": NOTIFY_SOCKET, "source": notify_socket, "type": "bind"}
            yield RULE + "$NOTIFY_SOCKET", *self._mount(wanted, {})

    def _mount(self, mount: Mapping[str, Any], cgroup_directories: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        options = mounts.parse(mount.get("options") or ())
        kind = mount.get("type", "")
        flags = options.flags | (mounts.MS_BIND if kind == "bind" else 0)
        flags |= mounts.MS_BIND | mounts.MS_REC if kind == "rbind" else 0
        common = {
            "destination": specs.normalise(mount["destination"]),
            "propagation": list(options.propagation),
            "tree_set": options.tree_set,
            "tree_clear": options.tree_clear,
        }
        control_groups = kind in ("cgroup", "cgroup2")
        if flags & mounts.MS_REMOUNT:
            return "remount", {**common, "flags": flags & ~mounts.MS_REC, "data": options.data}
        if flags & mounts.MS_BIND:
            return "bind", {**common, **self._bind(mount, mount["source"], flags, options)}
        if control_groups and "" in cgroup_directories and self.namespaces.get("cgroup") != "":
            # Without a cgroup namespace of its own a cgroup2 mount would show every group of the host.
            return "bind", {**common, **self._bind({}, cgroup_directories[""], flags, options)}
        if control_groups and cgroup_directories and "" not in cgroup_directories:
            to_set, to_clear = mounts.attributes(flags, 0)
            # One mount to its reader, it has one below it for each hierarchy: each gets the plain options too.
            return "cgroup_v1", {
                "destination": common["destination"],
                "directories": dict(cgroup_directories),
                "set": to_set & ~options.tree_clear | options.tree_set,
                "clear": to_clear | options.tree_clear,
                "propagation": common["propagation"],
            }
        fstype = "cgroup2" if control_groups else kind
        args = {
            **common,
            "origin": mount.get("source") or fstype,
            "fstype": fstype,
            "flags": flags,
            "data": self._data(options.data, fstype),
            "copy_up": "tmpcopyup" in options.extensions,
        }
        shown, path = _SHOWS.get(fstype, ("", ""))
        if shown and self.own_user and self.namespaces.get(shown) != "":
            args["or_bind"] = path
        return "mount", args

    def _bind(self, mount: Mapping[str, Any], origin: str, flags: int, options: mounts.Options) -> dict[str, Any]:
        to_set, to_clear = mounts.attributes(flags, options.cleared)
        if not origin.startswith("/"):
            origin = f"{self.container.bundle}/{origin}"
        args: dict[str, Any] = {
            "origin": origin,
            "recursive": bool(flags & mounts.MS_REC),
            "set": to_set,
            "clear": to_clear,
        }
        if options.extensions & {"idmap", "ridmap"} or mount.get("uidMappings"):
            args["id_map"] = [id_map(mount.get("uidMappings") or ()), id_map(mount.get("gidMappings") or ())]
            args["map_all"] = "ridmap" in options.extensions
        if options.extensions & {"copy-symlink", "src-nofollow"}:
            args["links"] = "copy" if "copy-symlink" in options.extensions else "mount"
        if "dest-nofollow" in options.extensions:
            args["follow"] = False
        return args

    def _data(self, data: str, fstype: str) -> str:
        label = self.linux.get("mountLabel", "")
        if not label or fstype in _WITHOUT_CONTEXT:
            return data
        return f'{data},context="{label}"'.lstrip(",")

    def _owned_outside(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """With the numbers that the host has for the owner; what has none belongs to the host's root."""
        uid, gid = (
            outside(self.linux.get(field) or (), node[name])
            for field, name in (("uidMappings", "uid"), ("gidMappings", "gid"))
        )
        return {**node, "uid": uid or 0, "gid": gid or 0}

    def _hosts_dev(self) -> bool:
        """Whether a directory of the host is mounted on /dev: that is complete."""
        return any(
            specs.normalise(mount["destination"]) == "/dev"
            and (mount.get("type") in ("bind", "rbind") or {"bind", "rbind"} & set(mount.get("options") or ()))
            for mount in self.container.spec.get("mounts") or ()
        )

    def _device_groups(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(source, nodes): the default devices, and the asked ones."""
        asked = self.linux.get("devices") or ()
        taken = {specs.normalise(device["path"]) for device in asked}
        yield (
            RULE + "default devices",
            [
                {"path": path, "type": "c", "major": major, "minor": minor, "mode": 0o666, "uid": 0, "gid": 0}
                for path, major, minor in DEFAULT_DEVICES
                if path not in taken
            ],
        )
        if asked:
            yield "linux.devices", [_node(device) for device in asked]


def _node(device: Mapping[str, Any]) -> dict[str, Any]:
    mode = device.get("fileMode")
    return {
        "path": specs.normalise(device["path"]),
        "type": device["type"],
        "major": device.get("major", 0),
        "minor": device.get("minor", 0),
        "mode": (mode if mode is not None else 0o666) & 0o7777,
        "uid": device.get("uid") or 0,
        "gid": device.get("gid") or 0,
    }


def outside(mappings: Sequence[Mapping[str, int]], number: int) -> int | None:
    """The host's number of a user or group of a user namespace."""
    for entry in mappings:
        if 0 <= number - entry["containerID"] < entry["size"]:
            return entry["hostID"] + number - entry["containerID"]
    return None


def id_map(mappings: Sequence[Mapping[str, int]]) -> str:
    """As the kernel's uid_map and gid_map want them."""
    return "".join(f"{entry['containerID']} {entry['hostID']} {entry['size']}\n" for entry in mappings)
