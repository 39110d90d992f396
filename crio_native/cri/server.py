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
import socket
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextvars import ContextVar, copy_context
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from crio_native.cri.status_codes import status_code
from crio_native.errors import AlreadyExists, CrioError, Internal

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

    async def thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a blocking function in a worker thread."""
        context = copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: context.run(function, *args))


class Server:
    """Serves services on a unix socket."""

    def __init__(self, path: str, executor: Executor, *, receive_max: int, send_max: int) -> None:
        self._path = path
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
        claim_socket(self._path)
        self._server.add_insecure_port(f"unix:{self._path}")
        await self._server.start()
        os.chmod(self._path, 0o660)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those that run end for `grace` seconds, and remove the socket."""
        await self._server.stop(grace)
        try:
            os.unlink(self._path)
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
                await _refuse(name, error, context)
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
    await context.abort(code, text)


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


def claim_socket(path: str) -> None:
    """Make the socket's directory and clear a stale socket away.

    Raises AlreadyExists when somebody serves it, or when the path is something else than a socket.
    """
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if len(os.fsencode(path)) > 107:  # sun_path
        raise Internal(f"the socket path {path} is longer than 107 bytes; set crio.api.listen to a shorter one")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AlreadyExists(f"{path} exists and is no socket; remove it or change crio.api.listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            os.unlink(path)
            return
        except OSError:
            pass  # alive, if slow
    raise AlreadyExists(f"a server is already listening on {path}; stop it or change crio.api.listen")
