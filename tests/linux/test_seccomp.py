"""Compiled seccomp profiles, loaded in real processes: what the kernel then allows, refuses, and with which errno."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyseccomp
import pytest

from crio_native.config.values import CAPABILITIES
from crio_native.linux import syscalls
from crio_native.oci import seccomp, seccomp_profile

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

MARK = 99  # an errno (EADDRNOTAVAIL) that none of the probed calls returns by itself
NEW_NS, NEW_USER, NEW_UTS = 0x00020000, 0x10000000, 0x04000000
DEFAULT_CAPABILITIES = {"CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
Call = tuple[str | int, tuple[int, ...]]


def number(name: str | int) -> int:
    found = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) if isinstance(name, str) else name
    assert found >= 0, name
    return int(found)


def in_child(act: Callable[[], Any]) -> tuple[Any, int]:
    """What `act` returned in a forked child, and the child's wait status."""
    ours, childs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            childs.send(json.dumps(act()).encode())
        finally:
            os._exit(0)
    childs.close()
    answer = ours.recv(65536)
    ours.close()
    return json.loads(answer or b"null"), os.waitpid(pid, 0)[1]


def load(compiled: seccomp.Compiled, flags: int = 0) -> int:
    syscalls.prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    return syscalls.seccomp_filter(compiled.bpf, compiled.flags | flags)


def call(name: str | int, arguments: Sequence[int]) -> int:
    """0, or the errno."""
    ctypes.set_errno(0)
    result = libc.syscall(number(name), *(ctypes.c_ulong(argument) for argument in arguments))
    return ctypes.get_errno() if result == -1 else 0


def errnos(compiled: seccomp.Compiled, calls: Sequence[Call]) -> list[int]:
    """The errno of each call in a process under the filter."""
    prepared = [(number(name), arguments) for name, arguments in calls]

    def act() -> list[int]:
        load(compiled)
        return [call(name, arguments) for name, arguments in prepared]

    answer, status = in_child(act)
    assert status == 0, f"the child ended with wait status {status}"
    return list(answer)


def runtime_default(capabilities: set[str] = DEFAULT_CAPABILITIES) -> seccomp.Compiled:
    return seccomp.compile(seccomp_profile.resolve(seccomp_profile.default_profile(), capabilities))


def rule_on_dup(op: str, value: int, value_two: int = 0, index: int = 0) -> seccomp.Compiled:
    argument = {"index": index, "op": op, "value": value, "valueTwo": value_two}
    rule = {"names": ["dup"], "action": "SCMP_ACT_ERRNO", "errnoRet": MARK, "args": [argument]}
    return seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})


BIG = 1 << 40


@pytest.mark.parametrize(
    ("op", "value", "value_two", "matching", "other"),
    [
        ("SCMP_CMP_EQ", BIG + 5, 0, [BIG + 5], [5, BIG, BIG + 4, 2 * BIG + 5]),
        ("SCMP_CMP_NE", 900, 0, [0, 899, BIG + 900], [900]),
        ("SCMP_CMP_LT", BIG, 0, [0, BIG - 1], [BIG, BIG + 1, 2 * BIG]),
        ("SCMP_CMP_LE", BIG, 0, [0, BIG - 1, BIG], [BIG + 1, 2 * BIG]),
        ("SCMP_CMP_GT", BIG, 0, [BIG + 1, 2 * BIG], [0, BIG - 1, BIG]),
        ("SCMP_CMP_GE", BIG, 0, [BIG, BIG + 1, 2 * BIG], [0, BIG - 1]),
        ("SCMP_CMP_MASKED_EQ", 0xF0F0, 0x5050, [0x5050, 0x5F5F, BIG + 0x5050], [0x5051 ^ 0x10, 0, 0xFFFF]),
    ],
)
def test_each_operator_matches_what_it_says(
    op: str, value: int, value_two: int, matching: list[int], other: list[int]
) -> None:
    found = errnos(rule_on_dup(op, value, value_two), [("dup", (argument,)) for argument in matching + other])
    assert found[: len(matching)] == [MARK] * len(matching)
    assert MARK not in found[len(matching) :]


