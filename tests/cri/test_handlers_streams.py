"""Exec, attach and port-forward, with and without a terminal, by OCI runtimes' programs and by a shim."""

# ruff: noqa: F401  # tests and fixtures are found by their names here
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .external import PROGRAMS, OfHandler, prepare_host, table
from .test_streaming import (
    container,
    test_a_command_that_does_not_exist,
    test_a_grandchild_that_keeps_the_streams_does_not_hold_the_session,
    test_a_terminal,
    test_a_terminal_that_loses_its_client_hangs_up,
    test_attach_before_the_start_misses_nothing,
    test_attach_many_and_late,
    test_attach_with_a_terminal,
    test_input_and_its_end,
    test_output_and_exit_code,
    test_port_forward,
    test_stdin_once,
    test_stdin_stays_open_for_the_next_without_stdin_once,
    web,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[OfHandler]:
    prepare_host()
    with OfHandler.serving("".join(table(name) for name in PROGRAMS)) as client:
        yield client


@pytest.fixture(scope="module", params=sorted(PROGRAMS), autouse=True)
def handler(request: Any, shared: OfHandler) -> str:
    shared.handler = request.param
    return shared.handler
