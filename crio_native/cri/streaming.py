"""Exec, Attach and PortForward: who may be reached, checked at the door; then a URL of the streaming server.

What the URL will do is bound here to a container or a pod, and looked at again when a client comes: up to a minute
has passed by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crio_native.api.runtime.v1 import api_pb2 as pb
from crio_native.config.tables import ApiTable
from crio_native.cri import exec_sync, lookup
from crio_native.cri.server import Call
from crio_native.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from crio_native.pods import pausing
from crio_native.pods.containers import Containers
from crio_native.pods.node import Node
from crio_native.pods.records import Container, ContainerState, Pod, PodState
from crio_native.pods.values import NamespaceMode
from crio_native.streaming.server import StreamServer
from crio_native.streaming.settings import Settings, TlsFiles

if TYPE_CHECKING:
    from crio_native.streaming.programs import Options, Program

_FORWARD_PORTS_MAX = 127  # two WebSocket channels each, whose numbers are bytes, and 255 is taken
_PIPE_SIZE = 1 << 20


def settings(api: ApiTable) -> Settings:
    """[crio.api] in the server's words."""
    files = TlsFiles(
        api.stream_tls_cert, api.stream_tls_key, api.stream_tls_ca, api.tls_min_version, tuple(api.tls_cipher_suites)
    )
    return Settings(
        api.stream_address, api.stream_port, api.stream_idle_timeout, files if api.stream_enable_tls else None
    )


class StreamingService:
    """The three calls.  What the server needs for a session is imported with the first of them."""

    def __init__(self, node: Node, containers: Containers, server: StreamServer) -> None:
        self._node, self._containers, self._server = node, containers, server

    async def Exec(self, request: Any, call: Call) -> Any:
        from crio_native.streaming.remotecommand import Command

        container = lookup.find(self._node.store, Container, request.container_id, "container_id")
        if container.state != ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container.id} is {container.state}; exec needs a running one")
        words = exec_sync.check_command(request.cmd)
        options = _options(request)
        await call.thread(pausing.check_runs, self._node, container)
        command = Command(options, lambda: self._exec(container.id, words, options))
        return pb.ExecResponse(url=self._server.url("exec", command))

    async def Attach(self, request: Any, call: Call) -> Any:
        from crio_native.streaming.remotecommand import Command

        container = self._live(request.container_id)
        options = _options(request)
        command = Command(options, lambda: self._attach(container.id, options))
        return pb.AttachResponse(url=self._server.url("attach", command))

    async def PortForward(self, request: Any, call: Call) -> Any:
        from crio_native.streaming.portforward import Ports

        pod = lookup.find(self._node.store, Pod, request.pod_sandbox_id, "pod_sandbox_id")
        self._ready(pod.id)
        if len(request.port) > _FORWARD_PORTS_MAX:
            raise InvalidArgument("port", f"{len(request.port)} ports", f"must be at most {_FORWARD_PORTS_MAX}")
        for index, port in enumerate(request.port):
            if not 0 < port <= 65535:
                raise InvalidArgument(f"port[{index}]", port, "must be 1 to 65535")
        ports = Ports(tuple(request.port), lambda: self._dial(pod.id))
        return pb.PortForwardResponse(url=self._server.url("portforward", ports))

    def _live(self, container_id: str) -> Container:
        """To attach to: also one that is not started yet, so that a client may have its output from the first byte."""
        container = lookup.find(self._node.store, Container, container_id, "container_id")
        if not container.live:
            raise FailedPrecondition(f"container {container.id} is {container.state}; attach needs one that lives")
        return container

    def _ready(self, pod_id: str) -> Pod:
        pod = self._node.store.get(Pod, pod_id)
        if pod.state != PodState.READY:
            raise FailedPrecondition(f"pod {pod.id} is {pod.state}; port-forward needs a ready one")
        return pod

    def _exec(self, container_id: str, words: tuple[str, ...], options: Options) -> Program:
        from crio_native.streaming.programs import Exec

        if options.tty:
            session = self._containers.exec(container_id, words, terminal=True)
            if session.terminal < 0:
                session.kill()
                session.close()
                raise Unimplemented("this container's runtime handler cannot give an exec'ed process a terminal")
            outputs = {"stdout": session.terminal} if options.stdout else {}
            return Exec(session, -1, outputs, session.terminal)
        ours: dict[str, int] = {}
        given = {"stdin": -1, "stdout": -1, "stderr": -1}
        with contextlib.ExitStack() as theirs:
            for name in given:
                if getattr(options, name):
                    read, write = _pipe()
                    given[name], ours[name] = (read, write) if name == "stdin" else (write, read)
                    theirs.callback(os.close, given[name])
            try:
                session = self._containers.exec(
                    container_id, words, given["stdout"], given["stderr"], stdin=given["stdin"]
                )
            except BaseException:
                for fd in ours.values():
                    os.close(fd)
                raise
        stdin = ours.pop("stdin", -1)
        return Exec(session, stdin, ours, -1)

    def _attach(self, container_id: str, options: Options) -> Program:
        from crio_native.streaming.programs import Attachment

        container = self._live(container_id)
        runtime = self._node.executor(self._node.store.get(Pod, container.pod_id))
        run_dir = self._node.layout.run_dir(container.id)
        connection = runtime.attach(container.id, run_dir, stdin=options.stdin and container.config.stdin)
        return Attachment(
            connection,
            options,
            lambda height, width: runtime.resize(container.id, run_dir, height, width),
            lambda: runtime.exit_status(run_dir) is None and self._lives(container.id),
        )

    def _lives(self, container_id: str) -> bool:
        try:
            return self._node.store.get(Container, container_id).live
        except NotFound:
            return False

    def _dial(self, pod_id: str) -> Sequence[socket.socket]:
        pod = self._ready(pod_id)
        if pod.config.namespaces.network is NamespaceMode.NODE:
            return [socket.socket(socket.AF_INET), socket.socket(socket.AF_INET6)]
        return self._node.namespaces.open_sockets(self._node.layout.pins(pod.id)["net"])


def _pipe() -> tuple[int, int]:
    """(read, write); large, where the host lets us, so that neither side has to wait for the other's turn."""
    read, write = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return read, write


def _options(request: Any) -> Options:
    from crio_native.streaming.programs import Options

    if request.tty and request.stderr:
        raise InvalidArgument("stderr", True, "excludes tty: a terminal has one output")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("stdout", False, "one of stdin, stdout and stderr must be true")
    return Options(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, tty=request.tty)
