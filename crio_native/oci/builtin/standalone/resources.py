"""update, events and ps: a container's limits, its accounts, its processes."""

from __future__ import annotations

import sys
import time

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.linux.cgroup import files
from crio_native.oci.builtin.standalone import log, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import SimpleNamespace
    from typing import Any

    from crio_native.linux.cgroup import Cgroup
    from crio_native.oci.builtin.standalone.state import State

# Flag -> the field of linux.resources that it sets.
_FIELDS = {
    "blkio_weight": ("blockIO", "weight"),
    "cpu_period": ("cpu", "period"),
    "cpu_quota": ("cpu", "quota"),
    "cpu_burst": ("cpu", "burst"),
    "cpu_share": ("cpu", "shares"),
    "cpu_rt_period": ("cpu", "realtimePeriod"),
    "cpu_rt_runtime": ("cpu", "realtimeRuntime"),
    "cpu_idle": ("cpu", "idle"),
    "cpuset_cpus": ("cpu", "cpus"),
    "cpuset_mems": ("cpu", "mems"),
    "memory": ("memory", "limit"),
    "memory_reservation": ("memory", "reservation"),
    "memory_swap": ("memory", "swap"),
    "kernel_memory": ("memory", "kernel"),
    "kernel_memory_tcp": ("memory", "kernelTCP"),
    "pids_limit": ("pids", "limit"),
}
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def update(options: SimpleNamespace) -> int:
    """Change limits of a live container; fields that are not given stay as they are.  Raises FailedPrecondition."""
    found = state.load(options.root, options.arguments[0])
    if found.status() == "stopped":
        raise FailedPrecondition(f"container not running: {found.id!r} has stopped")
    wanted = _from_file(options.resources) if options.resources else _from_flags(options)
    schemata = {"l3CacheSchema": options.l3_cache_schema, "memBwSchema": options.mem_bw_schema}
    if any(schemata.values()):
        _update_resctrl(found, {name: schema for name, schema in schemata.items() if schema})
    cgroup = _cgroup(found)
    for warning in cgroup.apply(wanted):
        log.warning(f"container {found.id}: {warning}")
    if wanted.get("devices"):
        from crio_native.oci.builtin.plan import DEFAULT_DEVICE_RULES

        cgroup.apply_devices([*wanted["devices"], *DEFAULT_DEVICE_RULES])
    _keep(found, wanted)
    return 0


def asked(found: State) -> dict[str, Any]:
    """What the container is to be by now: its config.json with the group that it was given, and with the limits that
    `update` has given it since."""
    config = found.config()
    linux = dict(config.get("linux") or {})
    if found.record["cgroupManager"] != "disabled":
        linux["cgroupsPath"] = found.record["cgroupsPath"]
    if updates := _updates(found):
        linux["resources"] = _updated(linux.get("resources") or {}, updates)
    return {**config, "linux": linux}


def _updates(found: State) -> dict[str, Any]:
    """All that `update` has changed, as one `linux.resources` object."""
    try:
        return state.read_json(found.path(state.UPDATES))
    except FileNotFoundError:
        return {}


def _keep(found: State, wanted: Mapping[str, Any]) -> None:
    """Record an update; in a file of its own, for state.json may be that of a `create` which is still at work."""
    said = dict(wanted)
    # In most fields a 0 changes nothing.
    for section, zeros in {"memory": ("swappiness",), "cpu": ("burst", "idle")}.items():
        said[section] = {name: value for name, value in (wanted.get(section) or {}).items() if value or name in zeros}
    if said["memory"].get("limit") == -1:  # which takes the limit on both together away
        said["memory"].setdefault("swap", -1)
    found.replace(state.UPDATES, _updated(_updates(found), said))


