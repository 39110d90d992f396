"""The same tests on kernels that lack newer system calls: what can be had is had, the rest is refused clearly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

TREES = "open_tree,move_mount,mount_setattr,fsopen,fsconfig,fsmount"
# Which tests need what a kernel without these calls cannot do: recursive attributes, id mappings.
NEEDS_SETATTR = (
    "recursive or decides or id_mapped or same_mapping or cannot_be_mapped or what_is_written"
    " or all_that_is_mounted_below"
)
# And what one without detached trees: to clone a mount before another becomes private, or is out of reach.
NEEDS_TREES = f"{NEEDS_SETATTR} or roots_own_file_system or only_the_hosts_root_reaches or mount_namespace_is_joined"


def rerun(calls: str, *modules: str, leave_out: str = "") -> None:
    arguments = [str(HERE / (f"{name}.py" if name == "lacking" else f"test_builtin_{name}.py")) for name in modules]
    if leave_out:
        arguments += ["-k", f"not ({leave_out})"]
    command = [sys.executable, "-m", "tests.oci.without", calls, sys.executable, "-m", "pytest", "-q", "-x", *arguments]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


@pytest.mark.slow
class TestReruns:
    def test_without_clone3(self) -> None:
        rerun("clone3", "isolation", "userns")

    def test_without_openat2(self) -> None:
        rerun("openat2", "isolation", "failures")

    def test_without_close_range(self) -> None:
        rerun("close_range", "isolation")

    def test_without_mount_setattr(self) -> None:
        rerun("mount_setattr", "isolation", "mounts", leave_out=NEEDS_SETATTR)

    def test_without_detached_trees(self) -> None:
        rerun(TREES, "isolation", "failures", "mounts", leave_out=NEEDS_TREES)

    def test_without_any_of_them_in_a_user_namespace(self) -> None:
        rerun(f"{TREES},clone3,openat2,close_range", "hooks", "userns", leave_out=NEEDS_TREES)

    def test_what_cannot_be_done_is_said(self) -> None:
        rerun("mount_setattr", "lacking")
        rerun(TREES, "lacking")
