"""Control groups on the host's own hierarchies, whichever they are."""

from __future__ import annotations

import pytest

from .cgroup_behaviour import *  # noqa: F403  (the tests)

pytestmark = pytest.mark.root
