"""What the rig reports about tests that fail, skip, kill their guest or end its session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .guest import Configuration
from .packages import RigUnavailable, rig


@pytest.fixture(autouse=True)
def bootable() -> None:
    try:
        rig()
    except RigUnavailable as error:
        pytest.skip(str(error))


def run_ill_behaved(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "CRIO_NATIVE_MUST_WORK"} | environment,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.slow
def test_failures_skips_and_panics_come_out_of_the_guest() -> None:
    output = run_ill_behaved("tests/vm/ill_behaved.py")
    outcomes = {line.split("::")[1].split()[0]: line.split()[1] for line in output.splitlines() if "%]" in line}
    assert outcomes == {
        "test_fails": "FAILED",
        "test_skips": "SKIPPED",
        "test_panics": "FAILED",
        "test_after_the_panic": "PASSED",
        "test_ends_its_session": "FAILED",
        "test_is_told_where_it_runs": "PASSED",
    }
    assert "words from the guest" in output and "assert os.getpid() == 0" in output
    assert "a reason from the guest" in output
    assert "Kernel panic" in output
    assert "pytest in the guest ended with status 2" in output


def test_a_skip_fails_where_everything_must_work() -> None:
    output = run_ill_behaved("tests/vm/ill_behaved.py::test_skips", CRIO_NATIVE_MUST_WORK="1")
    assert "CRIO_NATIVE_MUST_WORK forbids this skip: Skipped: a reason from the guest" in output
    assert "1 failed" in output


def test_a_wrong_configuration_is_named() -> None:
    with pytest.raises(ValueError, match=r"cgroup is one of .*'v2'.*lsm one of"):
        Configuration(cgroup="v3")
