"""Seccomp profiles compiled to BPF: the bytes that a container's init loads by seccomp(2), which is not done here.

Profiles are read and fitted to a container by `seccomp_profile`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyseccomp
from cachetools import LRUCache, cached

from crio_native.errors import FailedPrecondition, InvalidArgument
from crio_native.oci import seccomp_profile as profiles

NO_SUCH_SYSCALL = -1  # __NR_SCMP_ERROR; other negative numbers are calls of other architectures
BPF_MAXINSNS = 4096  # linux/bpf_common.h
_NEW_LISTENER, _TSYNC_ESRCH = 1 << 3, 1 << 4  # the kernel wants the second where the first meets TSYNC


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a container's init loads.

    bpf: an array of struct sock_filter.  flags: for seccomp(SECCOMP_SET_MODE_FILTER).  notify: a rule hands system
    calls to a listener, so loading it (flags has SECCOMP_FILTER_FLAG_NEW_LISTENER) gives a descriptor to pass on.
    """

    bpf: bytes
    flags: int
    notify: bool


def knows(name: str) -> bool:
    """Whether libseccomp knows a system call of this name, on any architecture."""
    return bool(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != NO_SUCH_SYSCALL)


class Shared(dict[str, Any]):
    """A `linux.seccomp` object with its program; whoever has an equal one has this (see `share`)."""

    def __init__(self, profile: Mapping[str, Any], compiled: Compiled) -> None:
        super().__init__(profile)
        self.compiled = compiled


def share(linux_seccomp: Mapping[str, Any]) -> Shared:
    """For an object that is to be compiled again and again, or is held by many.  Raises as `compile` does."""
    return _share_text(_text(linux_seccomp))


def compile(linux_seccomp: Mapping[str, Any]) -> Compiled:
    """The BPF program of a `linux.seccomp` object.

    System calls that libseccomp does not know are passed over, as the OCI specification asks.  Raises InvalidArgument
    for a profile that is wrong, contradicts itself or is too long; FailedPrecondition when libseccomp lacks an action.
    The result is kept by the profile's hash: compiling takes milliseconds, and most containers share one profile.
    (The architecture and libseccomp's version also decide it, but do not change while this process lives.)
    """
    if isinstance(linux_seccomp, Shared):
        return linux_seccomp.compiled
    return _compile_text(_text(linux_seccomp))


