"""BPF programs of type cgroup device: an assembler for the few instructions they need, and bpf(2) to load and attach.

Knows nothing of OCI: rules come as `Rule` values.  See linux/bpf.h and Documentation/bpf/prog_cgroup_sockopt for the
attach semantics, which are the same for all cgroup programs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

READ, WRITE, MKNOD = 2, 4, 1  # BPF_DEVCG_ACC_*
ANY = -1  # any type, any major, any minor
BLOCK, CHAR = 1, 2  # BPF_DEVCG_DEV_*

_NUMBER = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_PROG_LOAD, _PROG_ATTACH, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 5, 8, 13, 15, 16
_TYPE_CGROUP_DEVICE = 15
_ATTACH_CGROUP_DEVICE = 6
_F_ALLOW_MULTI = 2  # groups below (another engine, inside) may attach their own; all must allow
_F_REPLACE = 4
_ATTACHED_MAX = 64  # programs on one group: the kernel's own bound
_LOG_SIZE = 1 << 16
NAME = b"crio_native"  # how a program of ours is known among others; 15 characters at most


class Rule:
    """One device rule.  type: BLOCK, CHAR or ANY; major, minor: number or ANY; access: READ | WRITE | MKNOD."""

    __slots__ = ("access", "allow", "major", "minor", "type")

    def __init__(self, allow: bool, type: int, major: int, minor: int, access: int) -> None:
        self.allow, self.type, self.major, self.minor, self.access = allow, type, major, minor, access

    def _key(self) -> tuple[int, ...]:
        return self.allow, self.type, self.major, self.minor, self.access

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Rule{self._key()}"


# Instructions: opcode, destination | source << 4, offset, immediate.
_MOV_IMM, _MOV_REG, _AND_IMM, _RSH_IMM = 0xB7, 0xBF, 0x57, 0x77
_LOAD_WORD, _JUMP, _JEQ_IMM, _JNE_IMM, _JSET_IMM, _EXIT = 0x61, 0x05, 0x15, 0x55, 0x45, 0x95
_R0, _R1, _TYPE, _ACCESS, _MAJOR, _MINOR = 0, 1, 2, 3, 4, 5


def _instruction(opcode: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, destination | source << 4, offset, immediate)


def device_program(rules: Sequence[Rule]) -> bytes:
    """The program for these rules, of which the last that matches decides, for each kind of access separately.

    What no rule matches is denied.  The accesses asked for and not yet allowed stay in one register; rules are tested
    from the last to the first; one that denies any of them ends it, one that allows takes its bits out of the register.
    """
    head = b"".join(
        (
            _instruction(_LOAD_WORD, _TYPE, _R1, 0),  # access << 16 | type
            _instruction(_MOV_REG, _ACCESS, _TYPE),
            _instruction(_AND_IMM, _TYPE, immediate=0xFFFF),
            _instruction(_RSH_IMM, _ACCESS, immediate=16),
            _instruction(_LOAD_WORD, _MAJOR, _R1, 4),
            _instruction(_LOAD_WORD, _MINOR, _R1, 8),
        )
    )
    tail = _instruction(_MOV_IMM, _R0) + _instruction(_EXIT)
    return head + b"".join(_rule(rule) for rule in reversed(rules)) + tail


def _rule(rule: Rule) -> bytes:
    answer = _instruction(_MOV_IMM, _R0, immediate=int(rule.allow)) + _instruction(_EXIT)
    if rule.allow:
        body = _instruction(_AND_IMM, _ACCESS, immediate=~rule.access & 7)
        body += _instruction(_JNE_IMM, _ACCESS, offset=2) + answer
    else:
        body = _instruction(_JSET_IMM, _ACCESS, offset=1, immediate=rule.access)
        body += _instruction(_JUMP, offset=2) + answer
    # each test jumps over the tests after it and the body
    for register, wanted in ((_MINOR, rule.minor), (_MAJOR, rule.major), (_TYPE, rule.type)):
        if wanted != ANY:
            body = _instruction(_JNE_IMM, register, offset=len(body) // 8, immediate=wanted) + body
    return body


class _Load(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_LOAD reads."""

    _fields_ = [
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
    ]


