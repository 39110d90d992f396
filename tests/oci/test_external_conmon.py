"""An OCI runtime's program under conmon: conmon's own conventions, and its own ways to fail."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.errors import DeadlineExceeded, FailedPrecondition, NotFound, StepFailed
from crio_native.linux import process
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.external.conmon import ConmonRuntime, is_conmon
from crio_native.oci.external.conmon_runner import outcome
from crio_native.oci.external.making import Refusal

from .conftest import Box, Container

pytestmark = pytest.mark.root
CONMON = str(shutil.which("conmon"))


Boxes = Callable[..., Box]


@pytest.fixture
def boxes(launchers: Launchers) -> Iterator[Boxes]:
    made: list[Box] = []

    def make(monitor: str = CONMON, program: str = "/usr/sbin/runc", **settings: Any) -> Box:
        directory = Path(tempfile.mkdtemp(prefix="crio-native-box-"))
        handler = RuntimeHandler(
            runtime_type="oci",
            runtime_path=program,
            runtime_root=str(directory / "state"),
            monitor_path=monitor,
            **settings,
        )
        table = RuntimeTable(
            container_exits_dir=str(directory / "exits"), container_attach_socket_dir=str(directory / "sockets")
        )
        runtime = ConmonRuntime(
            "box", handler, table, launchers, scratch=directory / "scratch", bundle=lambda container_id: directory
        )
        made.append(Box(runtime, directory))  # type: ignore[arg-type]  # whatever has its methods
        return made[-1]

    yield make
    for box in made:
        box.remove_all()


def read(sock: socket.socket, wanted: bytes) -> bytes:
    data = b""
    sock.settimeout(5)
    while wanted not in data:
        packet = sock.recv(8193)
        assert packet[:1] in (b"\2", b"\3"), "each packet says its stream"
        data += packet[1:]
    return data


def finished(container: Container) -> None:
    """conmon has written all that it will, and ended."""
    while Path(f"/proc/{container.process.monitor_pid}/exe").exists():
        time.sleep(0.01)


def test_names() -> None:
    assert is_conmon("/usr/libexec/podman/conmon") and not is_conmon("/usr/bin/crio-monitor") and not is_conmon("")


def test_exit_files_and_log(boxes: Boxes) -> None:
    box = boxes()
    container = box.run("sh", "-c", "echo out; exit 7")
    finished(container)
    assert container.wait().code == 7
    assert container.output() == "out\n"
    assert (box.directory / "exits" / container.spec.id).read_text() == "7"
    box.remove_containers()
    assert not list((box.directory / "exits").iterdir()) and not list((box.directory / "sockets").iterdir())


def test_conmon_is_the_parent(boxes: Boxes) -> None:
    container = boxes().create(boxes().spec()).start()
    assert os.readlink(f"/proc/{container.process.monitor_pid}/exe") == os.path.realpath(CONMON)
    watch = container.runtime.watch(container.spec.id, container.spec.run_dir)
    container.runtime.kill(container.spec.id, container.spec.run_dir, 9)
    import select

    assert select.select([watch], [], [], 10)[0]
    status = container.runtime.read_exit(watch)
    watch.close()
    assert status is not None and (status.code, status.signal) == (137, 9)
    container.runtime.delete(container.spec.id, container.spec.run_dir, "")


def test_attach(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(box.spec("cat"), stdin=True, stdin_once=True).start()
    with container.runtime.attach(container.spec.id, container.spec.run_dir, stdin=True) as sock:
        sock.send(b"there and back\n")
        assert read(sock, b"back\n") == b"there and back\n"
        sock.shutdown(socket.SHUT_WR)
        assert container.wait().code == 0
    with pytest.raises(NotFound):
        container.runtime.attach("nobody", box.directory / "nothing", stdin=True)


def test_a_terminal_and_its_size(boxes: Boxes) -> None:
    box = boxes()
    (box.root / "bin/stty").symlink_to("busybox")
    spec = box.spec("sh", "-c", "read line; stty size")
    spec["process"]["terminal"] = True
    container = box.create(spec, stdin=True).start()
    container.runtime.resize(container.spec.id, container.spec.run_dir, 33, 77)
    time.sleep(0.3)  # conmon says nothing when it has done it
    with container.runtime.attach(container.spec.id, container.spec.run_dir, stdin=True) as sock:
        sock.send(b"go\n")
        assert b"33 77" in read(sock, b"33 77")
    assert container.wait().code == 0


def test_reopen(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(box.spec("sh", "-c", "while :; do echo line; sleep 0.05; done")).start()
    path = Path(container.spec.log_path)
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.01)
    path.rename(f"{path}.1")
    container.runtime.reopen_log(container.spec.id, container.spec.run_dir)
    assert path.exists()


def test_the_runtimes_words_are_passed_on(boxes: Boxes) -> None:
    box = boxes()
    with pytest.raises(StepFailed, match=r"runc says: .*no-such-command") as caught:
        box.create(box.spec("no-such-command"))
    assert caught.value.step == "create"
    assert not list((box.directory / "state").iterdir())


def test_a_runtime_that_hangs(boxes: Boxes, tmp_path: Path) -> None:
    program = tmp_path / "runtime"
    program.write_text("#!/bin/sh\nfor w in $*; do [ $w = create ] && sleep 600; done\nexec runc $*\n")
    program.chmod(0o755)
    box = boxes(program=str(program), container_create_timeout=1)
    with pytest.raises(DeadlineExceeded):
        box.create(box.spec())
    time.sleep(0.5)
    here = str(box.directory).encode()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if here in _line(p)]


def _line(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("before", ["", "runc $*;"])
def test_a_pid_file_with_somebody_elses_pid(boxes: Boxes, tmp_path: Path, before: str) -> None:
    """It is not believed, or that process would be killed with the container."""
    program = tmp_path / "runtime"
    with subprocess.Popen(["sleep", "60"]) as somebody:
        lie = f"for w in $*; do case $w in */pid) echo -n {somebody.pid} > $w;; esac; done; exit 0"
        program.write_text(f'#!/bin/sh\ncase "$*" in *" create "*) {before} {lie};; esac\nexec runc $*\n')
        program.chmod(0o755)
        box = boxes(program=str(program))
        with pytest.raises(StepFailed, match=f"left a pid file with {somebody.pid}, which is no process that it made"):
            box.create(box.spec())
        time.sleep(0.2)
        assert somebody.poll() is None
        somebody.kill()
    assert not list((box.directory / "state").iterdir())


def test_a_runtime_that_says_nothing(boxes: Boxes, tmp_path: Path) -> None:
    program = tmp_path / "runtime"
    program.write_text("#!/bin/sh\nfor w in $*; do [ $w = create ] && exit 1; done\nexec runc $*\n")
    program.chmod(0o755)
    box = boxes(program=str(program))
    with pytest.raises(StepFailed, match="says: nothing"):
        box.create(box.spec())


def test_a_program_that_is_no_conmon(boxes: Boxes, tmp_path: Path) -> None:
    program = tmp_path / "conmon"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(StepFailed, match="conmon --version"):
        boxes(monitor=str(program)).runtime.abilities()


def test_conmon_dies(boxes: Boxes) -> None:
    """The container goes with it, and there is no exit status to be had."""
    box = boxes()
    container = box.create(box.spec()).start()
    os.kill(container.process.monitor_pid, 9)
    while process.start_time(container.process.monitor_pid) is not None:
        time.sleep(0.01)
    assert box.runtime.exit_status(container.spec.run_dir) is None
    with pytest.raises(NotFound):
        box.runtime.watch(container.spec.id, container.spec.run_dir)
    box.remove_containers()
    assert not box.runtime.is_alive(container.process)


@pytest.mark.parametrize("path", ["/no/such/conmon", "/tmp"])
def test_a_conmon_that_is_none(boxes: Boxes, path: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"monitor_path .* leave it out for our own monitor"):
        boxes(monitor=path).runtime.abilities()


@pytest.mark.parametrize(
    "told", [b"", b"rubbish", b"[]", b"{}", b'{"pid": "x"}', b'{"pid": -1}', b'{"pid": 0}\n', b"[" * 9000]
)
def test_nonsense_from_conmon(told: bytes) -> None:
    with pytest.raises(Refusal):
        outcome(told)


def test_words_from_conmon() -> None:
    assert outcome(b'{"pid": 12}\n') == 12
    with pytest.raises(Refusal, match="it is so"):
        outcome(b'{"pid": -1, "message": "it is so"}\n')
