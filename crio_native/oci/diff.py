"""What isolates two containers differently, in the words of whoever answers for it.

A config.json becomes facts: each has a key (what it is about), a weight and a predicate ("keeps CAP_NET_RAW").  Two
configs differ where their facts do; what belongs to a thing that only one of them has is told with that thing.  Only
what isolates is looked at: not the command, its environment, nor where the root file system is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crio_native.linux import mounts, namespaces
from crio_native.linux.cgroup import devices
from crio_native.oci import seccomp_profile
from crio_native.oci import spec as specs
from crio_native.oci.calls import device_rule

Key = tuple[str, ...]
Spec = Mapping[str, Any]

# Weights: what gives the host away, what gives neighbours away, what limits, the rest.
ESCAPE, REACH, CONTAIN, LIMIT, MINOR = 100, 80, 60, 40, 20
HEAVY_CAPABILITIES = frozenset(
    "CAP_SYS_ADMIN CAP_SYS_MODULE CAP_SYS_PTRACE CAP_SYS_RAWIO CAP_DAC_READ_SEARCH CAP_BPF CAP_MKNOD CAP_SYS_BOOT "
    "CAP_NET_ADMIN CAP_MAC_ADMIN CAP_MAC_OVERRIDE CAP_PERFMON CAP_SYSLOG CAP_CHECKPOINT_RESTORE".split()
)
NAMESPACE_WEIGHT = {"mount": ESCAPE, "pid": ESCAPE, "network": REACH, "ipc": REACH, "cgroup": CONTAIN}
SENSITIVE_PATHS = frozenset(
    "/proc/sys /proc/sysrq-trigger /proc/kcore /proc/irq /proc/bus /proc/keys /proc/acpi /proc/timer_list /proc/scsi "
    "/sys /sys/firmware".split()
)
SECCOMP_FIELDS = {"defaultAction": REACH, "defaultErrnoRet": MINOR, "architectures": LIMIT, "flags": MINOR}
SECCOMP_FIELDS |= {"listenerPath": MINOR, "listenerMetadata": MINOR}
OWN = "'s"  # the beginning of a predicate about something that the container has: "'s /proc/sys is writable"
DENIALS = {"is": "is not", "can": "cannot", "may": "may not"}  # of predicates that begin so; of others "does not"
PERMITTING = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG")
LIMIT_WORDS = {
    "memory.limit": "bytes of memory",
    "memory.swap": "bytes of memory and swap",
    "pids.limit": "processes",
    "cpu.quota": "microseconds of CPU in a period",
    "cpu.shares": "CPU shares",
}
MOUNT_FLAGS = (
    (mounts.MS_NOSUID, "nosuid", "honours set-user-id programs on", CONTAIN),
    (mounts.MS_NODEV, "nodev", "honours device files on", CONTAIN),
    (mounts.MS_NOEXEC, "noexec", "executes programs on", LIMIT),
    (mounts.MS_NOSYMFOLLOW, "nosymfollow", "follows symbolic links on", LIMIT),
)
# Fields of `linux` and `process` that facts are made of, or that do not isolate; any other is compared as it stands.
KNOWN = {
    "linux": "namespaces resources devices seccomp maskedPaths readonlyPaths sysctl cgroupsPath rootfsPropagation "
    "uidMappings gidMappings mountLabel".split(),
    "process": "args env cwd terminal consoleSize commandLine user capabilities noNewPrivileges apparmorProfile "
    "selinuxLabel rlimits oomScoreAdj".split(),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """weight: 0..100.  topic: what it is about.  text: a sentence with "A" and "B" for the two."""

    weight: int
    topic: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "topic": self.topic, "text": self.text}

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is true of a config; a key of several words belongs to the thing that its first words name."""

    key: Key
    weight: int
    predicate: str


def diff(a: Spec, b: Spec) -> list[Difference]:
    """What isolates the containers of two configs differently, the weightiest first; [] when nothing does.

    Raises InvalidArgument for a config that the executor would refuse.
    """
    for spec in (a, b):
        _check(spec)
    left, right = ({fact.key: fact for fact in facts(spec)} for spec in (a, b))
    found = []
    for key in dict.fromkeys([*left, *right]):
        one, other = left.get(key), right.get(key)
        if (key[:1] in left) != (key[:1] in right) and len(key) > 1:
            continue  # told with the thing that it belongs to
        if one and other and one.predicate != other.predicate:
            text = f"{_said('B', other)}; {_said('A', one)}"
        elif one and not other:
            text = f"{_said('A', one)}; {_denied('B', one)}"
        elif other and not one:
            text = f"{_said('B', other)}; {_denied('A', other)}"
        else:
            continue
        weight = max(fact.weight for fact in (one, other) if fact)
        found.append(Difference(weight, " ".join(key), text))
    found += _seccomp(_profile(a), _profile(b))
    return sorted(found, key=lambda difference: -difference.weight)


