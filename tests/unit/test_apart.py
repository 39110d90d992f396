"""That a run of the tests is cut off from the machine's network, and that what it leaves is found and named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

RUN = """
import os, subprocess, tempfile
from pathlib import Path
import prctl
from tests import apart, machine

prctl.set_child_subreaper(1)
machine.SETTLE_SECONDS = 0.2
with apart.apart():
    {act}
"""
CGROUP = "/sys/fs/cgroup/unified" if Path("/sys/fs/cgroup/unified").exists() else "/sys/fs/cgroup"


def run(act: str) -> subprocess.CompletedProcess[str]:
    """A run of the tests that does nothing but this one line."""
    return subprocess.run([sys.executable, "-c", RUN.format(act=act)], capture_output=True, text=True, timeout=60)


def shell(command: str) -> str:
    return f"subprocess.run({command!r}, shell=True, check=True)"


def test_the_links_of_the_machine_are_out_of_reach() -> None:
    done = run(f"print(os.listdir('/sys/class/net')); {shell('ip link add gone0 type bridge && ip link del gone0')}")
    assert (done.returncode, done.stdout) == (0, "['lo']\n"), done.stderr


def test_the_control_groups_are_the_machines() -> None:
    assert run("print(sorted(os.listdir('/sys/fs/cgroup')))").stdout == f"{sorted(os.listdir('/sys/fs/cgroup'))}\n"


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (shell("ip link add left0 type bridge"), "links: left0"),
        (shell("nft add table inet left"), "table inet left"),
        (shell("mount -t tmpfs left /mnt"), "mounts: tmpfs on /mnt"),
        (shell("sleep 60 >&- 2>&- & exit"), r"processes: sleep \(pid (\d+),"),
        ("tempfile.mkdtemp(prefix='left-')", "/left-"),
        ("held = open('/dev/zero')", r"descriptors: \d+ -> /dev/zero"),
    ],
)
def test_what_is_left_is_named(act: str, named: str) -> None:
    done = run(act)
    found = re.search(named, done.stderr)
    assert done.returncode == 1 and found, done.stderr
    for process in found.groups():
        os.kill(int(process), 9)


def test_what_is_left_in_places_of_the_machine_is_named() -> None:
    done = run(f"os.mkdir('{CGROUP}/' + apart.MARK + 'left'); os.mkdir('/var/tmp/' + apart.MARK + 'left')")
    group = re.search(rf"cgroups: ({CGROUP}/crio-native-\d+-left)\n", done.stderr)
    assert group, done.stderr
    os.rmdir(group[1])
    file = Path("/var/tmp", Path(group[1]).name)
    assert str(file) in done.stderr
    file.rmdir()