def _text(linux_seccomp: Mapping[str, Any]) -> str:
    return json.dumps(linux_seccomp, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@cached(LRUCache(maxsize=64), key=_digest, lock=threading.Lock())
def _share_text(text: str) -> Shared:
    return Shared(json.loads(text), _compile_text(text))


@cached(LRUCache(maxsize=64), key=_digest, condition=threading.Condition())
def _compile_text(text: str) -> Compiled:
    profile = json.loads(text)
    profiles.check_profile(profile, "linux.seccomp")
    default = _action(profile["defaultAction"], profiles.errno_of(profile, "defaultErrno"))
    try:
        program = pyseccomp.SyscallFilter(default)
        _add_architectures(program, profile)
        notify = default == pyseccomp.NOTIFY
        for index, rule in enumerate(profile.get("syscalls") or ()):
            notify |= _add_rule(program, rule, default, f"linux.seccomp: syscalls[{index}]")
    except OSError as error:
        # seccomp_init and the attributes: this libseccomp knows the action not at all.
        raise FailedPrecondition(f"libseccomp refuses the profile's default action: {error.strerror}") from None
    flags = 0
    for flag in profile.get("flags") or ():
        flags |= profiles.FLAGS[flag]
    if notify:
        flags |= _NEW_LISTENER | (_TSYNC_ESRCH if flags & profiles.FLAGS["SECCOMP_FILTER_FLAG_TSYNC"] else 0)
    return Compiled(_export(program, profile, default), flags, notify)


def _action(name: str, number: int) -> int:
    return int(profiles.ACTIONS[name] | (number if name in profiles.WITH_ERRNO else 0))


def _add_architectures(program: pyseccomp.SyscallFilter, profile: Mapping[str, Any]) -> None:
    native = pyseccomp.system_arch()
    for name in profile.get("architectures") or ():
        if profiles.ARCHITECTURES[name] != native:
            program.add_arch(profiles.ARCHITECTURES[name])


def _add_rule(program: pyseccomp.SyscallFilter, rule: Mapping[str, Any], default: int, where: str) -> bool:
    """Whether the rule hands system calls to a listener."""
    action = _action(rule["action"], profiles.errno_of(rule, "errno"))
    if action == default:  # libseccomp refuses a rule that changes nothing
        return False
    for name in rule.get("names") or [rule["name"]]:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        if number == NO_SUCH_SYSCALL:
            continue
        for arguments in _argument_sets(rule.get("args") or ()):
            try:
                program.add_rule(action, number, *arguments)
            except OSError as error:
                raise InvalidArgument(where, name, f"is refused by libseccomp: {error.strerror}") from None
    return bool(action == pyseccomp.NOTIFY)


def _argument_sets(args: Sequence[Mapping[str, Any]]) -> Iterator[list[pyseccomp.Arg]]:
    """The conditions that must hold together.

    libseccomp takes one condition for each argument.  Where a profile has two for the same one, every engine since
    the first has made a rule of each condition: they are alternatives.
    """
    conditions = [_condition(argument) for argument in args]
    if len({argument["index"] for argument in args}) == len(args):
        yield conditions
    else:
        yield from ([condition] for condition in conditions)


def _condition(argument: Mapping[str, Any]) -> pyseccomp.Arg:
    # For MASKED_EQ, `value` is the mask and `valueTwo` what must be left under it.
    return pyseccomp.Arg(
        argument["index"], profiles.OPERATORS[argument["op"]], argument["value"], argument.get("valueTwo", 0)
    )


def _export(program: pyseccomp.SyscallFilter, profile: Mapping[str, Any], default: int) -> bytes:
    with open(os.memfd_create("seccomp", os.MFD_CLOEXEC), "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        bpf = file.read()
    if default == pyseccomp.ERRNO(errno.EPERM):
        bpf = _enosys_prologue(profile) + bpf
    length = len(bpf) // INSTRUCTION.size
    if length > BPF_MAXINSNS:
        raise InvalidArgument(
            "linux.seccomp", f"{length} instructions", f"must compile to at most {BPF_MAXINSNS} instructions"
        )
    return bpf


INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k
# linux/filter.h: loads are from struct seccomp_data, whose members nr and arch are at 0 and 4.
LOAD, JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_OR_EQUAL, RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
# Above all calls that are numbered in sequence, below x32's bit and Arm's private calls.
NUMBERS_END = 1024


def _enosys_prologue(profile: Mapping[str, Any]) -> bytes:
    """Instructions that answer ENOSYS to calls newer than any that the profile names; others go on to the filter.

    A profile cannot allow what was not known when it was written.  But libc takes EPERM for an answer, and only
    ENOSYS for the advice to use an older call; so a profile that refuses with EPERM would break new programs.
    """
    newest = _newest_calls(profile)
    code = b""
    for index, (arch, number) in enumerate(newest.items()):
        beyond = 6 * (len(newest) - index - 1)  # length of the blocks after this one
        code += INSTRUCTION.pack(LOAD, 0, 0, 4)
        code += INSTRUCTION.pack(JUMP_EQUAL, 0, 4, arch)
        code += INSTRUCTION.pack(LOAD, 0, 0, 0)
        code += INSTRUCTION.pack(JUMP_GREATER, 0, 2 + beyond, number)
        code += INSTRUCTION.pack(JUMP_GREATER_OR_EQUAL, 1 + beyond, 0, NUMBERS_END)
        code += INSTRUCTION.pack(RETURN, 0, 0, pyseccomp.ERRNO(errno.ENOSYS))
    return code


def _newest_calls(profile: Mapping[str, Any]) -> dict[int, int]:
    """For each architecture of the filter the largest number of a call that the profile names."""
    arches = {pyseccomp.system_arch(), *(profiles.ARCHITECTURES[name] for name in profile.get("architectures") or ())}
    names = {name for rule in profile.get("syscalls") or () for name in rule.get("names") or [rule["name"]]}
    numbers = {arch: max((pyseccomp.resolve_syscall(arch, name) for name in names), default=-1) for arch in arches}
    # x32 is X86_64 to the kernel and differs by a bit of the number alone: it has no block of its own.
    return {arch: number for arch, number in numbers.items() if number >= 0 and arch != pyseccomp.Arch.X32}
