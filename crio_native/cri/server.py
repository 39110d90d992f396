"""The gRPC server: its calls, and their errors.  What a call does is in the services, how it travels in `rpc`.

The methods of a service come from the protobuf descriptor: each is served by the first object that has a coroutine of
its name (an asynchronous generator, for a stream), and one that none has answers UNIMPLEMENTED with its name.  What a
coroutine returns, or yields, is a message or ready bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextvars import ContextVar
from typing import Any, NoReturn

from google.protobuf.message_factory import GetMessageClass

from crio_native.cri.background import in_thread
from crio_native.cri.rpc import Code, Connection, Method, Refused
from crio_native.cri.status_codes import status_code
from crio_native.errors import CrioError

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="-")
_numbers = itertools.count(1)
_LOUD = frozenset({Code.INTERNAL, Code.UNKNOWN})


class Call:
    """One call: who serves it and how long its client waits."""

    def __init__(self, method: str, deadline: float | None, executor: Executor) -> None:
        """deadline: by the event loop's clock; None for a client that waits for ever."""
        self.method = method
        self._deadline = deadline
        self._executor = executor

    def seconds(self) -> float | None:
        """Time until the client gives up; None for no limit."""
        return None if self._deadline is None else self._deadline - asyncio.get_running_loop().time()

    async def thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a blocking function in a worker thread."""
        return await in_thread(self._executor, function, *args)


class Server:
    """Serves services to the connections that it is handed."""

    def __init__(
        self,
        executor: Executor,
        *,
        receive_max: int,
        send_max: int,
        observe: Callable[[str, float, bool], None] = lambda name, seconds, failed: None,
    ) -> None:
        """observe: told each call's name, its seconds, and whether it failed."""
        self._executor = executor
        self._receive_max, self._send_max = receive_max, send_max
        self._observe = observe
        self._methods: dict[bytes, Method] = {}
        self._connections: set[Connection] = set()

    def add(self, descriptor: Any, *parts: object) -> None:
        """Serve all methods of a protobuf service, whose calls the parts share among them."""
        for method in descriptor.methods:
            self._methods[f"/{descriptor.full_name}/{method.name}".encode()] = self._method(method, parts)

    def connection(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self._methods, self._connections, receive_max=self._receive_max, send_max=self._send_max)

    def connections(self) -> int:
        return len(self._connections)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those that run end for `grace` seconds, and hang up."""
        for connection in self._connections:
            connection.go_away()
        working = set().union(*(connection.working() for connection in self._connections))
        if working:
            await asyncio.wait(working, timeout=grace)
        for connection in list(self._connections):
            connection.close()

    def hang_up(self) -> None:
        """End every connection, whether or not its client has taken what was said."""
        for connection in list(self._connections):
            connection.abort()

    def _method(self, method: Any, parts: Sequence[object]) -> Method:
        name = method.name
        function = next((found for part in parts if (found := getattr(part, name, None))), None)
        parse = GetMessageClass(method.input_type).FromString
        if function is None:
            return Method(parse, _unimplemented(name))
        if method.server_streaming:
            return Method(parse, stream=self._stream(name, function))
        return Method(parse, self._serve(name, function))

    def _serve(
        self, name: str, function: Callable[[Any, Call], Awaitable[Any]]
    ) -> Callable[[Any, float | None], Awaitable[bytes]]:
        async def serve(request: Any, deadline: float | None) -> bytes:
            request_id.set(f"{next(_numbers):x}")
            start = time.monotonic()
            try:
                answer = await function(request, Call(name, deadline, self._executor))
            except asyncio.CancelledError:
                log.info("%s: the client gave up after %.3f s", name, time.monotonic() - start)
                raise
            except Exception as error:
                self._observe(name, time.monotonic() - start, True)
                _refuse(name, error)
            seconds = time.monotonic() - start
            self._observe(name, seconds, False)
            log.debug("%s took %.1f ms", name, seconds * 1000)
            return _serialise(answer)

        return serve

    def _stream(
        self, name: str, function: Callable[[Any, Call], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, float | None], AsyncGenerator[bytes, None]]:
        async def serve(request: Any, deadline: float | None) -> AsyncGenerator[bytes, None]:
            request_id.set(f"{next(_numbers):x}")
            try:
                # Closed here and now, whatever ends it: what it holds is not left to the garbage collector.
                async with contextlib.aclosing(function(request, Call(name, deadline, self._executor))) as answers:
                    async for answer in answers:
                        yield _serialise(answer)
            except Exception as error:
                _refuse(name, error)

        return serve


def _refuse(name: str, error: Exception) -> NoReturn:
    code = status_code(error)
    known = isinstance(error, (CrioError, OSError))
    if code in _LOUD:
        log.error("%s failed: %s", name, error, exc_info=None if known else error)
    else:
        log.info("%s: %s: %s", name, code.name, error)
    raise Refused(
        code, str(error) if known else f"{type(error).__name__}: {error}; this is a defect, see the daemon's log"
    )


def _unimplemented(name: str) -> Callable[[Any, float | None], Awaitable[bytes]]:
    async def refuse(request: Any, deadline: float | None) -> bytes:
        raise Refused(Code.UNIMPLEMENTED, f"{name} is not implemented in this version")

    return refuse


def _serialise(answer: Any) -> bytes:
    data: bytes = answer if isinstance(answer, bytes) else answer.SerializeToString()
    return data
