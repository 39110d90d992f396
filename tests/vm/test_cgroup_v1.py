"""Control groups on a host with v1 hierarchies only."""

from __future__ import annotations

import pytest

from crio_native.linux.cgroup import hierarchy

from ..linux.cgroup_behaviour import *  # noqa: F403  (the tests)

pytestmark = pytest.mark.vm(cgroup="v1")


def test_this_host_is_v1_only() -> None:
    assert hierarchy().mode == "v1"