def test_conditions_on_several_arguments_hold_together_and_on_one_argument_are_alternatives() -> None:
    def rule(*args: tuple[int, int]) -> seccomp.Compiled:
        conditions = [{"index": index, "op": "SCMP_CMP_EQ", "value": value} for index, value in args]
        rules = [{"names": ["dup2"], "action": "SCMP_ACT_ERRNO", "errnoRet": MARK, "args": conditions}]
        return seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})

    calls: list[Call] = [("dup2", pair) for pair in ((900, 901), (900, 902), (902, 901), (901, 900))]
    assert errnos(rule((0, 900), (1, 901)), calls) == [MARK, errno.EBADF, errno.EBADF, errno.EBADF]
    assert errnos(rule((0, 900), (0, 901)), calls) == [MARK, MARK, errno.EBADF, MARK]


@pytest.mark.parametrize("index", range(6))
def test_every_argument_can_be_compared(index: int) -> None:
    rule = {
        "names": ["mmap"],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": MARK,
        "args": [{"index": index, "op": "SCMP_CMP_EQ", "value": 12345}],
    }
    compiled = seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})
    arguments = [0, 0, 0, 0, 0, 0]
    plain = tuple(arguments)
    arguments[index] = 12345
    assert errnos(compiled, [("mmap", tuple(arguments)), ("mmap", plain)]) == [MARK, errno.EINVAL]


def one_action(action: str, **more: int) -> seccomp.Compiled:
    rule = {"names": ["getpgid"], "action": action, **more}
    return seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})


