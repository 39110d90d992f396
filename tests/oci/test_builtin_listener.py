"""Seccomp filters with every action and flag, and the listener that gets their notifications."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, StepFailed

from ..machine import Machine
from .conftest import Box, status_of
from .test_builtin_userns import in_user_namespace

pytestmark = pytest.mark.root

NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101


class Listener:
    """An agent: takes listeners' descriptors, and answers every notification with an errno."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states: list[dict[str, Any]] = []
        self.calls: list[tuple[int, int]] = []  # (pid, system call)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            data, ancillary, _, _ = connection.recvmsg(65536, 64)
            while more := connection.recv(65536):
                data += more
            fds = array.array("i")
            for _, _, content in ancillary:
                fds.frombytes(content)
            self.states.append(json.loads(data))
            threading.Thread(target=self._answer, args=(fds[0],), daemon=True).start()

    def _answer(self, fd: int) -> None:
        while True:
            notification = bytearray(80)
            try:
                fcntl.ioctl(fd, NOTIF_RECV, notification)
            except OSError:
                os.close(fd)
                return
            number, pid, _, call = struct.unpack_from("=QIIi", notification)
            self.calls.append((pid, call))
            fcntl.ioctl(fd, NOTIF_SEND, struct.pack("=QqiI", number, 0, -42, 0))

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@pytest.fixture
def listener(box: Box) -> Iterator[Listener]:
    directory = box.directory / ("d" * 100)  # longer than a socket's name may be
    directory.mkdir(mode=0o700)
    here = os.open(directory, os.O_PATH)
    found = Listener(Path(f"/proc/self/fd/{here}/agent"))
    found.path = directory / "agent"
    yield found
    box.remove_containers()
    found.close()
    os.close(here)


def profile(listener: Listener, **more: Any) -> dict[str, Any]:
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(listener.path),
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
        **more,
    }


@pytest.mark.parametrize("no_new_privileges", [True, False])
@pytest.mark.parametrize("own_user", [True, False])
def test_a_listener_gets_the_state_and_the_notifications(
    box: Box, listener: Listener, no_new_privileges: bool, own_user: bool
) -> None:
    spec = in_user_namespace(box) if own_user else box.spec()
    spec["process"]["args"] = ["sh", "-c", "mkdir /tmp/x; echo $?; sleep 1000"]
    spec["process"]["noNewPrivileges"] = no_new_privileges
    spec["annotations"] = {"key": "value"}
    spec["linux"]["seccomp"] = profile(listener, listenerMetadata="some words")
    container = box.create(spec).start()
    while container.output() != "1\n":
        pass
    assert "No message of desired type" in container.output("stderr")  # errno 42
    found = listener.states[0]
    pid = container.process.pid
    assert found["fds"] == ["seccompFd"] and found["metadata"] == "some words" and found["pid"] == pid
    assert found["state"]["id"] == container.spec.id and found["state"]["pid"] == pid
    assert found["state"]["bundle"] == str(box.directory) and found["state"]["annotations"] == {"key": "value"}
    assert len(listener.calls) == 1


def test_an_exec_has_a_listener_of_its_own(box: Box, listener: Listener) -> None:
    spec = box.spec()
    spec["linux"]["seccomp"] = profile(listener)
    container = box.create(spec).start()
    code, text = container.exec("mkdir", "/tmp/y", seccomp=spec["linux"]["seccomp"])
    assert code == 1 and "No message" in text
    assert len(listener.states) == 2 and listener.states[1]["state"]["status"] == "running"
    assert listener.states[1]["pid"] not in (0, container.process.pid)


def test_a_listener_that_is_not_there(box: Box, listener: Listener, leaks: Machine) -> None:
    spec = box.spec()
    spec["linux"]["seccomp"] = profile(listener, listenerPath=str(box.directory / "nobody"))
    with pytest.raises(StepFailed, match=r"step 'connect_listener' failed on .*/nobody with ENOENT"):
        box.create(spec)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"listenerPath": ""}, "listenerPath"),
        ({"listenerPath": "relative"}, "listenerPath"),
        ({"listenerPath": 7}, "listenerPath"),
        ({"syscalls": [{"names": ["sendmsg"], "action": "SCMP_ACT_NOTIFY"}]}, "syscalls"),
        ({"defaultAction": "SCMP_ACT_NOTIFY", "syscalls": []}, "syscalls"),
        ({"listenerPath": "", "listenerMetadata": "x", "syscalls": []}, "listenerMetadata"),
    ],
)
def test_listeners_that_cannot_be(box: Box, listener: Listener, change: dict[str, Any], field: str) -> None:
    spec = box.spec()
    spec["linux"]["seccomp"] = profile(listener, **change)
    with pytest.raises(InvalidArgument, match=f"^linux.seccomp.{field}:"):
        box.create(spec)


@pytest.mark.parametrize(
    "flags",
    [
        ["SECCOMP_FILTER_FLAG_TSYNC"],
        ["SECCOMP_FILTER_FLAG_LOG"],
        ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
        ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
    ],
)
def test_flags(box: Box, flags: list[str]) -> None:
    spec = box.spec("cat", "/proc/self/status")
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "flags": flags}
    status = status_of(box.run(spec=spec).output())
    assert status["Seccomp"] == "2" and status["Seccomp_filters"] == "1"


@pytest.mark.parametrize("flags", [["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"], ["SECCOMP_FILTER_FLAG_TSYNC"]])
def test_flags_with_a_listener(box: Box, listener: Listener, flags: list[str]) -> None:
    spec = box.spec("sh", "-c", "mkdir /tmp/x; echo $?")
    spec["linux"]["seccomp"] = profile(listener, flags=flags)
    assert box.run(spec=spec).output() == "1\n"


@pytest.mark.parametrize(
    ("action", "signal"),
    [("SCMP_ACT_KILL", 31), ("SCMP_ACT_KILL_THREAD", 31), ("SCMP_ACT_KILL_PROCESS", 31), ("SCMP_ACT_TRAP", 31)],
)
def test_actions_that_end_the_process(box: Box, action: str, signal: int) -> None:
    spec = box.spec("mkdir", "/tmp/x")
    spec["linux"]["namespaces"] = [entry for entry in spec["linux"]["namespaces"] if entry["type"] != "pid"]
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": action}],
    }
    assert box.run(spec=spec).wait().signal == signal


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ({"action": "SCMP_ACT_LOG"}, 0),
        ({"action": "SCMP_ACT_TRACE", "errnoRet": 7}, 1),
        ({"action": "SCMP_ACT_ERRNO", "errnoRet": 0}, 0),
        ({"action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 0o777, "op": "SCMP_CMP_EQ"}]}, 1),
        ({"action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 0o700, "op": "SCMP_CMP_LT"}]}, 0),
    ],
)
def test_other_actions(box: Box, rule: dict[str, Any], code: int) -> None:
    spec = box.spec("mkdir", "/tmp/x")
    rules = [{"names": ["mkdir"], **rule}]
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}
    assert box.run(spec=spec).wait().code == code