def _updated(resources: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """A `linux.resources` object with the fields that another has.  An entry of a list takes the place of the one for
    the same device or page size; device rules are replaced as a whole, as the kernel's are."""
    merged = dict(resources)
    for name, value in update.items():
        old = merged.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[name] = _updated(old, value)
        elif isinstance(value, list) and isinstance(old, list) and name != "devices":
            about = [_subject(entry) for entry in value]
            merged[name] = [*(entry for entry in old if _subject(entry) not in about), *value]
        elif value is not None:
            merged[name] = value
    return merged


def _subject(entry: Any) -> Any:
    """What a limit in a list is about: the device, the page size."""
    if not isinstance(entry, dict):
        return entry
    return {name: value for name, value in entry.items() if name not in ("rate", "weight", "leafWeight", "limit")}


def _update_resctrl(found: State, schemata: dict[str, str]) -> None:
    """New lines for the group that the container has of its own.  Raises FailedPrecondition where it has none."""
    from crio_native.linux import resctrl

    own = found.record.get("intelRdt") or {}
    root = resctrl.mount_point()
    if not root or not own or own.get("closID"):
        raise FailedPrecondition(f"container {found.id!r} has no Intel RDT group of its own to change")
    for line in schemata.values():
        files.write(f"{root}/{found.id}/schemata", line + "\n")


def _from_file(path: str) -> dict[str, Any]:
    if path != "-":
        return state.read_foreign_json(path, "linux.resources")
    with open(0, "rb", closefd=False) as file:
        return state.foreign_json(file.read(state.MAX_CONFIG + 1), "--resources -", "linux.resources")


def _from_flags(options: SimpleNamespace) -> dict[str, Any]:
    wanted: dict[str, dict[str, Any]] = {}
    for flag, (section, field) in _FIELDS.items():
        value = getattr(options, flag)
        if value is not None and value != "":
            text_field = field in ("cpus", "mems")
            number = value if text_field or isinstance(value, int) else _bytes(f"--{flag.replace('_', '-')}", value)
            wanted.setdefault(section, {})[field] = number
    return wanted


def _bytes(flag: str, text: str) -> int:
    """Bytes, also as 64k, 32m, 1g; -1 for no limit."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    if not number.removeprefix("-").isdecimal() or unit not in _UNITS:
        raise InvalidArgument(flag, text, "must be a number of bytes, or one like 64m")
    return int(number) * _UNITS[unit]


def ps(options: SimpleNamespace) -> int:
    """The container's processes, by the host's pids: a table from ps(1), or the pids as JSON."""
    found = state.load(options.root, options.arguments[0])
    if options.format not in ("", "table", "json"):
        raise InvalidArgument("--format", options.format, "must be table or json")
    pids = _cgroup(found).processes()
    if options.format == "json":
        import json

        sys.stdout.write(json.dumps(pids) + "\n")
        return 0
    sys.stdout.write(_table_of(pids, options.arguments[1:] or ["-ef"]))
    return 0


def _table_of(pids: list[int], arguments: list[str]) -> str:
    """Those lines of ps(1) whose PID column has one of the pids."""
    import subprocess

    try:
        listed = subprocess.run(["ps", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        raise FailedPrecondition("this host has no program `ps`: use --format json") from None
    if listed.returncode:
        raise InvalidArgument("ps options", arguments, listed.stderr.strip() or f"ps ended with {listed.returncode}")
    title, *lines = listed.stdout.splitlines() or [""]
    if "PID" not in title.split():
        raise InvalidArgument("ps options", arguments, "the table has no column PID")
    column = title.split().index("PID")
    known = {str(pid) for pid in pids}
    return "\n".join([title, *(line for line in lines if line.split()[column : column + 1][0] in known)]) + "\n"


def events(options: SimpleNamespace) -> int:
    """JSON lines: statistics once (--stats) or at every interval, and each OOM kill, until the container ends.  Raises
    FailedPrecondition."""
    found = state.load(options.root, options.arguments[0])
    if found.status() == "stopped":
        raise FailedPrecondition(f"container not running: {found.id!r} has stopped")
    cgroup = _cgroup(found)
    interval = _seconds(options.interval or "5s")
    killed = cgroup.events().get("oom_kill", 0)
    while True:
        _event("stats", found.id, statistics(cgroup))
        if options.stats:
            return 0
        until = time.monotonic() + interval
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            now = cgroup.events().get("oom_kill", 0)
            if now > killed:
                _event("oom", found.id, None)
            killed = now
            if not found.alive():
                return 0


def _seconds(text: str) -> float:
    """A duration in Go's form: 500ms, 5s, 1m."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdecimal() and 0 < float(number) * factor < 1e6:
            return float(number) * factor
    raise InvalidArgument("--interval", text, "must be a time like 500ms, 5s or 1m, and more than nothing")


def _event(kind: str, container: str, data: object) -> None:
    import json

    event = {"type": kind, "id": container} | ({"data": data} if data is not None else {})
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def statistics(cgroup: Cgroup) -> dict[str, Any]:
    """A reading of the accounts in the form that runc's `events` has; ns and bytes."""
    from crio_native.linux.cgroup import hierarchy, stats

    host, path = hierarchy(), cgroup.path
    found = cgroup.stats()
    extra = found["extra"]
    cpu, memory = extra.get("cpu") or {}, extra.get("memory") or {}
    return {
        "cpu": {
            "usage": {
                "total": found.get("cpu_usage") or 0,
                "kernel": cpu.get("system", 0),
                "user": cpu.get("user", 0),
            },
            "throttling": {
                "periods": cpu.get("periods", 0),
                "throttledPeriods": cpu.get("throttled_periods", 0),
                "throttledTime": cpu.get("throttled_time", 0),
            },
        },
        "memory": {
            "cache": memory.get("cache", memory.get("file", 0)),
            **stats.memory_counters(host, path),
            "raw": memory,
        },
        "pids": {"current": found.get("pids") or 0, "limit": extra.get("pids_limit") or 0},
        "blkio": {"ioServiceBytesRecursive": _block_io(extra.get("io") or [])},
        "hugetlb": stats.huge_pages(host, path),
        "cpuset": stats.cpuset(host, path),
    }


def _block_io(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for device in devices:
        major, _, minor = str(device["device"]).partition(":")
        for name, operation in (("rbytes", "Read"), ("wbytes", "Write")):
            if name in device:
                entries.append({"major": int(major), "minor": int(minor), "op": operation, "value": device[name]})
    return entries


def _cgroup(found: State) -> Cgroup:
    cgroup = found.cgroup
    if cgroup is None:
        raise FailedPrecondition(f"container {found.id!r} was made without a cgroup")
    return cgroup
