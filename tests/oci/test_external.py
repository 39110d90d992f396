"""An OCI runtime's program under our monitor: what it does well, and every way in which it can misbehave.

The program is a script that is runc but for one command, in which it does something else.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.config.tables import RuntimeHandler, RuntimeTable
from crio_native.errors import (
    CrioError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StartFailed,
    StepFailed,
)
from crio_native.oci.builtin.launchers import Launchers
from crio_native.oci.external import program
from crio_native.oci.external import runtime as external
from crio_native.oci.external.program import OUTPUT_MAX, WORDS_MAX, abilities_of, words
from crio_native.oci.external.runtime import ExternalRuntime
from crio_native.oci.runtime import CheckpointSpec, ExecSpec, UserRequest

from ..machine import machine_state
from .conftest import PARENT, Box

pytestmark = pytest.mark.root


Boxes = Callable[..., Box]


@pytest.fixture
def boxes(launchers: Launchers) -> Iterator[Boxes]:
    """Makes boxes of a runtime that misbehaves: `boxes("create", "exit 1")`; settings are the handler's."""
    made: list[Box] = []

    def make(command: str = "", does: str = "", **settings: Any) -> Box:
        directory = Path(tempfile.mkdtemp(prefix="crio-native-box-"))
        program = directory / "runtime"
        program.write_text(
            f'#!/bin/sh\nfor word in "$@"; do [ "$word" = "{command}" ] && {{ {does or ":"}; }}; done\nexec runc "$@"\n'
        )
        program.chmod(0o755)
        settings = {"runtime_path": str(program), "runtime_root": str(directory / "state"), **settings}
        handler = RuntimeHandler(runtime_type="oci", **settings)
        runtime = ExternalRuntime(
            "box-runtime",
            handler,
            RuntimeTable(),
            launchers,
            scratch=directory / "scratch",
            bundle=lambda container_id: directory,
        )
        box = Box(runtime, directory)  # type: ignore[arg-type]  # whatever has its methods
        made.append(box)
        return box

    yield make
    for box in made:
        box.remove_all()


def grouped(box: Box, *args: str) -> dict[str, Any]:
    """A spec whose cgroup has a name that leftovers are found by."""
    spec = box.spec(*args)
    spec["linux"]["cgroupsPath"] = f"{PARENT}/{box.directory.name}"
    return spec


def leftovers(box: Box) -> list[str]:
    """What a container may have left, once what was killed has had a second to go: processes, and mounts, cgroups and
    files of the runtime that name the box."""
    for _ in range(100):
        found = [str(each) for group in ("mounts", "cgroups") for each in machine_state(box.directory.name)[group]]
        found += [each for each in machine_state()["processes"] if not launchers_own(each)]
        for place in ("state", "scratch"):
            found += [str(path) for path in (box.directory / place).rglob("*")]
        if not found:
            break
        time.sleep(0.01)
    return found


def launchers_own(process: str) -> bool:
    """Launchers, and the spares and monitors that wait beside them for their first container."""
    if process.startswith(("crio-launcher", "crio-spare")):
        return True
    pid = process.partition("(pid ")[2].partition(",")[0]
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return not line or b"--donor" in line  # none: it has ended, and waits to be reaped
    except OSError:
        return True


def refused(box: Box, kind: type[CrioError], *said: str, **more: Any) -> str:
    """Creating a container fails, in these words, and leaves nothing; the message."""
    with pytest.raises(kind) as caught:
        box.create(grouped(box), **more)
    message = str(caught.value)
    for each in said:
        assert each in message
    assert leftovers(box) == []
    return message


# What it does well


def test_a_container_from_its_creation_to_its_end(boxes: Boxes) -> None:
    box = boxes()
    container = box.run("sh", "-c", "echo out; echo err >&2; exit 7", spec=None)
    assert (container.wait().code, container.output(), container.output("stderr")) == (7, "out\n", "err\n")
    box.remove_containers()
    assert leftovers(box) == []


