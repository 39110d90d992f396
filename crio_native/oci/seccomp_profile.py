"""Seccomp profiles: reading them, checking them, and fitting them to a container.

A profile is JSON in one of two forms.  The *portable* form has rules with conditions (`includes`, `excludes`:
capabilities, architectures, kernel) and an `archMap`; it is what files hold, ours in conf/seccomp.json and an
operator's.  The *plain* form is `linux.seccomp` of the OCI runtime specification, which is also a valid portable
profile.  `resolve` makes the plain form for one container; `seccomp` compiles it.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyseccomp

from crio_native.config.installed import installed
from crio_native.errors import FailedPrecondition, InvalidArgument, NotFound

PROFILE_SIZE_MAX = 1 << 20
RULES_MAX = 2048
NAMES_MAX = 2048
ERRNO_MAX = 4095  # MAX_ERRNO: the kernel cuts larger ones down to it
ACTIONS = {
    "SCMP_ACT_KILL": pyseccomp.KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": pyseccomp.KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": pyseccomp.KILL_PROCESS,
    "SCMP_ACT_TRAP": pyseccomp.TRAP,
    "SCMP_ACT_ERRNO": pyseccomp.ERRNO(0),
    "SCMP_ACT_TRACE": pyseccomp.TRACE(0),
    "SCMP_ACT_ALLOW": pyseccomp.ALLOW,
    "SCMP_ACT_LOG": pyseccomp.LOG,
    "SCMP_ACT_NOTIFY": pyseccomp.NOTIFY,
}
WITH_ERRNO = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
OPERATORS = {
    "SCMP_CMP_NE": pyseccomp.NE,
    "SCMP_CMP_LT": pyseccomp.LT,
    "SCMP_CMP_LE": pyseccomp.LE,
    "SCMP_CMP_EQ": pyseccomp.EQ,
    "SCMP_CMP_GE": pyseccomp.GE,
    "SCMP_CMP_GT": pyseccomp.GT,
    "SCMP_CMP_MASKED_EQ": pyseccomp.MASKED_EQ,
}
ARCHITECTURES = {
    "SCMP_ARCH_X86": pyseccomp.Arch.X86,
    "SCMP_ARCH_X86_64": pyseccomp.Arch.X86_64,
    "SCMP_ARCH_X32": pyseccomp.Arch.X32,
    "SCMP_ARCH_ARM": pyseccomp.Arch.ARM,
    "SCMP_ARCH_AARCH64": pyseccomp.Arch.AARCH64,
    "SCMP_ARCH_MIPS": pyseccomp.Arch.MIPS,
    "SCMP_ARCH_MIPS64": pyseccomp.Arch.MIPS64,
    "SCMP_ARCH_MIPS64N32": pyseccomp.Arch.MIPS64N32,
    "SCMP_ARCH_MIPSEL": pyseccomp.Arch.MIPSEL,
    "SCMP_ARCH_MIPSEL64": pyseccomp.Arch.MIPSEL64,
    "SCMP_ARCH_MIPSEL64N32": pyseccomp.Arch.MIPSEL64N32,
    "SCMP_ARCH_PARISC": pyseccomp.Arch.PARISC,
    "SCMP_ARCH_PARISC64": pyseccomp.Arch.PARISC64,
    "SCMP_ARCH_PPC": pyseccomp.Arch.PPC,
    "SCMP_ARCH_PPC64": pyseccomp.Arch.PPC64,
    "SCMP_ARCH_PPC64LE": pyseccomp.Arch.PPC64LE,
    "SCMP_ARCH_RISCV64": pyseccomp.Arch.RISCV64,
    "SCMP_ARCH_S390": pyseccomp.Arch.S390,
    "SCMP_ARCH_S390X": pyseccomp.Arch.S390X,
}
# uname's machine -> the name in `includes.arches` (Go's), and libseccomp's.
MACHINES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "i686": ("386", "SCMP_ARCH_X86"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
}
# linux/seccomp.h, by the names that the OCI specification gives them.
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1 << 0,
    "SECCOMP_FILTER_FLAG_LOG": 1 << 1,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 1 << 2,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 1 << 5,
}


def default_profile() -> dict[str, Any]:
    """The profile of RuntimeDefault, from conf/seccomp.json."""
    return load_profile(installed("seccomp.json"))


def load_profile(source: str | Path) -> dict[str, Any]:
    """A checked profile, from its text (str) or its file (Path).

    Raises InvalidArgument whose field is the file's path, or "seccomp profile", with the JSON path of the fault;
    NotFound when there is no such file, FailedPrecondition when it cannot be read.
    """
    name = str(source) if isinstance(source, Path) else "seccomp profile"
    text = _read(source) if isinstance(source, Path) else source
    if len(text) > PROFILE_SIZE_MAX:
        raise InvalidArgument(name, len(text), f"must be at most {PROFILE_SIZE_MAX} bytes")
    try:
        profile = json.loads(text)
    except RecursionError:
        raise InvalidArgument(name, f"{len(text)} characters", "is nested too deeply") from None
    except ValueError as error:  # never the text: the path came from a client, who may not read that file
        raise InvalidArgument(name, f"{len(text)} characters", f"is not JSON: {error}") from None
    check_profile(profile, name)
    return dict(profile)


def _read(path: Path) -> str:
    try:
        # O_NONBLOCK: the path may be a FIFO, and must not hold the caller.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(PROFILE_SIZE_MAX + 1).decode()
    except FileNotFoundError:
        raise NotFound("seccomp profile", str(path)) from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(str(path), error.object[error.start : error.end], "is not UTF-8") from None
    except OSError as error:
        raise FailedPrecondition(f"seccomp profile {path} cannot be read: {error.strerror}") from None


def check_profile(profile: Any, where: str) -> None:
    """Refuse what is not a profile of either form.  Raises InvalidArgument; `where` heads the field's path."""
    _Check(where).profile(profile)


