"""mount(2) and umount2(2) wait in the kernel without the interpreter's lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A FUSE file system whose server says nothing holds up whoever looks below it, until its server has gone.  With the
# lock held the main thread would never get to close the server's descriptor.
PROGRAM = """
import errno, os, sys, threading
from crio_native.linux import syscalls
from crio_native.linux.mounts import MNT_DETACH, MS_PRIVATE, MS_REC
place, act = sys.argv[1:]
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount(None, "/", None, MS_REC | MS_PRIVATE)
server = os.open("/dev/fuse", os.O_RDWR)
syscalls.mount("silent", place, "fuse", 0, f"fd={server},rootmode=40000,user_id=0,group_id=0")
os.read(server, 1 << 20)  # the greeting, which nobody answers
failure = []
def wait():
    try:
        if act == "mount":
            syscalls.mount("none", place + "/below", "tmpfs", 0)
        else:
            syscalls.umount2(place + "/below", 0)
    except OSError as error:
        failure.append(error.errno)
waiting = threading.Thread(target=wait)
waiting.start()
while open(f"/proc/self/task/{waiting.native_id}/stat").read().rpartition(") ")[2][0] != "D":
    pass
os.close(server)
waiting.join()
syscalls.umount2(place, MNT_DETACH)
sys.exit(failure != [errno.ENOTCONN])
"""


@pytest.mark.root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="the kernel has no FUSE")
@pytest.mark.parametrize("act", ["mount", "umount2"])
def test_other_threads_run_while_a_mount_waits(act: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path, act], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