def _check(spec: Spec) -> None:
    """What the executor checks of a config, some of it only when it comes to use it."""
    specs.validate(spec)
    linux = spec.get("linux") or {}
    if linux.get("seccomp"):
        seccomp_profile.check_profile(linux["seccomp"], "linux.seccomp")
    devices.parse((linux.get("resources") or {}).get("devices") or ())


def _said(who: str, fact: Fact) -> str:
    return f"{who}{'' if fact.predicate.startswith(OWN) else ' '}{fact.predicate}"


def _denied(who: str, fact: Fact) -> str:
    if fact.predicate.startswith(OWN):
        return f"{who}{OWN} is not"
    return f"{who} {DENIALS.get(fact.predicate.split()[0], 'does not')}"


def facts(spec: Spec) -> Iterator[Fact]:
    """All that isolates, of one valid config; the keys are unique."""
    linux, process = spec.get("linux") or {}, spec["process"]
    yield from _namespaces(spec)
    yield from _mappings(linux)
    yield from _capabilities(process.get("capabilities") or {})
    yield from _privileges(process, linux)
    yield from _paths(spec)
    yield from _mounts(spec)
    yield from _devices(linux)
    yield from _limits(process, linux)
    yield from _hooks(spec.get("hooks") or {})
    if specs.keeps_groups(spec):
        yield Fact(("caller's groups",), CONTAIN, "keeps the supplementary groups of whoever runs it")
    for section, known in KNOWN.items():
        for name, value in (spec.get(section) or {}).items():
            if name not in known and value not in (None, "", [], {}):
                yield Fact((f"{section}.{name}",), MINOR, f"has {section}.{name} {_short(value)}")


def _namespaces(spec: Spec) -> Iterator[Fact]:
    paths = specs.namespace_paths(spec)
    for kind in namespaces.FILE:
        path = paths.get(kind)
        words = (
            f"shares the host's {kind} namespace"
            if path is None
            else f"joins the {kind} namespace of {path}"
            if path
            else f"has a {kind} namespace of its own"
        )
        yield Fact((f"{kind} namespace",), NAMESPACE_WEIGHT.get(kind, CONTAIN), words)


def _mappings(linux: Spec) -> Iterator[Fact]:
    for what, field in (("user", "uidMappings"), ("group", "gidMappings")):
        for entry in linux.get(field) or ():
            weight = ESCAPE if entry["hostID"] == 0 else CONTAIN
            yield Fact((f"{what} mapping {entry['containerID']}",), weight, f"maps {what}s {_span(entry)}")


def _span(entry: Mapping[str, int]) -> str:
    first = entry["containerID"]
    return f"{first} to {first + entry['size'] - 1} to the host's {entry['hostID']} and up"


def _capabilities(sets: Spec) -> Iterator[Fact]:
    held = {*(sets.get("effective") or ()), *(sets.get("permitted") or ())}
    for name in sorted(held):
        yield Fact((name,), ESCAPE if name in HEAVY_CAPABILITIES else REACH, f"keeps {name}")
    for name in sorted({*(sets.get("bounding") or ())} - held):
        yield Fact((name, "bounding"), CONTAIN, f"can gain {name} by executing a file that has it")
    for name in sets.get("inheritable") or ():
        yield Fact((f"inheritable {name}",), CONTAIN, f"passes {name} on to files that inherit it")
    for name in sets.get("ambient") or ():
        yield Fact((f"ambient {name}",), CONTAIN, f"passes {name} on to every program that it executes")


def _privileges(process: Spec, linux: Spec) -> Iterator[Fact]:
    user = process.get("user") or {}
    uid, gid = user.get("uid", 0), user.get("gid", 0)
    yield Fact(("user",), CONTAIN, f"runs as {'root' if uid == 0 else f'user {uid}'}")
    yield Fact(("group",), LIMIT, f"runs with group {gid}")
    for group in sorted({*(user.get("additionalGids") or ())}):
        yield Fact((f"group {group}",), LIMIT, f"belongs to group {group}")
    if user.get("umask") is not None:
        yield Fact(("umask",), MINOR, f"makes files with umask {user['umask']:#o}")
    refuses = process.get("noNewPrivileges")
    words = "cannot gain privileges by execve (no_new_privs)" if refuses else "can gain privileges by execve"
    yield Fact(("no_new_privs",), REACH, words)
    for module, label in (("AppArmor", process.get("apparmorProfile")), ("SELinux", process.get("selinuxLabel"))):
        words = f"runs under the {module} label {label}" if label else f"has no {module} label"
        yield Fact((module,), REACH, words)
    if linux.get("mountLabel"):
        yield Fact(("mount label",), CONTAIN, f"labels its files {linux['mountLabel']}")
    words = "has a seccomp filter" if linux.get("seccomp") else "has no seccomp filter"
    yield Fact(("seccomp filter",), ESCAPE, words)


