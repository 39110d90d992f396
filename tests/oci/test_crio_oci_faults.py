"""--trace and --fail: every step of several plans fails once, is named in the error, and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .command_line import Oci, Receiver, oci

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
__all__ = ["oci"]

SECCOMP = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO"}]}
HOOK = {"path": "/bin/true"}


def plain(spec: dict[str, Any]) -> None:
    spec["linux"]["resources"] = {"pids": {"limit": 100}, "devices": [{"allow": False, "access": "rwm"}]}


def rich(spec: dict[str, Any]) -> None:
    """As much as one container can have."""
    plain(spec)
    spec["process"] |= {
        "noNewPrivileges": False,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 100}],
        "oomScoreAdj": 10,
    }
    spec["domainname"] = "example"
    spec["root"]["readonly"] = True
    spec["mounts"].append({"destination": "/tmp", "type": "bind", "source": "/tmp", "options": ["rbind", "ro"]})
    spec["linux"] |= {
        "seccomp": SECCOMP,
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "devices": [{"type": "c", "path": "/dev/mine", "major": 1, "minor": 3}],
    }
    spec["hooks"] = {kind: [HOOK] for kind in ("createRuntime", "createContainer", "startContainer")}


def user_namespace(spec: dict[str, Any]) -> None:
    plain(spec)
    spec["linux"]["namespaces"].append({"type": "user"})
    for field in ("uidMappings", "gidMappings"):
        spec["linux"][field] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    spec["linux"]["devices"] = [{"type": "c", "path": "/dev/mine", "major": 1, "minor": 3, "uid": 5}]
    spec["mounts"].insert(0, {"destination": "/", "type": "bind", "source": spec["root"]["path"], "options": ["bind"]})
    spec["mounts"].append(
        {"destination": "/dev/link", "type": "bind", "source": "/proc/self", "options": ["copy-symlink"]}
    )


PLANS = {function.__name__: function for function in (plain, rich, user_namespace)}


def steps_of(trace: Path) -> Iterator[str]:
    """The steps of a traced run, as --fail names them."""
    for line in trace.read_text().splitlines():
        step = json.loads(line)
        if step["result"] != "begun" or step["step"] == "execute":
            yield f"{step['step']}#{step['occurrence']}"


@pytest.mark.parametrize("plan", PLANS)
def test_every_step_fails_once(oci: Oci, plan: str) -> None:
    os.chmod(oci.directory, 0o755)  # the user of a user namespace must get to his root
    spec = oci.spec("true")
    PLANS[plan](spec)
    bundle, trace, pid_file = oci.write(spec), oci.directory / "trace", oci.directory / "pid"
    words: list[str | Path] = ["run", "--pid-file", pid_file, "-b", bundle]
    oci.ok("--trace", trace, *words, "whole")
    pid_file.unlink()
    steps = list(dict.fromkeys(steps_of(trace)))
    assert len(steps) > 25
    for step in steps:
        error = oci.refused("--fail", f"{step}=ENOTNAM", *words, "c")
        assert f"step {step.partition('#')[0]!r} failed" in error, (step, error)
        assert "ENOTNAM" in error, (step, error)
        assert not pid_file.exists(), step
        assert not oci.left(), (step, oci.left())


def test_a_trace_tells_every_step_in_its_order(oci: Oci) -> None:
    trace = oci.directory / "trace"
    oci.ok("--trace", trace, "run", "-b", oci.bundle("true"), "c")
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [line["step"] for line in lines][:2] == ["make_cgroup", "limit_cgroup"]
    assert lines[-1]["step"] == "execute" and lines[-1]["result"] == "begun"
    by_step = {line["step"]: line for line in lines}
    assert by_step["pivot_root"]["process"] == "init" and by_step["clone"]["process"] == "crio-oci"
    assert by_step["execute"]["source"] == "process.args"
    assert all(line["result"] in ("ok", "begun") and line["microseconds"] >= 0 for line in lines)
    mounts = [line for line in lines if line["step"] == "mount"]
    assert [line["occurrence"] for line in mounts] == list(range(1, len(mounts) + 1))
    assert {line["source"] for line in mounts} >= {"mounts[0]", "mounts[1]"}


def test_a_trace_of_a_failure_ends_with_it(oci: Oci) -> None:
    spec = oci.spec("true")
    spec["mounts"].append({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]})
    trace = oci.directory / "trace"
    error = oci.refused("--trace", trace, "create", "-b", oci.write(spec), "c")
    last = json.loads(trace.read_text().splitlines()[-1])
    assert last["result"] == "ENOENT" and repr(last["step"]) in error


@pytest.mark.parametrize("lines", [0, 8], ids=["at-once", "in-the-init"])
def test_a_trace_on_a_full_disk_is_a_warning_and_the_container_runs(oci: Oci, lines: int) -> None:
    disk = oci.directory / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "disk", str(disk)], check=True)
    try:
        trace = disk / "trace"
        trace.write_text("x" * (4096 - 180 * lines))  # a line has some 180 bytes
        done = oci.call("--trace", trace, "run", "-b", oci.bundle("sh", "-c", "echo up; exit 4"), "c")
        assert (done.returncode, done.stdout) == (4, "up\n"), done.stderr
        assert f"warning: --trace {trace}: writing the trace: no space left on device" in done.stderr
        assert "give another file" in done.stderr
        oci.running("d")
        assert oci.ok("--trace", trace, "exec", "d", "echo", "up") == "up\n"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_exec_fails_at_every_step_and_the_container_lives_on(oci: Oci) -> None:
    oci.running("c")
    trace = oci.directory / "trace"
    oci.ok("--trace", trace, "exec", "c", "true")
    for step in dict.fromkeys(steps_of(trace)):
        error = oci.refused("--fail", f"{step}=ENOTNAM", "exec", "c", "true", code=255)
        assert f"step {step.partition('#')[0]!r} failed" in error and "ENOTNAM" in error
    assert len(json.loads(oci.ok("ps", "-f", "json", "c"))) == 1
    oci.ok("exec", "c", "true")
    oci.ok("delete", "-f", "c")


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        ("nosuch", "is no step; the steps are"),
        ("mount=ENOSUCH", "is no errno"),
        ("mount=0", "is no errno"),
        ("mount=99999", "is no errno"),
        ("mount#0", "must be 1 or more"),
        ("mount#x", "must be 1 or more"),
        ("mount#99", "this plan has no such step; it has"),
        ("enter_container", "this plan has no such step"),
    ],
)
def test_what_cannot_fail(oci: Oci, fail: str, text: str) -> None:
    assert text in oci.refused("--fail", fail, "create", "-b", oci.bundle("true"), "c")
    assert not oci.left()


def test_a_trace_that_cannot_be_written(oci: Oci) -> None:
    assert "--trace: cannot be written" in oci.refused("--trace", "/no/such", "create", "-b", oci.bundle("true"), "c")
    assert not oci.left()


def test_a_terminal_that_nobody_takes(oci: Oci) -> None:
    receiver = Receiver(oci.directory / "console")
    bundle = oci.bundle("true", terminal=True)
    error = oci.refused("--fail", "console", "create", "-b", bundle, "--console-socket", receiver.path, "c")
    assert "step 'console' failed" in error
    assert not oci.left()


BAD = {
    "ociVersion": "2.0.0",
    "root.path": 5,
    "process.args": [],
    "process.cwd": "here",
    "process.user.uid": -1,
    "process.capabilities.bounding": ["CAP_NONE"],
    "process.capabilities.effective": ["CAP_KILL", "CAP_SYS_BOOT"],
    "process.capabilities.inheritable": ["CAP_KILL", "CAP_SYS_BOOT"],
    "mounts": [{"destination": 5, "type": "proc"}],
    "linux.namespaces": [{"type": "nosuch"}],
    "linux.cgroupsPath": "/../x",
    "hostname": 7,
}


@pytest.mark.parametrize("field", BAD)
def test_a_config_that_is_wrong_is_refused_by_its_path(oci: Oci, field: str) -> None:
    spec = oci.spec("true")
    *parents, last = field.split(".")
    inner = spec
    for name in parents:
        inner = inner[name]
    inner[last] = BAD[field]
    assert f"crio-oci: {field}" in oci.refused("create", "-b", oci.write(spec), "c")
    assert not oci.left()
    assert not list(oci.state.glob("*"))


HALF = "\ud800"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hostname": HALF}, "hostname"),
        ({"annotations": {HALF: "x"}}, r"annotations['\ud800']"),
        ({"root": {"path": f"/{HALF}"}}, "root.path"),
        ({"mounts": [{"destination": "/a", "type": "tmpfs", "options": [HALF]}]}, "mounts[0].options[0]"),
        ({"hooks": {"poststop": [{"path": "/x", "env": [f"A={HALF}"]}]}}, "hooks.poststop[0].env[0]"),
        ({"unknown": [[{"x": "\ude00\ud83d"}]]}, "unknown[0][0].x"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_by_its_path(oci: Oci, change: dict[str, Any], field: str) -> None:
    spec = oci.spec("true") | change
    assert f"crio-oci: {field}: may not contain half of" in oci.refused("create", "-b", oci.write(spec), "c")
    assert not list(oci.state.glob("*"))


def test_half_of_a_surrogate_pair_in_other_files(oci: Oci) -> None:
    whole, bad = oci.directory / "whole\udcff.json", oci.directory / "bad.json"
    oci.running("c")
    process = {"args": ["echo", "\U0001f600"], "cwd": "/", "env": ["PATH=/bin"]}
    whole.write_text(json.dumps(process))  # in escapes: a pair is fine, and a file's name may be any bytes
    assert oci.ok("exec", "-p", whole, "c") == "\U0001f600\n"
    bad.write_text(json.dumps(process | {"cwd": f"/{HALF}"}))
    assert "process.cwd: may not contain half" in oci.refused("exec", "-p", bad, "c", code=255)
    bad.write_text(json.dumps({"unified": {HALF: "1"}}))
    assert r"linux.resources.unified['\ud800']: may not" in oci.refused("update", "-r", bad, "c")


def test_a_seccomp_filter_is_compiled_once(oci: Oci) -> None:
    spec = oci.spec("sh", "-c", "grep Seccomp: /proc/self/status")
    spec["linux"]["seccomp"] = SECCOMP
    bundle = oci.write(spec)
    assert oci.ok("run", "-b", bundle, "c").split() == ["Seccomp:", "2"]
    (kept,) = (oci.state / "@seccomp").iterdir()
    made = kept.stat().st_mtime_ns
    assert oci.ok("run", "-b", bundle, "c").split() == ["Seccomp:", "2"]
    assert kept.stat().st_mtime_ns == made
    kept.write_bytes(b"not a filter")  # cut short by a full disk, say
    assert oci.ok("run", "-b", bundle, "c").split() == ["Seccomp:", "2"]
    assert kept.stat().st_mtime_ns != made