@pytest.mark.parametrize("action", ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"])
def test_killing_actions_end_the_process_by_sigsys(action: str) -> None:
    compiled = one_action(action)

    def act() -> int:
        load(compiled)
        return call("getpgid", (0,))

    answer, status = in_child(act)
    assert answer is None
    assert os.WTERMSIG(status) == signal.SIGSYS


def test_log_allows_trace_without_a_tracer_is_enosys_and_errno_zero_pretends_success() -> None:
    assert errnos(one_action("SCMP_ACT_LOG"), [("getpgid", (1 << 30,))]) == [errno.ESRCH]
    assert errnos(one_action("SCMP_ACT_TRACE", errnoRet=7), [("getpgid", (0,))]) == [errno.ENOSYS]
    assert errnos(one_action("SCMP_ACT_ERRNO", errnoRet=0), [("getpgid", (1 << 30,))]) == [0]
    assert errnos(one_action("SCMP_ACT_ERRNO"), [("getpgid", (0,))]) == [errno.EPERM]


def test_a_default_action_meets_all_that_no_rule_names() -> None:
    rules = [{"names": ["write", "sendto", "exit_group", "close", "mmap", "munmap"], "action": "SCMP_ACT_ALLOW"}]
    compiled = seccomp.compile({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": MARK, "syscalls": rules})
    assert errnos(compiled, [("getpid", ()), ("getuid", ())]) == [MARK, MARK]


def test_notify_hands_the_call_to_a_listener() -> None:
    compiled = one_action("SCMP_ACT_NOTIFY")
    assert compiled.notify
    assert not one_action("SCMP_ACT_LOG").notify
    ours, childs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        listener = load(compiled, flags=1 << 3)  # SECCOMP_FILTER_FLAG_NEW_LISTENER
        socket.send_fds(childs, [b"x"], [listener])
        os._exit(libc.syscall(number("getpgid"), 0))
    _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
    notification = array.array("B", bytes(80))  # struct seccomp_notif
    fcntl.ioctl(listener, 0xC0502100, notification)  # SECCOMP_IOCTL_NOTIF_RECV
    identity, who, _, call_number = struct.unpack_from("=QIIi", notification)
    assert (who, call_number) == (pid, number("getpgid"))
    response = array.array("B", struct.pack("=QqiI", identity, 42, 0, 0))
    fcntl.ioctl(listener, 0xC0182101, response)  # SECCOMP_IOCTL_NOTIF_SEND
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    os.close(listener)


@pytest.mark.parametrize("flag", sorted(set(seccomp_profile.FLAGS) - {"SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"}))
def test_flags_are_taken_by_the_kernel(flag: str) -> None:
    compiled = seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "flags": [flag]})
    assert compiled.flags == seccomp_profile.FLAGS[flag]
    assert errnos(compiled, [("getpid", ())]) == [0]


def test_runtime_default_refuses_what_leads_out_of_a_container() -> None:
    calls: dict[str, tuple[Call, int]] = {
        "new user namespace": (("unshare", (NEW_USER,)), errno.EPERM),
        "new mount namespace by clone": (("clone", (NEW_NS | signal.SIGCHLD, 0, 0, 0, 0)), errno.EPERM),
        "clone3": (("clone3", (0, 0)), errno.ENOSYS),
        "setns": (("setns", (0, 0)), errno.EPERM),
        "mount": (("mount", (0, 0, 0, 0, 0)), errno.EPERM),
        "pivot_root": (("pivot_root", (0, 0)), errno.EPERM),
        "keyctl": (("keyctl", (0, 0, 0)), errno.EPERM),
        "add_key": (("add_key", (0, 0, 0, 0, 0)), errno.EPERM),
        "bpf": (("bpf", (0, 0, 0)), errno.EPERM),
        "perf_event_open": (("perf_event_open", (0, 0, 0, 0, 0)), errno.EPERM),
        "io_uring_setup": (("io_uring_setup", (1, 0)), errno.EPERM),
        "userfaultfd": (("userfaultfd", (0,)), errno.EPERM),
        "open_by_handle_at": (("open_by_handle_at", (0, 0, 0)), errno.EPERM),
        "kexec_load": (("kexec_load", (0, 0, 0, 0)), errno.EPERM),
        "init_module": (("init_module", (0, 0, 0)), errno.EPERM),
        "reboot": (("reboot", (0, 0, 0, 0)), errno.EPERM),
        "settimeofday": (("settimeofday", (0, 0)), errno.EPERM),
        "AF_ALG": (("socket", (socket.AF_ALG, socket.SOCK_SEQPACKET, 0)), errno.EPERM),
        "AF_VSOCK": (("socket", (socket.AF_VSOCK, socket.SOCK_STREAM, 0)), errno.EPERM),
        "AF_RDS": (("socket", (21, socket.SOCK_SEQPACKET, 0)), errno.EPERM),
        "ADDR_NO_RANDOMIZE": (("personality", (0x0040000,)), errno.EPERM),
    }
    found = errnos(runtime_default(), [wanted for wanted, _ in calls.values()])
    assert dict(zip(calls, found, strict=True)) == {name: expected for name, (_, expected) in calls.items()}


def test_bits_that_the_kernel_ignores_do_not_get_a_call_past_its_rule() -> None:
    """The kernel takes the low 32 bits of these arguments; a comparison of all 64 would let 2**32 + AF_ALG pass."""
    high = 1 << 32
    calls: list[Call] = [
        ("socket", (high | socket.AF_ALG, socket.SOCK_SEQPACKET, 0)),
        ("socket", (high | socket.AF_VSOCK, socket.SOCK_STREAM, 0)),
        ("clone", (high | NEW_USER | signal.SIGCHLD, 0, 0, 0, 0)),
        ("personality", (high | 0x0040000,)),
    ]
    assert errnos(runtime_default(), calls) == [errno.EPERM] * 4


def test_runtime_default_allows_ordinary_work() -> None:
    calls: list[Call] = [
        ("socket", (socket.AF_UNIX, socket.SOCK_STREAM, 0)),
        ("socket", (socket.AF_INET, socket.SOCK_STREAM, 0)),
        ("socket", (socket.AF_INET6, socket.SOCK_DGRAM, 0)),
        ("socket", (socket.AF_NETLINK, socket.SOCK_RAW, 0)),
        ("personality", (0xFFFFFFFF,)),
        ("memfd_create", (0, 0)),
        ("eventfd2", (0, 0)),
    ]
    assert errnos(runtime_default(), calls) == [0, 0, 0, 0, 0, errno.EFAULT, 0]


def test_a_real_program_with_threads_and_children_runs_under_runtime_default() -> None:
    compiled = runtime_default()
    script = (
        "import subprocess, threading, socket, tempfile, hashlib\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "print(subprocess.run(['sh', '-c', 'echo child | cat'], capture_output=True, text=True).stdout.strip())\n"
        "a, b = socket.socketpair(); a.send(b'socket'); print(b.recv(9).decode())\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x'); file.flush()\n"
        "import asyncio; asyncio.run(asyncio.sleep(0.01)); print('done')\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", script], preexec_fn=lambda: load(compiled), capture_output=True, text=True
    )
    assert result.stdout.split() == ["thread", "child", "socket", "done"], result.stderr