class _Attach(ctypes.Structure):
    """BPF_PROG_ATTACH."""

    _fields_ = [
        (name, ctypes.c_uint32) for name in ("target_fd", "attach_bpf_fd", "attach_type", "attach_flags", "replace_fd")
    ]


class _Query(ctypes.Structure):
    """BPF_PROG_QUERY."""

    _fields_ = [
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("prog_cnt", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    ]


class _Id(ctypes.Structure):
    """BPF_PROG_GET_FD_BY_ID."""

    _fields_ = [("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32)]


class _InfoRequest(ctypes.Structure):
    """BPF_OBJ_GET_INFO_BY_FD."""

    _fields_ = [("fd", ctypes.c_uint32), ("length", ctypes.c_uint32), ("info", ctypes.c_uint64)]


class _Info(ctypes.Structure):
    """struct bpf_prog_info as far as its name."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("lengths", ctypes.c_uint32 * 2),
        ("instructions", ctypes.c_uint64 * 2),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("map_ids_count", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    ]


# Not among `syscalls`, which hold the GIL: the verifier takes half a millisecond, and an attach may wait for another.
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)
_syscall.restype = ctypes.c_long


def _bpf(command: int, attributes: ctypes.Structure) -> int:
    result = _syscall(_NUMBER, command, ctypes.addressof(attributes), ctypes.sizeof(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "bpf")
    return int(result)


def load_device_program(instructions: bytes) -> int:
    """A descriptor of the loaded program; the caller closes it.

    Raises OSError; when the kernel's verifier refuses the program its words are the error's file name.
    """
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = _Load(
        prog_type=_TYPE_CGROUP_DEVICE,
        insn_cnt=len(instructions) // 8,
        insns=ctypes.addressof(code),
        license=ctypes.addressof(licence),
        prog_name=NAME,
    )
    try:
        return _bpf(_PROG_LOAD, attributes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
    # Only now, because a log buffer makes every load slower.
    log = ctypes.create_string_buffer(_LOG_SIZE)
    attributes.log_level, attributes.log_size, attributes.log_buf = 1, _LOG_SIZE, ctypes.addressof(log)
    try:
        return _bpf(_PROG_LOAD, attributes)
    except OSError as error:
        error.filename = log.value.decode(errors="replace").strip()[-500:] or "bpf"
        raise


def replace_device_program(cgroup: int, program: int) -> None:
    """Make program the group's only one of ours, at no moment without one.  cgroup: descriptor of its directory.

    Programs of others (systemd's, say) stay.  Raises OSError.
    """
    attributes = _Attach(cgroup, program, _ATTACH_CGROUP_DEVICE, _F_ALLOW_MULTI)
    old = our_program(cgroup)
    if old is None:
        _bpf(_PROG_ATTACH, attributes)
        return
    try:
        attributes.attach_flags, attributes.replace_fd = _F_ALLOW_MULTI | _F_REPLACE, old
        _bpf(_PROG_ATTACH, attributes)
    finally:
        os.close(old)


def our_program(cgroup: int) -> int | None:
    """A descriptor of our program on the group, which the caller closes; None when there is none.  Raises OSError."""
    ids = (ctypes.c_uint32 * _ATTACHED_MAX)()
    query = _Query(cgroup, _ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), _ATTACHED_MAX)
    _bpf(_PROG_QUERY, query)
    for number in ids[: query.prog_cnt]:
        program = _bpf(_PROG_GET_FD_BY_ID, _Id(number))
        if _name(program) == NAME:
            return program
        os.close(program)
    return None


def _name(program: int) -> bytes:
    info = _Info()
    _bpf(_OBJ_GET_INFO_BY_FD, _InfoRequest(program, ctypes.sizeof(info), ctypes.addressof(info)))
    return bytes(info.name)
