"""What all tests share: the ``root`` and ``vm`` marks, skips that may not happen in CI, and the ``leaks`` fixture."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator, Iterator

import prctl
import pytest

from crio_native.errors import CrioError
from crio_native.oci import criu

from . import apart
from .machine import Machine, assert_machine_unchanged, machine_state
from .vm.plugin import MUST_WORK, Inside, Outside, in_vm


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Inside(config) if in_vm else Outside())
    # A monitor or a container that outlives its parent becomes our child: the first process of some machines reaps
    # late, and a test for left-over processes has to find them somewhere.
    prctl.set_child_subreaper(1)
    if config.pluginmanager.has_plugin("dsession") or hasattr(config, "workerinput"):
        from . import workers

        config.pluginmanager.register(workers)


@pytest.fixture(scope="session", autouse=True)
def own_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the machine's network is touched, and nothing is left; a guest is a machine of its own already."""
    tmp_path_factory.getbasetemp()  # outlives the run, so not in the run's temporary directory
    with contextlib.nullcontext() if in_vm or os.geteuid() else apart.apart():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if os.geteuid() != 0 and item.get_closest_marker("root") and not item.get_closest_marker("vm"):
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("criu") and (why := criu_trouble()):
            item.add_marker(pytest.mark.skip(reason=f"needs a CRIU that fits this kernel: {why}"))


@functools.cache
def criu_trouble() -> str:
    """Debian's CRIU is older than some kernels that this is tested on, and refuses them."""
    try:
        return criu.trouble(criu.program())
    except CrioError as error:
        return str(error)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if MUST_WORK and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("criu"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"CRIO_NATIVE_MUST_WORK forbids this skip: {reason}"
    return report


@pytest.fixture
def leaks() -> Iterator[Machine]:
    """The machine as it was; after the test it must be so again.  Ask for it before the fixtures it should cover."""
    before = machine_state(group=apart.MARK)
    yield before
    assert_machine_unchanged(before, group=apart.MARK)