@pytest.mark.root
def test_capabilities_open_what_they_are_for() -> None:
    calls: list[Call] = [
        ("unshare", (NEW_UTS,)),
        ("clone3", (0, 0)),
        ("mount", (0, 0, 0, 0, 0)),
        ("keyctl", (0, 0, 0)),
    ]
    found = errnos(runtime_default({"CAP_SYS_ADMIN"}), calls)
    assert found == [0, errno.EINVAL, errno.EFAULT, errno.EPERM]
    assert errnos(runtime_default(), [("chroot", (0,))]) == [errno.EPERM]
    assert errnos(runtime_default({"CAP_SYS_CHROOT"}), [("chroot", (0,))]) == [errno.EFAULT]
    alg: Call = ("socket", (socket.AF_ALG, socket.SOCK_SEQPACKET, 0))
    assert errnos(runtime_default(set(CAPABILITIES)), [alg, ("io_uring_setup", (1, 0))]) == [errno.EPERM] * 2


def test_calls_newer_than_the_profile_are_enosys_and_older_ones_keep_their_answer() -> None:
    newest = max(number(name) for name in ("futex_waitv", "clone3"))
    rules = [{"names": ["futex_waitv", "write", "sendto", "exit_group", "close"], "action": "SCMP_ACT_ALLOW"}]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}
    calls: list[Call] = [(newest + 1, ()), (1023, ()), (1024, ()), ("getpid", ())]
    expected = [errno.ENOSYS, errno.ENOSYS, errno.EPERM, errno.EPERM]
    assert errnos(seccomp.compile(profile), calls) == expected
    several = profile | {"architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64", "SCMP_ARCH_X86_64"]}
    assert errnos(seccomp.compile(several), calls) == expected
    # Another errno than EPERM is taken as meant.
    other = profile | {"defaultErrnoRet": MARK}
    assert errnos(seccomp.compile(other), calls) == [MARK] * 4


INT80 = bytes.fromhex("53 89f8 89f3 89d1 31d2 cd80 5b c3")
"""int80(number, ebx, ecx): push rbx; mov eax,edi; mov ebx,esi; mov ecx,edx; xor edx,edx; int 0x80; pop rbx; ret."""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="32-bit calls of x86")
def test_32_bit_calls_meet_the_same_rules() -> None:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(INT80)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    int80 = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int)(address)
    getpid, socket_call, socketcall, unshare = 20, 359, 102, 310

    def act(compiled: seccomp.Compiled) -> list[int]:
        load(compiled)
        alg = int80(socket_call, socket.AF_ALG, socket.SOCK_SEQPACKET)
        return [int80(getpid, 0, 0), alg, int80(socketcall, 1, 0), int80(unshare, NEW_USER, 0), int80(1000, 0, 0)]

    answer, status = in_child(lambda: act(runtime_default()))
    assert status == 0
    assert answer[0] > 0
    assert answer[1:] == [-errno.EPERM, -errno.ENOSYS, -errno.EPERM, -errno.ENOSYS]
    # A filter for the native architecture alone kills at the first call of another.
    native = seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"]})
    answer, status = in_child(lambda: act(native))
    assert (answer, os.WTERMSIG(status)) == (None, signal.SIGSYS)


FOREIGN = Path("/usr/share/containers/seccomp.json")


def test_a_profile_that_another_project_wrote_works_as_it_says() -> None:
    profile = seccomp_profile.load_profile(FOREIGN)
    compiled = seccomp.compile(seccomp_profile.resolve(profile, DEFAULT_CAPABILITIES))
    calls: list[Call] = [("getpid", ()), ("mount", (0, 0, 0, 0, 0)), ("bpf", (0, 0, 0)), ("chroot", (0,)), (1000, ())]
    assert errnos(compiled, calls) == [0, errno.EFAULT, errno.EPERM, errno.EPERM, errno.ENOSYS]
    with_admin = seccomp.compile(seccomp_profile.resolve(profile, {"CAP_SYS_ADMIN"}))
    assert errnos(with_admin, [("bpf", (0, 0, 0))]) != [errno.EPERM]
