"""The tests of pods and containers once more, with containerd's shim over runc: the CRI answers the same.

What differs by nature is overridden below, each with its reason.
"""

# ruff: noqa: F403
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cri.conftest import Client, close
from tests.cri.test_containers import *
from tests.cri.test_exec_sync import *
from tests.cri.test_life_cycle import *
from tests.cri.test_restart import *

# After the others, because it is to replace one of theirs.
from tests.cri.test_handlers import test_command_and_environment  # isort: skip  # noqa: F401

from .shim_support import HANDLERS, RUNC_SHIM, new_client

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.access(RUNC_SHIM, os.X_OK), reason="needs containerd-shim-runc-v2 (Debian's containerd)"),
]
DEFAULT = HANDLERS + '[crio.runtime]\ndefault_runtime = "shim"\n'


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    client = new_client(DEFAULT)
    yield client
    close(client)


@pytest.fixture
def cri(shared: Client) -> Iterator[Client]:
    yield shared
    for pod in shared.pods():
        shared.remove_pod(pod.id)


@pytest.fixture
def fresh() -> Iterator[Client]:
    client = new_client(DEFAULT)
    yield client
    close(client)


def test_version_and_status(cri: Client) -> None:
    """The shim is the default handler; what its runtime could do it does not tell."""
    answer = cri.call("Status", verbose=True)
    assert all(condition.status for condition in answer.status.conditions)
    features = {each.name: each.features.recursive_read_only_mounts for each in answer.runtime_handlers}
    assert features == {"": False, "builtin": True, "shim": False}


# A shim keeps the exit status while no daemon runs, so there is no exit file to wait for: `test_shim` tests it its way.
del test_containers_go_on, test_after_a_reboot  # noqa: F821
# It reads the monitor's pid where the built-in executor has it: `test_shim` finds the monitor by its command line.
del test_a_monitor_that_was_killed  # noqa: F821
