"""The gRPC server: its socket, its calls, its errors.  What a call does is in the services.

The methods of a service come from the protobuf descriptor: each is served by the first object that has a coroutine of
its name (an asynchronous generator, for a stream), and one that none has answers UNIMPLEMENTED with its name.  What a
coroutine returns, or yields, is a message or ready bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from crio_native.cri.background import in_thread
from crio_native.cri.front_door import claim_socket
from crio_native.cri.status_codes import status_code
from crio_native.errors import CrioError, printable

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="-")
_numbers = itertools.count(1)
_LOUD = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})


class Call:
    """One call: who serves it and how long its client waits."""

    def __init__(self, method: str, context: grpc.aio.ServicerContext[Any, Any], executor: Executor) -> None:
        self.method = method
        self._context = context
        self._executor = executor

    def seconds(self) -> float | None:
        """Time until the client gives up; None for no limit."""
        left = self._context.time_remaining()
        return None if left is None or math.isinf(left) or left > 1e9 else float(left)

    def thread(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run a blocking function in a worker thread."""
        return in_thread(self._executor, function, *args)


class Server:
    """Serves services on a unix socket: `front_door`'s back, in a directory that only root can enter."""

    def __init__(
        self,
        path: str,
        executor: Executor,
        *,
        receive_max: int,
        send_max: int,
        observe: Callable[[str, float, bool], None] = lambda name, seconds, failed: None,
    ) -> None:
        """observe: told each call's name, its seconds, and whether it failed."""
        self.path = path
        self._observe = observe
        self._executor = executor
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", receive_max),
                ("grpc.max_send_message_length", send_max),
                ("grpc.so_reuseport", 0),
            ]
        )

    def add(self, descriptor: Any, *parts: object) -> None:
        """Serve all methods of a protobuf service, whose calls the parts share among them."""
        handlers = {method.name: self._handler(method, parts) for method in descriptor.methods}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(descriptor.full_name, handlers),))

    async def start(self) -> None:
        """Bind and serve.  Raises AlreadyExists when a live server has the socket."""
        claim_socket(self.path, "crio.runroot")
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those that run end for `grace` seconds, and remove the socket."""
        await self._server.stop(grace)
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass

    def _handler(self, method: Any, parts: Sequence[object]) -> grpc.RpcMethodHandler[Any, Any]:
        name = method.name
        function = next((found for part in parts if (found := getattr(part, name, None))), None)
        parse = GetMessageClass(method.input_type).FromString
        if method.server_streaming:
            stream = self._serve_stream(name, function) if function is not None else _unimplemented_stream(name)
            return grpc.unary_stream_rpc_method_handler(stream, parse, _serialise)
        serve = self._serve(name, function) if function is not None else _unimplemented(name)
        return grpc.unary_unary_rpc_method_handler(serve, parse, _serialise)

    def _serve(
        self, name: str, function: Callable[[Any, Call], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            request_id.set(f"{next(_numbers):x}")
            start = time.monotonic()
            try:
                answer = await function(request, Call(name, context, self._executor))
            except asyncio.CancelledError:
                log.info("%s: the client gave up after %.3f s", name, time.monotonic() - start)
                raise
            except Exception as error:
                self._observe(name, time.monotonic() - start, True)
                await _refuse(name, error, context)
            self._observe(name, time.monotonic() - start, False)
            log.debug("%s took %.1f ms", name, (time.monotonic() - start) * 1000)
            return answer

        return serve

    def _serve_stream(
        self, name: str, function: Callable[[Any, Call], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, Any], Any]:
        async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            request_id.set(f"{next(_numbers):x}")
            try:
                # Closed here and now, whatever ends it: what it holds is not left to the garbage collector.
                async with contextlib.aclosing(function(request, Call(name, context, self._executor))) as answers:
                    async for answer in answers:
                        yield answer
            except Exception as error:
                await _refuse(name, error, context)

        return serve


async def _refuse(name: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    code = status_code(error)
    known = isinstance(error, (CrioError, OSError))
    if code in _LOUD:
        log.error("%s failed: %s", name, error, exc_info=None if known else error)
    else:
        log.info("%s: %s: %s", name, code.name, error)
    text = str(error) if known else f"{type(error).__name__}: {error}; this is a defect, see the daemon's log"
    await context.abort(code, printable(text))


def _unimplemented(name: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not implemented in this version")

    return refuse


def _unimplemented_stream(name: str) -> Callable[[Any, Any], Any]:
    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not implemented in this version")
        yield b""

    return refuse


def _serialise(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
