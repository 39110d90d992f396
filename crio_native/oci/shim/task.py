"""The task service of a shim: a method for each of its calls, in this program's words.

Here belongs what the messages mean.  Which shim is asked, and what an answer means for a container, is `pod`'s and
`runtime`'s.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from crio_native.api.shim.v1 import task_pb2 as pb
from crio_native.errors import CrioError, Internal, NotFound
from crio_native.oci.shim.client import Client

SERVICES = {2: "containerd.task.v2.Task", 3: "containerd.task.v3.Task"}
SPEC_PREFIX = "types.containerd.io/opencontainers/runtime-spec/1/"
CALL_SECONDS = 15.0  # for what a shim answers by itself, or with a run of its runtime
ACT_SECONDS = 60.0  # for what starts or ends a process
_METHODS = pb.DESCRIPTOR.services_by_name["Task"].methods_by_name


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended.  code: 0..255; finished_at: ns since the epoch, 0 if the shim did not say."""

    code: int
    finished_at: int


@dataclass(frozen=True, slots=True)
class Streams:
    """Paths of named pipes, "" for none; a terminal has no stderr."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class Tasks:
    """The tasks of one shim.  exec_id: a process beside the container's first, "" for that.

    Every call raises DeadlineExceeded, Unavailable when the shim is gone, Internal when it answers nonsense, NotFound
    for a task that it does not have, and else what it refuses the call with, in its own words.
    """

    def __init__(self, client: Client, version: int) -> None:
        self._client, self._service = client, SERVICES[version]

    def create(self, container_id: str, bundle: str, streams: Streams, *, config_path: str = "", timeout: float) -> int:
        """Make the container of the bundle up to its command; returns the pid of its first process.

        config_path: the shim's own configuration file, "" for none.
        """
        request = pb.CreateTaskRequest(
            id=container_id,
            bundle=bundle,
            terminal=streams.terminal,
            stdin=streams.stdin,
            stdout=streams.stdout,
            stderr=streams.stderr,
        )
        if config_path:
            options = pb.Options(type_url="runtimeoptions.v1.Options", config_path=config_path)
            request.options.CopyFrom(_packed("runtimeoptions.v1.Options", options.SerializeToString()))
        return _pid(self._call("Create", request, timeout), "Create")

    def start(self, container_id: str, exec_id: str = "", *, timeout: float = ACT_SECONDS) -> int:
        return _pid(self._call("Start", pb.StartRequest(id=container_id, exec_id=exec_id), timeout), "Start")

    def exec(self, container_id: str, exec_id: str, process: Mapping[str, Any], streams: Streams) -> None:
        """Make a process ready to be started; process: an OCI `process` object."""
        request = pb.ExecProcessRequest(
            id=container_id,
            exec_id=exec_id,
            terminal=streams.terminal,
            stdin=streams.stdin,
            stdout=streams.stdout,
            stderr=streams.stderr,
            spec=_packed(SPEC_PREFIX + "Process", json.dumps(process).encode()),
        )
        self._call("Exec", request, ACT_SECONDS)

    def wait(self, container_id: str, exec_id: str = "") -> Future[End]:
        """The end of a process, when it comes."""
        return self._begin("Wait", pb.WaitRequest(id=container_id, exec_id=exec_id), _end)

    def kill(self, container_id: str, signal: int, exec_id: str = "", *, everyone: bool = False) -> None:
        """everyone: all processes of the container."""
        self._call("Kill", pb.KillRequest(id=container_id, exec_id=exec_id, signal=signal, all=everyone), CALL_SECONDS)

    def resize(self, container_id: str, height: int, width: int, exec_id: str = "") -> None:
        request = pb.ResizePtyRequest(id=container_id, exec_id=exec_id, width=width, height=height)
        self._call("ResizePty", request, CALL_SECONDS)

    def close_stdin(self, container_id: str, exec_id: str = "") -> Future[None]:
        """Have stdin end when our end of its pipe does.

        A shim over runc lets go of its own write end; Kata's answers when the end has come.  So nobody waits for it.
        """
        request = pb.CloseIORequest(id=container_id, exec_id=exec_id, stdin=True)
        return self._begin("CloseIO", request, lambda _: None)

    def pids(self, container_id: str) -> list[int]:
        answer = self._call("Pids", pb.PidsRequest(id=container_id), CALL_SECONDS)
        return [each.pid for each in answer.processes]

    def pause(self, container_id: str) -> None:
        self._call("Pause", pb.PauseRequest(id=container_id), CALL_SECONDS)

    def resume(self, container_id: str) -> None:
        self._call("Resume", pb.ResumeRequest(id=container_id), CALL_SECONDS)

    def checkpoint(self, container_id: str, path: str) -> None:
        self._call("Checkpoint", pb.CheckpointTaskRequest(id=container_id, path=path), ACT_SECONDS)

    def update(self, container_id: str, resources: Mapping[str, Any]) -> None:
        """resources: an OCI `linux.resources` object."""
        packed = _packed(SPEC_PREFIX + "LinuxResources", json.dumps(resources).encode())
        self._call("Update", pb.UpdateTaskRequest(id=container_id, resources=packed), CALL_SECONDS)

    def stats(self, container_id: str) -> tuple[str, bytes]:
        """(type's name, message): one of the two cgroup Metrics, see `statistics`."""
        packed = self._call("Stats", pb.StatsRequest(id=container_id), CALL_SECONDS).stats
        return packed.type_url.rpartition("/")[2], packed.value

    def state(self, container_id: str) -> pb.StateResponse:
        answer = self._call("State", pb.StateRequest(id=container_id), CALL_SECONDS)
        assert isinstance(answer, pb.StateResponse)
        return answer

    def delete(self, container_id: str, exec_id: str = "") -> End:
        """Forget an ended process; of the first one, the whole task."""
        return _end(self._call("Delete", pb.DeleteRequest(id=container_id, exec_id=exec_id), ACT_SECONDS))

    def forget(self, container_id: str, exec_id: str) -> None:
        """Delete an exec'ed process without waiting for the answer, which comes when its streams have ended."""
        with contextlib.suppress(CrioError):
            self._begin("Delete", pb.DeleteRequest(id=container_id, exec_id=exec_id), lambda _: None)

    def connect(self, container_id: str) -> int:
        """The shim's own pid; the proof that it lives and knows the container."""
        return int(self._call("Connect", pb.ConnectRequest(id=container_id), CALL_SECONDS).shim_pid)

    def shutdown(self, container_id: str) -> None:
        """End the shim, unless it still has tasks."""
        self._call("Shutdown", pb.ShutdownRequest(id=container_id), CALL_SECONDS)

    def _call(self, method: str, request: Message, timeout: float) -> Any:
        try:
            payload = self._client.call(self._service, method, request.SerializeToString(), timeout)
        except NotFound as error:
            raise _absent(request, error) from None
        return _parsed(method, payload)

    def _begin(self, method: str, request: Message, meaning: Callable[[Any], Any]) -> Future[Any]:
        result: Future[Any] = Future()

        def answered(future: Future[bytes]) -> None:
            try:
                result.set_result(meaning(_parsed(method, future.result())))
            except NotFound as error:
                result.set_exception(_absent(request, error))
            except CrioError as error:
                result.set_exception(error)

        self._client.begin(self._service, method, request.SerializeToString()).add_done_callback(answered)
        return result


def _absent(request: Message, error: NotFound) -> NotFound:
    exec_id = getattr(request, "exec_id", "")
    kind, name = ("exec process", exec_id) if exec_id else ("task", request.id)
    return NotFound(kind, name, f"the shim does not have it: {error}")


def _parsed(method: str, payload: bytes) -> Any:
    kind = _METHODS[method].output_type
    try:
        return GetMessageClass(kind).FromString(payload) if kind.name != "Empty" else Empty.FromString(payload)
    except DecodeError:
        raise Internal(f"the shim answered {method} with what is no {kind.name}: {payload[:60]!r}") from None


def _packed(type_url: str, value: bytes) -> Packed:
    return Packed(type_url=type_url, value=value)


def _pid(answer: Any, method: str) -> int:
    pid = int(answer.pid)
    if not 0 < pid < 2**22:  # the kernel's PID_MAX_LIMIT
        raise Internal(f"the shim answered {method} with pid {pid}, which no process can have")
    return pid


def _end(answer: Any) -> End:
    """A code that no process can end with is a shim's way to say that it does not know: 255, as it would log it."""
    at = answer.exited_at
    finished_at = at.seconds * 10**9 + at.nanos if 0 < at.seconds < 2**33 and 0 <= at.nanos < 10**9 else 0
    return End(answer.exit_status if answer.exit_status <= 255 else 255, finished_at)
