"""Blocking functions called from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any


def in_thread(executor: Executor, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """Run it in a worker thread, in the caller's context (the request that log lines belong to)."""
    return asyncio.get_running_loop().run_in_executor(executor, copy_context().run, function, *args)