class _Check:
    """A walk over a profile that knows where it is."""

    def __init__(self, where: str) -> None:
        self.where = where

    def refuse(self, at: str, value: object, reason: str) -> InvalidArgument:
        return InvalidArgument(f"{self.where}: {at}" if at else self.where, value, reason)

    def profile(self, profile: Any) -> None:
        if not isinstance(profile, Mapping):
            raise self.refuse("", profile, "must be a JSON object")
        if "defaultAction" not in profile:
            raise self.refuse("defaultAction", None, f"must be one of {', '.join(ACTIONS)}")
        self.action(profile, "defaultAction", "", "defaultErrno")
        for index, name in enumerate(self.items(profile, "architectures", "")):
            self.known(name, ARCHITECTURES, f"architectures[{index}]")
        for index, name in enumerate(self.items(profile, "flags", "")):
            self.known(name, FLAGS, f"flags[{index}]")
        for index, entry in enumerate(self.items(profile, "archMap", "")):
            self.arch_map(entry, f"archMap[{index}]")
        for index, rule in enumerate(self.items(profile, "syscalls", "", RULES_MAX)):
            self.rule(rule, f"syscalls[{index}]")
        for key in ("listenerPath", "listenerMetadata"):
            if not isinstance(profile.get(key, ""), str):
                raise self.refuse(key, profile[key], "must be a string")
        if "listenerMetadata" in profile and "listenerPath" not in profile:
            raise self.refuse("listenerMetadata", profile["listenerMetadata"], "must come with listenerPath")

    def arch_map(self, entry: Any, at: str) -> None:
        if not isinstance(entry, Mapping):
            raise self.refuse(at, entry, "must be an object")
        self.known(entry.get("architecture"), ARCHITECTURES, f"{at}.architecture")
        for index, name in enumerate(self.items(entry, "subArchitectures", f"{at}.")):
            self.known(name, ARCHITECTURES, f"{at}.subArchitectures[{index}]")

    def rule(self, rule: Any, at: str) -> None:
        if not isinstance(rule, Mapping):
            raise self.refuse(at, rule, "must be an object")
        names = list(self.items(rule, "names", f"{at}.", NAMES_MAX))
        if not names and not isinstance(rule.get("name"), str):
            raise self.refuse(f"{at}.names", names, "must name at least one system call")
        for index, name in enumerate(names):
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,64}", name):
                raise self.refuse(f"{at}.names[{index}]", name, "must be the name of a system call")
        if "action" not in rule:
            raise self.refuse(f"{at}.action", None, f"must be one of {', '.join(ACTIONS)}")
        self.action(rule, "action", f"{at}.", "errno")
        for index, argument in enumerate(self.items(rule, "args", f"{at}.", 6 * 4)):
            self.argument(argument, f"{at}.args[{index}]")
        for key in ("includes", "excludes"):
            self.condition(rule.get(key) or {}, f"{at}.{key}")

    def action(self, holder: Mapping[str, Any], key: str, at: str, errno_key: str) -> None:
        name = holder[key]
        self.known(name, ACTIONS, f"{at}{key}")
        number, symbol = holder.get(f"{errno_key}Ret"), holder.get(errno_key)
        if number is None and not symbol:
            return
        field = f"{at}{errno_key}Ret" if number is not None else f"{at}{errno_key}"
        if name not in WITH_ERRNO:
            raise self.refuse(field, symbol or number, f"has no meaning with {name}")
        if number is not None and not (_is_integer(number) and 0 <= number <= ERRNO_MAX):
            raise self.refuse(field, number, f"must be an errno from 0 to {ERRNO_MAX}")
        if symbol and not isinstance(getattr(errno, str(symbol), None), int):
            raise self.refuse(f"{at}{errno_key}", symbol, "must be the name of an errno, such as EPERM")

    def argument(self, argument: Any, at: str) -> None:
        if not isinstance(argument, Mapping):
            raise self.refuse(at, argument, "must be an object")
        for key, most in (("index", 5), ("value", 2**64 - 1), ("valueTwo", 2**64 - 1)):
            value = argument.get(key, 0)
            if not _is_integer(value) or not 0 <= value <= most:
                raise self.refuse(f"{at}.{key}", value, f"must be an integer from 0 to {most}")
        for key in ("index", "value"):
            if key not in argument:
                raise self.refuse(f"{at}.{key}", None, "must be given")
        self.known(argument.get("op"), OPERATORS, f"{at}.op")

    def condition(self, condition: Any, at: str) -> None:
        if not isinstance(condition, Mapping):
            raise self.refuse(at, condition, "must be an object")
        for key in ("caps", "arches"):
            for index, name in enumerate(self.items(condition, key, f"{at}.")):
                if not isinstance(name, str):
                    raise self.refuse(f"{at}.{key}[{index}]", name, "must be a string")
        kernel = condition.get("minKernel")
        if kernel is not None and not (isinstance(kernel, str) and re.fullmatch(r"\d{1,3}\.\d{1,3}", kernel)):
            raise self.refuse(f"{at}.minKernel", kernel, 'must be a version such as "5.9"')
        if unknown := set(condition) - {"caps", "arches", "minKernel"}:
            # A condition that is not understood cannot be passed over: the rule may be the one that allows.
            raise self.refuse(f"{at}.{min(unknown)}", condition[min(unknown)], "is not a known condition")

    def items(self, holder: Mapping[str, Any], key: str, at: str, most: int = 256) -> Sequence[Any]:
        value = holder.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise self.refuse(f"{at}{key}", value, "must be a list")
        if len(value) > most:
            raise self.refuse(f"{at}{key}", len(value), f"must have at most {most} members")
        return value

    def known(self, name: Any, table: Mapping[str, int], at: str) -> None:
        if not isinstance(name, str) or name not in table:
            raise self.refuse(at, name, f"must be one of {', '.join(table)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def resolve(
    profile: Mapping[str, Any],
    capabilities: Collection[str],
    arch: str | None = None,
    kernel: str | None = None,
) -> dict[str, Any]:
    """The plain form (OCI `linux.seccomp`) of a checked profile, for a container with these capabilities.

    capabilities: the bounding set, as CAP_NAME.  arch: uname's machine, kernel: uname's release; without them those
    of this host.  Raises InvalidArgument for a machine that no profile can name.
    """
    host = os.uname()
    machine, release = arch or host.machine, kernel or host.release
    if machine not in MACHINES:
        raise InvalidArgument("arch", machine, f"must be one of {', '.join(MACHINES)}")
    plain = {key: profile[key] for key in ("defaultAction", "listenerPath", "listenerMetadata") if key in profile}
    if profile["defaultAction"] in WITH_ERRNO:
        plain["defaultErrnoRet"] = errno_of(profile, "defaultErrno")
    plain["architectures"] = _architectures(profile, MACHINES[machine][1])
    if profile.get("flags"):
        plain["flags"] = list(profile["flags"])
    applies = [
        rule
        for rule in profile.get("syscalls") or ()
        if _applies(rule, set(capabilities), MACHINES[machine][0], _version(release))
    ]
    plain["syscalls"] = [_plain_rule(rule) for rule in applies]
    return plain


