"""Blocking functions called from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any


async def in_thread(executor: Executor, function: Callable[..., Any], *args: Any) -> Any:
    """Run it in a worker thread, in the caller's context (the request that log lines belong to)."""
    context = copy_context()
    return await asyncio.get_running_loop().run_in_executor(executor, lambda: context.run(function, *args))