def test_signals(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(
        grouped(box, "sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")
    ).start()
    while "ready" not in container.output():
        time.sleep(0.01)
    box.runtime.kill(container.spec.id, container.spec.run_dir, 15)
    assert container.wait().code == 3
    with pytest.raises(NotFound):
        box.runtime.kill(container.spec.id, container.spec.run_dir, 15)


def test_users_are_found_in_the_image(boxes: Boxes) -> None:
    box = boxes()
    container = box.run("sh", "-c", "id -u; id -g; id -G; echo $HOME", user=UserRequest("web"))
    assert container.output() == "33\n44\n44 99\n/var/www\n"
    assert (container.process.user.uid, container.process.user.home) == (33, "/var/www")  # type: ignore[union-attr]
    box.remove_containers()
    message = refused(box, StepFailed, "/etc/passwd", "nobody here", user=UserRequest("nobody here"))
    assert "find_user" in message


def test_digits_are_a_number_whatever_the_image_calls_so(boxes: Boxes) -> None:
    box = boxes()
    with (box.root / "etc/passwd").open("a") as passwd:
        passwd.write("1000:x:0:0:evil:/root:/bin/sh\n")
    container = box.run("sh", "-c", "id -u; id -G; echo $HOME", user=UserRequest("1000", "2000"))
    assert container.output() == "1000\n2000\n/\n"
    box.remove_containers()
    with (box.root / "etc/group").open("a") as group:
        group.write("2000:x:0:\n")
    for request in (UserRequest("1000", "2000"), UserRequest("web", supplementary=[2000])):
        refused(box, StepFailed, "/etc/group", "calls group 0 by the number 2000", user=request)


def test_a_terminal(boxes: Boxes) -> None:
    box = boxes()
    spec = box.spec("sh", "-c", "[ -t 0 ] && [ -t 1 ] && echo terminal")
    spec["process"]["terminal"] = True
    assert box.run(spec=spec).output().strip() == "terminal"


def test_exec(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(grouped(box)).start()
    assert container.exec("sh", "-c", "echo out; echo err >&2; exit 4") == (4, "out\nerr\n")
    assert container.exec("sh", "-c", "kill -9 $$")[0] == 137
    with pytest.raises(StartFailed) as caught:
        container.exec("/no/such")
    assert caught.value.number == errno.ENOENT and "/no/such" in caught.value.detail
    assert list((box.directory / "scratch").iterdir()) == []


def test_exec_on_a_terminal(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(grouped(box)).start()
    process = {**container.spec.spec["process"], "args": ["sh", "-c", "[ -t 1 ] && echo terminal"], "terminal": True}
    session = box.runtime.exec(container.spec.id, container.process, container.cgroup, ExecSpec(process))
    try:
        assert os.isatty(session.terminal)
        assert session.result().code == 0
        assert os.read(session.terminal, 100).strip() == b"terminal"
    finally:
        os.close(session.terminal)
        session.close()


def test_exec_on_the_first_cpu(boxes: Boxes) -> None:
    """runc of Debian does not know the field, so what is tested is what it is told."""
    box = boxes(
        "exec", 'for f in "$@"; do case $f in *.process) cp $f ${f%/*}/../told;; esac; done', exec_cpu_affinity="first"
    )
    container = box.create(grouped(box)).start()
    container.exec("true")
    first = min(os.sched_getaffinity(0))
    assert f'"execCPUAffinity": {{"initial": "{first}"}}' in (box.directory / "told").read_text()


def test_exec_kill_ends_the_group(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(grouped(box)).start()
    process = {**container.spec.spec["process"], "args": ["sh", "-c", "sleep 600 & sleep 600"]}
    session = box.runtime.exec(container.spec.id, container.process, container.cgroup, ExecSpec(process))
    session.kill()
    assert (session.result().code, session.result().signal) == (137, 9)
    session.close()
    assert "sleep 600" not in container.exec("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")[1].replace(
        "sh -c", ""
    )


def test_update_pause_and_resume(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(grouped(box)).start()
    runtime: Any = box.runtime
    runtime.update(container.spec.id, container.cgroup, {"memory": {"limit": 32 << 20}})
    [limit] = Path("/sys/fs/cgroup").glob(f"memory{container.cgroup}/memory.limit_in_bytes")
    assert int(limit.read_text()) == 32 << 20
    runtime.pause(container.spec.id)
    assert runtime._program.status(container.spec.id) == "paused"
    runtime.resume(container.spec.id)
    assert runtime._program.status(container.spec.id) == "running"
    assert box.runtime.is_alive(container.process)


def test_a_checkpoint(boxes: Boxes) -> None:
    """Where criu cannot do it, because it is not there or not able to on this kernel, its failure is told."""
    box = boxes()
    runtime: Any = box.runtime
    container = box.create(grouped(box)).start()
    spec = container.spec.spec
    images, work, group = box.directory / "images", box.directory / "work", spec["linux"]["cgroupsPath"]
    asked = CheckpointSpec(container.spec.id, container.process, group, spec, Path(spec["root"]["path"]), images, work)
    try:
        runtime.checkpoint(asked)
    except StepFailed as error:
        assert error.step == "checkpoint" and "criu" in error.detail.lower()
    else:
        assert list((box.directory / "images").iterdir())
        runtime.freezer(container.spec.id, group).thaw()
    assert box.runtime.is_alive(container.process)


def test_the_monitor_in_the_pods_cgroup(boxes: Boxes) -> None:
    box = boxes(monitor_cgroup="pod")
    container = box.create(grouped(box)).start()
    group = f"{PARENT}/crio-conmon-{container.spec.id}"
    assert group in Path(f"/proc/{container.process.monitor_pid}/cgroup").read_text()
    assert group not in Path(f"/proc/{container.process.pid}/cgroup").read_text()
    box.remove_containers()
    assert not list(Path("/sys/fs/cgroup").glob(f"*{group}"))


def test_an_exec_in_the_containers_cgroup(boxes: Boxes) -> None:
    box = boxes("exec", "cat /proc/self/cgroup > ${0%/*}/told", monitor_exec_cgroup="container")
    container = box.create(grouped(box)).start()
    assert container.exec("true")[0] == 0
    assert container.cgroup in (box.directory / "told").read_text()


def test_what_the_program_gets(boxes: Boxes) -> None:
    """Three descriptors, beside the shell's own of its script, and an environment of PATH and monitor_env."""
    does = 'd=$(ls -l /proc/$$/fd); echo "$d" > ${0%/*}/descriptors; env > ${0%/*}/environment'
    box = boxes("create", does, monitor_env=("EXTRA=given",))
    box.run("true")
    descriptors = [line for line in (box.directory / "descriptors").read_text().splitlines() if "->" in line]
    assert {line.split()[-3] for line in descriptors if "box" not in line} == {"0", "1", "2", "3"}  # 3: of $()
    environment = dict(line.split("=", 1) for line in (box.directory / "environment").read_text().splitlines())
    assert set(environment) - {"PWD", "OLDPWD", "SHLVL", "_"} == {"EXTRA", "PATH"} and environment["EXTRA"] == "given"


# What it does badly


def test_a_program_that_is_missing(boxes: Boxes) -> None:
    box = boxes(runtime_path="/no/such/runtime")
    with pytest.raises(NotFound, match="runtime_path names no file"):
        box.runtime.abilities()
    refused(box, StepFailed, "ENOENT", "/no/such/runtime")


def test_a_program_that_is_not_in_the_path(boxes: Boxes) -> None:
    with pytest.raises(NotFound, match=r"'box-runtime' not found: not in .*; install box-runtime, or set runtime_path"):
        boxes(runtime_path="").runtime.abilities()


def test_a_program_where_cri_os_packages_have_it(boxes: Boxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("/bin/sh", tmp_path / "box-runtime")
    monkeypatch.setattr(program, "OF_CRIO", str(tmp_path))
    runtime: Any = boxes(runtime_path="").runtime
    assert runtime.program == str(tmp_path / "box-runtime")


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("x"), lambda path: path.mkdir()], ids=["file", "directory"]
)
def test_a_program_that_is_not_executable(boxes: Boxes, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "program")
    box = boxes(runtime_path=str(tmp_path / "program"))
    with pytest.raises(FailedPrecondition, match="not an executable file"):
        box.runtime.abilities()
    refused(box, StepFailed, "EACCES")


def test_a_file_that_is_no_program(boxes: Boxes, tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"\x7fELF rubbish")
    (tmp_path / "program").chmod(0o755)
    box = boxes(runtime_path=str(tmp_path / "program"))
    with pytest.raises(StepFailed, match="ENOEXEC"):
        box.runtime.abilities()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("exit 1", "says: nothing, it ended with code 1"),
        ("echo plainly >&2; exit 1", "says: plainly"),
        ("echo plainly; exit 1", "says: plainly"),
        (
            """echo 'level=info msg="no"' >&2; echo 'time="t" level=error msg="so \\"it\\" is"' >&2; exit 1""",
            'so "it" is',
        ),
        ("""echo '{"level":"error","msg":"in JSON"}' >&2; exit 1""", "says: in JSON"),
        ("echo '2026-01-02T03:04:05.678Z: in its own way' >&2; exit 1", "says: in its own way"),
        ("kill -9 $$", "killed by signal 9"),
        ("head -c 30000000 /dev/zero | tr '\\0' x >&2; exit 1", "says: xxxx"),
        ("head -c 300000 /dev/urandom >&2; exit 1", "says: "),
        ("echo 'cannot: no space left on device' >&2; exit 1", "ENOSPC"),
    ],
)
def test_create_fails(boxes: Boxes, does: str, said: str) -> None:
    assert len(refused(boxes("create", does), StepFailed, said)) < WORDS_MAX + 200


def test_create_succeeds_with_megabytes_of_words(boxes: Boxes) -> None:
    box = boxes("create", "head -c 5000000 /dev/zero | tr '\\0' x >&2")
    assert box.run("echo", "fine").output() == "fine\n"


@pytest.mark.parametrize("does", ["sleep 600 & sleep 601", 'runc "$@"; sleep 600', "trap '' TERM; while :; do :; done"])
def test_create_hangs(boxes: Boxes, does: str) -> None:
    """Also when the container is there already."""
    start = time.monotonic()
    refused(boxes("create", does, container_create_timeout=1), DeadlineExceeded, "within 1 s")
    assert time.monotonic() - start < 15


OUR_OWN = pytest.param(str(os.getpid()), id="our own")


@pytest.mark.parametrize("rubbish", ["", "x", "-1", "0", "1", "99999999999999999999", OUR_OWN, "1 2", "\\0\\0"])
def test_a_pid_file_with_rubbish(boxes: Boxes, rubbish: str) -> None:
    box = boxes(
        "create", f"""runc "$@"; for f in "$@"; do case $f in */pid) printf '{rubbish}' > $f;; esac; done; exit 0"""
    )
    refused(box, StepFailed, "pid file")


def test_no_pid_file(boxes: Boxes) -> None:
    refused(boxes("create", "exit 0"), StepFailed, "left no pid file")


def test_a_terminal_that_never_comes(boxes: Boxes) -> None:
    box = boxes("create", "exit 0")
    spec = grouped(box)
    spec["process"]["terminal"] = True
    with pytest.raises(StepFailed, match="console socket"):
        box.create(spec)
    assert leftovers(box) == []


def test_bytes_that_json_cannot_hold(boxes: Boxes) -> None:
    box = boxes()
    spec = grouped(box)
    spec["process"]["env"].append(os.fsdecode(b"X=\xff"))
    with pytest.raises(InvalidArgument, match=r"process.env\[2\].*UTF-8"):
        box.create(spec)


def test_start_fails(boxes: Boxes) -> None:
    box = boxes("start", "echo 'not today' >&2; exit 1")
    container = box.create(grouped(box))
    with pytest.raises(StartFailed, match="says: not today"):
        container.start()
    assert container.wait().code == 137, "what could not be started is killed"


def test_a_second_start(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(grouped(box)).start()
    with pytest.raises(FailedPrecondition, match="was started before"):
        container.start()
    assert box.runtime.is_alive(container.process)


def test_kill_and_delete_of_a_runtime_that_was_uninstalled(boxes: Boxes, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nexec runc "$@"\n')
    program.chmod(0o755)
    box = boxes(runtime_path=str(program))
    container = box.create(grouped(box)).start()
    program.unlink()
    box.runtime.kill(container.spec.id, container.spec.run_dir, 9)
    assert container.wait().code == 137
    box.remove_containers()
    assert leftovers(box) == []


@pytest.mark.parametrize("does", ["exit 1", "sleep 600"])
def test_a_delete_that_does_not(boxes: Boxes, does: str) -> None:
    box = boxes("delete", does)
    box.runtime._program.act_seconds = 1.0  # type: ignore[attr-defined]
    box.create(grouped(box)).start()
    box.remove_containers()
    assert leftovers(box) == []


def test_a_kill_that_hangs(boxes: Boxes) -> None:
    box = boxes("kill", "sleep 600")
    box.runtime._program.act_seconds = 0.5  # type: ignore[attr-defined]
    container = box.create(grouped(box)).start()
    box.runtime.kill(container.spec.id, container.spec.run_dir, 9)
    assert container.wait().code == 137


def test_a_kill_that_lies(boxes: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "OBEY_SECONDS", 0.3)
    box = boxes("kill", "exit 0")
    container = box.create(grouped(box, "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done")).start()
    time.sleep(0.3)
    box.runtime.kill(container.spec.id, container.spec.run_dir, 15)
    time.sleep(0.3)
    assert box.runtime.is_alive(container.process)  # what a TERM means is the runtime's to say
    box.runtime.kill(container.spec.id, container.spec.run_dir, 9)
    assert container.wait().code == 137


@pytest.mark.parametrize(("spoil", "errno_"), [(Path.unlink, "ENOENT"), (lambda path: path.chmod(0o644), "EACCES")])
def test_exec_by_a_runtime_that_was_uninstalled(
    boxes: Boxes, tmp_path: Path, spoil: Callable[[Path], None], errno_: str
) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nexec runc "$@"\n')
    program.chmod(0o755)
    box = boxes(runtime_path=str(program))
    container = box.create(grouped(box)).start()
    spoil(program)
    with pytest.raises(StepFailed, match=f"step 'exec' failed on {program} with {errno_}"):
        container.exec("true")
    assert list((box.directory / "scratch").iterdir()) == []


@pytest.mark.parametrize("does", ["exit 1", "kill -9 $$", "exit 0"])
def test_an_exec_that_fails(boxes: Boxes, does: str) -> None:
    box = boxes("exec", does)
    container = box.create(grouped(box)).start()
    with pytest.raises(StartFailed):
        container.exec("true")
    assert list((box.directory / "scratch").iterdir()) == []
    assert box.runtime.is_alive(container.process)


def test_exec_in_a_container_that_has_ended(boxes: Boxes) -> None:
    box = boxes()
    container = box.run("true", spec=grouped(box, "true"))
    with pytest.raises(StepFailed) as caught:
        container.exec("true")
    assert caught.value.number == errno.ESRCH


def test_the_monitor_dies(boxes: Boxes) -> None:
    box = boxes()
    container = box.create(grouped(box)).start()
    os.kill(container.process.monitor_pid, 9)
    box.remove_containers()
    assert leftovers(box) == [] and not box.runtime.is_alive(container.process)


# What it says of itself


def test_abilities(boxes: Boxes) -> None:
    abilities = boxes().runtime.abilities()
    version = subprocess.run(["runc", "--version"], capture_output=True, check=True, text=True).stdout
    assert abilities.version == version.split("\n")[0]
    assert abilities.recursive_read_only_mounts == ("rro" in abilities.features["mountOptions"])


def test_an_older_runtime_has_no_features(boxes: Boxes) -> None:
    abilities = boxes("features", "exit 1").runtime.abilities()
    assert abilities.version and abilities.features == {} and not abilities.recursive_read_only_mounts


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("exit 0", "is not JSON"),
        ("echo '[]'; exit 0", "not an object"),
        ("echo '{}'; exit 0", "ociVersionMin"),
        ("""echo '{"ociVersionMin": 7}'; exit 0""", "ociVersionMin must be a version"),
        ("""echo '{"ociVersionMin": "1.0.0", "ociVersionMax": "99999999999"}'; exit 0""", "ociVersionMax must be"),
        ("""echo '{"ociVersionMin": "2.0.0", "ociVersionMax": "3.0.0"}'; exit 0""", "must not exclude"),
        (
            """echo '{"ociVersionMin": "1.0.0", "ociVersionMax": "1.3.0", "mountOptions": [1]}'; exit 0""",
            "mountOptions",
        ),
        (
            """echo '{"ociVersionMin": "1.0.0", "ociVersionMax": "1.3.0", "linux": [1]}'; exit 0""",
            "linux must be an object",
        ),
        ("yes '[' | head -n 100000 | tr -d '\\n'; exit 0", "is not JSON"),
        ("yes; exit 0", "not done within|printed 262144 bytes"),
        ("head -c 1000000 /dev/zero | tr '\\0' ' '; exit 0", f"printed {OUTPUT_MAX} bytes"),
        ("kill -9 $$", "killed by signal 9"),
    ],
)
def test_lies_about_features(boxes: Boxes, monkeypatch: pytest.MonkeyPatch, does: str, said: str) -> None:
    monkeypatch.setattr("crio_native.oci.external.program.ASK_SECONDS", 2.0)
    with pytest.raises(CrioError, match=said):
        boxes("features", does).runtime.abilities()


def test_a_features_document_is_believed_as_far_as_it_goes() -> None:
    document = {"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0-rc.1", "mountOptions": ["ro", "rro"]}
    assert abilities_of("x", document, "/x").recursive_read_only_mounts
    assert not abilities_of("x", {**document, "mountOptions": None}, "/x").recursive_read_only_mounts


@pytest.mark.parametrize(
    ("linux", "maps"),
    [
        ({"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": True}}}, True),
        ({"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": False}}}, False),
        ({"namespaces": ["pid"], "mountExtensions": {"idmap": {"enabled": True}}}, False),
        ({"namespaces": "user", "mountExtensions": {"idmap": {"enabled": True}}}, False),
        ({"namespaces": ["user"], "mountExtensions": {"idmap": {"enabled": "yes"}}}, False),
        ({"namespaces": ["user"], "mountExtensions": {"idmap": True}}, False),
        ({"namespaces": ["user"], "mountExtensions": [1]}, False),
        ({"namespaces": ["user"]}, False),
        (None, False),
    ],
)
def test_user_namespaces_take_both_words(linux: Any, maps: bool) -> None:
    document = {"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0", "linux": linux}
    assert abilities_of("x", document, "/x").user_namespaces is maps


def test_words_of_no_log() -> None:
    assert words(b"") == ""
    assert words(b"\xff\n\n  two \n two ") == "\ufffd; two"
    assert words(b'{"level": {}}') == '{"level": {}}'
    assert len(words(b"x" * 100_000)) <= WORDS_MAX + 3
