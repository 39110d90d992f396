"""A shim that misbehaves: the file `behaviour` in the daemon's root says how, method by method.

It speaks ttrpc by its own few lines, not by the project's, and its "container" is a `cat`.  What a shim does right is
proven with containerd's; this one is for what can be done wrong.  Its "container" ends with it: nobody else would.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from crio_native.api.shim.v1 import bootstrap_pb2, task_pb2, ttrpc_pb2

HEADER = struct.Struct(">IIBB")
METHODS = task_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name


def behaviour() -> dict[str, str]:
    """What the test wants now: {"METHOD": "how", ...}; read anew for every call."""
    path = Path.cwd().parents[1] / "behaviour"
    try:
        wanted: dict[str, str] = json.loads(path.read_text())
        return wanted
    except FileNotFoundError:
        return {}


class Shim:
    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ends: dict[str, int] = {}
        self.sending = threading.Lock()

    def serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.converse, args=(connection,), daemon=True).start()

    def converse(self, connection: socket.socket) -> None:
        reader = connection.makefile("rb")
        while len(header := reader.read(HEADER.size)) == HEADER.size:
            length, stream, _, _ = HEADER.unpack(header)
            request = ttrpc_pb2.Request.FromString(reader.read(length))
            threading.Thread(target=self.answer, args=(connection, stream, request), daemon=True).start()

    def answer(self, connection: socket.socket, stream: int, request: ttrpc_pb2.Request) -> None:
        wanted = str(behaviour().get(request.method, ""))
        how, _, argument = wanted.partition(" ")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        if how == "late":
            time.sleep(float(argument))
        if how == "close":
            connection.shutdown(socket.SHUT_RDWR)
            return
        if how == "half":  # of a frame, then the end
            connection.sendall(HEADER.pack(100, stream, 2, 0) + b"half")
            connection.shutdown(socket.SHUT_RDWR)
            return
        if how == "garbage":
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            return
        if how == "nonsense":  # a frame whose message is none
            connection.sendall(HEADER.pack(5, stream, 2, 0) + b"\xff\xff\xff\xff\xff")
            return
        if how == "payload":  # a response whose payload is none
            self.send(connection, stream, ttrpc_pb2.Response(payload=b"\xff\xff\xff"))
            return
        if how == "huge":
            with self.sending:
                connection.sendall(HEADER.pack(5 << 20, stream, 2, 0) + bytes(5 << 20))
            return
        if how == "stranger":  # an answer to what nobody asked
            self.send(connection, 99_999, ttrpc_pb2.Response())
            return
        if how == "refuse":
            self.send(connection, stream, ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=2, message=argument)))
            return
        try:
            message = getattr(self, request.method.lower())(request.payload, how, argument)
        except KeyError:
            self.send(connection, stream, ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=5, message="not found")))
            return
        payload = message.SerializeToString() if message is not None else b""
        for _ in range(2 if how == "twice" else 1):
            self.send(connection, stream, ttrpc_pb2.Response(payload=payload))

    def send(self, connection: socket.socket, stream: int, response: ttrpc_pb2.Response) -> None:
        message = response.SerializeToString()
        with self.sending:
            connection.sendall(HEADER.pack(len(message), stream, 2, 0) + message)

    def create(self, payload: bytes, how: str, argument: str) -> task_pb2.CreateTaskResponse:
        request = task_pb2.CreateTaskRequest.FromString(payload)
        with open(request.stdout, "wb", 0) as stdout:
            stdout.write(b"made\n")
            process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=stdout, stderr=stdout)
        self.processes[request.id] = process
        threading.Thread(target=self.reap, args=(request.id,), daemon=True).start()
        return task_pb2.CreateTaskResponse(pid=int(argument) if how == "pid" else process.pid)

    def reap(self, container: str) -> None:
        code = self.processes[container].wait()
        self.ends[container] = 128 - code if code < 0 else code

    def start(self, payload: bytes, how: str, argument: str) -> task_pb2.StartResponse:
        return task_pb2.StartResponse(pid=self.processes[task_pb2.StartRequest.FromString(payload).id].pid)

    def wait(self, payload: bytes, how: str, argument: str) -> task_pb2.WaitResponse:
        container = task_pb2.WaitRequest.FromString(payload).id
        self.processes[container].wait()
        while container not in self.ends:
            time.sleep(0.01)
        status = int(argument) if how == "status" else self.ends[container]
        return task_pb2.WaitResponse(exit_status=status)

    def state(self, payload: bytes, how: str, argument: str) -> task_pb2.StateResponse:
        container = task_pb2.StateRequest.FromString(payload).id
        status = task_pb2.STOPPED if self.processes[container].poll() is not None else task_pb2.RUNNING
        return task_pb2.StateResponse(id=container, status=status, pid=self.processes[container].pid)

    def kill(self, payload: bytes, how: str, argument: str) -> None:
        request = task_pb2.KillRequest.FromString(payload)
        if how != "ignore":
            self.processes[request.id].send_signal(request.signal)

    def delete(self, payload: bytes, how: str, argument: str) -> task_pb2.DeleteResponse:
        container = task_pb2.DeleteRequest.FromString(payload).id
        self.processes.pop(container)
        return task_pb2.DeleteResponse(exit_status=self.ends.pop(container, 0))

    def connect(self, payload: bytes, how: str, argument: str) -> task_pb2.ConnectResponse:
        return task_pb2.ConnectResponse(shim_pid=int(argument) if how == "pid" else os.getpid())

    def shutdown(self, payload: bytes, how: str, argument: str) -> None:
        if how != "ignore":
            threading.Timer(0.05, os._exit, (0,)).start()

    def update(self, payload: bytes, how: str, argument: str) -> None: ...

    def closeio(self, payload: bytes, how: str, argument: str) -> None: ...

    def stats(self, payload: bytes, how: str, argument: str) -> task_pb2.StatsResponse:
        answer = task_pb2.StatsResponse()
        answer.stats.type_url = "example.com/some.Other"
        return answer


def install(directory: Path) -> Path:
    """A program that is this shim."""
    path = directory / "fake-shim"
    repository = Path(__file__).resolve().parents[2]
    lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(repository)!r})"]
    path.write_text("\n".join([*lines, f"from {__name__} import main", "main()", ""]))
    path.chmod(0o755)
    return path


def main() -> None:
    verb = sys.argv[-1]
    if verb == "-v":
        print("fake shim 1")
    elif verb == "delete":
        (Path.cwd() / "deleted").touch()
        sys.stdout.buffer.write(task_pb2.DeleteResponse(exit_status=137).SerializeToString())
    elif verb == "start":
        start()


def start() -> None:
    how, _, argument = str(behaviour().get("start", "")).partition(" ")
    if how == "fail":
        sys.exit(argument)
    if how == "silent":
        sys.exit(1)
    if how == "hang":
        time.sleep(3600)
    if how == "talk":
        sys.stdout.write("x" * (1 << 20))
        return
    params = bootstrap_pb2.BootstrapParams.FromString(sys.stdin.buffer.read()) if how == "message" else None
    if params is not None and params.instance_id != sys.argv[sys.argv.index("-id") + 1]:
        sys.exit("the deprecated way to start: it must be told by the bootstrap protocol")
    address = str(Path.cwd().parents[1] / f"fake-{os.getpid()}.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    if os.fork() == 0:
        os.setpgid(0, 0)
        null = os.open("/dev/null", os.O_RDWR)
        log = os.open("log", os.O_WRONLY)
        for number, fd in ((0, null), (1, null), (2, log)):
            os.dup2(fd, number)
        os.write(2, b"level=error msg=hello\n")
        Shim(listener).serve()
    answers = {
        "": f"unix://{address}",
        "version": f'{{"version": {argument}, "address": "unix://{address}", "protocol": "ttrpc"}}',
        "grpc": json.dumps({"version": 3, "address": f"unix://{address}", "protocol": "grpc"}),
        "json": '{"version": 3, "address": ',
        "address": argument,
    }
    if how == "message":
        result = bootstrap_pb2.BootstrapResult(version=3, address=f"unix://{address}", protocol="ttrpc")
        sys.stdout.buffer.write(result.SerializeToString())
    else:
        sys.stdout.write(answers[how])
