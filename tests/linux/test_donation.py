"""A child in its parent's memory: it goes on, and the parent never comes back to its own program."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import os, signal, time
from crio_native.linux import donation, syscalls
note, told = os.pipe()
area = bytearray(b"x") * (256 * 4096)
donor = syscalls.clone3(0, exit_signal=signal.SIGCHLD)
if donor == 0:
    switch = donation.KillSwitch()
"""
pytestmark = pytest.mark.root


def run(body: str, *, without: str = "", prelude: str = PRELUDE) -> str:
    """What a single-threaded process says that runs the prelude and then `body`."""
    words = [sys.executable, "-c", prelude + body]
    if without:
        words = [sys.executable, "-m", "tests.oci.without", without, *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout


BY_EXEC = """
    value = [1]
    pid = donation.donate(switch, syscalls.CLONE_NEWPID)
    value.append(2)
    os.write(told, b"%d %d %d" % (pid, os.getpid(), sum(value)))
    os.execv("/bin/sh", ["sh", "-c", "sleep 0.3; exit 7"])
pid, inside, total = os.read(note, 100).decode().split()
status = os.waitpid(donor, 0)[1]
assert os.waitpid(int(pid), os.WNOHANG) == (0, 0), "the donor has outlived the child"
code = os.waitstatus_to_exitcode(os.waitpid(int(pid), 0)[1])
print(os.waitstatus_to_exitcode(status), inside, total, code)
"""
BY_END = BY_EXEC.replace('os.execv("/bin/sh", ["sh", "-c", "sleep 0.3; exit 7"])', "os._exit(7)").replace("assert", "#")
ALONE = BY_EXEC.replace("NEWPID)", "NEWPID, alone=True)").replace("os.execv", "time.sleep(0.3); os.execv")


@pytest.mark.parametrize("without", ["", "clone3"])
@pytest.mark.parametrize("body", [BY_EXEC, BY_END], ids=["exec", "end"])
def test_the_parent_ends_when_the_child_leaves_the_memory(body: str, without: str) -> None:
    assert run(body, without=without).split() == [str(-signal.SIGUSR1), "1", "3", "7"]


@pytest.mark.parametrize("without", ["", "clone3"])
def test_a_child_that_wants_to_be_alone_has_the_parent_killed_in_its_sleep(without: str) -> None:
    assert run(ALONE, without=without).split() == [str(-signal.SIGKILL), "1", "3", "7"]


def test_no_signal_brings_the_parent_back() -> None:
    """SIGCONT would, if it had been stopped, and a handler of its own would run on the child's stack."""
    body = """
    signal.signal(signal.SIGINT, lambda *_: os.write(told, b"the donor runs"))
    donation.donate(switch, 0)
    os.write(told, b"%d" % os.getpid())
    time.sleep(0.3)
    os.execv("/bin/true", ["true"])
child = int(os.read(note, 100))
for number in (signal.SIGINT, signal.SIGCONT, signal.SIGUSR1, signal.SIGCHLD):
    os.kill(donor, number)
ends = dict(os.wait() for _ in range(2))
os.close(told)
print(os.waitstatus_to_exitcode(ends[donor]), os.waitstatus_to_exitcode(ends[child]), os.read(note, 100))
"""
    assert run(body).split() == [str(-signal.SIGUSR1), "0", "b''"]


def test_nothing_has_happened_when_the_kernel_refuses() -> None:
    body = """
    try:
        donation.donate(switch, 0, cgroup=os.open("/proc", os.O_RDONLY))
    except OSError as error:
        os._exit(error.errno)
print(os.waitstatus_to_exitcode(os.waitpid(donor, 0)[1]))
"""
    assert int(run(body)) == 9  # EBADF: no cgroup


def test_the_switch_works_for_a_process_that_cannot_be_named() -> None:
    body = """
    if os.fork() == 0:
        syscalls.unshare(syscalls.CLONE_NEWPID)
        if os.fork() == 0:
            os.setresuid(65534, 65534, 65534)  # who holds the pipe may press
            switch.press_and_wait()
            os._exit(0)
        os._exit(0)
    while True:
        signal.pause()
print(os.waitstatus_to_exitcode(os.waitpid(donor, 0)[1]))
"""
    assert int(run(body)) == -signal.SIGKILL


def test_written_pages_are_found_and_can_be_written_in_advance() -> None:
    body = """
    pages = donation.Pages(100)
    def own():
        return sum(size for _, size in pages.written())
    before = own()
    area[: 128 * 4096] = b"y" * (128 * 4096)
    written = own()
    donation.write_pages([(0x1000, 4096)])  # what is no memory of ours is passed over
    start = __import__("ctypes").addressof((__import__("ctypes").c_char * 1).from_buffer(area)) & -4096
    donation.write_pages([(start, 256 * 4096)])
    os.write(told, b"%d %d" % ((written - before) // 4096, (own() - written) // 4096))
    os._exit(0)
os.waitpid(donor, 0)
print(os.read(note, 100).decode())
"""
    by_hand, in_advance = map(int, run(body).split())
    assert 128 <= by_hand < 256 and 127 <= in_advance < 256


LEAST = """
    donation.donate(switch, syscalls.CLONE_NEWPID)
    os.write(told, b"%d" % os.getpriority(os.PRIO_PROCESS, 0))
    os.execv("/bin/sleep", ["sleep", "0.3"])
nice = os.read(note, 10).decode()
os.waitid(os.P_PID, donor, os.WEXITED | os.WNOWAIT)
print(nice, open(f"/proc/{donor}/stat").read().rpartition(")")[2].split()[16], os.getpriority(os.PRIO_PROCESS, 0))
os.wait(), os.wait()
"""


def test_nobody_waits_for_the_donors_end() -> None:
    """It has the least priority; its child, and who made it, keep theirs."""
    assert run(LEAST).split() == ["0", "19", "0"]


def test_who_could_not_take_its_priority_back_keeps_it() -> None:
    """A root without CAP_SYS_NICE."""
    lacking = "effective, permitted, _ = syscalls.capget()\nsyscalls.capset(effective & ~NICE, permitted & ~NICE, 0)\n"
    prelude = PRELUDE.replace("donor = ", f"NICE = 1 << 23\n{lacking}donor = ")
    assert run(LEAST, prelude=prelude).split() == ["0", "0", "0"]
