"""Exec and attach, with and without a terminal, by OCI runtimes' programs and by a shim; see `test_handlers`.

Not with conmon, whose attach socket ends without a word of how the container did.
"""

# ruff: noqa: F401  # tests and fixtures are found by their names here
from __future__ import annotations

from typing import Any

import pytest

from .external import PROGRAMS, fresh, prepare_host, shared
from .test_streaming import (
    container,
    test_a_command_that_does_not_exist,
    test_a_terminal,
    test_a_terminal_that_loses_its_client_hangs_up,
    test_attach_many_and_late,
    test_attach_with_a_terminal,
    test_input_and_its_end,
    test_output_and_exit_code,
    test_stdin_once,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=sorted(PROGRAMS.keys() - {"conmon"}))
def handler(request: Any) -> str:
    prepare_host()
    return str(request.param)
