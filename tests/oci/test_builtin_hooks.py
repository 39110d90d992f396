"""The six hooks: when, where and with what each runs, and what its failure means."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crio_native.errors import InvalidArgument, StartFailed, StepFailed

from ..machine import Machine
from .conftest import Box, Container
from .test_builtin_userns import in_user_namespace

pytestmark = pytest.mark.root

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
OUTSIDE = ("prestart", "createRuntime", "poststart", "poststop")


def shell(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


def recording(box: Box, kind: str) -> dict[str, Any]:
    """A hook that keeps its standard input, and says in which namespaces and under which root it ran."""
    name = kind if kind == "startContainer" else f"{box.directory}/{kind}"
    text = f"cat > {name}.state; cat /proc/self/mountinfo > {name}.mounts; "
    if kind == "startContainer":
        return shell(f"cd /; {text} echo $PATH > {name}.env; echo {kind} >> /order", env=["PATH=/bin"])
    where = "for k in mnt net uts; do readlink /proc/self/ns/$k; done"
    return shell(f"{text} {where} > {name}.where; echo {kind} >> {box.root}/order", env=["PATH=/usr/bin:/bin"])


def state(box: Box, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        ((box.root if kind == "startContainer" else box.directory) / f"{kind}.state").read_text()
    )
    return found


def run_to_the_end(box: Box, spec: dict[str, Any]) -> Container:
    container = box.create(spec)
    assert not (box.root / "startContainer.state").exists() and not (box.directory / "poststart.state").exists()
    container.start()
    container.wait()
    assert not (box.directory / "poststop.state").exists()
    box.remove_containers()
    return container


@pytest.mark.parametrize("own_user", [False, True])
def test_each_runs_at_its_moment_with_the_state(box: Box, own_user: bool) -> None:
    spec = in_user_namespace(box, "sleep", "0.1") if own_user else box.spec("sleep", "0.1")
    box.root.chmod(0o777)
    box.directory.chmod(0o777)
    spec["annotations"] = {"a.b/c": 'quoted "text"\n'}
    spec["hooks"] = {kind: [recording(box, kind)] for kind in KINDS}
    (box.root / "order").touch()
    (box.root / "order").chmod(0o666)
    container = run_to_the_end(box, spec)
    assert (box.root / "order").read_text().split() == list(KINDS)
    outside = {"status": "creating", "pid": container.process.pid}
    expected = {
        "prestart": outside | {"status": "created"},
        "createRuntime": outside,
        "createContainer": {"status": "creating", "pid": 1},
        "startContainer": {"status": "created", "pid": 1},
        "poststart": {"status": "running", "pid": container.process.pid},
        "poststop": {"status": "stopped", "pid": 0},
    }
    for kind in KINDS:
        common = {"ociVersion": "1.2.0", "id": container.spec.id, "bundle": str(box.directory)}
        assert state(box, kind) == {**common, "annotations": spec["annotations"], **expected[kind]}, kind


def test_each_runs_in_its_namespaces(box: Box) -> None:
    spec = box.spec("sleep", "0.1")
    spec["hooks"] = {kind: [recording(box, kind)] for kind in KINDS}
    run_to_the_end(box, spec)
    ours = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "net", "uts")]
    for kind in OUTSIDE:
        assert (box.directory / f"{kind}.where").read_text().split() == ours, kind
    inside = (box.directory / "createContainer.where").read_text().split()
    assert not set(inside) & set(ours)
    mounts = (box.directory / "createContainer.mounts").read_text()
    assert f"{box.root}/proc" in mounts  # the mounts are made, and the root is not yet the root
    assert " / /proc " in (box.root / "startContainer.mounts").read_text()
    assert (box.root / "startContainer.env").read_text() == "/bin\n"


def test_each_runs_in_its_directory(box: Box) -> None:
    """As with runc: the bundle, and in the container's namespaces its root and then the command's own."""
    spec = box.spec("true")
    spec["process"]["cwd"] = "/tmp"
    spec["hooks"] = {kind: [shell(f"pwd > {box.directory}/{kind}")] for kind in KINDS}
    spec["hooks"]["startContainer"] = [shell("pwd > /startContainer", env=["PATH=/bin"])]
    run_to_the_end(box, spec)
    for kind in OUTSIDE:
        assert (box.directory / kind).read_text().strip() == str(box.directory), kind
    assert (box.directory / "createContainer").read_text().strip() == str(box.root)
    assert (box.root / "startContainer").read_text() == "/tmp\n"


def test_hooks_of_a_kind_run_in_order_and_their_descriptors_are_their_own(box: Box) -> None:
    out = box.directory / "out"
    spec = box.spec("true")
    spec["hooks"] = {
        kind: [shell(f"echo {kind}{number} >> {out}; ls -l /proc/self/fd >> {out}.{kind}") for number in range(3)]
        for kind in ("createRuntime", "createContainer", "poststart", "poststop")
    }
    run_to_the_end(box, spec)
    assert out.read_text().split() == [f"{kind}{number}" for kind in spec["hooks"] for number in range(3)]
    for kind in spec["hooks"]:
        for line in Path(f"{out}.{kind}").read_text().splitlines():
            if "->" in line:
                assert line.split()[8] in "0123" and not ("socket:" in line or "run" in line.split()[-1]), line


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
@pytest.mark.parametrize("own_user", [False, True])
def test_a_failure_ends_the_creation(box: Box, leaks: Machine, kind: str, own_user: bool) -> None:
    spec = in_user_namespace(box) if own_user else box.spec()
    box.directory.chmod(0o777)
    after = box.directory / "after"
    spec["hooks"] = {
        kind: [shell("echo the reason >&2; exit 3"), shell(f"touch {after}")],
        "poststop": [recording(box, "poststop")],
    }
    with pytest.raises(StepFailed) as failure:
        box.create(spec)
    assert failure.value.step == ("run_hooks" if kind == "createContainer" else "parent_hooks")
    assert failure.value.path == "/bin/sh"
    assert failure.value.detail == f"hooks.{kind}[0]: {kind} hook failed with exit code 3: the reason"
    assert not after.exists()
    assert state(box, "poststop")["status"] == "stopped"


def test_a_failing_start_container_hook_ends_the_start(box: Box) -> None:
    spec = box.spec("touch", "/ran")
    spec["hooks"] = {"startContainer": [shell("kill -9 $$")]}
    container = box.create(spec)
    with pytest.raises(StartFailed, match=r"run_hooks.*hooks.startContainer\[0\] was ended by signal 9"):
        container.start()
    container.wait()
    assert not (box.root / "ran").exists()


def test_a_failing_poststart_hook_stops_the_container(box: Box) -> None:
    spec = box.spec()
    spec["hooks"] = {"poststart": [shell("true"), shell("exit 1")]}
    container = box.create(spec)
    with pytest.raises(StartFailed, match=r"poststart.*hooks.poststart\[1\]: poststart hook failed with exit code 1"):
        container.start()
    assert container.wait().signal == 9


def test_a_failing_poststop_hook_is_a_warning_and_the_others_run(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    spec = box.spec("true")
    spec["hooks"] = {"poststop": [shell("exit 4"), recording(box, "poststop")]}
    box.run(spec=spec)
    box.remove_containers()
    assert "hooks.poststop[0]: poststop hook failed with exit code 4" in caplog.text
    assert state(box, "poststop")["pid"] == 0


def test_poststop_runs_once(box: Box) -> None:
    out = box.directory / "out"
    spec = box.spec("true")
    spec["hooks"] = {"poststop": [shell(f"echo x >> {out}")]}
    container = box.run(spec=spec)
    for _ in range(2):
        box.runtime.delete(container.spec.id, container.spec.run_dir, "")
    assert out.read_text() == "x\n"


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            yield path.read_bytes()


@pytest.mark.parametrize("kind", ["createRuntime", "createContainer", "startContainer", "poststart"])
def test_a_hook_that_hangs_is_ended_with_all_its_children(box: Box, kind: str) -> None:
    program = "busybox sleep 98765" if kind == "startContainer" else "sleep 98765"
    spec = box.spec()
    spec["hooks"] = {kind: [shell(f"{program} & {program}", timeout=1, env=["PATH=/bin:/usr/bin"])]}
    began = time.monotonic()
    with pytest.raises(StepFailed, match=rf"hooks.{kind}\[0\] did not end within its timeout of 1 s"):
        box.create(spec).start()
    assert 1 <= time.monotonic() - began < 5
    time.sleep(0.05)
    for line in command_lines():
        assert b"98765" not in line or b"-c" in line


def test_a_hook_that_leaves_something_running_does_not_hold_us(box: Box) -> None:
    spec = box.spec()
    spec["hooks"] = {"createRuntime": [shell("sleep 3 & exit 0", timeout=60)]}
    began = time.monotonic()
    box.create(spec)
    assert time.monotonic() - began < 2


def test_what_a_hook_says_is_bounded(box: Box) -> None:
    spec = box.spec()
    spec["hooks"] = {"createRuntime": [shell("head -c 3000000 /dev/zero | tr '\\0' x; exit 1")]}
    with pytest.raises(StepFailed) as failure:
        box.create(spec)
    assert 3000 < len(failure.value.detail) < 5000


def test_a_hook_that_does_not_read_its_input(box: Box) -> None:
    spec = box.spec()
    spec["annotations"] = {f"key{number}": "x" * 1000 for number in range(500)}
    spec["hooks"] = {"createRuntime": [shell("exit 0")], "createContainer": [shell("exit 0")]}
    box.create(spec)


def test_a_program_that_does_not_exist(box: Box) -> None:
    spec = box.spec()
    spec["hooks"] = {"createRuntime": [{"path": "/no/such/hook"}]}
    with pytest.raises(StepFailed, match=r"parent_hooks.*/no/such/hook with ENOENT.*cannot be executed"):
        box.create(spec)


@pytest.mark.parametrize(
    ("hook", "field"),
    [
        ({}, "path"),
        ({"path": "relative"}, "path"),
        ({"path": "/x", "args": "text"}, "args"),
        ({"path": "/x", "env": ["X"]}, r"env\[0\]"),
        ({"path": "/x", "timeout": 0}, "timeout"),
        ({"path": "/x", "timeout": "1"}, "timeout"),
        ({"path": "/x\0y"}, "path"),
    ],
)
def test_hooks_that_cannot_be(box: Box, hook: dict[str, Any], field: str) -> None:
    spec = box.spec()
    spec["hooks"] = {"poststop": [hook]}
    with pytest.raises(InvalidArgument, match=rf"^hooks.poststop\[0\].{field}:"):
        box.create(spec)