def _profile(spec: Spec) -> Mapping[str, Any]:
    profile: Mapping[str, Any] = (spec.get("linux") or {}).get("seccomp") or {}
    return profile


def _seccomp(a: Spec, b: Spec) -> Iterator[Difference]:
    """Two filters; many system calls make one sentence.  That one side has none has been said already."""
    if not a or not b:
        return
    for name, weight in SECCOMP_FIELDS.items():
        if (one_ := a.get(name) or None) != (other_ := b.get(name) or None):
            text = f"B has the seccomp {name} {_short(other_)}; A has {_short(one_)}"
            yield Difference(weight, f"seccomp {name}", text)
    one, other = _verdicts(a), _verdicts(b)
    changed = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    groups: dict[str, list[str]] = {}
    for name in sorted(changed):
        permitted = [
            any(rule[0] in PERMITTING for rule in table.get(name) or [(profile["defaultAction"],)])
            for table, profile in ((one, a), (other, b))
        ]
        who = "B permits" if permitted == [False, True] else "A permits" if permitted == [True, False] else "both treat"
        groups.setdefault(who, []).append(name)
    for who, names in groups.items():
        many = "system call" + ("s" if len(names) > 1 else "")
        listed = ", ".join(names)
        if who == "both treat":
            yield Difference(LIMIT, "system calls", f"A and B treat the {many} {listed} by different rules")
        else:
            refuses = "A" if who.startswith("B") else "B"
            yield Difference(REACH, "system calls", f"{who} the {many} {listed}; {refuses} does not")


def _verdicts(profile: Spec) -> dict[str, list[tuple[Any, ...]]]:
    """System call -> its rules: (action, errno, arguments)."""
    table: dict[str, list[tuple[Any, ...]]] = {}
    for rule in profile.get("syscalls") or ():
        verdict = (rule["action"], rule.get("errnoRet"), json.dumps(rule.get("args") or [], sort_keys=True))
        for name in rule.get("names") or [rule["name"]]:
            table.setdefault(name, []).append(verdict)
    return {name: sorted(rules, key=str) for name, rules in table.items()}


def _paths(spec: Spec) -> Iterator[Fact]:
    """How the paths that kernels let root misuse look from inside."""
    linux = spec.get("linux") or {}
    hidden = {specs.normalise(path) for path in linux.get("maskedPaths") or ()}
    read_only = {specs.normalise(path) for path in linux.get("readonlyPaths") or ()}
    read_only |= {
        specs.normalise(mount["destination"])
        for mount in spec.get("mounts") or ()
        if _read_only(mounts.parse(mount.get("options") or ())) and mount.get("type") in ("proc", "sysfs")
    }
    for path in sorted({*SENSITIVE_PATHS, *hidden, *read_only}):
        if _covered(path, hidden):
            words = f"{OWN} {path} is masked"
        elif _covered(path, read_only):
            words = f"{OWN} {path} is read-only"
        else:
            words = f"{OWN} {path} is writable"
        yield Fact((path,), ESCAPE if path in SENSITIVE_PATHS else CONTAIN, words)
    writable = not (spec["root"].get("readonly") or False)
    yield Fact(("root",), CONTAIN, "may write to its root file system" if writable else "has a read-only root")
    if propagation := linux.get("rootfsPropagation"):
        weight = ESCAPE if "shared" in propagation else LIMIT
        yield Fact(("propagation of /",), weight, f"has the mount propagation {propagation} on its root")


def _covered(path: str, tops: set[str]) -> bool:
    return any(path == top or path.startswith(top.rstrip("/") + "/") for top in tops)


def _read_only(options: mounts.Options) -> bool:
    return bool(options.top_flags & mounts.MS_RDONLY)


