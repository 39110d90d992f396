"""The daemon inside a guest, for modules whose tests ask it by the CRI as a kubelet does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crio_native.cli import scratch as scratches

from ..cri.conftest import Client


@contextlib.contextmanager
def daemon(settings: str = "") -> Iterator[Client]:
    """One that has busybox's image; in there the start takes some seconds, so a module's tests share it."""
    scratches.START_SECONDS = 100.0  # who asks three programs for their features in there, on a busy host, needs it
    scratch = scratches.ScratchDaemon(Path(tempfile.gettempdir()), settings)
    try:
        scratch.start()
        client = Client(scratch)
        client.load_image()
        yield client
    finally:
        problems = scratch.close()
    assert not problems


@pytest.fixture
def cri(shared: Client) -> Iterator[Client]:
    """The module's daemon, which every test leaves without pods."""
    yield shared
    shared.remove_pods()
