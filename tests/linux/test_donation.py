"""A child in its parent's memory: it goes on, and the parent dies without having woken."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import os, signal
from crio_native.linux import donation, syscalls
syscalls.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: the orphan comes to us
note, told = os.pipe()
area = bytearray(b"x") * (256 * 4096)
donor = syscalls.clone3(0, exit_signal=signal.SIGCHLD)
if donor == 0:
    switch = donation.KillSwitch()
"""
pytestmark = pytest.mark.root


def run(body: str, *, without: str = "") -> str:
    """What a single-threaded process says that runs the prelude and then `body`."""
    words = [sys.executable, "-c", PRELUDE + body]
    if without:
        words = [sys.executable, "-m", "tests.oci.without", without, *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout


IN_A_PID_NAMESPACE = """
    value = [1]
    pid = donation.donate(switch, syscalls.CLONE_NEWPID)
    value.append(2)
    switch.wait()
    os.write(told, b"%d %d %d" % (pid, os.getpid(), sum(value)))
    os._exit(7)
status = os.waitpid(donor, 0)[1]
pid, inside, total = os.read(note, 100).decode().split()
code = os.waitstatus_to_exitcode(os.waitpid(int(pid), 0)[1])
print(os.waitstatus_to_exitcode(status), inside, total, code)
"""


@pytest.mark.parametrize("without", ["", "clone3"])
def test_the_child_goes_on_and_the_parent_is_killed(without: str) -> None:
    assert run(IN_A_PID_NAMESPACE, without=without).split() == [str(-signal.SIGKILL), "1", "3", "7"]


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
            switch.press()
            os._exit(0)
        os._exit(0)
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
