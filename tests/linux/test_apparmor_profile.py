"""conf/apparmor-crio-default, loaded into a kernel with AppArmor: what a process under it can and cannot do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROFILE = Path(__file__).parents[2] / "conf" / "apparmor-crio-default"

# Each line names its outcome; a shell's redirection that is refused does not run the command.
SCRIPT = """
cat /proc/self/attr/current
echo x > {tmp}/file && cat {tmp}/file
echo vm > /proc/sys/kernel/hostname || echo sysctl refused
echo h > /proc/sysrq-trigger || echo sysrq refused
head -c 1 /proc/kcore || echo kcore refused
echo 0 > /proc/self/oom_score_adj && echo own process allowed
echo 0 > /sys/kernel/mm/ksm/run || echo ksm refused
ls /sys/kernel/security/apparmor || echo securityfs refused
mount -t tmpfs none {tmp} || echo mount refused
kill -0 {pid} || echo signal refused
"""


@pytest.mark.vm(lsm="apparmor")
def test_the_profile_keeps_a_process_from_the_host(tmp_path: Path) -> None:
    # The rig's own package, whose tree also holds the guest's modprobe.
    parser = Path(Path("/proc/sys/kernel/modprobe").read_text()).parent / "sbin" / "apparmor_parser"
    subprocess.run([parser, "--replace", "--skip-cache", PROFILE], check=True)

    def confine() -> None:
        with open("/proc/self/attr/apparmor/exec", "w") as file:
            file.write("exec crio-default")

    script = SCRIPT.format(tmp=tmp_path, pid=os.getpid())
    done = subprocess.run(["sh", "-c", script], preexec_fn=confine, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "crio-default (enforce)",
        "x",
        "sysctl refused",
        "sysrq refused",
        "kcore refused",
        "own process allowed",
        "ksm refused",
        "securityfs refused",
        "mount refused",
        "signal refused",
    ], done.stderr
    assert "No such file" not in done.stderr  # refused, not absent
