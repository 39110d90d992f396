"""list, spec and features: what there is, and what could be."""

from __future__ import annotations

import os
import sys

from crio_native.errors import AlreadyExists, CrioError, InvalidArgument
from crio_native.oci.builtin.standalone import log, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import SimpleNamespace
    from typing import Any

OCI_VERSION = "1.3.0"
_COLUMNS = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")


def list_(options: SimpleNamespace) -> int:
    """Every container below --root."""
    if options.format not in ("", "table", "json"):
        raise InvalidArgument("--format", options.format, "must be table or json")
    states = list(_states(options.root))
    if options.quiet:
        sys.stdout.write("".join(f"{entry['id']}\n" for entry in states))
    elif options.format == "json":
        import json

        sys.stdout.write(json.dumps(states) + "\n")
    else:
        rows = [_COLUMNS, *(tuple(str(entry[name.lower()]) for name in _COLUMNS) for entry in states)]
        sys.stdout.write(table(rows))
    return 0


def _states(root: str) -> Iterator[dict[str, Any]]:
    """One container that is damaged must not hide the others from who asks for all."""
    for name in state.ids(root):
        try:
            yield state.load(root, name).oci()
        except state.DoesNotExist:
            continue
        except CrioError as error:
            log.warning(str(error))


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; the last as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("   ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(line + "\n" for line in lines)


def features(_options: SimpleNamespace) -> int:
    """What is really there, in the form of the specification's features.md."""
    import json

    from crio_native.oci.features import features as found

    sys.stdout.write(json.dumps(found(), indent=2) + "\n")
    return 0


def spec(options: SimpleNamespace) -> int:
    """Write config.json into the bundle; never over another."""
    import json

    path = os.path.join(options.bundle or ".", "config.json")
    content = json.dumps(_rootless(_example()) if options.rootless else _example(), indent="\t") + "\n"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w") as file:
            file.write(content)
    except FileExistsError:
        raise AlreadyExists(f"{path} exists: remove it first") from None
    except OSError as error:
        raise InvalidArgument("--bundle", path, f"cannot be written: {os.strerror(error.errno or 0).lower()}") from None
    return 0


def _example() -> dict[str, Any]:
    """A shell on a terminal, isolated as runc's starting point is."""
    capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    quiet = ["nosuid", "noexec", "nodev"]
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "crio-oci",
        "mounts": [
            _mount("/proc", "proc", "proc"),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "devpts", *terminals),
            _mount("/dev/shm", "tmpfs", "shm", *quiet, "mode=1777", "size=65536k"),
            _mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
            _mount("/sys", "sysfs", "sysfs", *quiet, "ro"),
            _mount("/sys/fs/cgroup", "cgroup", "cgroup", *quiet, "relatime", "ro"),
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": [
                "/proc/acpi",
                "/proc/asound",
                "/proc/kcore",
                "/proc/keys",
                "/proc/latency_stats",
                "/proc/timer_list",
                "/proc/timer_stats",
                "/proc/sched_debug",
                "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    mount: dict[str, Any] = {"destination": destination, "type": kind, "source": source}
    return mount | {"options": list(options)} if options else mount


def _rootless(config: dict[str, Any]) -> dict[str, Any]:
    """For the caller's own numbers alone: one user in a namespace of its own, the host's network, no cgroup limits."""
    linux = config["linux"]
    linux.pop("resources")
    linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != "network"] + [{"type": "user"}]
    linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    for mount in config["mounts"]:
        mount["options"] = [option for option in mount.get("options", ()) if not option.startswith("gid=")]
    bound = {"type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]}
    config["mounts"] = [
        {**mount, **bound} if mount["destination"] == "/sys" else mount
        for mount in config["mounts"]
        if mount["destination"] != "/sys/fs/cgroup"
    ]
    return config