def _mounts(spec: Spec) -> Iterator[Fact]:
    seen: dict[str, int] = {}
    for mount in spec.get("mounts") or ():
        target = specs.normalise(mount["destination"])
        seen[target] = count = seen.get(target, 0) + 1
        key = f"mount {target}" + (f" ({count})" if count > 1 else "")
        options = mounts.parse(mount.get("options") or ())
        flags, kind = options.top_flags, mount.get("type", "")
        read_only = _read_only(options)
        if flags & mounts.MS_BIND or kind in ("bind", "rbind"):
            source = mount.get("source", "")
            may = "may read" if read_only else "may write to"
            yield Fact((key,), CONTAIN if read_only else REACH, f"{may} {target} from the host's {source}")
        else:
            yield Fact((key,), LIMIT, f"has a {'read-only' if read_only else 'writable'} {kind} on {target}")
            if options.data:
                yield Fact((key, "options"), MINOR, f"mounts {target} with {options.data}")
        for flag, name, words, weight in MOUNT_FLAGS:
            if flags & flag:
                yield Fact((key, name), weight, f"mounts {target} {name}")
            else:
                yield Fact((key, name), weight, f"{words} {target}")
        for kind_ in options.propagation[-1:]:
            words = mounts.flag_names(kind_).lower().replace("ms_", "")
            weight = ESCAPE if kind_ & mounts.MS_SHARED else LIMIT
            yield Fact((f"propagation of {target}",), weight, f"has the mount propagation {words} on {target}")
        if flags & mounts.MS_REC or kind == "rbind":
            yield from _below(key, target, options)
        for name in sorted(options.extensions - {"idmap", "ridmap"}):
            yield Fact((key, "extension", name), LIMIT, f"mounts {target} with {name}")
        if options.extensions & {"idmap", "ridmap"} or mount.get("uidMappings"):
            yield Fact((key, "owners"), CONTAIN, _owners(target, mount, "ridmap" in options.extensions))


def _below(key: str, target: str, options: mounts.Options) -> Iterator[Fact]:
    """The mounts that come with a recursive bind: as on the host, but for what is asked for the whole tree."""
    for flag, name, words, weight in ((mounts.MS_RDONLY, "read-only", "may write to", REACH), *MOUNT_FLAGS):
        if options.tree_flags & flag:
            yield Fact((key, "below", name), weight, f"mounts all below {target} {name}")
        elif options.tree_cleared & flag:
            yield Fact((key, "below", name), weight, f"{words} all below {target}, even where the host is {name}")


def _owners(target: str, mount: Spec, below: bool) -> str:
    what = f"maps the owners of {target}{' and all below' if below else ''}"
    maps = [", ".join(_span(entry) for entry in mount.get(name) or ()) for name in ("uidMappings", "gidMappings")]
    if not maps[0]:
        return f"{what} as its user namespace does"
    if maps[0] == maps[1]:
        return f"{what}: users and groups {maps[0]}"
    return f"{what}: users {maps[0]}; groups {maps[1]}"


def _devices(linux: Spec) -> Iterator[Fact]:
    for device in linux.get("devices") or ():
        path = specs.normalise(device["path"])
        number = f" ({device['type']} {device.get('major', 0)}:{device.get('minor', 0)})"
        yield Fact((f"device {path}",), REACH, f"has the device {path}{number}")
        owner = f"{device.get('uid') or 0}:{device.get('gid') or 0}"
        mode = f"{device.get('fileMode') or 0o666:o}"
        yield Fact((f"device {path}", "mode"), LIMIT, f"has {path} with mode {mode} and owner {owner}")
    rules = (linux.get("resources") or {}).get("devices") or ()
    if not rules:
        yield Fact(("device rules",), REACH, "has no rules for devices")
        return
    # One fact for all: rules override each other, so that their order means something too.
    words = ", ".join(f"{'allow' if rule.get('allow') else 'deny'} {device_rule(rule)}" for rule in rules)
    weight = ESCAPE if rules[-1].get("allow") and device_rule(rules[-1]).startswith("a *:*") else REACH
    yield Fact(("device rules",), weight, f"has the device rules {words}")


def _limits(process: Spec, linux: Spec) -> Iterator[Fact]:
    for name, value in _leaves({k: v for k, v in (linux.get("resources") or {}).items() if k != "devices"}):
        unlimited = value in (-1, "max", 0, None)
        what = LIMIT_WORDS.get(name)
        if unlimited and what:
            continue
        words = f"is limited to {value} {what}" if what else f"sets {name} to {_short(value)}"
        yield Fact((name,), LIMIT, words)
    for limit in process.get("rlimits") or ():
        words = f"limits {limit['type']} to {limit['soft']}, at most {limit['hard']}"
        yield Fact((limit["type"],), LIMIT, words)
    for name, value in (linux.get("sysctl") or {}).items():
        yield Fact((f"sysctl {name}",), LIMIT, f"sets the sysctl {name} to {value}")
    if process.get("oomScoreAdj") is not None:
        yield Fact(("oom_score_adj",), MINOR, f"has oom_score_adj {process['oomScoreAdj']}")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif value not in (None, [], ()):
        yield path, value


def _hooks(hooks: Spec) -> Iterator[Fact]:
    for moment in specs.HOOKS:
        for index, hook in enumerate(hooks.get(moment) or ()):
            words = f"has {hook.get('path')} run on the host at {moment}"
            yield Fact((f"hook {moment} {index}",), REACH, words)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "..."