def errno_of(holder: Mapping[str, Any], key: str) -> int:
    """Of an action that has one: key is "errno", of a rule, or "defaultErrno"."""
    number = holder.get(f"{key}Ret")
    if number is None:
        return int(getattr(errno, holder.get(key) or "EPERM"))
    return int(number)


def _architectures(profile: Mapping[str, Any], native: str) -> list[str]:
    for entry in profile.get("archMap") or ():
        if entry["architecture"] == native:
            return [native, *(entry.get("subArchitectures") or ())]
    return list(profile.get("architectures") or [native])


def _applies(rule: Mapping[str, Any], capabilities: set[str], arch: str, kernel: tuple[int, ...]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if not set(includes.get("caps") or ()) <= capabilities or set(excludes.get("caps") or ()) & capabilities:
        return False
    if (includes.get("arches") and arch not in includes["arches"]) or arch in (excludes.get("arches") or ()):
        return False
    if includes.get("minKernel") and kernel < _version(includes["minKernel"]):
        return False
    return not (excludes.get("minKernel") and kernel >= _version(excludes["minKernel"]))


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


def _plain_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"names": list(rule.get("names") or [rule["name"]]), "action": rule["action"]}
    if rule["action"] in WITH_ERRNO:
        plain["errnoRet"] = errno_of(rule, "errno")
    if rule.get("args"):
        plain["args"] = [dict(argument) for argument in rule["args"]]
    return plain
